/* records.h - methods of Shm on records. */
#ifndef DMABUF_RECORDS_H
#define DMABUF_RECORDS_H
#include "python.h"

extern PyMethodDef record_methods[];
#endif
