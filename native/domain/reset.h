/* reset.h - methods of Shm by which a process begins and ends to look at the file, and the last one gives its memory back. */
#ifndef DMABUF_RESET_H
#define DMABUF_RESET_H
#include "python.h"

extern PyMethodDef reset_methods[];
#endif
