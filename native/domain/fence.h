/* fence.h - fences by their handle: slots that one life owns, that it signals, and for which every process can wait. */
#ifndef DMABUF_FENCE_H
#define DMABUF_FENCE_H
#include "domain/table.h"

/* ---- the state of a fence ---- */

/* 1: pending; 0: signaled or past. *out (may be NULL): its slot while the handle is of the present generation, else NULL. */
static inline int fence_pending(Shm *s, uint64_t handle, db_fence **out) {
  db_fence *f = fence_at(s, H_SLOT(handle));
  if (out) *out = NULL;
  if (!f) return 0;
  uint32_t w = atomic_load(&f->word);
  if (FW_GEN(w) != WORD_OF(H_GEN(handle)) || END_GEN(atomic_load(&f->end)) != H_GEN(handle)) return 0;
  if (out) *out = f;
  return !(w & FW_SIGNALED);
}

static inline uint32_t fence_owner(Shm *s, uint64_t handle) { /* the life that owns the slot, 0: none */
  return CT_LIFE(atomic_load(chunk_entry(s, H_SLOT(handle) / FENCES_PER)));
}

static inline uint64_t fence_stamp(db_fence *f, uint64_t handle) { /* when it was signaled, 0: not yet */
  uint64_t t = atomic_load(&f->timestamp);
  return t == STAMP_NONE(H_GEN(handle)) ? 0 : t;
}

static inline int fence_for_all(db_fence *f) { return (atomic_load(&f->flags) & FF_ANYBODY) != 0; } /* May every process signal it? */

/* The error of a past fence, from its slot or from its timeline; 0 if neither knows of one. */
int fence_past_error(Shm *s, uint64_t handle, uint32_t timeline, uint64_t seqno);

/* Set a bit in the word, in this generation only. 1; 0: the fence is past, or its owner is dropping it. */
int fence_flag(uint64_t handle, db_fence *f, uint32_t bit);

/* From now on this life is woken when another process sets a deadline for its pending fence. It may have one already. */
void fence_watch_deadline(Shm *s, uint64_t handle);
void fence_ignore_deadline(Shm *s, uint64_t handle); /* the opposite */

/* ---- its life ---- */

/* A new pending fence of this life. 0: an exception is set. */
uint64_t fence_make(Shm *s, uint32_t timeline, uint64_t context, uint64_t seqno, uint32_t flags, uint64_t owner, uint32_t rec);

#define FENCE_QUIET 2 /* shared, and the caller holds a lock: it runs the callbacks of this process once that is free */

/* Signal a fence. shared: other processes may signal it at this moment (fence_for_all). 0; 1: it was signaled before, or otherwise. */
int fence_finish(Shm *s, uint64_t handle, db_fence *f, int error, uint64_t stamp, int shared);

/* Signal a fence of this life; drop: its slot is free afterwards. 1: it was pending; 0: it was not; -1: an exception is set. */
int fence_end_own(Shm *s, uint64_t handle, int error, int drop, uint64_t stamp);

/* Signal a fence of this life and free its slot. Raises nothing. */
void fence_end(Shm *s, uint64_t handle, int error);

int fence_free_slot(Shm *s, uint32_t slot); /* This life may use the slot again, after all that are free now. */

/* Note from which CPU this process signals, for waiters that spin. */
void fence_note_cpu(Shm *s);

/* ---- waiting and waking ---- */

/* What wakes the streams of which a slot has the fence that ended (streams.c). rec: of an access, else 0. */
extern void (*fence_wake_streams)(Shm *s, uint32_t rec);
extern void (*fence_spoil_frames)(Shm *s, uint64_t handle, int error); /* before it is known: the fence fails */

/* Wait until `until` (CLOCK_MONOTONIC ns, -1: no limit). 1: signaled; 0: out of time, or with one_tick a tick is over; -EINTR, if
 * interruptible; RAISED. */
int fence_wait_for(Shm *s, uint64_t handle, int64_t until, int interruptible, int one_tick);

void fence_wake_dispatcher(db_life *l, uint64_t handle);          /* wake the dispatcher of that process to look at the fence */
void fence_run_local(Shm *s, uint64_t handle);                    /* call the callbacks that this process has with the signaled fence */
void fence_wake_sync_files(Shm *s, uint64_t handle, db_fence *f); /* advance the sync files that wait for the signaled fence: sync.c */
#endif
