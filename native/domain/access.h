/* access.h - methods of Shm for read() and write() blocks. */
#ifndef DMABUF_ACCESS_H
#define DMABUF_ACCESS_H
#include "python.h"

extern PyMethodDef access_methods[];
#endif
