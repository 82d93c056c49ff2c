/* arrays.h - a View as an array of NumPy, and by DLPack as one of any other library. */
#ifndef DMABUF_ARRAYS_H
#define DMABUF_ARRAYS_H
#include "access/view.h"

PyObject *view_array(View *v, PyObject *args, PyObject *kwargs);
/* View.__array__(): NumPy takes the buffer first, and calls this if it can't: after the block it raises, where NumPy would make an array of
 * one object. */
PyObject *view_as_array(View *v, PyObject *args, PyObject *kwargs);
#endif
