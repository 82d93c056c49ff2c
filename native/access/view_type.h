/* view_type.h - the methods of View. */
#ifndef DMABUF_VIEW_TYPE_H
#define DMABUF_VIEW_TYPE_H
#include "python.h"

int view_type_register(PyObject *module);
#endif
