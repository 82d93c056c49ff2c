/* fence_type.c - the Fence type, from which DmaFence inherits its fast paths. */
#include "domain/fence_type.h"
#include "domain/fence.h"
#include "domain/guard.h"
#include "domain/sleep.h"

typedef struct {
  PyObject_HEAD
  Shm *s;
  uint64_t handle, context, seqno, timestamp;
  uint32_t timeline, flags;
  uint32_t life;     /* of the fence's owner, if that is this process; else 0 */
  int status, error; /* what was seen: status 0 is pending, 1 or negative is signaled */
} Fence;

static PyTypeObject *fence_type;

static int owned_here(Fence *x) { return x->life && x->life == my_life(x->s); }

static int refresh(Fence *x) { /* 1: signaled, which the object remembers from then on; 0: pending */
  if (x->status) return 1;
  db_fence *f;
  for (;;) {
    if (fence_pending(x->s, x->handle, &f)) return 0;
    int error = 0;
    uint64_t stamp = 0;
    if (f) {
      error = END_ERROR(atomic_load(&f->end));
      stamp = fence_stamp(f, x->handle);
      db_fence *again;
      fence_pending(x->s, x->handle, &again);
      if (!again) continue; /* the slot was used again during the reading */
    } else
      error = fence_past_error(x->s, x->handle, x->timeline, x->seqno);
    x->error = error;
    x->timestamp = stamp;
    x->status = error ? error : 1;
    return 1;
  }
}

static int check(Fence *x) { /* refresh(), and notice the death of the owner too. -1: an exception is set */
  if (refresh(x)) return 1;
  if (owned_here(x)) return 0; /* no other process could have signaled it */
  int k = shm_notice_deaths(x->s);
  return k > 0 ? refresh(x) : k;
}

static PyObject *fence_new(PyTypeObject *type, PyObject *args, PyObject *kw) {
  static char *names[] = {"shm", "handle", "owned", "context", "seqno", "timeline", "status", "timestamp", NULL};
  Shm *s;
  unsigned long long handle, context = 0, seqno = 0, stamp = 0;
  unsigned timeline = 0;
  int owned = 0, status = 0;
  if (!PyArg_ParseTupleAndKeywords(args, kw, "O!K|pKKIiK", names, Shm_Type, &s, &handle, &owned, &context, &seqno, &timeline, &status,
                                   &stamp))
    return NULL;
  Fence *x = (Fence *)type->tp_alloc(type, 0);
  if (!x) return NULL;
  x->s = (Shm *)Py_NewRef(s);
  x->handle = handle;
  if (owned) x->life = my_life(s);
  db_fence *f;
  fence_pending(s, handle, &f);
  if (f) {
    x->context = atomic_load(&f->context);
    x->seqno = atomic_load(&f->seqno);
    x->timeline = atomic_load(&f->timeline);
    x->flags = atomic_load(&f->flags);
    fence_pending(s, handle, &f); /* NULL: the slot was used again during the reading */
  }
  if (!f) {
    x->context = context;
    x->seqno = seqno;
    x->timeline = timeline;
    if (status == 1 || (status < 0 && status >= -4095)) { /* the caller knows how it ended */
      x->status = status;
      x->error = status < 0 ? status : 0;
      x->timestamp = stamp;
    }
  }
  refresh(x);
  return (PyObject *)x;
}

/* A new fence and its object in one call: a signal handler that raises finds the fence owned. */
static PyObject *fence_made(PyTypeObject *type, PyObject *args) {
  Shm *s;
  unsigned timeline, flags;
  unsigned long long context, seqno;
  if (!PyArg_ParseTuple(args, "O!IKKI", Shm_Type, &s, &timeline, &context, &seqno, &flags) || shm_need_life(s, "fence")) return NULL;
  Fence *x = (Fence *)type->tp_alloc(type, 0);
  if (!x) return NULL;
  x->s = (Shm *)Py_NewRef(s);
  if (!(x->handle = fence_make(s, timeline, context, seqno, flags, 0, 0))) {
    Py_DECREF(x);
    return NULL;
  }
  x->context = context;
  x->seqno = seqno;
  x->timeline = timeline;
  x->flags = flags;
  x->life = my_life(s);
  return (PyObject *)x;
}

/* The object of a fence goes: see to it that the fence is signaled. A fence that nobody else can know takes no line of Python. */
static void fence_finalize(PyObject *self) {
  Fence *x = (Fence *)self;
  db_fence *f;
  if (!owned_here(x) || !fence_pending(x->s, x->handle, &f)) return;
  PyObject *kind, *value, *trace;
  PyErr_Fetch(&kind, &value, &trace);
  if (!(atomic_load(&f->word) & (FW_SHARED | FW_WAITERS)) && !atomic_load(&f->wake_mask))
    fence_end_own(x->s, x->handle, 0, 0, 0); /* a failure would be kept for processes that look late, and there are none */
  else {
    PyObject *drop = PyObject_GetAttrString(self, "drop"), *done = drop ? guard_finish(drop, NULL, 0, NULL, true) : NULL;
    if (!done) PyErr_WriteUnraisable(self);
    Py_XDECREF(done);
    Py_XDECREF(drop);
  }
  PyErr_Restore(kind, value, trace);
}

static void fence_dealloc(Fence *x) {
  PyTypeObject *type = Py_TYPE(x);
  if (x->s) {
    db_fence *f;
    PyObject *kind, *value, *trace;
    PyErr_Fetch(&kind, &value, &trace);
    /* A fence of this process is signaled by now, unless an exception kept drop() from that. */
    if (owned_here(x)) {
      if (fence_pending(x->s, x->handle, &f))
        fence_end_own(x->s, x->handle, 0, 1, 0);
      else if (f)
        fence_free_slot(x->s, H_SLOT(x->handle));
      PyErr_Clear();
    }
    PyErr_Restore(kind, value, trace);
    Py_DECREF(x->s);
  }
  type->tp_free(x);
  Py_DECREF(type);
}

static PyObject *fence_signal(Fence *x, PyObject *const *args, Py_ssize_t n, PyObject *names) {
  long error = 0;
  Py_ssize_t named = names ? PyTuple_GET_SIZE(names) : 0;
  if (n + named > 1 || (named && PyUnicode_CompareWithASCIIString(PyTuple_GET_ITEM(names, 0), "error"))) {
    PyErr_SetString(PyExc_TypeError, "signal() takes one optional argument, error");
    return NULL;
  }
  if (n + named) {
    error = PyLong_AsLong(args[0]);
    if (error == -1 && PyErr_Occurred()) return NULL;
    if (error > 0 || error < -4095) {
      shm_fail(x->s, EINVAL, "signal", "error", "not a negative errno, and not 0", "negate the errno: -errno.EIO");
      return NULL;
    }
  }
  if (!owned_here(x)) {
    shm_fail(x->s, EPERM, "signal", "fence", "another process owns it", "signal it in the process that made its timeline");
    return NULL;
  }
  db_fence *f;
  fence_note_cpu(x->s);
  int past = !fence_pending(x->s, x->handle, &f) || fence_finish(x->s, x->handle, f, (int)error, 0, fence_for_all(f));
  if (PyErr_Occurred()) return NULL;
  if (past) {
    shm_fail(x->s, EINVAL, "signal", "fence", "it is signaled already", "signal a fence once");
    return NULL;
  }
  Py_RETURN_NONE;
}

static PyObject *fence_wait(Fence *x, PyObject *const *args, Py_ssize_t n, PyObject *names) {
  PyObject *timeout = n ? args[0] : NULL;
  int interruptible = 0, known = n <= 1;
  for (Py_ssize_t i = 0; known && names && i < PyTuple_GET_SIZE(names); i++) {
    PyObject *name = PyTuple_GET_ITEM(names, i);
    if (!PyUnicode_CompareWithASCIIString(name, "timeout") && !timeout)
      timeout = args[n + i];
    else if (!PyUnicode_CompareWithASCIIString(name, "interruptible"))
      interruptible = PyObject_IsTrue(args[n + i]);
    else
      known = 0;
  }
  if (!known) {
    PyErr_SetString(PyExc_TypeError, "wait(timeout=None, *, interruptible=False)");
    return NULL;
  }
  int64_t until;
  if (parse_timeout(x->s, timeout, &until, "wait")) return NULL;
  int r = refresh(x) ? 1 : fence_wait_for(x->s, x->handle, until, interruptible, 0);
  if (r == RAISED) return NULL;
  if (r == -EINTR) {
    shm_fail(x->s, EINTR, "wait", "fence", "a signal arrived", "wait again");
    return NULL;
  }
  if (r == 1) refresh(x);
  return PyFloat_FromDouble(r ? remaining_s(until) : 0.0);
}

static PyObject *fence_disown(Fence *x, PyObject *unused) {
  x->life = 0;
  Py_RETURN_NONE;
}

static PyObject *fence_is_signaled(Fence *x, PyObject *unused) {
  int r = check(x);
  return r < 0 ? NULL : PyBool_FromLong(r);
}

static PyObject *fence_get_status(Fence *x, void *unused) { return check(x) < 0 ? NULL : PyLong_FromLong(x->status); }

static PyObject *fence_get_error(Fence *x, void *unused) {
  refresh(x);
  return PyLong_FromLong(x->error);
}

static PyObject *fence_get_timestamp(Fence *x, void *unused) {
  refresh(x);
  return PyLong_FromUnsignedLongLong(x->timestamp);
}

static PyObject *fence_get_owned(Fence *x, void *unused) { return PyBool_FromLong(owned_here(x)); }

static PyMethodDef methods[] = {
    {"made", (PyCFunction)(void *)fence_made, METH_VARARGS | METH_CLASS,
     "made($type, shm, timeline, context, seqno, flags, /)\n--\n\nReturn a new pending fence of this life, see Shm.fence_alloc()."},
    {"signal", (PyCFunction)(void *)fence_signal, METH_FASTCALL | METH_KEYWORDS,
     "signal($self, error=0)\n--\n\n"
     "Signal the fence, once. Only the process that owns its timeline can.\n\n"
     "Args:\n"
     "    error: A negative errno if the work failed, or 0.\n\n"
     "Raises:\n"
     "    InvalidError: It is signaled already, or error is not a negative errno (EINVAL).\n"
     "    NotPermittedError: Another process owns the timeline (EPERM).\n\n"
     "See semantics 3.4."},
    {"wait", (PyCFunction)(void *)fence_wait, METH_FASTCALL | METH_KEYWORDS,
     "wait($self, timeout=None, *, interruptible=False)\n--\n\n"
     "Wait until the fence is signaled.\n\n"
     "Args:\n"
     "    timeout: Seconds to wait; None waits forever.\n"
     "    interruptible: Whether a signal whose handler does not raise ends the wait.\n\n"
     "Returns:\n"
     "    The seconds that were left, more than 0 (inf for None); 0.0 if the time was over.\n\n"
     "Raises:\n"
     "    InvalidError: timeout is negative or not a number (EINVAL).\n"
     "    InterruptedWaitError: A signal ended an interruptible wait (EINTR).\n\n"
     "See semantics 3.9."},
    {"disown", (PyCFunction)fence_disown, METH_NOARGS,
     "disown($self, /)\n--\n\nLeave the fence to another object of this process: it doesn't end with this one."},
    {"is_signaled", (PyCFunction)fence_is_signaled, METH_NOARGS,
     "is_signaled($self)\n--\n\nReturn True if the fence is signaled, with or without an error. See semantics 3.6."},
    {0}};
static PyGetSetDef getset[] = {
    {"status", (getter)fence_get_status, NULL,
     "0 while pending, 1 once signaled, or the negative errno it was signaled with. is_signaled() asks for less. See semantics 3.5.", NULL},
    {"error", (getter)fence_get_error, NULL, "The negative errno it was signaled with, else 0.", NULL},
    {"timestamp", (getter)fence_get_timestamp, NULL, "When it was signaled, CLOCK_MONOTONIC ns; 0 while pending.", NULL},
    {"owned", (getter)fence_get_owned, NULL, "Whether this process owns the fence's timeline.", NULL},
    {0}};
static PyMemberDef members[] = {{"shm", T_OBJECT, offsetof(Fence, s), READONLY, NULL},
                                {"handle", T_ULONGLONG, offsetof(Fence, handle), READONLY, "Its slot and generation in the domain."},
                                {"context", T_ULONGLONG, offsetof(Fence, context), READONLY, "The fence context (timeline) it belongs to."},
                                {"seqno", T_ULONGLONG, offsetof(Fence, seqno), READONLY, "Its number on the timeline."},
                                {"timeline_index", T_UINT, offsetof(Fence, timeline), READONLY, NULL},
                                {"flags", T_UINT, offsetof(Fence, flags), READONLY, NULL},
                                {0}};
static PyType_Slot slots[] = {
    {Py_tp_doc,
     "A fence by its handle; the base class of DmaFence, whose drop() signals a pending fence that others know when its object goes."},
    {Py_tp_new, fence_new},
    {Py_tp_finalize, fence_finalize},
    {Py_tp_dealloc, fence_dealloc},
    {Py_tp_methods, methods},
    {Py_tp_getset, getset},
    {Py_tp_members, members},
    {0, NULL}};
static PyType_Spec spec = {"dmabuf._native.Fence", sizeof(Fence), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE, slots};

int fence_register(PyObject *module) {
  fence_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &spec, NULL);
  return fence_type ? PyModule_AddObjectRef(module, "Fence", (PyObject *)fence_type) : -1;
}
