/* access.c - an access: what a read() or write() block does most, entering and leaving, in one call each.
 *
 * Measured against one call from Python for each part, this takes a third of the time.
 *
 * An access is a fence. It is WAITING while it is in the list and something blocks it, and GRANTED after that. A writer that dies while
 * WAITING has written nothing. One that dies while GRANTED leaves the content torn.
 */
#include "domain/access.h"
#include "domain/fence.h"
#include "domain/resv.h"
#include "domain/resv_lock.h"
#include "domain/step.h"

/* Handles that block an access. Not a list: an object that is allocated under the lock may collect garbage there, and a finalizer of the
 * program may wait for the process or thread that waits for the lock. */
#define FEW 16

typedef struct {
  uint64_t *more; /* NULL: they are in `few`; else all of them are here */
  uint32_t count, room;
  uint64_t few[FEW];
} handles;

static int handles_add(handles *x, uint64_t handle) { /* 0, or -1 with an exception set */
  if (x->count == x->room) {
    uint64_t *more = PyMem_Realloc(x->more, 2 * x->room * sizeof *more);
    if (!more) {
      PyErr_NoMemory();
      return -1;
    }
    if (!x->more) memcpy(more, x->few, sizeof x->few);
    x->more = more;
    x->room *= 2;
  }
  (x->more ? x->more : x->few)[x->count++] = handle;
  return 0;
}

static PyObject *handles_list(handles *x) {
  PyObject *list = PyList_New(x->count);
  for (uint32_t i = 0; list && i < x->count; i++) {
    PyObject *h = PyLong_FromUnsignedLongLong((x->more ? x->more : x->few)[i]);
    if (!h)
      Py_CLEAR(list);
    else
      PyList_SET_ITEM(list, i, h);
  }
  return list;
}

/* With the lock: put the handles that block the access into *pending, and add the access's own fence. Returns its handle, or 0 with *error
 * set, or with an exception set. */
static uint64_t access_add(Shm *s, db_resv *r, uint32_t target, uint32_t rec, uint64_t me, int write, uint32_t timeline, handles *pending,
                           int *error) {
  cursor c = cursor_of(s, r, target);
  *error = 0;
  for (a64 *p; (p = entry_next(&c));) {
    uint64_t e = atomic_load(p);
    if (!e) break;
    db_fence *f;
    if (E_USAGE(e) > (write ? 2u : 1u) || !fence_pending(s, E_HANDLE(e), &f)) continue;
    if (f && atomic_load(&f->owner) == me) { /* the access would wait for its own thread or task */
      *error = EDEADLK;
      return 0;
    }
    if (handles_add(pending, E_HANDLE(e))) return 0;
  }
  int room = entries_reserve(s, r, target, 1);
  if (room) {
    if (room != RAISED) *error = -room;
    return 0;
  }
  /* A fence context of its own: accesses overlap, so none may replace another. */
  uint64_t context = atomic_fetch_add(&hdr(s)->next_context, 1);
  uint64_t h = fence_make(s, timeline, context, 1, FF_ACCESS | (write ? FF_WRITE : 0), me, rec + 1);
  if (!h) return 0;
  STEP_OF(access_fence, rec_at(s, rec), h); /* pending, and in no list: the reaper signals it */
  entries_add(s, r, target, h, write ? 1 : 2, 1);
  STEP_OF(access_added, rec_at(s, rec), h); /* WAITING: the content is whole */
  return h;
}

/* WAITING -> GRANTED. 0; or the errno of a torn write(), which keeps a reader out. */
static int access_let_in(Shm *s, uint64_t handle, uint32_t rec, int write) {
  db_rec *x = rec_at(s, rec);
  int torn = x && !write ? (int)(uint32_t)atomic_load(&x->torn) : 0;
  if (torn) return torn > 0 && torn < 4096 ? torn : EUCLEAN;
  db_fence *f;
  fence_pending(s, handle, &f);
  if (f && write) STEP_NOTE(access_writing, x, handle);
  if (f) atomic_fetch_or(&f->flags, FF_GRANTED);
  STEP_OF(access_granted, x, handle); /* GRANTED: from here on a writer's death leaves the content torn */
  return 0;
}

static PyObject *access_begin(Shm *s, PyObject *const *a, Py_ssize_t n) {
  static PyObject *name;
  if (!name && !(name = PyUnicode_InternFromString("fence"))) return NULL;
  if (n != 8) {
    PyErr_SetString(PyExc_TypeError, "access_begin() takes 8 arguments");
    return NULL;
  }
  uint32_t rec = (uint32_t)PyLong_AsUnsignedLong(a[0]), target = (uint32_t)PyLong_AsUnsignedLong(a[1]);
  uint32_t timeline = (uint32_t)PyLong_AsUnsignedLong(a[4]);
  uint64_t me = PyLong_AsUnsignedLongLong(a[2]);
  int write = PyObject_IsTrue(a[3]), locked = PyObject_IsTrue(a[6]);
  int64_t until = PyLong_AsLongLong(a[5]);
  if (PyErr_Occurred() || shm_need_life(s, "access")) return NULL;
  db_resv *r = resv_of(s, target);
  if (!r) return NULL;
  if (!locked) {
    int got = resv_take(s, r, me, 0, 0, 0, until);
    if (got == RAISED) return NULL;
    if (got < 0) return PyLong_FromLong(got == -EDEADLK ? -EALREADY : got);
  }
  handles blocking;
  blocking.more = NULL;
  blocking.count = 0;
  blocking.room = FEW;
  int error;
  uint32_t moves = s->moves;
  uint64_t h = access_add(s, r, target, rec, me, write, timeline, &blocking, &error);
  if (!locked && s->moves == moves) resv_release(r, me); /* else another thread left the domain, and `r` may be gone */
  PyObject *handle = h ? PyLong_FromUnsignedLongLong(h) : NULL, *pending = NULL;
  /* Without blocking fences: of one of several accesses, which are let in together. */
  if (handle && (blocking.count || locked) && !(pending = handles_list(&blocking))) Py_CLEAR(handle);
  PyMem_Free(blocking.more);
  if (!h) return PyErr_Occurred() ? NULL : PyLong_FromLong(-error);
  if (!handle || PyObject_SetAttr(a[7], name, handle)) {
    Py_XDECREF(handle);
    Py_XDECREF(pending);
    fence_end(s, h, 0);
    return NULL;
  }
  Py_DECREF(handle);
  if (pending) return pending;
  int torn = access_let_in(s, h, rec, write);
  if (torn) return PyLong_FromLong(torn);
  Py_RETURN_NONE;
}

static PyObject *access_grant(Shm *s, PyObject *args) {
  unsigned long long h;
  unsigned rec;
  int write;
  if (!PyArg_ParseTuple(args, "KIp", &h, &rec, &write)) return NULL;
  return PyLong_FromLong(access_let_in(s, h, rec, write));
}

static PyObject *access_end(Shm *s, PyObject *const *a, Py_ssize_t n) {
  if (n != 5) {
    PyErr_SetString(PyExc_TypeError, "access_end() takes 5 arguments");
    return NULL;
  }
  uint64_t h = PyLong_AsUnsignedLongLong(a[0]);
  uint32_t rec = (uint32_t)PyLong_AsUnsignedLong(a[1]), pid = (uint32_t)PyLong_AsUnsignedLong(a[4]);
  int write = PyObject_IsTrue(a[2]), error = (int)PyLong_AsLong(a[3]);
  if (PyErr_Occurred()) return NULL;
  db_rec *x = write ? rec_at(s, rec) : NULL;
  if (x && error) {
    atomic_store(&x->torn, TORN_MAKE(pid, -error));
    STEP_OF(access_torn, x, h); /* torn and pending: the reaper marks it torn again */
  } else if (x && atomic_load(&x->torn)) {
    atomic_store(&x->torn, 0);
    STEP_OF(access_whole, x, h); /* whole and GRANTED: the reaper marks it torn, which is only cautious */
  }
  fence_end(s, h, error);
  STEP_OF(access_ended, NULL, h); /* signaled, and its slot is free */
  Py_RETURN_NONE;
}

PyMethodDef access_methods[] = {
    METHOD(access_begin, METH_FASTCALL, "($self, rec, target, ctx, write, timeline, until, locked, access, /)",
           "Add the fence of an access, store its handle in access.fence, and grant the access if nothing blocks it.\n\n"
           "Args:\n"
           "    rec: The record of the buffer.\n"
           "    target: The record whose reservation object counts for it.\n"
           "    ctx: The word of the context of the thread or task.\n"
           "    until: When to stop waiting for the lock, CLOCK_MONOTONIC ns, or -1 for no limit.\n"
           "    locked: The caller holds the lock, and grants the access itself.\n\n"
           "Returns:\n"
           "    None if it was granted; a list of the handles that block it; the errno of a torn write(); or a negative errno."),
    METHOD(access_grant, METH_VARARGS, "($self, handle, rec, write, /)", "Grant an access. Return 0, or the errno of a torn write()."),
    METHOD(access_end, METH_FASTCALL, "($self, handle, rec, write, error, pid, /)", "End an access; error: its content is torn."),
    {0}};
