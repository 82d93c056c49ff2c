/* resv.h - reservation objects. */
#ifndef DMABUF_RESV_H
#define DMABUF_RESV_H
#include "domain/table.h"

extern PyMethodDef resv_methods[];
db_resv *resv_of(Shm *s, uint32_t rec);
db_ctx *ctx_alive(Shm *s, uint64_t word);
int resv_give(db_resv *r, uint64_t me);
int resv_hand(Shm *s, db_resv *r, uint64_t from, uint64_t to);
#endif
