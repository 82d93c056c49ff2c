/* fence_methods.c - methods of Shm that work on handles of fences. */
#include "domain/fence_methods.h"
#include "domain/fence.h"
#include "domain/step.h"

static PyObject *fence_alloc(Shm *s, PyObject *args) { /* (timeline + 1, context, seqno, flags, owner, rec + 1) -> handle */
  unsigned timeline, flags, rec;
  unsigned long long context, seqno, owner;
  if (!PyArg_ParseTuple(args, "IKKIKI", &timeline, &context, &seqno, &flags, &owner, &rec)) return NULL;
  if (shm_need_life(s, "fence")) return NULL;
  uint64_t h = fence_make(s, timeline, context, seqno, flags, owner, rec);
  return h ? PyLong_FromUnsignedLongLong(h) : NULL;
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
  PyObject *r = Py_BuildValue("{sN,sN,sK,sK,si,sI,sK,sI,sI,sI,sK,sK,sK,sI}", "pending", PyBool_FromLong(pending), "sync",
                              PyBool_FromLong(atomic_load(&f->word) & FW_SYNC), "context", atomic_load(&f->context), "seqno",
                              atomic_load(&f->seqno), "error", END_ERROR(atomic_load(&f->end)), "flags", atomic_load(&f->flags), "owner",
                              atomic_load(&f->owner), "rec", atomic_load(&f->rec), "rec_gen", atomic_load(&f->rec_gen), "timeline",
                              atomic_load(&f->timeline), "created", atomic_load(&f->created), "deadline", deadline >> 63 ? 0 : deadline,
                              "timestamp", stamp_of(f, h), "life", CT_LIFE(atomic_load(chunk_entry(s, H_SLOT(h) / FENCES_PER))));
  fence_pending(s, h, &f);
  if (!f) {
    Py_XDECREF(r);
    Py_RETURN_NONE;
  }
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
  STEP(
      fence_marking); /* from here on the slot of another process's fence may be used again: a mark is for this generation, or does no harm */
  uint32_t owner = CT_LIFE(atomic_load(chunk_entry(s, H_SLOT(h) / FENCES_PER)));
  if (!strcmp(what, "granted"))
    atomic_fetch_or(&f->flags, FF_GRANTED);
  else if (!strcmp(what, "error"))
    atomic_store(&f->error, (int32_t)v);
  else if (!strcmp(what, "shared"))
    pending = fence_flag(h, f, FW_SHARED) && pending;
  else if (!strcmp(what, "sync")) {
    fence_flag(h, f, FW_SYNC); /* the same word: who ends the fence sees the bit, or we see the end */
    pending = fence_pending(s, h, NULL);
  } else if (!strcmp(what, "bell")) {
    if (owner != my_life(s)) fence_flag(h, f, FW_SHARED);
    atomic_fetch_or(&f->wake_mask, 1ull << (LIFE_INDEX(my_life(s)) & 63)); /* in a slot that was used again, we are rung once for nothing */
    pending = fence_pending(s, h, NULL);                                   /* after the bit: the signaller sees it, or we see the signal */
  } else if (!strcmp(what, "deadline")) {
    /* The first one is of this generation alone; a later one could hit another's only if that had the same deadline, to the nanosecond. */
    uint64_t old = atomic_load(&f->deadline);
    int earlier;
    while ((earlier = fence_pending(s, h, NULL) && (old == STAMP_NONE(H_GEN(h)) || (!(old >> 63) && (uint64_t)v < old))) &&
           !atomic_compare_exchange_weak(&f->deadline, &old, (uint64_t)v)) {}
    if (earlier && (atomic_load(&f->flags) & FF_WATCH_DEADLINE) && owner != my_life(s) && life_current(s, owner))
      ring_life(life_slot(s, owner), h); /* a hint: lost with a signaller that dies here */
  } else {
    PyErr_SetString(PyExc_ValueError, "fence_mark: no such mark");
    return NULL;
  }
  return PyBool_FromLong(pending);
}

static PyObject *fence_shared(Shm *s,
                              PyObject *arg) { /* somebody but the owner may know it: listed, sent, slept on, listened to elsewhere */
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
  if (!my_life(s) || !fence_pending(s, h, &f) || CT_LIFE(atomic_load(chunk_entry(s, H_SLOT(h) / FENCES_PER))) != my_life(s))
    Py_RETURN_FALSE;
  uint32_t w = atomic_load(&f->word);
  do {
    if (w & (FW_SIGNALED | FW_SHARED | FW_WAITERS | FW_SYNC)) Py_RETURN_FALSE;
  } while (!atomic_compare_exchange_weak(&f->word, &w,
                                         w | FW_DROPPED)); /* the same word: who shares it sees this, or we see that it is shared */
  STEP(fence_dropped); /* pending, but nobody takes it any more: ends with us */
  return PyBool_FromLong(own_end(s, h, error, 0, 0));
}

static PyObject *fences_done(Shm *s, PyObject *seq) { /* of a list of handles those that are signalled */
  PyObject *fast = PySequence_Fast(seq, "a sequence of handles"), *out = fast ? PyList_New(0) : NULL;
  for (Py_ssize_t i = 0; out && i < PySequence_Fast_GET_SIZE(fast); i++) {
    PyObject *o = PySequence_Fast_GET_ITEM(fast, i);
    unsigned long long h = PyLong_AsUnsignedLongLong(o);
    if (h == (unsigned long long)-1 && PyErr_Occurred()) {
      Py_CLEAR(out);
      break;
    }
    if (!fence_pending(s, h, NULL) && PyList_Append(out, o)) Py_CLEAR(out);
  }
  Py_XDECREF(fast);
  return out;
}

PyMethodDef fence_methods[] = {
#define M(n, flags, doc) {#n, (PyCFunction)n, flags, doc}
    M(fence_alloc, METH_VARARGS, "A new pending fence of this life -> handle."),
    M(fence_signal, METH_VARARGS, "Signal (handle, error, drop, timestamp or 0) -> was pending."),
    M(fence_end_any, METH_VARARGS, "Signal (handle, error) a fence that anybody may end -> was pending."),
    M(fence_wait, METH_VARARGS, "Wait (handle, until, interruptible) -> 1, 0, -4."),
    {"fence_pending", (PyCFunction)py_fence_pending, METH_O, "Is the handle's fence pending?"},
    M(fence_info, METH_O, "What a fence's slot says, or None."),
    M(fence_mark, METH_VARARGS, "Mark (handle, what, value) -> pending."),
    M(fence_shared, METH_O, "May anybody but the owner know this fence?"),
    M(fence_drop, METH_VARARGS, "End (handle, error) an own fence that nobody waits for -> done."),
    M(fences_done, METH_O, "Those of the handles that are signalled."),
    {0}};
