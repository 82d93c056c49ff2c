/* handle.h - HandleBase: the attributes of a handle, and its end. */
#ifndef DMABUF_HANDLE_H
#define DMABUF_HANDLE_H
#include "python.h"

int handle_register(PyObject *module);
#endif
