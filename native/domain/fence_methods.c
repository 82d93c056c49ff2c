/* fence_methods.c - methods of Shm on handles of fences. */
#include "domain/fence_methods.h"
#include "domain/fence.h"
#include "domain/step.h"

static PyObject *fence_alloc(Shm *s, PyObject *args) {
  unsigned timeline, flags, rec;
  unsigned long long context, seqno, owner;
  if (!PyArg_ParseTuple(args, "IKKIKI", &timeline, &context, &seqno, &flags, &owner, &rec)) return NULL;
  if (shm_need_life(s, "fence")) return NULL;
  uint64_t h = fence_make(s, timeline, context, seqno, flags, owner, rec);
  return h ? PyLong_FromUnsignedLongLong(h) : NULL;
}

static PyObject *fence_signal(Shm *s, PyObject *args) {
  unsigned long long h, stamp = 0;
  int error, drop;
  if (!PyArg_ParseTuple(args, "Kip|K", &h, &error, &drop, &stamp)) return NULL;
  int r = fence_end_own(s, h, error, drop, stamp);
  return r < 0 ? NULL : PyBool_FromLong(r);
}

static PyObject *fence_end_any(Shm *s, PyObject *args) {
  unsigned long long h;
  int error;
  if (!PyArg_ParseTuple(args, "Ki", &h, &error)) return NULL;
  if (shm_need_life(s, "signal")) return NULL;
  db_fence *f;
  int pending = fence_pending(s, h, &f);
  if (!pending || !f || !fence_for_all(f)) Py_RETURN_FALSE;
  fence_note_cpu(s);
  return PyBool_FromLong(!fence_finish(s, h, f, error, 0, 1));
}

static PyObject *fence_wait(Shm *s, PyObject *args) {
  unsigned long long h;
  long long until;
  int interruptible;
  if (!PyArg_ParseTuple(args, "KLp", &h, &until, &interruptible)) return NULL;
  int r = fence_wait_for(s, h, until, interruptible);
  return r == RAISED ? NULL : PyLong_FromLong(r);
}

static PyObject *py_fence_pending(Shm *s, PyObject *arg) {
  uint64_t h;
  return arg_u64(arg, &h) ? NULL : PyBool_FromLong(fence_pending(s, h, NULL));
}

static PyObject *fence_info(Shm *s, PyObject *arg) {
  uint64_t h;
  if (arg_u64(arg, &h)) return NULL;
  db_fence *f;
  int pending = fence_pending(s, h, &f);
  if (!f) Py_RETURN_NONE;
  uint64_t deadline = atomic_load(&f->deadline);
  PyObject *r = Py_BuildValue("{sN,sN,sK,sK,si,sI,sK,sI,sI,sI,sK,sK,sK,sI}", "pending", PyBool_FromLong(pending), "sync",
                              PyBool_FromLong(atomic_load(&f->word) & FW_SYNC), "context", atomic_load(&f->context), "seqno",
                              atomic_load(&f->seqno), "error", END_ERROR(atomic_load(&f->end)), "flags", atomic_load(&f->flags), "owner",
                              atomic_load(&f->owner), "rec", atomic_load(&f->rec), "rec_gen", atomic_load(&f->rec_gen), "timeline",
                              atomic_load(&f->timeline), "created", atomic_load(&f->created), "deadline", deadline >> 63 ? 0 : deadline,
                              "timestamp", fence_stamp(f, h), "life", fence_owner(s, h));
  fence_pending(s, h, &f);
  if (f) return r;
  Py_XDECREF(r); /* the slot was used again during the reading */
  Py_RETURN_NONE;
}

/* ---- marks
 *
 * The slot of another process's fence may be used again between any two lines. A mark is for its generation, or does no harm in another.
 * Each of these returns whether the fence is pending.
 */

/* Wake this process's dispatcher when the fence is signaled. */
static int mark_watched(Shm *s, uint64_t h, db_fence *f) {
  if (fence_owner(s, h) != my_life(s)) fence_flag(h, f, FW_SHARED);
  atomic_fetch_or(&f->wake_mask, 1ull << (LIFE_INDEX(my_life(s)) & 63)); /* in another generation: woken once for nothing */
  return fence_pending(s, h, NULL); /* after the bit: the signaler sees the bit, or this process sees that it is signaled */
}

/* A sync file waits for it. */
static int mark_sync(Shm *s, uint64_t h, db_fence *f) {
  fence_flag(h, f, FW_SYNC); /* in the same word: the signaler sees the bit, or this process sees that it is signaled */
  return fence_pending(s, h, NULL);
}

static void mark_deadline(Shm *s, uint64_t h, db_fence *f, uint64_t ns) {
  uint32_t owner = fence_owner(s, h);
  uint64_t old = atomic_load(&f->deadline);
  int earlier;
  /* The first deadline can only meet this generation. A later one could meet another, if that had the same deadline to the nanosecond. */
  while ((earlier = fence_pending(s, h, NULL) && (old == STAMP_NONE(H_GEN(h)) || (!(old >> 63) && ns < old))) &&
         !atomic_compare_exchange_weak(&f->deadline, &old, ns)) {}
  if (earlier && (atomic_load(&f->flags) & FF_WATCH_DEADLINE) && owner != my_life(s) && life_current(s, owner))
    fence_wake_dispatcher(life_slot(s, owner), h); /* a hint, which is lost if this process dies here */
}

static PyObject *fence_mark(Shm *s, PyObject *args) {
  unsigned long long h;
  const char *what;
  long long v;
  if (!PyArg_ParseTuple(args, "KsL", &h, &what, &v)) return NULL;
  db_fence *f;
  int pending = fence_pending(s, h, &f);
  if (!f) Py_RETURN_FALSE;
  STEP(fence_marking);
  if (!strcmp(what, "granted"))
    atomic_fetch_or(&f->flags, FF_GRANTED);
  else if (!strcmp(what, "error"))
    atomic_store(&f->error, (int32_t)v);
  else if (!strcmp(what, "shared"))
    pending = fence_flag(h, f, FW_SHARED) && pending;
  else if (!strcmp(what, "sync"))
    pending = mark_sync(s, h, f);
  else if (!strcmp(what, "bell"))
    pending = mark_watched(s, h, f);
  else if (!strcmp(what, "deadline"))
    mark_deadline(s, h, f, (uint64_t)v);
  else {
    PyErr_SetString(PyExc_ValueError, "fence_mark: no such mark");
    return NULL;
  }
  return PyBool_FromLong(pending);
}

static PyObject *fence_shared(Shm *s, PyObject *arg) {
  uint64_t h;
  if (arg_u64(arg, &h)) return NULL;
  db_fence *f;
  fence_pending(s, h, &f);
  return PyBool_FromLong(f && (atomic_load(&f->word) & (FW_SHARED | FW_WAITERS)));
}

static PyObject *fence_drop(Shm *s, PyObject *args) {
  unsigned long long h;
  int error;
  if (!PyArg_ParseTuple(args, "Ki", &h, &error)) return NULL;
  db_fence *f;
  if (!my_life(s) || !fence_pending(s, h, &f) || fence_owner(s, h) != my_life(s)) Py_RETURN_FALSE;
  uint32_t w = atomic_load(&f->word);
  do { /* in the same word: a process that shares the fence sees this bit, or this one sees that it is shared */
    if (w & (FW_SIGNALED | FW_SHARED | FW_WAITERS | FW_SYNC)) Py_RETURN_FALSE;
  } while (!atomic_compare_exchange_weak(&f->word, &w, w | FW_DROPPED));
  STEP(fence_dropped); /* pending, and nobody can share it any more: the reaper signals it */
  return PyBool_FromLong(fence_end_own(s, h, error, 0, 0));
}

static PyObject *fences_done(Shm *s, PyObject *handles) {
  PyObject *fast = PySequence_Fast(handles, "fences_done() takes a sequence of handles"), *out = fast ? PyList_New(0) : NULL;
  for (Py_ssize_t i = 0; out && i < PySequence_Fast_GET_SIZE(fast); i++) {
    PyObject *item = PySequence_Fast_GET_ITEM(fast, i);
    uint64_t h;
    if (arg_u64(item, &h) || (!fence_pending(s, h, NULL) && PyList_Append(out, item))) Py_CLEAR(out);
  }
  Py_XDECREF(fast);
  return out;
}

PyMethodDef fence_methods[] = {
    METHOD(fence_alloc, METH_VARARGS, "($self, timeline, context, seqno, flags, owner, rec, /)",
           "Return the handle of a new pending fence of this life.\n\n"
           "Args:\n"
           "    timeline: The slot of its timeline + 1, 0: none.\n"
           "    flags: FF_ flags.\n"
           "    owner: Of an access, the word of its context; else 0.\n"
           "    rec: Of an access, its record + 1; else 0."),
    METHOD(fence_signal, METH_VARARGS, "($self, handle, error, drop, timestamp=0, /)",
           "Signal a fence of this life; drop: free its slot too. Return whether it was pending."),
    METHOD(fence_end_any, METH_VARARGS, "($self, handle, error, /)", "Signal a fence of FF_ANYBODY. Return whether it was pending."),
    METHOD(fence_wait, METH_VARARGS, "($self, handle, until, interruptible, /)",
           "Wait until the time, CLOCK_MONOTONIC ns, or -1 for no limit. Return 1: signaled, 0: out of time, -EINTR: interrupted."),
    {"fence_pending", (PyCFunction)py_fence_pending, METH_O,
     "fence_pending($self, handle, /)\n--\n\nReturn True if the fence is pending, False if it is signaled or past."},
    METHOD(fence_info, METH_O, "($self, handle, /)", "Return what the fence's slot says, None for a past generation."),
    METHOD(fence_mark, METH_VARARGS, "($self, handle, what, value, /)", "Mark a fence. Return whether it is pending."),
    METHOD(fence_shared, METH_O, "($self, handle, /)",
           "Return True if others than the owner may know the fence: it was listed, sent, waited for or watched elsewhere."),
    METHOD(fence_drop, METH_VARARGS, "($self, handle, error, /)",
           "Signal a pending fence of this life that nobody else knows. Return whether that was done."),
    METHOD(fences_done, METH_O, "($self, handles, /)", "Return those of the handles whose fences are not pending."),
    {0}};
