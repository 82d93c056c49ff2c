/* Mapping and Window: the memory of a buffer as Python sees it.  The contract
 * is at the top of mapping.c. */
#ifndef DMABUF_NATIVE_MAPPING_H
#define DMABUF_NATIVE_MAPPING_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

/* Adds Mapping, Window, window_view and buffer_address to the module.
 * 0, or -1 with an exception set. */
int mapping_register(PyObject *module);

/* Address and length in bytes of an open Mapping.  The pointer is valid for as
 * long as something keeps the mapping from being closed: an export, a window,
 * or the GIL held without running Python code.
 * 0, or -1 with TypeError (not a Mapping) or ValueError (closed) set. */
int mapping_memory(PyObject *mapping, char **address, Py_ssize_t *length);

#endif
