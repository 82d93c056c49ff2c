/* reap.h - methods of Shm that end what a dead life left. */
#ifndef DMABUF_REAP_H
#define DMABUF_REAP_H
#include "python.h"

extern PyMethodDef reap_methods[];
#endif
