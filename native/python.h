/* python.h - CPython's header, as every file here that needs it includes it, and what their method tables share. */
#ifndef DMABUF_PYTHON_H
#define DMABUF_PYTHON_H
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <structmember.h>

/* Result of a function whose other negative results are -errno: an exception is set. */
#define RAISED (-100000)

/* Append an item to a list, and take over the reference to the item. item NULL: an exception is set. 0 or -1. */
static inline int list_add(PyObject *list, PyObject *item) {
  int r = item ? PyList_Append(list, item) : -1;
  Py_XDECREF(item);
  return r;
}

/* The value of an argument that is an unsigned number. Like the formats "I" and "K", arg_u32 keeps the lowest bits. 0 or -1. */
static inline int arg_u64(PyObject *arg, uint64_t *value) {
  *value = PyLong_AsUnsignedLongLong(arg);
  return *value == UINT64_MAX && PyErr_Occurred() ? -1 : 0;
}

static inline int arg_u32(PyObject *arg, uint32_t *value) {
  uint64_t whole;
  int r = arg_u64(arg, &whole);
  *value = (uint32_t)whole;
  return r;
}

/* An entry of a method table, for a method that has its function's name. The signature is what inspect.signature() shows. */
#define METHOD(name, flags, signature, doc) {#name, (PyCFunction)(void *)name, flags, #name signature "\n--\n\n" doc}
#endif
