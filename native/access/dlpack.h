/* dlpack.h - a View by DLPack, for every library of arrays that takes it. */
#ifndef DMABUF_DLPACK_H
#define DMABUF_DLPACK_H
#include "access/view.h"

PyObject *view_dlpack(View *v, PyObject *args, PyObject *kwargs);
PyObject *view_dlpack_device(View *v, PyObject *unused);
#endif
