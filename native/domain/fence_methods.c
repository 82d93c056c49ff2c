/* fence_methods.c - methods of Shm on handles of fences. */
#include "domain/fence_methods.h"
#include "domain/fence.h"
#include "domain/resv_lock.h"
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
  int error, quiet = 0;
  if (!PyArg_ParseTuple(args, "Ki|p", &h, &error, &quiet)) return NULL;
  if (shm_need_life(s, "signal")) return NULL;
  db_fence *f;
  int pending = fence_pending(s, h, &f);
  if (!pending || !f || !fence_for_all(f)) Py_RETURN_FALSE;
  fence_note_cpu(s);
  return PyBool_FromLong(!fence_finish(s, h, f, error, 0, quiet ? FENCE_QUIET : 1));
}

static PyObject *fence_wait(Shm *s, PyObject *args) {
  unsigned long long h;
  long long until;
  int interruptible, one_tick = 0;
  if (!PyArg_ParseTuple(args, "KLp|p", &h, &until, &interruptible, &one_tick)) return NULL;
  int r = fence_wait_for(s, h, until, interruptible, one_tick);
  return r == RAISED ? NULL : PyLong_FromLong(r);
}

static PyObject *py_fence_pending(Shm *s, PyObject *arg) {
  uint64_t h;
  return arg_u64(arg, &h) ? NULL : PyBool_FromLong(fence_pending(s, h, NULL));
}

static PyObject *fence_is_here(Shm *s, PyObject *arg) {
  uint64_t h;
  if (arg_u64(arg, &h)) return NULL;
  db_fence *f;
  int pending = fence_pending(s, h, &f);
  uint64_t owner = pending ? atomic_load(&f->owner) : 0;
  db_ctx *c = owner ? ctx_open_at(s, owner) : NULL;
  return PyBool_FromLong(c && ctx_is_here(s, c));
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

static PyObject *fence_origin(Shm *s, PyObject *arg) {
  uint64_t h;
  if (arg_u64(arg, &h)) return NULL;
  db_fence *f;
  fence_pending(s, h, &f);
  if (!f) Py_RETURN_NONE;
  uint32_t timeline = atomic_load(&f->timeline), life = fence_owner(s, h);
  uint64_t context = atomic_load(&f->context);
  fence_pending(s, h, &f); /* the slot may have been used again during the reading */
  if (!f) Py_RETURN_NONE;
  PyObject *origin = PyTuple_New(3);
  if (!origin) return NULL;
  PyTuple_SET_ITEM(origin, 0, PyLong_FromUnsignedLong(timeline));
  PyTuple_SET_ITEM(origin, 1, PyLong_FromUnsignedLongLong(context));
  PyTuple_SET_ITEM(origin, 2, PyLong_FromUnsignedLong(life));
  if (PyErr_Occurred()) Py_CLEAR(origin);
  return origin;
}

/* ---- marks
 *
 * The slot of another process's fence may be used again between any two lines. A mark is for its generation, or does no harm in another.
 */

/* The slot of a fence that is to be marked, NULL: it is past. */
static db_fence *fence_to_mark(Shm *s, uint64_t h, int *pending) {
  db_fence *f;
  *pending = fence_pending(s, h, &f);
  if (f) STEP(fence_marking);
  return f;
}

static PyObject *fence_share(Shm *s, PyObject *arg) {
  uint64_t h;
  if (arg_u64(arg, &h)) return NULL;
  int pending;
  db_fence *f = fence_to_mark(s, h, &pending);
  return PyBool_FromLong(f && fence_flag(h, f, FW_SHARED) && pending);
}

static PyObject *fence_watch(Shm *s, PyObject *arg) {
  uint64_t h;
  if (arg_u64(arg, &h)) return NULL;
  int pending;
  db_fence *f = fence_to_mark(s, h, &pending);
  if (!f) Py_RETURN_FALSE;
  if (fence_owner(s, h) != my_life(s)) fence_flag(h, f, FW_SHARED);
  atomic_fetch_or(&f->wake_mask, 1ull << (LIFE_INDEX(my_life(s)) & 63)); /* in another generation: woken once for nothing */
  return PyBool_FromLong(fence_pending(s, h, NULL)); /* after the bit: the signaler sees the bit, or this process that it is signaled */
}

static PyObject *fence_set_error(Shm *s, PyObject *args) {
  unsigned long long h;
  int error, pending;
  if (!PyArg_ParseTuple(args, "Ki", &h, &error)) return NULL;
  db_fence *f = fence_to_mark(s, h, &pending);
  if (f) atomic_store(&f->error, error);
  return PyBool_FromLong(pending);
}

static PyObject *fence_set_deadline(Shm *s, PyObject *args) {
  unsigned long long h, ns;
  if (!PyArg_ParseTuple(args, "KK", &h, &ns)) return NULL;
  int pending, earlier;
  db_fence *f = fence_to_mark(s, h, &pending);
  if (!f) Py_RETURN_FALSE;
  uint32_t owner = fence_owner(s, h);
  uint64_t old = atomic_load(&f->deadline);
  /* The first deadline can only meet this generation. A later one could meet another, if that had the same deadline to the nanosecond. */
  while ((earlier = fence_pending(s, h, NULL) && (old == STAMP_NONE(H_GEN(h)) || (!(old >> 63) && ns < old))) &&
         !atomic_compare_exchange_weak(&f->deadline, &old, ns)) {}
  if (earlier && (atomic_load(&f->flags) & FF_WATCH_DEADLINE) && owner != my_life(s) && life_current(s, owner))
    fence_wake_dispatcher(life_slot(s, owner), h); /* a hint, which is lost if this process dies here */
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
  STEP_OF(fence_dropped, f, h); /* pending, and nobody can share it any more: the reaper signals it */
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
    METHOD(fence_end_any, METH_VARARGS, "($self, handle, error, quiet=False, /)",
           "Signal a fence of FF_ANYBODY. Return whether it was pending.\n\n"
           "Args:\n"
           "    handle: The fence.\n"
           "    error: 0, or a negative errno.\n"
           "    quiet: The caller holds a lock, and calls on_local(handle) once that is free."),
    METHOD(fence_wait, METH_VARARGS, "($self, handle, until, interruptible, one_tick=False, /)",
           "Wait until the time, CLOCK_MONOTONIC ns, or -1 for no limit; with one_tick at most until a tick is over.\n\n"
           "Return 1: signaled, 0: out of time, -EINTR: interrupted."),
    {"fence_pending", (PyCFunction)py_fence_pending, METH_O,
     "fence_pending($self, handle, /)\n--\n\nReturn True if the fence is pending, False if it is signaled or past."},
    METHOD(fence_is_here, METH_O, "($self, handle, /)",
           "Return True if a pending fence is that of an access of the running thread, or of a task that runs in it."),
    METHOD(fence_origin, METH_O, "($self, handle, /)",
           "Return (timeline slot + 1, context, life) of a fence; None when its slot was used again."),
    METHOD(fence_info, METH_O, "($self, handle, /)", "Return what the fence's slot says, None for a past generation."),
    METHOD(fence_share, METH_O, "($self, handle, /)", "Note that others than the owner may know a fence. Return whether it is pending."),
    METHOD(fence_watch, METH_O, "($self, handle, /)",
           "Let the signaler wake this process's dispatcher, or call on_local() in this process. Return whether the fence is pending."),
    METHOD(fence_set_error, METH_VARARGS, "($self, handle, error, /)",
           "Set the error with which the owner will signal a fence. Return whether it is pending."),
    METHOD(fence_set_deadline, METH_VARARGS, "($self, handle, ns, /)",
           "Set the deadline of a fence, if it has none or a later one. Return whether it is pending."),
    METHOD(fence_shared, METH_O, "($self, handle, /)",
           "Return True if others than the owner may know the fence: it was listed, sent, waited for or watched elsewhere."),
    METHOD(fence_drop, METH_VARARGS, "($self, handle, error, /)",
           "Signal a pending fence of this life that nobody else knows. Return whether that was done."),
    METHOD(fences_done, METH_O, "($self, handles, /)", "Return those of the handles whose fences are not pending."),
    {0}};
