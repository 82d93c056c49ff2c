/* arrays.h - a View as an array of NumPy, and by DLPack as one of any other library. */
#ifndef DMABUF_ARRAYS_H
#define DMABUF_ARRAYS_H
#include "access/view.h"

PyObject *view_array(View *v, PyObject *args, PyObject *kwargs);
#endif
