/* stream_methods.h - methods of Shm on streams. */
#ifndef DMABUF_STREAM_METHODS_H
#define DMABUF_STREAM_METHODS_H
#include "python.h"

extern PyMethodDef stream_methods[];
#endif
