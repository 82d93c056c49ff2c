/* Mapping and Window: the memory of a buffer as Python sees it.  The contracts
 * are at the top of mapping.c and window.c. */
#ifndef DMABUF_NATIVE_MAPPING_H
#define DMABUF_NATIVE_MAPPING_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdbool.h>

/* For mapping.c and mapping_items.c; window.c knows the functions below only. */
typedef struct {
  PyObject_HEAD
  char *base; /* NULL: closed */
  Py_ssize_t length;
  Py_ssize_t exports;
  Py_ssize_t windows;
  bool writable;
  Py_ssize_t lead;             /* mapped in front of base, and not shown */
  unsigned long long dev, ino; /* of the file, as fstat(2) said */
  long long offset;
  PyObject *on_close; /* owned; NULL: none, or already called */
  PyObject *weakrefs;
} Mapping;

/* False with ValueError set when it is closed. */
bool mapping_is_open(const Mapping *self);

/* Items and slices: mapping_items.c. */
PyObject *mapping_subscript(PyObject *mapping, PyObject *key);
int mapping_ass_subscript(PyObject *mapping, PyObject *key, PyObject *value);

/* Adds Mapping and buffer_address to the module.
 * 0, or -1 with an exception set. */
int mapping_register(PyObject *module);

/* Address and length in bytes of an open Mapping.  The pointer is valid for as
 * long as something keeps the mapping from being closed: an export, a window,
 * or the GIL held without running Python code.
 * 0, or -1 with TypeError (not a Mapping) or ValueError (closed) set. */
int mapping_memory(PyObject *mapping, char **address, Py_ssize_t *length);

/* Of an object that mapping_memory() has accepted: may it be written, and one
 * open window more or less. */
bool mapping_writable(PyObject *mapping);
void mapping_windows(PyObject *mapping, int change);

/* Raises OSError(number, "format ..."); Python picks the builtin twin. */
void os_error(int number, const char *format, ...);

#endif
