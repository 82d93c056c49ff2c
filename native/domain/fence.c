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
#include <math.h>
#include <sched.h>

/* 1 pending, 0 signalled; *out is the slot while the handle's generation is the present one, else NULL */
int fence_pending(Shm *s, uint64_t handle, db_fence **out) {
  db_fence *f = fence_at(s, H_SLOT(handle));
  if (out) *out = NULL;
  if (!f) return 0;
  uint32_t w = atomic_load(&f->word);
  if ((w & ~((1u << FW_SHIFT) - 1)) != WORD_OF(H_GEN(handle)) || END_GEN(atomic_load(&f->end)) != H_GEN(handle)) return 0;
  if (out) *out = f;
  return !(w & FW_SIGNALED);
}
#define RING_TAG(h) (((uint64_t)H_SLOT(h) << 30 | (H_GEN(h) & 0x3fffffff)) << 12)
static int ring_error(Shm *s, uint32_t timeline, uint64_t seqno, uint64_t handle) { /* error of a past fence, 0 when it is not in the ring */
  db_timeline *t = timeline ? timeline_at(s, timeline - 1) : NULL;
  uint64_t e = t ? atomic_load(&t->ring[seqno & 63]) : 0;
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
static int past_error(Shm *s, uint64_t handle) {
  db_fence *f = fence_at(s, H_SLOT(handle));
  for (uint32_t i = 0; f && i < FENCE_PAST; i++) {
    uint64_t e = atomic_load(&f->past[i]);
    if (e >> 12 == H_GEN(handle)) return END_ERROR(e);
  }
  return 0;
}
static void ring_life(db_life *l, uint64_t handle) {
  uint32_t b = atomic_load(&l->bell); /* [rings 10 | slot 22]: who was rung once since it looked need look at one slot only */
  while (!atomic_compare_exchange_weak(&l->bell, &b, (b & ~(uint32_t)SLOT_MASK) + ((uint32_t)SLOT_MASK + 1) + H_SLOT(handle))) {}
  word_wake(&l->bell, INT32_MAX);
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
    for (int k = 0; k < 2; k++) { /* a signal handler may raise before a call has begun what it is for: once more, then it is there or done */
      PyObject *x = PyObject_CallFunction(s->on_local, "K", (unsigned long long)handle);
      if (x) { Py_DECREF(x); break; }
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
    while ((w & ~((1u << FW_SHIFT) - 1)) == WORD_OF(H_GEN(handle)) && (w & FW_SYNC) &&
           !atomic_compare_exchange_weak(&f->word, &w, w & ~FW_SYNC)) {}
  }
  Py_XDECREF(x);
}
int fence_flag(uint64_t handle, db_fence *f, uint32_t bit) {
  uint32_t w = atomic_load(&f->word);
  while ((w & ~((1u << FW_SHIFT) - 1)) == WORD_OF(H_GEN(handle)) && !(w & FW_DROPPED))
    if ((w & bit) || atomic_compare_exchange_weak(&f->word, &w, w | bit)) return 1;
  return 0;
}
/* End a fence: 0; 1: it has ended already, or otherwise. anybody: others may be ending it at this moment, and it may be theirs to finish */
int fence_finish(Shm *s, uint64_t handle, db_fence *f, int error, uint64_t stamp, int anybody) {
  if (atomic_load(&f->word) & FW_SIGNALED) return 1;
  if (anybody) STEP(fence_ending); /* nothing has been done */
  int e = error ? error : atomic_load(&f->error), decided = 1; /* if that was another generation's, the next step is in vain */
  uint64_t open = END_OPEN(H_GEN(handle)), none = STAMP_NONE(H_GEN(handle));
  uint64_t end = open | END_DECIDED | (e < 0 && e >= -4095 ? (uint32_t)-e : 0);
  if (!anybody) atomic_store(&f->end, end); /* a reaper overrides what the dead owner had not made known */
  else if (!atomic_compare_exchange_strong(&f->end, &open, end)) {
    if (END_GEN(open) != H_GEN(handle)) return 1;
    end = open; /* somebody was quicker, and may be dead: it ends as that one said */
    decided = 0;
  }
  if (END_ERROR(end)) {
    db_timeline *t = atomic_load(&f->timeline) ? timeline_at(s, atomic_load(&f->timeline) - 1) : NULL;
    uint64_t q = atomic_load(&f->seqno);
    if (t && atomic_load(&f->end) == end) atomic_store(&t->ring[q & 63], RING_TAG(handle) | (end & 0xfff)); /* says whose it is, wherever it comes to lie */
    STEP(fence_error); /* pending, with an error that shows once it is signalled */
  }
  if (!stamp) stamp = (uint64_t)now_ns();
  if (!anybody) atomic_store(&f->timestamp, stamp);
  else atomic_compare_exchange_strong(&f->timestamp, &none, stamp);
  STEP(fence_stamped); /* pending, with an end and a time that show once it is signalled */
  uint32_t w = atomic_load(&f->word);
  do {
    if ((w & FW_SIGNALED) || (w & ~((1u << FW_SHIFT) - 1)) != WORD_OF(H_GEN(handle))) return !decided; /* somebody made it known for us, and rings */
  } while (!atomic_compare_exchange_weak(&f->word, &w, w | FW_SIGNALED));
  STEP(fence_signaled); /* done; sleepers find out at their tick if we die now */
  if (w & FW_WAITERS) word_wake(&f->word, INT32_MAX);
  STEP(fence_woken);
  uint64_t bells = atomic_load(&f->bells);
  if (bells) ring_bells(s, bells, handle);
  STEP(fence_rung);
  if (w & FW_SYNC) ring_syncs(s, handle, f);
  return !decided;
}
int for_anybody(db_fence *f) { return (atomic_load(&f->flags) & FF_ANYBODY) != 0; } /* its owner asks, or the reaper: nobody uses the slot again meanwhile */
static inline void leave_cpu(Shm *s) { atomic_store_explicit(&life_slot(s, my_life(s))->cpu, (uint32_t)sched_getcpu() + 1, memory_order_relaxed); }

/* ---- allocation: the owner's first-in first-out list ---- */
static int fifo_push(Shm *s, uint32_t slot) {
  if (s->fifo_count == s->fifo_cap) {
    uint32_t cap = s->fifo_cap ? s->fifo_cap * 2 : 512;
    uint64_t *q = PyMem_Malloc(cap * sizeof *q);
    if (!q) { PyErr_NoMemory(); return -1; }
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
  if (s->fifo_life != my_life(s)) { s->fifo_life = my_life(s); s->fifo_count = 0; }
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
    if (!f) { shm_corrupt(s, "a fence outside of the file"); return 0; }
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
  atomic_store(&f->bells, 0);
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
static int wait_pending(Shm *s, uint64_t handle, int64_t until, int interruptible) {
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
    int64_t start = now_ns(), end = start + DB_SPIN_NS;
    if (until >= 0 && until < end) end = until;
    do {
      for (int k = 0; k < 32; k++) { if (atomic_load(&f->word) & FW_SIGNALED) return 1; cpu_relax(); }
    } while (now_ns() < start + DB_SPIN_GIL_NS);
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

/* ---- the Fence type: what DmaFence inherits its fast paths from ---- */
typedef struct {
  PyObject_HEAD
  Shm *s;
  uint64_t handle, context, seqno, timestamp;
  uint32_t timeline, life, flags; /* life: of the process that owns the fence, if that is this one; else 0 */
  int status, error;              /* what was seen: status 0 not yet, 1, or negative */
} Fence;
static PyTypeObject *Fence_Type;

static uint64_t stamp_of(db_fence *f, uint64_t handle) { /* 0 while pending */
  uint64_t t = atomic_load(&f->timestamp);
  return t == STAMP_NONE(H_GEN(handle)) ? 0 : t;
}
static int fence_look(Fence *x) { /* 1 once signalled; remembers */
  if (x->status) return 1;
  db_fence *f;
  for (;;) {
    if (fence_pending(x->s, x->handle, &f)) return 0;
    int error = 0;
    uint64_t stamp = 0;
    if (f) {
      error = END_ERROR(atomic_load(&f->end));
      stamp = stamp_of(f, x->handle);
      db_fence *again;
      fence_pending(x->s, x->handle, &again);
      if (!again) continue; /* the slot was used again while we read it */
    } else if (!(error = past_error(x->s, x->handle))) error = ring_error(x->s, x->timeline, x->seqno, x->handle);
    x->error = error;
    x->timestamp = stamp;
    x->status = error ? error : 1;
    return 1;
  }
}
/* Fence(shm, handle, owned=False, context, seqno, timeline, status, timestamp): the last five for a past generation */
static PyObject *fence_new(PyTypeObject *type, PyObject *args, PyObject *kw) {
  static char *names[] = {"shm", "handle", "owned", "context", "seqno", "timeline", "status", "timestamp", NULL};
  Shm *s;
  unsigned long long handle, context = 0, seqno = 0, stamp = 0;
  unsigned timeline = 0;
  int owned = 0, status = 0;
  if (!PyArg_ParseTupleAndKeywords(args, kw, "O!K|pKKIiK", names, Shm_Type, &s, &handle, &owned, &context, &seqno, &timeline, &status, &stamp)) return NULL;
  Fence *x = (Fence *)type->tp_alloc(type, 0);
  if (!x) return NULL;
  Py_INCREF(s);
  x->s = s;
  x->handle = handle;
  if (owned) x->life = my_life(s);
  db_fence *f;
  fence_pending(s, handle, &f);
  if (f) {
    x->context = atomic_load(&f->context);
    x->seqno = atomic_load(&f->seqno);
    x->timeline = atomic_load(&f->timeline);
    x->flags = atomic_load(&f->flags);
    fence_pending(s, handle, &f);
  }
  if (!f) {
    x->context = context;
    x->seqno = seqno;
    x->timeline = timeline;
    if (status == 1 || (status < 0 && status >= -4095)) { /* somebody has seen its end */
      x->status = status;
      x->error = status < 0 ? status : 0;
      x->timestamp = stamp;
    }
  }
  fence_look(x);
  return (PyObject *)x;
}
static void fence_dealloc(Fence *x) {
  PyTypeObject *type = Py_TYPE(x);
  if (x->s) {
    if (x->life && x->life == my_life(x->s)) { /* signalled (DmaFence saw to it) and dropped by its owner: free */
      db_fence *f;
      if (!fence_pending(x->s, x->handle, &f) && f && fifo_push(x->s, H_SLOT(x->handle))) PyErr_Clear();
    }
    Py_DECREF(x->s);
  }
  type->tp_free(x);
  Py_DECREF(type);
}
static PyObject *f_signal(Fence *x, PyObject *const *args, Py_ssize_t n, PyObject *kwnames) {
  long error = 0;
  if (n + (kwnames ? PyTuple_GET_SIZE(kwnames) : 0) > 1 || (kwnames && PyTuple_GET_SIZE(kwnames) && PyUnicode_CompareWithASCIIString(PyTuple_GET_ITEM(kwnames, 0), "error"))) {
    PyErr_SetString(PyExc_TypeError, "signal() takes one optional argument, error");
    return NULL;
  }
  if (n || (kwnames && PyTuple_GET_SIZE(kwnames))) {
    error = PyLong_AsLong(args[0]);
    if (error == -1 && PyErr_Occurred()) return NULL;
    if (error > 0 || error < -4095) {
      shm_fail(x->s, EINVAL, "signal", "error", "a fence's error is a negative errno, or 0");
      return NULL;
    }
  }
  if (!x->life || x->life != my_life(x->s)) {
    shm_fail(x->s, EPERM, "signal", "a fence of another process", "only the process that owns the timeline signals its fences");
    return NULL;
  }
  db_fence *f;
  leave_cpu(x->s);
  int past = !fence_pending(x->s, x->handle, &f) || fence_finish(x->s, x->handle, f, (int)error, 0, for_anybody(f));
  if (PyErr_Occurred()) return NULL;
  if (past) {
    shm_fail(x->s, EINVAL, "signal", "a signalled fence", "a fence is signalled once");
    return NULL;
  }
  Py_RETURN_NONE;
}
static PyObject *f_wait(Fence *x, PyObject *const *args, Py_ssize_t n, PyObject *kwnames) {
  PyObject *timeout = NULL;
  int interruptible = 0;
  Py_ssize_t nk = kwnames ? PyTuple_GET_SIZE(kwnames) : 0;
  if (n > 1) { PyErr_SetString(PyExc_TypeError, "wait(timeout=None, *, interruptible=False)"); return NULL; }
  if (n) timeout = args[0];
  for (Py_ssize_t i = 0; i < nk; i++) {
    PyObject *k = PyTuple_GET_ITEM(kwnames, i);
    if (!PyUnicode_CompareWithASCIIString(k, "timeout") && !timeout) timeout = args[n + i];
    else if (!PyUnicode_CompareWithASCIIString(k, "interruptible")) interruptible = PyObject_IsTrue(args[n + i]);
    else { PyErr_SetString(PyExc_TypeError, "wait(timeout=None, *, interruptible=False)"); return NULL; }
  }
  int64_t until;
  if (parse_timeout(x->s, timeout, &until, "wait")) return NULL;
  int r = fence_look(x) ? 1 : wait_pending(x->s, x->handle, until, interruptible);
  if (r == -1) return NULL;
  if (r == -4) {
    shm_fail(x->s, EINTR, "wait", "a fence", "a signal arrived; wait again");
    return NULL;
  }
  if (r == 1) fence_look(x);
  return PyFloat_FromDouble(r ? remaining_s(until) : 0.0);
}
static int fence_poll(Fence *x) { /* a look that may find out about a death; -1 exception */
  if (fence_look(x)) return 1;
  if (x->life && x->life == my_life(x->s)) return 0; /* ours: nobody else could have ended it */
  int k = shm_polled(x->s);
  return k > 0 ? fence_look(x) : k;
}
static PyObject *f_is_signaled(Fence *x, PyObject *u) {
  int r = fence_poll(x);
  return r < 0 ? NULL : PyBool_FromLong(r);
}
static PyObject *f_status(Fence *x, void *u) {
  if (fence_poll(x) < 0) return NULL;
  return PyLong_FromLong(x->status);
}
static PyObject *f_error(Fence *x, void *u) {
  fence_look(x);
  return PyLong_FromLong(x->error);
}
static PyObject *f_timestamp(Fence *x, void *u) {
  fence_look(x);
  return PyLong_FromUnsignedLongLong(x->timestamp);
}
static PyObject *f_owned(Fence *x, void *u) { return PyBool_FromLong(x->life && x->life == my_life(x->s)); }
static PyMethodDef fence_type_methods[] = {
    {"signal", (PyCFunction)(void *)f_signal, METH_FASTCALL | METH_KEYWORDS,
     "signal(error=0)\n--\n\nEnd the fence, once. error: a negative errno. EINVAL when signalled before, EPERM from another process (spec 3.4)."},
    {"wait", (PyCFunction)(void *)f_wait, METH_FASTCALL | METH_KEYWORDS,
     "wait(timeout=None, *, interruptible=False)\n--\n\nWait until signalled; returns the seconds left (> 0; inf for None), 0.0 when timed out. EINVAL for a negative timeout (spec 3.9)."},
    {"is_signaled", (PyCFunction)f_is_signaled, METH_NOARGS, "is_signaled()\n--\n\nTrue once the fence has ended, with or without an error (spec 3.6)."},
    {0}};
static PyGetSetDef fence_getset[] = {
    {"status", (getter)f_status, NULL, "0 pending, 1 signalled, or the negative errno it ended with (spec 3.5)", NULL},
    {"error", (getter)f_error, NULL, "the negative errno it ended with, else 0", NULL},
    {"timestamp", (getter)f_timestamp, NULL, "CLOCK_MONOTONIC ns of signalling; 0 while pending", NULL},
    {"owned", (getter)f_owned, NULL, "does this process own the fence's timeline?", NULL},
    {0}};
static PyMemberDef fence_members[] = {
    {"shm", T_OBJECT, offsetof(Fence, s), READONLY, NULL},
    {"handle", T_ULONGLONG, offsetof(Fence, handle), READONLY, "slot and generation in the domain"},
    {"context", T_ULONGLONG, offsetof(Fence, context), READONLY, "the fence context (timeline) it belongs to"},
    {"seqno", T_ULONGLONG, offsetof(Fence, seqno), READONLY, "its number on the timeline"},
    {"timeline_index", T_UINT, offsetof(Fence, timeline), READONLY, NULL},
    {"flags", T_UINT, offsetof(Fence, flags), READONLY, NULL},
    {0}};

/* ---- methods of Shm that work on handles ---- */
static PyObject *fence_alloc(Shm *s, PyObject *args) { /* (timeline + 1, context, seqno, flags, owner, rec + 1) -> handle */
  unsigned timeline, flags, rec;
  unsigned long long context, seqno, owner;
  if (!PyArg_ParseTuple(args, "IKKIKI", &timeline, &context, &seqno, &flags, &owner, &rec)) return NULL;
  if (shm_need_life(s, "fence")) return NULL;
  uint64_t h = fence_make(s, timeline, context, seqno, flags, owner, rec);
  return h ? PyLong_FromUnsignedLongLong(h) : NULL;
}
static int own_end(Shm *s, uint64_t h, int error, int drop, uint64_t stamp) { /* 1: it was pending; 0; -1 exception */
  if (!my_life(s)) return 0; /* inherited by a fork: inert */
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
static PyObject *fence_signal(Shm *s, PyObject *args) { /* (handle, error, drop, timestamp = 0: now) -> was pending */
  unsigned long long h, stamp = 0;
  int error, drop;
  if (!PyArg_ParseTuple(args, "Kip|K", &h, &error, &drop, &stamp)) return NULL;
  int r = own_end(s, h, error, drop, stamp);
  return r < 0 ? NULL : PyBool_FromLong(r);
}
static PyObject *fence_end_any(Shm *s, PyObject *args) { /* (handle, error) -> was pending; a fence of FF_ANYBODY, whoever owns it */
  unsigned long long h;
  int error;
  if (!PyArg_ParseTuple(args, "Ki", &h, &error)) return NULL;
  if (shm_need_life(s, "signal")) return NULL;
  db_fence *f;
  int pending = fence_pending(s, h, &f);
  if (!pending || !f || !(atomic_load(&f->flags) & FF_ANYBODY)) Py_RETURN_FALSE;
  leave_cpu(s);
  return PyBool_FromLong(!fence_finish(s, h, f, error, 0, 1));
}
static PyObject *fence_wait(Shm *s, PyObject *args) { /* (handle, until_ns or -1, interruptible) -> 1, 0, -4 */
  unsigned long long h;
  long long until;
  int intr;
  if (!PyArg_ParseTuple(args, "KLp", &h, &until, &intr)) return NULL;
  int r = wait_pending(s, h, until, intr);
  return r == -1 ? NULL : PyLong_FromLong(r);
}
static PyObject *py_fence_pending(Shm *s, PyObject *arg) {
  unsigned long long h = PyLong_AsUnsignedLongLong(arg);
  if (h == (unsigned long long)-1 && PyErr_Occurred()) return NULL;
  return PyBool_FromLong(fence_pending(s, h, NULL));
}
static PyObject *fence_info(Shm *s, PyObject *arg) { /* None for a past generation */
  unsigned long long h = PyLong_AsUnsignedLongLong(arg);
  if (h == (unsigned long long)-1 && PyErr_Occurred()) return NULL;
  db_fence *f;
  int pending = fence_pending(s, h, &f);
  if (!f) Py_RETURN_NONE;
  uint64_t deadline = atomic_load(&f->deadline);
  PyObject *r = Py_BuildValue("{sN,sN,sK,sK,si,sI,sK,sI,sI,sI,sK,sK,sK,sI}", "pending", PyBool_FromLong(pending), "sync", PyBool_FromLong(atomic_load(&f->word) & FW_SYNC), "context", atomic_load(&f->context),
                              "seqno", atomic_load(&f->seqno), "error", END_ERROR(atomic_load(&f->end)), "flags", atomic_load(&f->flags), "owner",
                              atomic_load(&f->owner), "rec", atomic_load(&f->rec), "rec_gen", atomic_load(&f->rec_gen), "timeline",
                              atomic_load(&f->timeline), "created", atomic_load(&f->created), "deadline", deadline >> 63 ? 0 : deadline, "timestamp",
                              stamp_of(f, h), "life", CT_LIFE(atomic_load(chunk_entry(s, H_SLOT(h) / FENCES_PER))));
  fence_pending(s, h, &f);
  if (!f) { Py_XDECREF(r); Py_RETURN_NONE; }
  return r;
}
static PyObject *fence_mark(Shm *s, PyObject *args) { /* (handle, what, value): granted, error, deadline, shared, bell, sync */
  unsigned long long h;
  const char *what;
  long long v;
  if (!PyArg_ParseTuple(args, "KsL", &h, &what, &v)) return NULL;
  db_fence *f;
  int pending = fence_pending(s, h, &f);
  if (!f) Py_RETURN_FALSE;
  STEP(fence_marking); /* from here on the slot of another process's fence may be used again: a mark is for this generation, or does no harm */
  uint32_t owner = CT_LIFE(atomic_load(chunk_entry(s, H_SLOT(h) / FENCES_PER)));
  if (!strcmp(what, "granted")) atomic_fetch_or(&f->flags, FF_GRANTED);
  else if (!strcmp(what, "error")) atomic_store(&f->error, (int32_t)v);
  else if (!strcmp(what, "shared")) pending = fence_flag(h, f, FW_SHARED) && pending;
  else if (!strcmp(what, "sync")) {
    fence_flag(h, f, FW_SYNC); /* the same word: who ends the fence sees the bit, or we see the end */
    pending = fence_pending(s, h, NULL);
  } else if (!strcmp(what, "bell")) {
    if (owner != my_life(s)) fence_flag(h, f, FW_SHARED);
    atomic_fetch_or(&f->bells, 1ull << (LIFE_INDEX(my_life(s)) & 63)); /* in a slot that was used again, we are rung once for nothing */
    pending = fence_pending(s, h, NULL); /* after the bit: the signaller sees it, or we see the signal */
  } else if (!strcmp(what, "deadline")) {
    /* The first one is of this generation alone; a later one could hit another's only if that had the same deadline, to the nanosecond. */
    uint64_t old = atomic_load(&f->deadline);
    int earlier;
    while ((earlier = fence_pending(s, h, NULL) && (old == STAMP_NONE(H_GEN(h)) || (!(old >> 63) && (uint64_t)v < old))) &&
           !atomic_compare_exchange_weak(&f->deadline, &old, (uint64_t)v)) {}
    if (earlier && (atomic_load(&f->flags) & FF_HASTY) && owner != my_life(s) && life_current(s, owner))
      ring_life(life_slot(s, owner), h); /* a hint: lost with a signaller that dies here */
  } else { PyErr_SetString(PyExc_ValueError, "fence_mark: no such mark"); return NULL; }
  return PyBool_FromLong(pending);
}
static PyObject *fence_shared(Shm *s, PyObject *arg) { /* somebody but the owner may know it: listed, sent, slept on, listened to elsewhere */
  unsigned long long h = PyLong_AsUnsignedLongLong(arg);
  if (h == (unsigned long long)-1 && PyErr_Occurred()) return NULL;
  db_fence *f;
  fence_pending(s, h, &f);
  return PyBool_FromLong(f && (atomic_load(&f->word) & (FW_SHARED | FW_WAITERS)));
}
static PyObject *fence_drop(Shm *s, PyObject *args) { /* (handle, error) -> True: an own pending fence that nobody waits for has ended */
  unsigned long long h;
  int error;
  if (!PyArg_ParseTuple(args, "Ki", &h, &error)) return NULL;
  db_fence *f;
  if (!my_life(s) || !fence_pending(s, h, &f) || CT_LIFE(atomic_load(chunk_entry(s, H_SLOT(h) / FENCES_PER))) != my_life(s)) Py_RETURN_FALSE;
  uint32_t w = atomic_load(&f->word);
  do {
    if (w & (FW_SIGNALED | FW_SHARED | FW_WAITERS | FW_SYNC)) Py_RETURN_FALSE;
  } while (!atomic_compare_exchange_weak(&f->word, &w, w | FW_DROPPED)); /* the same word: who shares it sees this, or we see that it is shared */
  STEP(fence_dropped); /* pending, but nobody takes it any more: ends with us */
  return PyBool_FromLong(own_end(s, h, error, 0, 0));
}
static PyObject *fences_done(Shm *s, PyObject *seq) { /* of a list of handles those that are signalled */
  PyObject *fast = PySequence_Fast(seq, "a sequence of handles"), *out = fast ? PyList_New(0) : NULL;
  for (Py_ssize_t i = 0; out && i < PySequence_Fast_GET_SIZE(fast); i++) {
    PyObject *o = PySequence_Fast_GET_ITEM(fast, i);
    unsigned long long h = PyLong_AsUnsignedLongLong(o);
    if (h == (unsigned long long)-1 && PyErr_Occurred()) { Py_CLEAR(out); break; }
    if (!fence_pending(s, h, NULL) && PyList_Append(out, o)) Py_CLEAR(out);
  }
  Py_XDECREF(fast);
  return out;
}
PyMethodDef fence_methods[] = {
#define M(n, flags, doc) {#n, (PyCFunction)n, flags, doc}
    M(fence_alloc, METH_VARARGS, "A new pending fence of this life -> handle."), M(fence_signal, METH_VARARGS, "Signal (handle, error, drop, timestamp or 0) -> was pending."),
    M(fence_end_any, METH_VARARGS, "Signal (handle, error) a fence that anybody may end -> was pending."),
    M(fence_wait, METH_VARARGS, "Wait (handle, until, interruptible) -> 1, 0, -4."),
    {"fence_pending", (PyCFunction)py_fence_pending, METH_O, "Is the handle's fence pending?"},
    M(fence_info, METH_O, "What a fence's slot says, or None."), M(fence_mark, METH_VARARGS, "Mark (handle, what, value) -> pending."),
    M(fence_shared, METH_O, "May anybody but the owner know this fence?"), M(fence_drop, METH_VARARGS, "End (handle, error) an own fence that nobody waits for -> done."),
    M(fences_done, METH_O, "Those of the handles that are signalled."),
    {0}};

int fence_register(PyObject *module) {
  PyType_Slot slots[] = {{Py_tp_doc, "A fence by its handle: what DmaFence is built on."}, {Py_tp_new, fence_new}, {Py_tp_dealloc, fence_dealloc},
                         {Py_tp_methods, fence_type_methods}, {Py_tp_getset, fence_getset}, {Py_tp_members, fence_members}, {0, NULL}};
  PyType_Spec spec = {"dmabuf._native.Fence", sizeof(Fence), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE, slots};
  Fence_Type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &spec, NULL);
  return Fence_Type ? PyModule_AddObjectRef(module, "Fence", (PyObject *)Fence_Type) : -1;
}
