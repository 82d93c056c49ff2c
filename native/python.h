/* python.h - CPython's header, as every file here that needs it includes it. */
#ifndef DMABUF_PYTHON_H
#define DMABUF_PYTHON_H
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <structmember.h>

/* An entry of a method table: a method that has its function's name. */
#define METHOD(name, flags, doc) {#name, (PyCFunction)(void *)name, flags, doc}
#endif
