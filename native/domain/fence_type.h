/* fence_type.h - the Fence type, from which DmaFence inherits its fast paths. */
#ifndef DMABUF_FENCE_TYPE_H
#define DMABUF_FENCE_TYPE_H
#include "python.h"

int fence_register(PyObject *module);
#endif
