/* resv_lock.c - the lock of a reservation object.
 *
 * The lock is the wait-die ww_mutex of spec 4.10. It is one word; it goes from 0 to its owner's context in one
 * compare-and-swap, so there is no instant at which it is held by nobody in particular; a lock whose owner's context has
 * another generation by now belongs to a dead process and is taken the same way. `next` names the oldest waiter, which
 * nobody younger overtakes. Whoever sleeps looks at everything again when woken, which is how a waiter is "woken to die". */
#include "domain/resv_lock.h"
#include "domain/sleep.h"
#include "domain/step.h"
#include "domain/table.h"
#include "domain/ticker.h"

db_resv *resv_of(Shm *s, uint32_t rec) {
  db_rec *r = rec_at(s, rec);
  if (!r) {
    shm_corrupt(s, "a record outside of the file");
    return NULL;
  }
  return &r->resv;
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

/* 0 locked, 1 taken from a dead owner, a negative errno, or RAISED */
int take(Shm *s, db_resv *r, uint64_t me, int acquired, int interruptible, int try, int64_t until) {
  db_ctx *mine = ctx_at(s, CTX_INDEX(me));
  if (!mine) {
    shm_corrupt(s, "a context outside of the file");
    return RAISED;
  }
  uint64_t w = 0;
  if (!atomic_load(&r->next) && atomic_compare_exchange_strong(&r->lock, &w, me)) {
    STEP(resv_locked);
    return 0;
  }
  int real = (int)atomic_load(&mine->real), result = 0, waited = 0;
  for (;;) {
    w = atomic_load(&r->lock);
    uint64_t owner = w & ~CTX_WAITERS, nx = atomic_load(&r->next);
    if (owner == me) {
      result = real ? -EALREADY : -EDEADLK;
      break;
    }
    db_ctx *holder = owner ? ctx_alive(s, owner) : NULL, *first = nx && nx != me ? ctx_alive(s, nx) : NULL;
    if (!holder) {
      if (!first || try || older(mine, first)) {
        if (!atomic_compare_exchange_strong(&r->lock, &w, me | (w & CTX_WAITERS))) continue;
        if (owner) {
          STEP(resv_stolen);
        } else
          STEP(resv_locked);
        if (nx == me) atomic_compare_exchange_strong(&r->next, &nx, 0);
        if (w & CTX_WAITERS) word_wake(lock_futex(r), INT32_MAX); /* they look again: some must die, one becomes next */
        return owner ? 1 : 0;
      }
    } else if (try) {
      int k = waited ? 0 : shm_polled(s);
      if (k < 0) {
        result = RAISED;
        break;
      }
      if (k && !waited++) continue;
      result = -EBUSY;
      break;
    } else if (real && acquired > 0) { /* wait-die: who holds locks does not wait for an older one */
      db_ctx *elder = atomic_load(&holder->real) && older(holder, mine)          ? holder
                      : first && atomic_load(&first->real) && older(first, mine) ? first
                                                                                 : NULL;
      if (elder) {
        uint64_t word = elder == holder ? owner : nx;
        if (shm_tick(s, TICK_CHECK, atomic_load(&elder->life))) {
          result = RAISED;
          break;
        }
        if (!ctx_alive(s, word)) continue; /* a dead process is no older context */
        result = -EDEADLK;
        break;
      }
    }
    if (until >= 0 && now_ns() >= until) {
      result = -ETIMEDOUT;
      break;
    }
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
    if (k == -1) {
      result = RAISED;
      break;
    }
    if (k == -2 && interruptible) {
      result = -EINTR;
      break;
    }
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

PyMethodDef resv_lock_methods[] = {
    METHOD(resv_lock, METH_VARARGS, "Lock (rec, ctx, acquired, interruptible, try, until) -> 0, 1 from a dead owner, or -errno."),
    METHOD(resv_unlock, METH_VARARGS, "Unlock (rec, ctx) -> it was ours."),
    METHOD(resv_owner, METH_O, "The living owner's context word, or 0."),
    {0}};
