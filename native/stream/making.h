/* making.h - the block of a frame that is made. */
#ifndef DMABUF_MAKING_H
#define DMABUF_MAKING_H
#include "stream/port.h"

PyObject *make_frame(Port *p, PyObject *timeout); /* a frame without a block; NULL: an exception is set */
PyObject *port_produce(Port *p, PyObject *const *a, Py_ssize_t n, PyObject *names);

int making_register(PyObject *module);
#endif
