/* fence.c - fences: slots owned by one life, signalled by it (or by anybody, if it says so), waited for and rung across processes.
 *
 * Signalling is: how it ends into the slot (an error into the timeline's ring too), then the time, then one compare-and-swap that
 * makes it signalled, then the sleepers are woken, then the dispatchers are rung. A death before it is signalled leaves a pending
 * fence that the reaper ends with -EOWNERDEAD; a death after it leaves sleepers and dispatchers that look again at their next tick.
 *
 * A fence of FF_ANYBODY can be ended by several processes at once, and under the hands of a slow one the owner may die and the slot be
 * another's. So each of its words is changed by a compare-and-swap from a value that no other generation has, and changes once: who
 * comes later finds how it ends decided, and only helps to make it known. What is decided stays so, whoever dies: the reaper ends such
 * a fence as it was decided, else with -EOWNERDEAD. Whatever else a stranger writes to a slot (fence_mark) names the generation too, or
 * does nobody harm in another one.
 */
#include "domain/fence.h"
#include "domain/sleep.h"
#include "domain/step.h"
#include "domain/ticker.h"
#include <sched.h>

#define SPIN_NS     20000ll /* a wait spins this long at most before it sleeps */
#define SPIN_GIL_NS 1000ll  /* and this long of it without releasing the GIL */

/* 1 pending, 0 signalled; *out is the slot while the handle's generation is the present one, else NULL */
int fence_pending(Shm *s, uint64_t handle, db_fence **out) {
  db_fence *f = fence_at(s, H_SLOT(handle));
  if (out) *out = NULL;
  if (!f) return 0;
  uint32_t w = atomic_load(&f->word);
  if (FW_GEN(w) != WORD_OF(H_GEN(handle)) || END_GEN(atomic_load(&f->end)) != H_GEN(handle)) return 0;
  if (out) *out = f;
  return !(w & FW_SIGNALED);
}

int ring_error(Shm *s, uint32_t timeline, uint64_t seqno, uint64_t handle) { /* error of a past fence, 0 when it is not in the ring */
  db_timeline *t = timeline ? timeline_at(s, timeline - 1) : NULL;
  uint64_t e = t ? atomic_load(&t->ring[seqno % RING_SLOTS]) : 0;
  return (e & ~0xfffull) == RING_TAG(handle) ? END_ERROR(e) : 0;
}

static void past_keep(db_fence *f) { /* the slot is about to be used again: who has not looked yet must still find a failure */
  uint64_t end = atomic_load(&f->end);
  if (!END_ERROR(end)) return;
  a64 *oldest = &f->past[0];
  for (uint32_t i = 1; i < FENCE_PAST; i++)
    if (atomic_load(&f->past[i]) < atomic_load(oldest)) oldest = &f->past[i];
  atomic_store(oldest, END_GEN(end) << 12 | (end & 0xfff)); /* dying now leaves it for a generation that still is the present one */
}

int past_error(Shm *s, uint64_t handle) {
  db_fence *f = fence_at(s, H_SLOT(handle));
  for (uint32_t i = 0; f && i < FENCE_PAST; i++) {
    uint64_t e = atomic_load(&f->past[i]);
    if (e >> 12 == H_GEN(handle)) return END_ERROR(e);
  }
  return 0;
}

void ring_life(db_life *l, uint64_t handle) {
  uint32_t b = atomic_load(&l->doorbell); /* [rings 10 | slot 22]: who was rung once since it looked need look at one slot only */
  while (!atomic_compare_exchange_weak(&l->doorbell, &b, (b & ~(uint32_t)SLOT_MASK) + ((uint32_t)SLOT_MASK + 1) + H_SLOT(handle))) {}
  word_wake(&l->doorbell, INT32_MAX);
}

static void ring_bells(Shm *s, uint64_t bells, uint64_t handle) {
  uint32_t me = my_life(s), high = atomic_load(&hdr(s)->life_high);
  if (high > DB_LIVES) high = DB_LIVES;
  for (uint32_t i = 0; i < high; i++) {
    db_life *l = (db_life *)(s->base + OFF_LIVES) + i;
    if (!(bells >> (i & 63) & 1) || atomic_load(&l->state) != LIFE_ALIVE || !atomic_load(&l->served)) continue;
    if (me && i == LIFE_INDEX(me)) continue; /* callbacks of this process run in the signaller, below */
    ring_life(l, handle);
  }
  if (me && (bells >> (LIFE_INDEX(me) & 63) & 1) && s->on_local) {
    for (int k = 0; k < 2;
         k++) { /* a signal handler may raise before a call has begun what it is for: once more, then it is there or done */
      PyObject *x = PyObject_CallFunction(s->on_local, "K", (unsigned long long)handle);
      if (x) {
        Py_DECREF(x);
        break;
      }
      PyErr_WriteUnraisable(s->on_local);
    }
  }
}

void ring_syncs(Shm *s, uint64_t handle, db_fence *f) { /* the descriptors of sync files that wait for an ended fence */
  PyObject *x = NULL;
  for (int k = 0; k < 2 && !x && s->on_sync; k++) /* again if a signal handler raised in the middle: ringing twice is ringing once */
    if (!(x = PyObject_CallFunction(s->on_sync, "K", (unsigned long long)handle))) PyErr_WriteUnraisable(s->on_sync);
  if (x == Py_True) { /* the bit is the duty: while it is there, whoever reaps the slot rings again */
    uint32_t w = atomic_load(&f->word);
    while (FW_GEN(w) == WORD_OF(H_GEN(handle)) && (w & FW_SYNC) && !atomic_compare_exchange_weak(&f->word, &w, w & ~FW_SYNC)) {}
  }
  Py_XDECREF(x);
}

int fence_flag(uint64_t handle, db_fence *f, uint32_t bit) {
  uint32_t w = atomic_load(&f->word);
  while (FW_GEN(w) == WORD_OF(H_GEN(handle)) && !(w & FW_DROPPED))
    if ((w & bit) || atomic_compare_exchange_weak(&f->word, &w, w | bit)) return 1;
  return 0;
}

/* End a fence: 0; 1: it has ended already, or otherwise. anybody: others may be ending it at this moment, and it may be theirs to finish */
int fence_finish(Shm *s, uint64_t handle, db_fence *f, int error, uint64_t stamp, int anybody) {
  if (atomic_load(&f->word) & FW_SIGNALED) return 1;
  if (anybody) STEP(fence_ending);                             /* nothing has been done */
  int e = error ? error : atomic_load(&f->error), decided = 1; /* if that was another generation's, the next step is in vain */
  uint64_t open = END_OPEN(H_GEN(handle)), none = STAMP_NONE(H_GEN(handle));
  uint64_t end = open | END_DECIDED | (e < 0 && e >= -4095 ? (uint32_t)-e : 0);
  if (!anybody)
    atomic_store(&f->end, end); /* a reaper overrides what the dead owner had not made known */
  else if (!atomic_compare_exchange_strong(&f->end, &open, end)) {
    if (END_GEN(open) != H_GEN(handle)) return 1;
    end = open; /* somebody was quicker, and may be dead: it ends as that one said */
    decided = 0;
  }
  if (END_ERROR(end)) {
    db_timeline *t = atomic_load(&f->timeline) ? timeline_at(s, atomic_load(&f->timeline) - 1) : NULL;
    uint64_t q = atomic_load(&f->seqno);
    if (t && atomic_load(&f->end) == end)
      atomic_store(&t->ring[q % RING_SLOTS], RING_TAG(handle) | (end & 0xfff)); /* says whose it is, wherever it comes to lie */
    STEP(fence_error);                                                          /* pending, with an error that shows once it is signalled */
  }
  if (!stamp) stamp = (uint64_t)now_ns();
  if (!anybody)
    atomic_store(&f->timestamp, stamp);
  else
    atomic_compare_exchange_strong(&f->timestamp, &none, stamp);
  STEP(fence_stamped); /* pending, with an end and a time that show once it is signalled */
  uint32_t w = atomic_load(&f->word);
  do {
    if ((w & FW_SIGNALED) || FW_GEN(w) != WORD_OF(H_GEN(handle))) return !decided; /* somebody made it known for us, and rings */
  } while (!atomic_compare_exchange_weak(&f->word, &w, w | FW_SIGNALED));
  STEP(fence_signaled); /* done; sleepers find out at their tick if we die now */
  if (w & FW_WAITERS) word_wake(&f->word, INT32_MAX);
  STEP(fence_woken);
  uint64_t bells = atomic_load(&f->wake_mask);
  if (bells) ring_bells(s, bells, handle);
  STEP(fence_rung);
  if (w & FW_SYNC) ring_syncs(s, handle, f);
  return !decided;
}

int for_anybody(db_fence *f) {
  return (atomic_load(&f->flags) & FF_ANYBODY) != 0;
} /* its owner asks, or the reaper: nobody uses the slot again meanwhile */

/* ---- allocation: the owner's first-in first-out list ---- */
int fifo_push(Shm *s, uint32_t slot) {
  if (s->fifo_count == s->fifo_cap) {
    uint32_t cap = s->fifo_cap ? s->fifo_cap * 2 : 512;
    uint64_t *q = PyMem_Malloc(cap * sizeof *q);
    if (!q) {
      PyErr_NoMemory();
      return -1;
    }
    for (uint32_t i = 0; i < s->fifo_count; i++) q[i] = s->fifo[(s->fifo_head + i) % s->fifo_cap];
    PyMem_Free(s->fifo);
    s->fifo = q;
    s->fifo_cap = cap;
    s->fifo_head = 0;
  }
  s->fifo[(s->fifo_head + s->fifo_count++) % s->fifo_cap] = slot;
  return 0;
}

static int fifo_ready(Shm *s) { /* a slot is there; a child starts with an empty list */
  if (s->fifo_life != my_life(s)) {
    s->fifo_life = my_life(s);
    s->fifo_count = 0;
  }
  if (s->fifo_count) return 0;
  int64_t c = chunk_claim(s, CH_FENCE, my_life(s));
  if (c < 0) return -1;
  for (uint32_t i = 0; i < FENCES_PER; i++)
    if (fifo_push(s, (uint32_t)c * FENCES_PER + i)) return -1;
  return 0;
}

uint64_t fence_make(Shm *s, uint32_t timeline, uint64_t context, uint64_t seqno, uint32_t flags, uint64_t owner, uint32_t rec) {
  db_fence *f;
  uint32_t slot;
  do {
    if (fifo_ready(s)) return 0;
    slot = (uint32_t)s->fifo[s->fifo_head];
    s->fifo_head = (s->fifo_head + 1) % s->fifo_cap;
    s->fifo_count--;
    f = fence_at(s, slot);
    if (!f) {
      shm_corrupt(s, "a fence outside of the file");
      return 0;
    }
  } while (!(atomic_load(&f->word) & FW_SIGNALED)); /* never hand out a slot that is still pending */
  uint64_t gen = (END_GEN(atomic_load(&f->end)) + 1) & GEN_MASK;
  if (!gen) gen = 1;
  db_rec *r = rec ? rec_at(s, rec - 1) : NULL;
  past_keep(f);
  atomic_store(&f->end, END_OPEN(gen)); /* from here the old handle is past: signalled, whatever the fields say */
  atomic_store(&f->context, context);
  atomic_store(&f->seqno, seqno);
  atomic_store(&f->timestamp, STAMP_NONE(gen));
  atomic_store(&f->error, 0);
  atomic_store(&f->timeline, timeline);
  atomic_store(&f->wake_mask, 0);
  atomic_store(&f->deadline, STAMP_NONE(gen));
  atomic_store(&f->owner, owner);
  atomic_store(&f->rec, rec);
  atomic_store(&f->rec_gen, r ? atomic_load(&r->gen) : 0);
  atomic_store(&f->flags, flags);
  atomic_store(&f->created, (uint64_t)now_ns());
  STEP(fence_filled); /* the word still says signalled: the slot is free */
  atomic_store(&f->word, WORD_OF(gen));
  STEP(fence_published); /* pending and known to nobody: ends with its owner */
  return H_MAKE(slot, gen);
}

/* ---- the wait ---- */
int wait_pending(Shm *s, uint64_t handle, int64_t until, int interruptible) {
  /* 1 signalled, 0 timed out, -1 exception, -4 interrupted */
  db_fence *f;
  if (!fence_pending(s, handle, &f)) return 1;
  if (until >= 0 && now_ns() >= until) {
    int k = shm_polled(s);
    return k < 0 ? -1 : k && !fence_pending(s, handle, NULL);
  }
  uint64_t e = atomic_load(chunk_entry(s, H_SLOT(handle) / FENCES_PER));
  uint32_t cpu = atomic_load_explicit(&life_slot(s, CT_LIFE(e))->cpu, memory_order_relaxed);
  if (cpu && cpu != (uint32_t)sched_getcpu() + 1 && CT_LIFE(e) != my_life(s)) {
    /* the signaller runs elsewhere: it may be done before a sleep would even begin */
    int64_t start = now_ns(), end = start + SPIN_NS;
    if (until >= 0 && until < end) end = until;
    do {
      for (int k = 0; k < 32; k++) {
        if (atomic_load(&f->word) & FW_SIGNALED) return 1;
        cpu_relax();
      }
    } while (now_ns() < start + SPIN_GIL_NS);
    Py_BEGIN_ALLOW_THREADS
    do {
      for (int k = 0; k < 32 && !(atomic_load(&f->word) & FW_SIGNALED); k++) cpu_relax();
    } while (!(atomic_load(&f->word) & FW_SIGNALED) && now_ns() < end);
    Py_END_ALLOW_THREADS
  }
  for (;;) {
    uint32_t w = atomic_load(&f->word);
    if (!fence_pending(s, handle, NULL)) return 1;
    if (!(w & FW_WAITERS) && !atomic_compare_exchange_strong(&f->word, &w, w | FW_WAITERS)) continue;
    if (until >= 0 && now_ns() >= until) return 0;
    step_armed ? step_sleeping(STEP_fence_woken) : (void)0;
    int r = shm_sleep(s, &f->word, w | FW_WAITERS, until, TICK_FENCE, handle);
    if (r == -1) return fence_pending(s, handle, NULL) ? -1 : (PyErr_Occurred() ? -1 : 1);
    if (r == 1 && !life_current(s, CT_LIFE(atomic_load(chunk_entry(s, H_SLOT(handle) / FENCES_PER)))) && fence_pending(s, handle, NULL)) {
      shm_corrupt(s, "a pending fence of nobody"); /* a reaper ends a life's fences before it gives back their chunk */
      return -1;
    }
    if (r == -2 && interruptible && fence_pending(s, handle, NULL)) return -4;
  }
}

uint64_t stamp_of(db_fence *f, uint64_t handle) { /* 0 while pending */
  uint64_t t = atomic_load(&f->timestamp);
  return t == STAMP_NONE(H_GEN(handle)) ? 0 : t;
}

int own_end(Shm *s, uint64_t h, int error, int drop, uint64_t stamp) { /* 1: it was pending; 0; -1 exception */
  if (!my_life(s)) return 0;                                           /* inherited by a fork: inert */
  db_fence *f;
  int pending = fence_pending(s, h, &f);
  if (!f || CT_LIFE(atomic_load(chunk_entry(s, H_SLOT(h) / FENCES_PER))) != my_life(s)) return 0;
  leave_cpu(s);
  if (pending) pending = !fence_finish(s, h, f, error, stamp, for_anybody(f));
  return drop && fifo_push(s, H_SLOT(h)) ? -1 : pending;
}

void fence_end(Shm *s, uint64_t handle, int error) {
  if (own_end(s, handle, error, 1, 0) < 0) PyErr_Clear(); /* no memory to remember the slot: it comes back with the chunk */
}
