/* fence.h - fences by their handle: slots owned by one life, signalled by it, waited for by all. */
#ifndef DMABUF_FENCE_H
#define DMABUF_FENCE_H
#include "domain/table.h"
#include <sched.h>

int fence_pending(Shm *s, uint64_t handle, db_fence **out); /* 1 pending, 0 signalled or gone; out may be NULL slot */
int fence_flag(uint64_t handle, db_fence *f, uint32_t bit); /* set in the word of this generation alone; 0: it is past, or being dropped */
uint64_t fence_make(Shm *s, uint32_t timeline, uint64_t context, uint64_t seqno, uint32_t flags, uint64_t owner,
                    uint32_t rec);                  /* 0: exception */
void fence_end(Shm *s, uint64_t handle, int error); /* signal and drop an own fence */
int fence_finish(Shm *s, uint64_t handle, db_fence *f, int error, uint64_t stamp, int anybody);
int for_anybody(db_fence *f);
void ring_syncs(Shm *s, uint64_t handle, db_fence *f);

static inline void leave_cpu(Shm *s) {
  atomic_store_explicit(&life_slot(s, my_life(s))->cpu, (uint32_t)sched_getcpu() + 1, memory_order_relaxed);
}

int ring_error(Shm *s, uint32_t timeline, uint64_t seqno, uint64_t handle);
int past_error(Shm *s, uint64_t handle);
void ring_life(db_life *l, uint64_t handle);
int wait_pending(Shm *s, uint64_t handle, int64_t until, int interruptible);
int fifo_push(Shm *s, uint32_t slot);
uint64_t stamp_of(db_fence *f, uint64_t handle);
int own_end(Shm *s, uint64_t h, int error, int drop, uint64_t stamp);
#endif
