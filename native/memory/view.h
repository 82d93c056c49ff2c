/* view.h - View, the bytes of a Mapping during one access. The contract stands in view.c. */
#ifndef DMABUF_VIEW_H
#define DMABUF_VIEW_H
#include "python.h"

int view_register(PyObject *module);
#endif
