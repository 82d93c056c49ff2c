/* access.h - an access: what read() and write() do most. */
#ifndef DMABUF_ACCESS_H
#define DMABUF_ACCESS_H
#include "domain/shm.h"

extern PyMethodDef access_methods[];
#endif
