/* lend.h - reservation locks that are lent to another process. */
#ifndef DMABUF_LEND_H
#define DMABUF_LEND_H
#include "domain/shm.h"

extern PyMethodDef lend_methods[];
void resv_bequeath(Shm *s, db_ctx *c, uint64_t word);
#endif
