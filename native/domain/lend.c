/* lend.c - a reservation lock that is lent: to another process, for a call that is carried there under the lock.
 *
 * The borrower's context names its heir, the lender, before it has the lock and until it has it no more. Whoever reaps the borrower's life
 * gives the lock to the heir before the borrower's generation moves, so that nobody else comes in between. An heir that is no more is
 * passed over, and then the lock is free, as after every owner's end. */
#include "domain/lend.h"
#include "domain/resv_lock.h"
#include "domain/step.h"
#include "domain/table.h"

static PyObject *resv_pass(Shm *s, PyObject *args) { /* (rec, holder, ctx) -> holder held it, and now ctx does */
  unsigned rec;
  unsigned long long from, to;
  if (!PyArg_ParseTuple(args, "IKK", &rec, &from, &to)) return NULL;
  db_resv *r = resv_of(s, rec);
  if (!r) return NULL;
  return PyBool_FromLong(my_life(s) && resv_hand(s, r, from, to));
}

static PyObject *resv_borrow(Shm *s, PyObject *args) { /* (rec, holder, ctx) -> holder held it, and has lent it to ctx, one of this life */
  unsigned rec;
  unsigned long long from, me;
  if (!PyArg_ParseTuple(args, "IKK", &rec, &from, &me)) return NULL;
  db_resv *r = resv_of(s, rec);
  if (!r) return NULL;
  db_ctx *c = ctx_alive(s, me);
  if (!c || !my_life(s) || atomic_load(&c->life) != my_life(s) || atomic_load(&c->return_to)) Py_RETURN_FALSE;
  atomic_store(&c->return_rec, rec);
  atomic_store(&c->return_to, from & ~CTX_WAITERS);
  STEP(resv_heir); /* an heir of what it doesn't have: bequeathing looks at the lock */
  int got = resv_hand(s, r, from, me);
  if (!got)
    atomic_store(&c->return_to, 0);
  else
    STEP(resv_borrowed);
  return PyBool_FromLong(got);
}

static PyObject *resv_return(Shm *s, PyObject *args) { /* (rec, ctx) -> what ctx borrowed is its heir's again; else it is free */
  unsigned rec;
  unsigned long long me;
  if (!PyArg_ParseTuple(args, "IK", &rec, &me)) return NULL;
  db_resv *r = resv_of(s, rec);
  if (!r) return NULL;
  db_ctx *c = ctx_alive(s, me);
  if (!c || !my_life(s) || atomic_load(&c->life) != my_life(s)) Py_RETURN_FALSE;
  int back = resv_hand(s, r, me, atomic_load(&c->return_to));
  STEP(resv_returned); /* still with an heir, but without the lock */
  if (!back) resv_give(r, me);
  atomic_store(&c->return_to, 0);
  return PyBool_FromLong(back);
}

/* The life of a context ends: what it has borrowed goes back. Its generation moves after that, so the lock was never free. */
void resv_bequeath(Shm *s, db_ctx *c, uint64_t word) {
  uint64_t heir = atomic_load(&c->return_to);
  db_rec *rec = heir ? rec_at(s, atomic_load(&c->return_rec)) : NULL;
  if (!rec) return;
  resv_hand(s, &rec->resv, word, heir);
  STEP(reap_heir);
  atomic_store(&c->return_to, 0);
}

PyMethodDef lend_methods[] = {
#define M(n, flags, doc) {#n, (PyCFunction)n, flags, doc}
    M(resv_pass, METH_VARARGS, "Hand the lock of (rec) from (holder) to (ctx) -> it was the holder's."),
    M(resv_borrow, METH_VARARGS, "Borrow the lock of (rec) from (holder) for (ctx) -> it was the holder's."),
    M(resv_return, METH_VARARGS, "Give what (rec, ctx) borrowed back -> its lender has it."),
    {0}};
