/* resv_lock.h - the lock of a reservation object. */
#ifndef DMABUF_RESV_LOCK_H
#define DMABUF_RESV_LOCK_H
#include "domain/shm.h"

#define RAISED (-100000) /* an exception is set */

db_resv *resv_of(Shm *s, uint32_t rec);
db_ctx *ctx_alive(Shm *s, uint64_t word);
int take(Shm *s, db_resv *r, uint64_t me, int acquired, int interruptible, int try, int64_t until);
int resv_give(db_resv *r, uint64_t me);
int resv_hand(Shm *s, db_resv *r, uint64_t from, uint64_t to);
extern PyMethodDef resv_lock_methods[];
#endif
