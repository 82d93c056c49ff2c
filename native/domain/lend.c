/* lend.c - a reservation lock on loan: another process holds it during a remote call that is made under the lock.
 *
 * The borrower's context names the context that gets the lock back (`return_to`) before it has the lock, and until it no longer has it. The
 * process that reaps a borrower returns the lock before the generation of the borrower's context moves, so that no other process can take
 * it in between. If the context to return it to is closed, the lock is free, as after the end of any owner.
 */
#include "domain/lend.h"
#include "domain/resv_lock.h"
#include "domain/step.h"
#include "domain/table.h"

static db_ctx *own_ctx(Shm *s, uint64_t word) { /* the context, if it is open and this life's */
  db_ctx *c = ctx_open_at(s, word);
  return c && my_life(s) && atomic_load(&c->life) == my_life(s) ? c : NULL;
}

static PyObject *resv_pass(Shm *s, PyObject *args) {
  unsigned rec;
  unsigned long long from, to;
  if (!PyArg_ParseTuple(args, "IKK", &rec, &from, &to)) return NULL;
  db_resv *r = resv_of(s, rec);
  return r ? PyBool_FromLong(my_life(s) && resv_transfer(s, r, from, to)) : NULL;
}

static PyObject *resv_borrow(Shm *s, PyObject *args) {
  unsigned rec;
  unsigned long long from, me;
  if (!PyArg_ParseTuple(args, "IKK", &rec, &from, &me)) return NULL;
  db_resv *r = resv_of(s, rec);
  if (!r) return NULL;
  db_ctx *c = own_ctx(s, me);
  if (!c || atomic_load(&c->return_to)) Py_RETURN_FALSE;
  atomic_store(&c->return_rec, rec);
  atomic_store(&c->return_to, from & ~CTX_WAITERS);
  STEP(resv_return_to); /* it names what it does not have: returning looks at the lock */
  int borrowed = resv_transfer(s, r, from, me);
  if (!borrowed)
    atomic_store(&c->return_to, 0);
  else
    STEP(resv_borrowed); /* borrowed: the reaper returns it */
  return PyBool_FromLong(borrowed);
}

static PyObject *resv_return(Shm *s, PyObject *args) {
  unsigned rec;
  unsigned long long me;
  if (!PyArg_ParseTuple(args, "IK", &rec, &me)) return NULL;
  db_resv *r = resv_of(s, rec);
  if (!r) return NULL;
  db_ctx *c = own_ctx(s, me);
  if (!c) Py_RETURN_FALSE;
  int returned = resv_transfer(s, r, me, atomic_load(&c->return_to));
  STEP(resv_returned); /* it names what it no longer has, or, if `return_to` was closed, still has: the reaper looks at the lock */
  if (!returned) resv_release(r, me);
  atomic_store(&c->return_to, 0);
  return PyBool_FromLong(returned);
}

void resv_return_dead(Shm *s, db_ctx *c, uint64_t word) {
  uint64_t to = atomic_load(&c->return_to);
  db_rec *rec = to ? rec_at(s, atomic_load(&c->return_rec)) : NULL;
  if (!rec) return;
  resv_transfer(s, &rec->resv, word, to);
  STEP(reap_lock_returned); /* it names what it no longer has: the next reaper looks at the lock */
  atomic_store(&c->return_to, 0);
}

PyMethodDef lend_methods[] = {METHOD(resv_pass, METH_VARARGS, "($self, rec, holder, ctx, /)",
                                     "Let ctx hold the lock instead of holder. Return whether holder held it."),
                              METHOD(resv_borrow, METH_VARARGS, "($self, rec, holder, ctx, /)",
                                     "Borrow the lock from holder for ctx, a context of this life. Return whether holder held it."),
                              METHOD(resv_return, METH_VARARGS, "($self, rec, ctx, /)",
                                     "Return the lock that ctx borrowed. Return True if its lender holds it again; else it is free."),
                              {0}};
