/* file.h - methods of Shm that need the descriptor of the domain's file. The functions of file.c for C stand in shm.h. */
#ifndef DMABUF_FILE_H
#define DMABUF_FILE_H
#include "python.h"

extern PyMethodDef file_methods[];
#endif
