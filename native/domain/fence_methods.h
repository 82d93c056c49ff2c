/* fence_methods.h - methods of Shm on handles of fences. */
#ifndef DMABUF_FENCE_METHODS_H
#define DMABUF_FENCE_METHODS_H
#include "python.h"

extern PyMethodDef fence_methods[];
#endif
