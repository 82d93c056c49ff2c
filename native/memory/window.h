/* window.h - Window: the bytes of a Mapping for the time of one access. */
#ifndef DMABUF_WINDOW_H
#define DMABUF_WINDOW_H
#include "python.h"

int window_register(PyObject *module);
#endif
