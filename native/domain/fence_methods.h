/* fence_methods.h - methods of Shm that work on handles of fences. */
#ifndef DMABUF_FENCE_METHODS_H
#define DMABUF_FENCE_METHODS_H
#include "domain/shm.h"

extern PyMethodDef fence_methods[];
#endif
