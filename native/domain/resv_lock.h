/* resv_lock.h - the lock of a reservation object. */
#ifndef DMABUF_RESV_LOCK_H
#define DMABUF_RESV_LOCK_H
#include "domain/shm.h"

db_resv *resv_of(Shm *s, uint32_t rec);     /* NULL: no such record, an exception is set */
db_ctx *ctx_open_at(Shm *s, uint64_t word); /* NULL: the context is closed, or its life was reaped */

/* Is it a context of the running thread? If another task of the thread has it, nothing comes of waiting for what it is about to do. */
int ctx_is_here(Shm *s, db_ctx *c);

/* Lock for the context `me`, which holds `acquired` locks already. 0: locked; 1: locked, taken from a dead owner; -errno; RAISED.
 * -EBUSY: with `try`, or another context of the running thread holds it. */
int resv_take(Shm *s, db_resv *r, uint64_t me, int acquired, int interruptible, int try, int64_t until);
/* Unlock. 1; 0: that context does not hold the lock. */
int resv_release(db_resv *r, uint64_t me);
/* Let `to` hold the lock instead of `from`. 1; 0: `from` does not hold it, or `to` is closed. */
int resv_transfer(Shm *s, db_resv *r, uint64_t from, uint64_t to);

extern PyMethodDef resv_lock_methods[];
#endif
