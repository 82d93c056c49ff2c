/* fence.c - fences: slots that one life owns, that it (or with FF_ANYBODY every process) signals, and for which every process can wait.
 *
 * Signaling stores how the fence ends (an error into the timeline's ring too), then the time, and then makes the fence signaled by one
 * compare-and-swap. After that it wakes the sleepers, and then the dispatchers. A death before the compare-and-swap leaves a pending fence,
 * which the reaper signals with -EOWNERDEAD. A death after it leaves sleepers and dispatchers that look again at their next tick.
 *
 * Several processes can signal a fence of FF_ANYBODY at once. While a slow one does, the owner may die and the slot be used for another
 * fence. Each word of such a fence therefore changes once, by a compare-and-swap from a value that no other generation has. A process that
 * comes later finds the end decided and only helps to make it known. A decision stands, whichever process dies: the reaper signals the
 * fence as it was decided, and with -EOWNERDEAD only if nothing was. Whatever else a stranger writes into a slot (fence_methods.c) names
 * the generation too, or does no harm in another one.
 */
#include "domain/fence.h"
#include "domain/sleep.h"
#include "domain/step.h"
#include "domain/ticker.h"
#include "later.h"
#include <sched.h>

#define SPIN_NS     20000ll /* a wait spins at most this long before it sleeps */
#define SPIN_GIL_NS 1000ll  /* and this long of it with the GIL */

void (*fence_wake_streams)(Shm *s, uint32_t rec);
void (*fence_spoil_frames)(Shm *s, uint64_t handle, int error);

/* ---- state ---- */

int fence_past_error(Shm *s, uint64_t handle, uint32_t timeline, uint64_t seqno) {
  db_fence *f = fence_at(s, H_SLOT(handle));
  for (uint32_t i = 0; f && i < FENCE_PAST; i++) {
    uint64_t e = atomic_load(&f->past[i]);
    if (e >> 12 == H_GEN(handle) && END_ERROR(e)) return END_ERROR(e);
  }
  db_timeline *t = timeline ? timeline_at(s, timeline - 1) : NULL;
  uint64_t e = t ? atomic_load(&t->ring[seqno % RING_SLOTS]) : 0;
  if ((e & ~0xfffull) == RING_TAG(handle) && END_ERROR(e)) return END_ERROR(e);
  /* Its chunk was given back since, or will be: nobody knows how it ended. */
  return H_GEN(handle) <= atomic_load(&hdr(s)->floor[CH_FENCE]) ? -EOWNERDEAD : 0;
}

/* The slot is about to be used again: keep its error for a process that has not looked yet. */
static void keep_error(db_fence *f) {
  uint64_t end = atomic_load(&f->end);
  if (!END_ERROR(end)) return;
  a64 *oldest = &f->past[0];
  for (uint32_t i = 1; i < FENCE_PAST; i++)
    if (atomic_load(&f->past[i]) < atomic_load(oldest)) oldest = &f->past[i];
  atomic_store(oldest, END_GEN(end) << 12 | (end & 0xfff)); /* a death here leaves it for a generation that is still the present one */
}

int fence_flag(uint64_t handle, db_fence *f, uint32_t bit) {
  uint32_t w = atomic_load(&f->word);
  while (FW_GEN(w) == WORD_OF(H_GEN(handle)) && !(w & FW_DROPPED))
    if ((w & bit) || atomic_compare_exchange_weak(&f->word, &w, w | bit)) return 1;
  return 0;
}

/* ---- waking ---- */

/* The doorbell counts its wake-ups beside the slot, so after exactly one the dispatcher needs to look at that slot only. */
void fence_wake_dispatcher(db_life *l, uint64_t handle) {
  uint32_t b = atomic_load(&l->doorbell);
  while (!atomic_compare_exchange_weak(&l->doorbell, &b, (b & ~(uint32_t)SLOT_MASK) + ((uint32_t)SLOT_MASK + 1) + H_SLOT(handle))) {}
  word_wake(&l->doorbell, INT32_MAX);
}

static void wake_dispatchers(Shm *s, uint64_t mask, uint64_t handle, int run) {
  uint32_t me = my_life(s);
  for (uint32_t i = 0, high = life_high(s); i < high; i++) {
    db_life *l = life_at(s, i);
    if (!(mask >> (i & 63) & 1) || atomic_load(&l->state) != LIFE_ALIVE || !atomic_load(&l->served)) continue;
    if (me && i == LIFE_INDEX(me)) continue; /* the signaler runs the callbacks of this process itself, below */
    fence_wake_dispatcher(l, handle);
  }
  if (s->ending) { /* the end of a life, with its byte locked: the callbacks run afterwards */
    if (s->ending->me && mask >> (LIFE_INDEX(s->ending->me) & 63) & 1) list_handle(&s->ending->local, handle);
    return;
  }
  if (!run || !me || !(mask >> (LIFE_INDEX(me) & 63) & 1) || !s->on_local) return;
  fence_run_local(s, handle);
}

void fence_run_local(Shm *s, uint64_t handle) {
  if (!s->on_local) return;
  PyObject *call = Py_NewRef(s->on_local); /* another thread may replace it during the call */
  call_hook(call, handle);
  Py_DECREF(call);
}

/* ---- signaling ---- */

int fence_finish(Shm *s, uint64_t handle, db_fence *f, int error, uint64_t stamp, int shared) {
  if (atomic_load(&f->word) & FW_SIGNALED) return 1;
  if (shared) STEP_OF(fence_ending, f, handle);                /* pending: nothing has been done */
  int e = error ? error : atomic_load(&f->error), decided = 1; /* of another generation: then the next step is in vain */
  uint64_t open = END_OPEN(H_GEN(handle)), none = STAMP_NONE(H_GEN(handle));
  uint64_t end = open | END_DECIDED | (e < 0 && e >= -4095 ? (uint32_t)-e : 0);
  if (!shared) /* the compare-and-swap of the word below orders these stores before it, so they need no barrier of their own */
    atomic_store_explicit(&f->end, end, memory_order_release); /* a reaper overrides what the dead owner had not made known */
  else if (!atomic_compare_exchange_strong(&f->end, &open, end)) {
    if (END_GEN(open) != H_GEN(handle)) return 1;
    end = open; /* another process was quicker, and may be dead: the fence ends as that one decided */
    decided = 0;
  }
  if (END_ERROR(end)) {
    db_timeline *t = atomic_load(&f->timeline) ? timeline_at(s, atomic_load(&f->timeline) - 1) : NULL;
    uint64_t seqno = atomic_load(&f->seqno);
    /* The tag says whose error it is, so it may come to lie in a slot of the ring that another fence has used. */
    if (t && atomic_load(&f->end) == end) atomic_store(&t->ring[seqno % RING_SLOTS], RING_TAG(handle) | (end & 0xfff));
    if (atomic_load(&f->flags) & FF_STREAM) fence_spoil_frames(s, handle, END_ERROR(end));
    STEP_OF(fence_error, f, handle); /* pending, with an error that shows once it is signaled */
  }
  if (!stamp) stamp = (uint64_t)now_ns();
  if (!shared)
    atomic_store_explicit(&f->timestamp, stamp, memory_order_release);
  else
    atomic_compare_exchange_strong(&f->timestamp, &none, stamp);
  STEP_OF(fence_stamped, f, handle); /* pending, with an end and a time that show once it is signaled */
  uint32_t w = atomic_load(&f->word);
  do {
    if ((w & FW_SIGNALED) || FW_GEN(w) != WORD_OF(H_GEN(handle))) return !decided; /* another process made it known, and wakes the others */
  } while (!atomic_compare_exchange_weak(&f->word, &w, w | FW_SIGNALED));
  STEP_OF(fence_signaled, f, handle); /* signaled: sleepers look again at their next tick */
  if (w & FW_WAITERS) word_wake(&f->word, INT32_MAX);
  STEP_OF(fence_woken, f, handle); /* signaled: dispatchers look again at their next tick, and the reaper wakes the sync files */
  uint64_t mask = atomic_load(&f->wake_mask);
  if (mask) wake_dispatchers(s, mask, handle, shared != FENCE_QUIET);
  STEP_OF(fence_dispatchers_woken, f, handle); /* signaled: the reaper wakes the sync files */
  if (w & FW_SYNC) fence_wake_sync_files(s, handle, f);
  if (__builtin_expect(atomic_load(&f->flags) & FF_STREAM, 0)) fence_wake_streams(s, atomic_load(&f->rec));
  return !decided;
}

void fence_note_cpu(Shm *s) { atomic_store_explicit(&life_slot(s, my_life(s))->cpu, (uint32_t)sched_getcpu() + 1, memory_order_relaxed); }

int fence_end_own(Shm *s, uint64_t handle, int error, int drop, uint64_t stamp) {
  if (!my_life(s)) return 0; /* a forked child inherited it: no effect */
  db_fence *f;
  int pending = fence_pending(s, handle, &f);
  if (!f || fence_owner(s, handle) != my_life(s)) return 0;
  fence_note_cpu(s);
  if (pending) pending = !fence_finish(s, handle, f, error, stamp, fence_for_all(f));
  return drop && fence_free_slot(s, H_SLOT(handle)) ? -1 : pending;
}

void fence_end(Shm *s, uint64_t handle, int error) {
  if (fence_end_own(s, handle, error, 1, 0) < 0) PyErr_Clear(); /* no memory to remember the slot: it returns with its chunk */
}

/* ---- slots: the life's first-in first-out list of free ones ---- */

int fence_free_slot(Shm *s, uint32_t slot) {
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

static int slots_ready(Shm *s) { /* Have at least one free slot. A forked child begins without any. */
  if (s->fifo_life != my_life(s)) {
    s->fifo_life = my_life(s);
    s->fifo_count = 0;
  }
  if (s->fifo_count) return 0;
  if (shm_need_life(s, "fence")) return -1;
  int64_t c = chunk_claim(s, CH_FENCE, my_life(s));
  if (c < 0) return -1;
  for (uint32_t i = 0; i < FENCES_PER; i++)
    if (fence_free_slot(s, (uint32_t)c * FENCES_PER + i)) return -1;
  return 0;
}

uint64_t fence_make(Shm *s, uint32_t timeline, uint64_t context, uint64_t seqno, uint32_t flags, uint64_t owner, uint32_t rec) {
  db_fence *f;
  uint32_t slot;
  do {
    if (slots_ready(s)) return 0;
    slot = (uint32_t)s->fifo[s->fifo_head];
    s->fifo_head = (s->fifo_head + 1) % s->fifo_cap;
    s->fifo_count--;
    f = fence_at(s, slot);
    if (!f) {
      shm_corrupt(s, "a fence lies outside of it");
      return 0;
    }
  } while (!(atomic_load(&f->word) & FW_SIGNALED)); /* a slot that is still pending is never used again */
  /* Above the floor as well: a reset that was killed leaves chunks of fences below it. */
  uint64_t gen = END_GEN(atomic_load(&f->end)), floor = atomic_load(&hdr(s)->floor[CH_FENCE]);
  gen = ((gen > floor ? gen : floor) + 1) & GEN_MASK;
  if (!gen) gen = 1;
  db_rec *r = rec ? rec_at(s, rec - 1) : NULL;
  keep_error(f);
  atomic_store(&f->end, END_OPEN(gen)); /* from here on the last handle is past: signaled, whatever the fields say */
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
  STEP_OF(fence_filled, f, H_MAKE(slot, gen)); /* the word says signaled: the slot is free, and returns with its chunk */
  atomic_store(&f->word, WORD_OF(gen));
  STEP_OF(fence_published, f, H_MAKE(slot, gen)); /* pending, and known to nobody: the reaper signals it */
  return H_MAKE(slot, gen);
}

/* ---- waiting ---- */

static inline void cpu_relax(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

/* Spin for a moment if the owner last signaled from another CPU: it may be done before a sleep would even begin. On its own CPU the spin
 * would keep it from running. 1: the word says signaled. */
static int spin(Shm *s, db_fence *f, uint32_t owner, int64_t until) {
  uint32_t cpu = atomic_load_explicit(&life_slot(s, owner)->cpu, memory_order_relaxed);
  if (!cpu || cpu == (uint32_t)sched_getcpu() + 1 || owner == my_life(s)) return 0;
  int64_t start = now_ns(), end = start + SPIN_NS;
  if (until >= 0 && until < end) end = until;
  do {
    for (int k = 0; k < 32; k++) {
      if (atomic_load(&f->word) & FW_SIGNALED) return 1;
      cpu_relax();
    }
  } while (now_ns() < start + SPIN_GIL_NS);
  atomic_fetch_add(&s->spinners, 1);
  Py_BEGIN_ALLOW_THREADS
  do {
    for (int k = 0; k < 32 && !(atomic_load(&f->word) & FW_SIGNALED); k++) cpu_relax();
  } while (!(atomic_load(&f->word) & FW_SIGNALED) && now_ns() < end);
  atomic_fetch_sub(&s->spinners, 1);
  Py_END_ALLOW_THREADS
  return 0;
}

int fence_wait_for(Shm *s, uint64_t handle, int64_t until, int interruptible, int one_tick) {
  db_fence *f;
  if (!fence_pending(s, handle, &f)) return 1;
  if (until >= 0 && now_ns() >= until) {
    int k = shm_notice_deaths(s);
    return k < 0 ? RAISED : k && !fence_pending(s, handle, NULL);
  }
  if (spin(s, f, fence_owner(s, handle), until)) return 1;
  int64_t since = 0;
  for (;;) {
    if (!fence_pending(s, handle, &f)) return 1; /* the slot's address too: this process may have left and joined again meanwhile */
    uint32_t w = atomic_load(&f->word);
    if (FW_GEN(w) != WORD_OF(H_GEN(handle)) || (w & FW_SIGNALED)) return 1;
    if (!(w & FW_WAITERS) && !atomic_compare_exchange_strong(&f->word, &w, w | FW_WAITERS)) continue;
    if (until >= 0 && now_ns() >= until) return 0;
    STEP_SLEEPING(fence_woken);
    int r = shm_sleep(s, &f->word, w | FW_WAITERS, until, TICK_FENCE, handle);
    if (r == SLEEP_RAISED) return fence_pending(s, handle, NULL) || PyErr_Occurred() ? RAISED : 1;
    if (r == SLEEP_TICK && !life_current(s, fence_owner(s, handle)) && fence_pending(s, handle, NULL)) {
      shm_corrupt(s, "a pending fence has no owner"); /* a reaper signals a life's fences before it returns their chunk */
      return RAISED;
    }
    if (r == SLEEP_TICK && shm_lasts(s, &since, TICK_FENCE, handle)) return RAISED;
    if (r == SLEEP_TICK && one_tick) return !fence_pending(s, handle, NULL);
    if (r == SLEEP_SIGNAL && interruptible && fence_pending(s, handle, NULL)) return -EINTR;
  }
}

void fence_watch_deadline(Shm *s, uint64_t handle) {
  db_fence *f;
  if (fence_pending(s, handle, &f) && f) atomic_fetch_or(&f->flags, FF_WATCH_DEADLINE);
}

void fence_ignore_deadline(Shm *s, uint64_t handle) {
  db_fence *f;
  if (fence_pending(s, handle, &f) && f) atomic_fetch_and(&f->flags, ~FF_WATCH_DEADLINE);
}
