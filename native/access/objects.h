/* objects.h - Access and AccessGroup. */
#ifndef DMABUF_OBJECTS_H
#define DMABUF_OBJECTS_H
#include "python.h"

int objects_register(PyObject *module);
#endif
