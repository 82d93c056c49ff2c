/* access.c - the fence of an access, and the marks that go with it. access/ has the block that it belongs to.
 *
 * An access is a fence. It is WAITING while it is in the list and something blocks it, and GRANTED after that. A writer that dies while
 * WAITING has written nothing. One that dies while GRANTED leaves the content torn.
 */
#include "domain/access.h"
#include "domain/fence.h"
#include "domain/resv.h"
#include "domain/resv_lock.h"
#include "domain/step.h"
#include "domain/streams.h"
#include <unistd.h>

void handles_begin(handles *x) {
  x->more = NULL;
  x->count = 0;
  x->room = FEW_HANDLES;
}

void handles_end(handles *x) { PyMem_Free(x->more); }

uint64_t *handles_all(handles *x) { return x->more ? x->more : x->few; }

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
  handles_all(x)[x->count++] = handle;
  return 0;
}

PyObject *handles_list(handles *x) {
  PyObject *list = PyList_New(x->count);
  for (uint32_t i = 0; list && i < x->count; i++) {
    PyObject *h = PyLong_FromUnsignedLongLong(handles_all(x)[i]);
    if (!h)
      Py_CLEAR(list);
    else
      PyList_SET_ITEM(list, i, h);
  }
  return list;
}

uint64_t access_add(Shm *s, db_resv *r, uint32_t target, uint32_t rec, uint64_t me, int write, uint32_t timeline, handles *pending,
                    int *error) {
  cursor c = cursor_of(s, r, target);
  *error = 0;
  for (a64 *p; (p = entry_next(&c));) {
    uint64_t e = atomic_load(p);
    if (!e) break;
    db_fence *f;
    if (E_USAGE(e) > (write ? 2u : 1u) || !fence_pending(s, E_HANDLE(e), &f)) continue; /* a stream's entries come last */
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
  /* Only now: a stream's producer looks whether there is such a fence after it has marked its slot. One of the two sees the other. */
  int failed = access_blocked(s, target, write, pending);
  if (!failed) return h;
  fence_end(s, h, 0);
  if (failed != RAISED) *error = -failed;
  return 0;
}

int access_blocked(Shm *s, uint32_t rec, int write, handles *pending) {
  db_rec *x = rec_at(s, rec);
  if (!x || !atomic_load(&x->stream)) return 0;
  for (int kind = ENTRY_WRITE; kind <= (write ? ENTRY_READ : ENTRY_WRITE); kind++) {
    uint64_t entry = stream_entry_of(s, x, kind);
    if (!entry || !stream_pending(s, entry)) continue;
    if (stream_is_own(s, entry)) return -EDEADLK;
    uint64_t fence = stream_ask(s, entry);
    if (fence ? handles_add(pending, fence) : PyErr_Occurred() != NULL) return RAISED;
  }
  return 0;
}

int access_let_in(Shm *s, uint64_t handle, uint32_t rec, int write) {
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

static PyObject *access_grant(Shm *s, PyObject *args) {
  unsigned long long h;
  unsigned rec;
  int write;
  if (!PyArg_ParseTuple(args, "KIp", &h, &rec, &write)) return NULL;
  return PyLong_FromLong(access_let_in(s, h, rec, write));
}

void access_finish(Shm *s, uint64_t handle, uint32_t rec, int write, int error) {
  db_rec *x = write ? rec_at(s, rec) : NULL;
  if (x && error) {
    atomic_store(&x->torn, TORN_MAKE((uint32_t)getpid(), -error));
    STEP_OF(access_torn, x, handle); /* torn and pending: the reaper marks it torn again */
  } else if (x && atomic_load(&x->torn)) {
    atomic_store(&x->torn, 0);
    STEP_OF(access_whole, x, handle); /* whole and GRANTED: the reaper marks it torn, which is only cautious */
  }
  fence_end(s, handle, error);
  STEP_OF(access_ended, NULL, handle); /* signaled, and its slot is free */
}

PyMethodDef access_methods[] = {
    METHOD(access_grant, METH_VARARGS, "($self, handle, rec, write, /)", "Grant an access. Return 0, or the errno of a torn write()."),
    {0}};
