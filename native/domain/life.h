/* life.h - methods of Shm by which this process's life begins and ends, and by which it reaps the dead. */
#ifndef DMABUF_LIFE_H
#define DMABUF_LIFE_H
#include "python.h"

extern PyMethodDef life_methods[];
#endif
