/* fence_type.h - the type that DmaFence inherits its fast paths from. */
#ifndef DMABUF_FENCE_TYPE_H
#define DMABUF_FENCE_TYPE_H
#include "python.h"

int fence_register(PyObject *module);
#endif
