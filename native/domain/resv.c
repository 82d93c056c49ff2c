/* resv.c - the reservation object: its lock and its list of fences.
 *
 * The lock is the wait-die ww_mutex of spec 4.10. It is one word; it goes from 0 to its owner's context in one
 * compare-and-swap, so there is no instant at which it is held by nobody in particular; a lock whose owner's context has
 * another generation by now belongs to a dead process and is taken the same way. `next` names the oldest waiter, which
 * nobody younger overtakes. Whoever sleeps looks at everything again when woken, which is how a waiter is "woken to die".
 *
 * The list is an array of words, each a fence and its usage; a 0 ends it. Adding is one store, replacing is one store.
 * Entries of signalled fences stay until a later add overwrites them or they are trimmed from the end, so a reader without
 * the lock can never miss a pending fence. */
#include "domain/fence.h"
#include "domain/resv.h"
#include "domain/sleep.h"
#include "domain/step.h"

db_resv *resv_of(Shm *s, uint32_t rec) {
  db_rec *r = rec_at(s, rec);
  if (!r) { shm_corrupt(s, "a record outside of the file"); return NULL; }
  return &r->r;
}
db_ctx *ctx_alive(Shm *s, uint64_t word) {
  db_ctx *c = ctx_at(s, CTX_INDEX(word));
  return c && atomic_load(&c->gen) == CTX_GEN(word) && atomic_load(&c->life) ? c : NULL;
}
static inline a32 *lock_futex(db_resv *r) {
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  return (a32 *)&r->lock;
#else
#error "the futex is the low half of the lock word: little-endian only"
#endif
}
static inline int older(db_ctx *a, db_ctx *b) { return (int64_t)(atomic_load(&a->stamp) - atomic_load(&b->stamp)) < 0; }

#define RAISED (-100000) /* an exception is set */
/* 0 locked, 1 taken from a dead owner, a negative errno, or RAISED */
static int take(Shm *s, db_resv *r, uint64_t me, int acquired, int interruptible, int try, int64_t until) {
  db_ctx *mine = ctx_at(s, CTX_INDEX(me));
  if (!mine) { shm_corrupt(s, "a context outside of the file"); return RAISED; }
  uint64_t w = 0;
  if (!atomic_load(&r->next) && atomic_compare_exchange_strong(&r->lock, &w, me)) {
    STEP(resv_locked);
    return 0;
  }
  int real = (int)atomic_load(&mine->real), result = 0, waited = 0;
  for (;;) {
    w = atomic_load(&r->lock);
    uint64_t owner = w & ~CTX_WAITERS, nx = atomic_load(&r->next);
    if (owner == me) { result = real ? -EALREADY : -EDEADLK; break; }
    db_ctx *holder = owner ? ctx_alive(s, owner) : NULL, *first = nx && nx != me ? ctx_alive(s, nx) : NULL;
    if (!holder) {
      if (!first || try || older(mine, first)) {
        if (!atomic_compare_exchange_strong(&r->lock, &w, me | (w & CTX_WAITERS))) continue;
        if (owner) { STEP(resv_stolen); }
        else STEP(resv_locked);
        if (nx == me) atomic_compare_exchange_strong(&r->next, &nx, 0);
        if (w & CTX_WAITERS) word_wake(lock_futex(r), INT32_MAX); /* they look again: some must die, one becomes next */
        return owner ? 1 : 0;
      }
    } else if (try) {
      int k = waited ? 0 : shm_polled(s);
      if (k < 0) { result = RAISED; break; }
      if (k && !waited++) continue;
      result = -EBUSY;
      break;
    }
    else if (real && acquired > 0) { /* wait-die: who holds locks does not wait for an older one */
      db_ctx *elder = atomic_load(&holder->real) && older(holder, mine) ? holder : first && atomic_load(&first->real) && older(first, mine) ? first : NULL;
      if (elder) {
        uint64_t word = elder == holder ? owner : nx;
        if (shm_tick(s, TICK_CHECK, atomic_load(&elder->life))) { result = RAISED; break; }
        if (!ctx_alive(s, word)) continue; /* a dead process is no older context */
        result = -EDEADLK;
        break;
      }
    }
    if (until >= 0 && now_ns() >= until) { result = -ETIMEDOUT; break; }
    if (nx != me && (!first || older(mine, first))) {
      if (!atomic_compare_exchange_strong(&r->next, &nx, me)) continue;
      STEP(resv_next); /* named as next; a death leaves a name whose context is no longer alive */
      if (w & CTX_WAITERS) word_wake(lock_futex(r), INT32_MAX);
      waited = 1;
      continue;
    }
    if (!(w & CTX_WAITERS) && !atomic_compare_exchange_strong(&r->lock, &w, w | CTX_WAITERS)) continue;
    waited = 1;
    STEP(resv_waiting);
    if (step_armed) step_sleeping(STEP_resv_waiting);
    int k = shm_sleep(s, lock_futex(r), (uint32_t)(w | CTX_WAITERS), until, TICK_RESV, owner ? owner : nx);
    if (k == -1) { result = RAISED; break; }
    if (k == -2 && interruptible) { result = -EINTR; break; }
  }
  if (waited) { /* leave without a trace, and let the others choose anew */
    uint64_t nx = me;
    if (atomic_compare_exchange_strong(&r->next, &nx, 0)) word_wake(lock_futex(r), INT32_MAX);
  }
  return result;
}
int resv_give(db_resv *r, uint64_t me) { /* 1: it was ours */
  uint64_t w = atomic_load(&r->lock);
  if ((w & ~CTX_WAITERS) != me) return 0;
  w = atomic_exchange(&r->lock, 0);
  STEP(resv_unlocked); /* free; who sleeps finds out at the next tick if we die now */
  if ((w & CTX_WAITERS) || atomic_load(&r->next)) word_wake(lock_futex(r), INT32_MAX);
  return 1;
}
/* One compare-and-swap hands a held lock from one context to another, so at every instant it has a living owner, or one whose death frees
 * it. Who sleeps looks again: the new owner may be older or younger than the last. */
int resv_hand(Shm *s, db_resv *r, uint64_t from, uint64_t to) { /* 1: `from` held it, and now `to` does */
  if (!from || !ctx_alive(s, to)) return 0;
  uint64_t w = atomic_load(&r->lock);
  do {
    if ((w & ~CTX_WAITERS) != (from & ~CTX_WAITERS)) return 0;
  } while (!atomic_compare_exchange_strong(&r->lock, &w, to | (w & CTX_WAITERS)));
  STEP(resv_passed);
  if (w & CTX_WAITERS) word_wake(lock_futex(r), INT32_MAX);
  return 1;
}
static PyObject *resv_lock(Shm *s, PyObject *args) {
  unsigned rec;
  unsigned long long me;
  int acquired, interruptible, try;
  long long until;
  if (!PyArg_ParseTuple(args, "IKippL", &rec, &me, &acquired, &interruptible, &try, &until)) return NULL;
  if (shm_need_life(s, "lock")) return NULL;
  db_resv *r = resv_of(s, rec);
  if (!r) return NULL;
  int result = take(s, r, me, acquired, interruptible, try, until);
  return result == RAISED ? NULL : PyLong_FromLong(result);
}
static PyObject *resv_unlock(Shm *s, PyObject *args) { /* (rec, ctx) -> it was ours */
  unsigned rec;
  unsigned long long me;
  if (!PyArg_ParseTuple(args, "IK", &rec, &me)) return NULL;
  db_resv *r = resv_of(s, rec);
  if (!r) return NULL;
  return PyBool_FromLong(my_life(s) && resv_give(r, me));
}
static PyObject *resv_owner(Shm *s, PyObject *arg) { /* the living owner's ctx word, 0: unlocked */
  unsigned long rec = PyLong_AsUnsignedLong(arg);
  if (rec == (unsigned long)-1 && PyErr_Occurred()) return NULL;
  db_resv *r = resv_of(s, (uint32_t)rec);
  if (!r) return NULL;
  uint64_t owner = atomic_load(&r->lock) & ~CTX_WAITERS;
  if (owner && ctx_alive(s, owner) && shm_polled(s) < 0) return NULL;
  return PyLong_FromUnsignedLongLong(owner && ctx_alive(s, owner) ? owner : 0);
}

/* ---- the list ---- */
typedef struct { Shm *s; db_resv *r; uint32_t i, block, blocks, rec; } cursor;
static a64 *entry_next(cursor *c) { /* NULL at the end of the capacity */
  uint32_t i = c->i++;
  if (i < INLINE_ENTRIES) return &c->r->entry[i];
  i = (i - INLINE_ENTRIES) % BLOCK_ENTRIES;
  if (!i) {
    db_block *b = c->blocks ? block_at(c->s, c->block - 1) : NULL;
    c->block = c->blocks ? (b ? atomic_load(&b->next) : 0) : atomic_load(&c->r->block);
    if (++c->blocks > c->s->known * BLOCKS_PER) c->block = 0; /* more than there are: a circle */
  }
  db_block *b = c->block ? block_at(c->s, c->block - 1) : NULL;
  if (!b || atomic_load(&b->owner) != c->rec + 1) return NULL;
  return &b->entry[i];
}
/* An entry and whether its fence is pending. One that is replaced while we look is looked at again: the new fence was there before the
 * old one ended, so without the lock, too, there is no instant at which neither is seen. */
static uint64_t entry_look(Shm *s, a64 *p, int *pending) {
  uint64_t e = atomic_load(p);
  *pending = 0;
  for (int k = 0; e && !(*pending = fence_pending(s, E_HANDLE(e), NULL)) && k < 64; k++) {
    uint64_t now = atomic_load(p);
    if (now == e) break;
    e = now;
  }
  return e;
}
static uint64_t first_pending(Shm *s, db_resv *r, uint32_t rec, uint32_t usage) {
  cursor c = {s, r, 0, 0, 0, rec};
  for (a64 *p; (p = entry_next(&c));) {
    int pending;
    uint64_t e = entry_look(s, p, &pending);
    if (!e) break;
    if (E_USAGE(e) <= usage && pending) return E_HANDLE(e);
  }
  return 0;
}
static PyObject *resv_entries(Shm *s, PyObject *args) { /* (rec, usage, pending_only) -> [handle, usage, ...] flat pairs */
  unsigned rec, usage;
  int pending;
  if (!PyArg_ParseTuple(args, "IIp", &rec, &usage, &pending)) return NULL;
  db_resv *r = resv_of(s, rec);
  if (r && pending && first_pending(s, r, rec, usage) && shm_polled(s) < 0) return NULL;
  PyObject *out = r ? PyList_New(0) : NULL;
  cursor c = {s, r, 0, 0, 0, rec};
  for (a64 *p; out && (p = entry_next(&c));) {
    int now;
    uint64_t e = entry_look(s, p, &now);
    if (!e) break;
    if (E_USAGE(e) > usage || (pending && !now)) continue;
    PyObject *t = Py_BuildValue("KI", (unsigned long long)E_HANDLE(e), E_USAGE(e));
    if (!t || PyList_Append(out, t)) Py_CLEAR(out);
    Py_XDECREF(t);
  }
  return out;
}
static PyObject *resv_pending(Shm *s, PyObject *args) { /* (rec, usage, not) -> [handle] of pending fences but `not` */
  unsigned rec, usage;
  unsigned long long not;
  if (!PyArg_ParseTuple(args, "IIK", &rec, &usage, &not)) return NULL;
  db_resv *r = resv_of(s, rec);
  if (r && first_pending(s, r, rec, usage) && shm_polled(s) < 0) return NULL;
  PyObject *out = r ? PyList_New(0) : NULL;
  cursor c = {s, r, 0, 0, 0, rec};
  for (a64 *p; out && (p = entry_next(&c));) {
    int pending;
    uint64_t e = entry_look(s, p, &pending);
    if (!e) break;
    if (E_USAGE(e) > usage || E_HANDLE(e) == not || !pending) continue;
    PyObject *h = PyLong_FromUnsignedLongLong(E_HANDLE(e));
    if (!h || PyList_Append(out, h)) Py_CLEAR(out);
    Py_XDECREF(h);
  }
  return out;
}
static PyObject *resv_busy(Shm *s, PyObject *args) { /* (rec, usage) -> a pending fence of at most that usage, or 0 */
  unsigned rec, usage;
  if (!PyArg_ParseTuple(args, "II", &rec, &usage)) return NULL;
  db_resv *r = resv_of(s, rec);
  if (!r) return NULL;
  uint64_t h = first_pending(s, r, rec, usage);
  if (h) {
    int k = shm_polled(s);
    if (k < 0) return NULL;
    if (k) h = first_pending(s, r, rec, usage);
  }
  return PyLong_FromUnsignedLongLong(h);
}
static int grow(Shm *s, db_resv *r, uint32_t rec, uint32_t cap, uint32_t n) { /* lock held: n entries more than cap; 0, -errno or RAISED */
  a32 *link = &r->block;
  for (uint32_t k = 0; atomic_load(link) && k < s->known * BLOCKS_PER; k++) {
    db_block *b = block_at(s, atomic_load(link) - 1);
    if (!b || atomic_load(&b->owner) != rec + 1) { atomic_store(link, 0); break; }
    link = &b->next;
  }
  uint32_t more = (n + BLOCK_ENTRIES - 1) / BLOCK_ENTRIES;
  if ((uint64_t)more * BLOCK_ENTRIES + cap > 1u << 22) return -ENOMEM;
  return blocks_add(s, rec, link, more) ? RAISED : 0;
}
static int make_room(Shm *s, db_resv *r, uint32_t rec, uint32_t n) { /* lock held: 0, a negative errno, or RAISED */
  cursor c = {s, r, 0, 0, 0, rec};
  uint32_t room = 0, cap = 0, used = 0;
  a64 *tail[16];
  for (a64 *p; (p = entry_next(&c)); cap++) {
    uint64_t e = atomic_load(p);
    if (!e || !fence_pending(s, E_HANDLE(e), NULL)) room++;
    if (e) { tail[used & 15] = p; used++; }
  }
  if (used > INLINE_ENTRIES) /* a list that grew long once shrinks a little each time */
    for (uint32_t k = 0; k < 16; k++) {
      a64 *p = tail[(used - 1 - k) & 15];
      if (fence_pending(s, E_HANDLE(atomic_load(p)), NULL)) break;
      atomic_store(p, 0); /* only the last entry goes, so the list never has a hole */
    }
  return room >= n ? 0 : grow(s, r, rec, cap, n - room);
}
static PyObject *resv_reserve(Shm *s, PyObject *args) { /* (rec, n): room for n more; lock held */
  unsigned rec, n;
  if (!PyArg_ParseTuple(args, "II", &rec, &n)) return NULL;
  db_resv *r = resv_of(s, rec);
  if (!r) return NULL;
  int result = make_room(s, r, rec, n);
  return result == RAISED ? NULL : PyLong_FromLong(result);
}
static int later(db_fence *a, uint64_t seqno, db_fence *b) { /* is a, whose number is seqno, later than b of the same context? (spec 3.10) */
  uint64_t other = atomic_load(&b->seqno);
  return atomic_load(&a->flags) & FF_SEQNO64 ? seqno > other : (int32_t)((uint32_t)seqno - (uint32_t)other) > 0;
}
static int put(Shm *s, db_resv *r, uint32_t rec, uint64_t handle, uint32_t usage, long room) { /* 1 took room, 0 replaced, -1 no room */
  db_fence *f;
  fence_pending(s, handle, &f);
  uint64_t context = f ? atomic_load(&f->context) : 0, seqno = f ? atomic_load(&f->seqno) : 0;
  cursor c = {s, r, 0, 0, 0, rec};
  for (a64 *p; (p = entry_next(&c));) {
    uint64_t e = atomic_load(p);
    if (!e) {
      if (!room) return -1;
      if (f) fence_flag(handle, f, FW_SHARED);
      atomic_store(p, E_MAKE(handle, usage));
      STEP(resv_added);
      return 1;
    }
    db_fence *o;
    int pending = fence_pending(s, E_HANDLE(e), &o);
    if (!pending || (f && o && atomic_load(&o->context) == context && E_USAGE(e) >= usage &&
                     (E_HANDLE(e) == handle || later(f, seqno, o)))) {
      if (f) fence_flag(handle, f, FW_SHARED);
      atomic_store(p, E_MAKE(handle, usage));
      STEP(resv_added);
      return 0;
    }
  }
  return -1;
}
static PyObject *resv_add(Shm *s, PyObject *args) { /* (rec, handle, usage, room) */
  unsigned rec, usage;
  unsigned long long handle;
  long room;
  if (!PyArg_ParseTuple(args, "IKIl", &rec, &handle, &usage, &room)) return NULL;
  db_resv *r = resv_of(s, rec);
  if (!r) return NULL;
  if (usage > 3) { PyErr_SetString(PyExc_ValueError, "resv_add: usage is 0 to 3"); return NULL; }
  return PyLong_FromLong(put(s, r, rec, handle, usage, room));
}

/* resv_copy(rec, source): the entries of rec, whose lock is held, become those of source that are pending -> 0 or -errno.
 *
 * The new ones are appended first, then written over the old ones from the front, then the list is cut at its end, one entry at a time.
 * So at any instant, and after a death at any, the list holds all of the new ones and perhaps some of the old, without a hole. */
static PyObject *resv_copy(Shm *s, PyObject *args) {
  unsigned rec, source;
  if (!PyArg_ParseTuple(args, "II", &rec, &source)) return NULL;
  db_resv *r = resv_of(s, rec), *from = resv_of(s, source);
  if (!r || !from) return NULL;
  uint32_t n = 0, used = 0, cap = 0, room = 0, ended = 0;
  uint64_t *new = NULL;
  a64 **at = NULL;
  int result = 0;
  cursor c = {s, from, 0, 0, 0, source};
  for (a64 *p; (p = entry_next(&c));) {
    uint64_t e = atomic_load(p);
    if (!e) break;
    if (!fence_pending(s, E_HANDLE(e), NULL)) continue;
    if (n == room) {
      uint64_t *bigger = PyMem_Realloc(new, (room += 64 + room) * sizeof *new);
      if (!bigger) { PyErr_NoMemory(); result = RAISED; goto out; }
      new = bigger;
    }
    new[n++] = e;
  }
  c = (cursor){s, r, 0, 0, 0, rec};
  for (a64 *p; (p = entry_next(&c)); cap++) used += !(ended |= !atomic_load(p));
  if (cap - used < n && (result = grow(s, r, rec, cap, n - (cap - used)))) goto out;
  at = PyMem_Malloc((used + n + 1) * sizeof *at);
  if (!at) { PyErr_NoMemory(); result = RAISED; goto out; }
  c = (cursor){s, r, 0, 0, 0, rec};
  for (uint32_t i = 0; i < used + n; i++)
    if (!(at[i] = entry_next(&c))) { shm_corrupt(s, "a list of fences without its blocks"); result = RAISED; goto out; }
  for (uint32_t i = 0; i < n; i++) {
    atomic_store(at[used + i], new[i]);
    STEP(resv_copied);
  }
  for (uint32_t i = 0; i < n; i++) {
    atomic_store(at[i], new[i]);
    STEP(resv_copied);
  }
  for (uint32_t i = used + n; i > n; i--) {
    atomic_store(at[i - 1], 0);
    STEP(resv_cut);
  }
out:
  PyMem_Free(at);
  PyMem_Free(new);
  return result == RAISED ? NULL : PyLong_FromLong(result);
}

/* ---- an access: what read() and write() do most, in one call each (measured: a third of the Python calls' time) ---- */

/* Lock held: snapshot what is in the way into *pending (NULL when nothing is), add the access's own fence. 0 with an exception or
 * *error set. */
static uint64_t access_put(Shm *s, db_resv *r, uint32_t target, uint32_t rec, uint64_t me, int write, uint32_t timeline, PyObject **pending, int *error) {
  cursor c = {s, r, 0, 0, 0, target};
  *pending = NULL;
  *error = 0;
  for (a64 *p; (p = entry_next(&c));) {
    uint64_t e = atomic_load(p);
    if (!e) break;
    db_fence *f;
    if (E_USAGE(e) > (write ? 2u : 1u) || !fence_pending(s, E_HANDLE(e), &f)) continue;
    if (f && atomic_load(&f->owner) == me) { Py_CLEAR(*pending); *error = EDEADLK; return 0; } /* waiting for oneself */
    PyObject *h = PyLong_FromUnsignedLongLong(E_HANDLE(e));
    if (!*pending) *pending = PyList_New(0);
    int bad = !h || !*pending || PyList_Append(*pending, h);
    Py_XDECREF(h);
    if (bad) { Py_CLEAR(*pending); return 0; }
  }
  int room = make_room(s, r, target, 1);
  if (room) {
    Py_CLEAR(*pending);
    if (room != RAISED) *error = -room;
    return 0;
  }
  uint64_t context = atomic_fetch_add(&hdr(s)->next_context, 1); /* a context of its own: accesses overlap, so none replaces another */
  uint64_t h = fence_make(s, timeline, context, 1, FF_ACCESS | (write ? FF_WRITE : 0), me, rec + 1);
  if (!h) { Py_CLEAR(*pending); return 0; }
  STEP(access_fence); /* pending and unknown: ends with us */
  put(s, r, target, h, write ? 1 : 2, 1);
  STEP(access_added); /* WAITING: dying here writes nothing */
  return h;
}
static int access_mark(Shm *s, uint64_t handle, uint32_t rec, int write) { /* WAITING -> GRANTED; a torn mark in the reader's way instead */
  db_rec *x = rec_at(s, rec);
  int torn = x && !write ? atomic_load(&x->torn) : 0;
  if (torn) return torn > 0 && torn < 4096 ? torn : EUCLEAN;
  db_fence *f;
  fence_pending(s, handle, &f);
  if (f) atomic_fetch_or(&f->flags, FF_GRANTED);
  STEP(access_granted); /* dying from here on tears what is written */
  return 0;
}
/* access_begin(rec, target, ctx, write, timeline, until, locked, access) -> None when granted at once, [pending] when it has to wait,
 * the torn mark's errno for a reader of torn content, or a negative errno. The fence's handle is stored in access._handle. */
static PyObject *access_begin(Shm *s, PyObject *const *a, Py_ssize_t n) {
  static PyObject *name;
  if (!name && !(name = PyUnicode_InternFromString("_handle"))) return NULL;
  if (n != 8) { PyErr_SetString(PyExc_TypeError, "access_begin: eight arguments"); return NULL; }
  uint32_t rec = (uint32_t)PyLong_AsUnsignedLong(a[0]), target = (uint32_t)PyLong_AsUnsignedLong(a[1]), timeline = (uint32_t)PyLong_AsUnsignedLong(a[4]);
  uint64_t me = PyLong_AsUnsignedLongLong(a[2]);
  int write = PyObject_IsTrue(a[3]), locked = PyObject_IsTrue(a[6]);
  int64_t until = PyLong_AsLongLong(a[5]);
  if (PyErr_Occurred() || shm_need_life(s, "access")) return NULL;
  db_resv *r = resv_of(s, target);
  if (!r) return NULL;
  if (!locked) {
    int got = take(s, r, me, 0, 0, 0, until);
    if (got == RAISED) return NULL;
    if (got < 0) return PyLong_FromLong(got == -EDEADLK ? -EALREADY : got);
  }
  PyObject *pending;
  int error;
  uint64_t h = access_put(s, r, target, rec, me, write, timeline, &pending, &error);
  if (!locked) resv_give(r, me);
  if (!h) return PyErr_Occurred() ? NULL : PyLong_FromLong(-error);
  PyObject *handle = PyLong_FromUnsignedLongLong(h);
  if (!handle || PyObject_SetAttr(a[7], name, handle)) {
    Py_XDECREF(handle);
    Py_XDECREF(pending);
    fence_end(s, h, 0);
    return NULL;
  }
  Py_DECREF(handle);
  if (pending) return pending;
  if (locked) return PyList_New(0); /* one of several: granted when all are free */
  int torn = access_mark(s, h, rec, write);
  if (torn) return PyLong_FromLong(torn);
  Py_RETURN_NONE;
}
static PyObject *access_grant(Shm *s, PyObject *args) { /* (handle, rec, write) -> torn errno in the way, 0 when granted */
  unsigned long long h;
  unsigned rec;
  int write;
  if (!PyArg_ParseTuple(args, "KIp", &h, &rec, &write)) return NULL;
  return PyLong_FromLong(access_mark(s, h, rec, write));
}
static PyObject *access_end(Shm *s, PyObject *const *a, Py_ssize_t n) { /* (handle, rec, write, error, pid) */
  if (n != 5) { PyErr_SetString(PyExc_TypeError, "access_end: five arguments"); return NULL; }
  uint64_t h = PyLong_AsUnsignedLongLong(a[0]);
  uint32_t rec = (uint32_t)PyLong_AsUnsignedLong(a[1]), pid = (uint32_t)PyLong_AsUnsignedLong(a[4]);
  int write = PyObject_IsTrue(a[2]), error = (int)PyLong_AsLong(a[3]);
  if (PyErr_Occurred()) return NULL;
  db_rec *x = write ? rec_at(s, rec) : NULL;
  if (x && error) {
    x->torn_pid = pid;
    atomic_store(&x->torn, -error);
    STEP(access_torn); /* torn, still pending: the reaper marks it again */
  } else if (x && atomic_load(&x->torn)) {
    atomic_store(&x->torn, 0);
    STEP(access_whole); /* whole, still GRANTED: dying here tears it again, which is only cautious */
  }
  fence_end(s, h, error);
  STEP(access_ended);
  Py_RETURN_NONE;
}
static PyObject *resv_replace(Shm *s, PyObject *args) { /* (rec, context, handle, usage): every entry of the context */
  unsigned rec, usage;
  unsigned long long context, handle;
  if (!PyArg_ParseTuple(args, "IKKI", &rec, &context, &handle, &usage)) return NULL;
  db_resv *r = resv_of(s, rec);
  if (!r) return NULL;
  db_fence *f;
  fence_pending(s, handle, &f);
  cursor c = {s, r, 0, 0, 0, rec};
  unsigned n = 0;
  for (a64 *p; (p = entry_next(&c));) {
    uint64_t e = atomic_load(p);
    if (!e) break;
    db_fence *o;
    fence_pending(s, E_HANDLE(e), &o);
    if (!o || atomic_load(&o->context) != context) continue;
    if (f) fence_flag(handle, f, FW_SHARED);
    atomic_store(p, E_MAKE(handle, usage & 3));
    n++;
  }
  return PyLong_FromUnsignedLong(n);
}
PyMethodDef resv_methods[] = {
#define M(n, flags, doc) {#n, (PyCFunction)n, flags, doc}
    M(resv_lock, METH_VARARGS, "Lock (rec, ctx, acquired, interruptible, try, until) -> 0, 1 from a dead owner, or -errno."),
    M(resv_unlock, METH_VARARGS, "Unlock (rec, ctx) -> it was ours."), M(resv_owner, METH_O, "The living owner's context word, or 0."),
    M(resv_entries, METH_VARARGS, "Entries (rec, usage, pending_only) -> [(handle, usage)]."),
    M(resv_pending, METH_VARARGS, "Pending handles (rec, usage, but)."), M(resv_busy, METH_VARARGS, "A pending handle (rec, usage), or 0."),
    M(resv_reserve, METH_VARARGS, "Make room (rec, n)."), M(resv_add, METH_VARARGS, "Add (rec, handle, usage, room) -> 1, 0, -1."),
    M(resv_copy, METH_VARARGS, "Copy (rec, source rec) -> 0 or -errno."),
    M(resv_replace, METH_VARARGS, "Replace (rec, context, handle, usage) -> count."),
    {"access_begin", (PyCFunction)(void *)access_begin, METH_FASTCALL, "Snapshot and own fence (rec, target, ctx, write, timeline, until, locked, access)."},
    {"access_grant", (PyCFunction)access_grant, METH_VARARGS, "WAITING -> GRANTED (handle, rec, write) -> torn errno or 0."},
    {"access_end", (PyCFunction)(void *)access_end, METH_FASTCALL, "End an access (handle, rec, write, error, pid)."},
    {0}};
