/* pools.h - methods of Shm on contexts and timelines. */
#ifndef DMABUF_POOLS_H
#define DMABUF_POOLS_H
#include "python.h"

extern PyMethodDef pool_methods[];
#endif
