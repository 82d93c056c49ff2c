/* guard.h - what a signal handler that raises can't cut short. */
#ifndef DMABUF_GUARD_H
#define DMABUF_GUARD_H
#include "python.h"

int guard_register(PyObject *module);
#endif
