/* Mapping and Window: the memory of a buffer as Python sees it.  The contracts
 * are at the top of mapping.c and window.c. */
#ifndef DMABUF_NATIVE_MAPPING_H
#define DMABUF_NATIVE_MAPPING_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdbool.h>

/* Adds Mapping, Window, window_view and buffer_address to the module.
 * 0, or -1 with an exception set. */
int mapping_register(PyObject *module);

/* The part of it that is in window.c. */
int window_register(PyObject *module);

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
