/* access.c - an access: what read() and write() do most, in one call each (measured: a third of the Python calls' time). */
#include "domain/access.h"
#include "domain/fence.h"
#include "domain/resv.h"
#include "domain/resv_lock.h"
#include "domain/step.h"

/* Lock held: snapshot what is in the way into *pending (NULL when nothing is), add the access's own fence. 0 with an exception or
 * *error set. */
static uint64_t access_put(Shm *s, db_resv *r, uint32_t target, uint32_t rec, uint64_t me, int write, uint32_t timeline, PyObject **pending,
                           int *error) {
  cursor c = {s, r, 0, 0, 0, target};
  *pending = NULL;
  *error = 0;
  for (a64 *p; (p = entry_next(&c));) {
    uint64_t e = atomic_load(p);
    if (!e) break;
    db_fence *f;
    if (E_USAGE(e) > (write ? 2u : 1u) || !fence_pending(s, E_HANDLE(e), &f)) continue;
    if (f && atomic_load(&f->owner) == me) {
      Py_CLEAR(*pending);
      *error = EDEADLK;
      return 0;
    } /* waiting for oneself */
    PyObject *h = PyLong_FromUnsignedLongLong(E_HANDLE(e));
    if (!*pending) *pending = PyList_New(0);
    int bad = !h || !*pending || PyList_Append(*pending, h);
    Py_XDECREF(h);
    if (bad) {
      Py_CLEAR(*pending);
      return 0;
    }
  }
  int room = make_room(s, r, target, 1);
  if (room) {
    Py_CLEAR(*pending);
    if (room != RAISED) *error = -room;
    return 0;
  }
  uint64_t context = atomic_fetch_add(&hdr(s)->next_context, 1); /* a context of its own: accesses overlap, so none replaces another */
  uint64_t h = fence_make(s, timeline, context, 1, FF_ACCESS | (write ? FF_WRITE : 0), me, rec + 1);
  if (!h) {
    Py_CLEAR(*pending);
    return 0;
  }
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
  if (n != 8) {
    PyErr_SetString(PyExc_TypeError, "access_begin: eight arguments");
    return NULL;
  }
  uint32_t rec = (uint32_t)PyLong_AsUnsignedLong(a[0]), target = (uint32_t)PyLong_AsUnsignedLong(a[1]),
           timeline = (uint32_t)PyLong_AsUnsignedLong(a[4]);
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
  if (n != 5) {
    PyErr_SetString(PyExc_TypeError, "access_end: five arguments");
    return NULL;
  }
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

PyMethodDef access_methods[] = {
    METHOD(access_begin, METH_FASTCALL, "Snapshot and own fence (rec, target, ctx, write, timeline, until, locked, access)."),
    METHOD(access_grant, METH_VARARGS, "WAITING -> GRANTED (handle, rec, write) -> torn errno or 0."),
    METHOD(access_end, METH_FASTCALL, "End an access (handle, rec, write, error, pid)."),
    {0}};
