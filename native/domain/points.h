/* points.h - the Points type: the point of a semaphore in a page of its file, for which processes wait. */
#ifndef DMABUF_POINTS_H
#define DMABUF_POINTS_H
#include "python.h"

int points_register(PyObject *module);
#endif
