/* resv_lock.c - the lock of a reservation object: the wait-die ww_mutex of semantics 4.10.
 *
 * The lock is one word. It goes from 0 to its owner's context by one compare-and-swap, so at no instant does it belong to nobody in
 * particular. A lock whose owner's context has another generation by now belonged to a dead process, and is taken in the same way. `next`
 * names the oldest waiter, which younger ones let pass. A waiter that wakes looks at everything again, and may find that it must die.
 *
 * Nobody's progress depends on the process that `next` names: it may be stopped, frozen or in a debugger. A waiter that has slept for a
 * tick, or whose time is over, and finds the lock free takes it, and removes the name. The overtaken waiter writes it again when it runs.
 */
#include "domain/resv_lock.h"
#include "domain/sleep.h"
#include "domain/step.h"
#include "domain/table.h"
#include "domain/ticker.h"
#include <sys/syscall.h>
#include <unistd.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the futex is the low half of the lock word: little-endian only"
#endif

db_resv *resv_of(Shm *s, uint32_t rec) {
  db_rec *r = rec_at(s, rec);
  if (r) return &r->resv;
  shm_corrupt(s, "a record lies outside of it");
  return NULL;
}

db_ctx *ctx_open_at(Shm *s, uint64_t word) {
  db_ctx *c = ctx_at(s, CTX_INDEX(word));
  return c && atomic_load(&c->gen) == CTX_GEN(word) && atomic_load(&c->life) ? c : NULL;
}

int ctx_is_here(Shm *s, db_ctx *c) {
  return my_life(s) && atomic_load(&c->life) == my_life(s) && atomic_load(&c->tid) == (uint32_t)syscall(SYS_gettid);
}

static inline a32 *lock_futex(db_resv *r) { return (a32 *)&r->lock; }

static inline void wake_waiters(db_resv *r) { word_wake(lock_futex(r), INT32_MAX); }

static inline int older(db_ctx *a, db_ctx *b) { return (int64_t)(atomic_load(&a->stamp) - atomic_load(&b->stamp)) < 0; }

/* Another thread of this process left the domain, so the context is closed: a lock with its name would be free for everyone. */
static int left_meanwhile(Shm *s) {
  shm_fail(s, EOWNERDEAD, "lock", "a reservation object", "this process left the domain meanwhile", "lock it again");
  return RAISED;
}

int resv_take(Shm *s, db_resv *r, uint64_t me, int acquired, int interruptible, int try, int64_t until) {
  db_ctx *mine = ctx_at(s, CTX_INDEX(me));
  if (!mine) {
    shm_corrupt(s, "a context lies outside of it");
    return RAISED;
  }
  if (!ctx_open_at(s, me)) return left_meanwhile(s);
  uint64_t w = 0;
  if (!atomic_load(&r->next) && atomic_compare_exchange_strong(&r->lock, &w, me)) {
    STEP_OF(resv_locked, r, me); /* locked: a death frees it, by the context's generation */
    return 0;
  }
  int64_t since = 0;
  int real = (int)atomic_load(&mine->real), result = 0, waited = 0, ticked = 0;
  for (;;) {
    w = atomic_load(&r->lock);
    uint64_t owner = w & ~CTX_WAITERS, next = atomic_load(&r->next);
    if (owner == me) {
      result = real ? -EALREADY : -EDEADLK;
      break;
    }
    db_ctx *holder = owner ? ctx_open_at(s, owner) : NULL, *first = next && next != me ? ctx_open_at(s, next) : NULL;
    if (!holder) {
      int overtakes = ticked || (first && until >= 0 && now_ns() >= until);
      if (!first || try || overtakes || older(mine, first)) {
        if (!atomic_compare_exchange_strong(&r->lock, &w, me | (w & CTX_WAITERS))) continue;
        if (owner) {
          STEP_NOTE(resv_dead_owner, r, owner);
          STEP_OF(resv_stolen, r, me); /* locked, as above: the dead owner left a whole list of fences */
        } else {
          STEP_OF(resv_locked, r, me);
        }
        /* A name that is stale, or whose process let a free lock lie for a tick, would keep every later locker from the short way. */
        if (next && (!first || overtakes)) atomic_compare_exchange_strong(&r->next, &next, 0);
        if (w & CTX_WAITERS) wake_waiters(r); /* they look again: some must die, and one becomes the next */
        return owner ? 1 : 0;
      }
    } else if (try) {
      int k = waited ? 0 : shm_notice_deaths(s);
      if (k < 0) {
        result = RAISED;
        break;
      }
      if (k && !waited++) continue;
      result = -EBUSY;
      break;
    } else if (real && acquired > 0) { /* wait-die: a context that holds locks does not wait for an older one */
      db_ctx *elder = NULL;
      if (atomic_load(&holder->real) && older(holder, mine))
        elder = holder;
      else if (first && atomic_load(&first->real) && older(first, mine))
        elder = first;
      if (elder) {
        uint64_t word = elder == holder ? owner : next;
        if (shm_tick(s, TICK_CHECK, atomic_load(&elder->life))) {
          result = RAISED;
          break;
        }
        if (!ctx_open_at(s, word)) continue; /* its process was dead */
        result = -EDEADLK;
        break;
      }
    }
    if (until >= 0 && now_ns() >= until) {
      result = -ETIMEDOUT;
      break;
    }
    if (next != me && (!first || older(mine, first))) {
      if (!atomic_compare_exchange_strong(&r->next, &next, me)) continue;
      STEP(resv_next); /* named as the next: a death leaves the name of a closed context, which counts for nothing */
      if (w & CTX_WAITERS) wake_waiters(r);
      waited = 1;
      continue;
    }
    if (holder && ctx_is_here(s, holder)) {
      result = -EBUSY;
      break;
    }
    STEP(resv_looked); /* it will wait: nothing has changed yet */
    if (!(w & CTX_WAITERS) && !atomic_compare_exchange_strong(&r->lock, &w, w | CTX_WAITERS)) continue;
    waited = 1;
    /* On a free lock this process relies on the one that `next` names. If that one went before the bit was set, nobody wakes it. */
    if (!owner && atomic_load(&r->next) != next) continue;
    STEP(resv_waiting); /* the bit for waiters is set: a death leaves one wake-up too many */
    STEP_SLEEPING(resv_waiting);
    uint32_t moves = s->moves;
    int k = shm_sleep(s, lock_futex(r), (uint32_t)(w | CTX_WAITERS), until, TICK_RESV, owner ? owner : next);
    if (s->moves != moves || !ctx_open_at(s, me)) { /* another thread left the domain: the context is closed, and `r` may be gone */
      if (k == SLEEP_RAISED) return RAISED;
      return left_meanwhile(s);
    }
    if (k == SLEEP_RAISED) {
      result = RAISED;
      break;
    }
    if (k == SLEEP_TICK && shm_lasts(s, &since, TICK_RESV, owner ? owner : next)) {
      result = RAISED;
      break;
    }
    ticked = k == SLEEP_TICK && !holder; /* the lock was free, and has been left alone for a while */
    if (k == SLEEP_SIGNAL && interruptible) {
      result = -EINTR;
      break;
    }
  }
  if (waited) { /* leave no name behind, and let the others choose again */
    uint64_t next = me, unlocked = CTX_WAITERS;
    if (atomic_compare_exchange_strong(&r->next, &next, 0)) {
      /* A process that is about to sleep on a free lock finds another word there, and looks again. */
      atomic_compare_exchange_strong(&r->lock, &unlocked, 0);
      wake_waiters(r);
    }
  }
  return result;
}

int resv_release(db_resv *r, uint64_t me) {
  uint64_t w = atomic_load(&r->lock);
  if ((w & ~CTX_WAITERS) != me) return 0;
  STEP_NOTE(resv_unlocking, r, me);
  w = atomic_exchange(&r->lock, 0);
  STEP(resv_unlocked); /* free: a waiter finds out at its next tick */
  if ((w & CTX_WAITERS) || atomic_load(&r->next)) wake_waiters(r);
  return 1;
}

/* By one compare-and-swap, so that at every instant the lock has an owner that is alive or whose death frees it. */
int resv_transfer(Shm *s, db_resv *r, uint64_t from, uint64_t to) {
  if (!from || !ctx_open_at(s, to)) return 0;
  uint64_t w = atomic_load(&r->lock);
  STEP_NOTE(resv_passing, r, from & ~CTX_WAITERS);
  STEP_NOTE(resv_passing_to, r, to);
  do {
    if ((w & ~CTX_WAITERS) != (from & ~CTX_WAITERS)) return 0;
  } while (!atomic_compare_exchange_strong(&r->lock, &w, to | (w & CTX_WAITERS)));
  STEP(resv_passed);                    /* the lock is the new owner's */
  if (w & CTX_WAITERS) wake_waiters(r); /* they look again: the new owner may be older or younger than the last */
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
  int result = resv_take(s, r, me, acquired, interruptible, try, until);
  return result == RAISED ? NULL : PyLong_FromLong(result);
}

static PyObject *resv_unlock(Shm *s, PyObject *args) {
  unsigned rec;
  unsigned long long me;
  if (!PyArg_ParseTuple(args, "IK", &rec, &me)) return NULL;
  db_resv *r = resv_of(s, rec);
  return r ? PyBool_FromLong(my_life(s) && resv_release(r, me)) : NULL;
}

static PyObject *resv_owner(Shm *s, PyObject *arg) {
  uint32_t rec;
  if (arg_u32(arg, &rec)) return NULL;
  db_resv *r = resv_of(s, rec);
  if (!r) return NULL;
  uint64_t owner = atomic_load(&r->lock) & ~CTX_WAITERS;
  if (owner && ctx_open_at(s, owner) && shm_notice_deaths(s) < 0) return NULL;
  return PyLong_FromUnsignedLongLong(owner && ctx_open_at(s, owner) ? owner : 0);
}

PyMethodDef resv_lock_methods[] = {
    METHOD(resv_lock, METH_VARARGS, "($self, rec, ctx, acquired, interruptible, trylock, until, /)",
           "Lock a reservation object. Return 0, 1 if it was taken from a dead owner, or -errno.\n\n"
           "Args:\n"
           "    ctx: The word of the context that locks.\n"
           "    acquired: How many locks it holds already.\n"
           "    trylock: Return -EBUSY instead of waiting. Without it, -EBUSY says that another task of this thread holds the lock.\n"
           "    until: CLOCK_MONOTONIC ns, or -1 for no limit."),
    METHOD(resv_unlock, METH_VARARGS, "($self, rec, ctx, /)", "Unlock. Return False if the context does not hold the lock."),
    METHOD(resv_owner, METH_O, "($self, rec, /)", "Return the word of the living owner's context, 0: unlocked."),
    {0}};
