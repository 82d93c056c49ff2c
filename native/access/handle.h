/* handle.h - HandleBase: the attributes of a handle, and its end. */
#ifndef DMABUF_HANDLE_H
#define DMABUF_HANDLE_H
#include "python.h"

/* What accesses of a handle need, borrowed: its AccessPath, or None before the first one; NULL: it is no handle. */
PyObject *handle_path(PyObject *handle);

int handle_register(PyObject *module);
#endif
