/* reap.h - what a dead life left in the domain is ended. */
#ifndef DMABUF_REAP_H
#define DMABUF_REAP_H
#include "domain/shm.h"

extern PyMethodDef reap_methods[];
#endif
