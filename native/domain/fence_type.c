/* fence_type.c - the Fence type: what DmaFence inherits its fast paths from. */
#include "domain/fence_type.h"
#include "domain/fence.h"
#include "domain/sleep.h"

typedef struct {
  PyObject_HEAD
  Shm *s;
  uint64_t handle, context, seqno, timestamp;
  uint32_t timeline, life, flags; /* life: of the process that owns the fence, if that is this one; else 0 */
  int status, error;              /* what was seen: status 0 not yet, 1, or negative */
} Fence;

static PyTypeObject *Fence_Type;

static int fence_look(Fence *x) { /* 1 once signalled; remembers */
  if (x->status) return 1;
  db_fence *f;
  for (;;) {
    if (fence_pending(x->s, x->handle, &f)) return 0;
    int error = 0;
    uint64_t stamp = 0;
    if (f) {
      error = END_ERROR(atomic_load(&f->end));
      stamp = stamp_of(f, x->handle);
      db_fence *again;
      fence_pending(x->s, x->handle, &again);
      if (!again) continue; /* the slot was used again while we read it */
    } else if (!(error = past_error(x->s, x->handle)))
      error = ring_error(x->s, x->timeline, x->seqno, x->handle);
    x->error = error;
    x->timestamp = stamp;
    x->status = error ? error : 1;
    return 1;
  }
}

/* Fence(shm, handle, owned=False, context, seqno, timeline, status, timestamp): the last five for a past generation */
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
  Py_INCREF(s);
  x->s = s;
  x->handle = handle;
  if (owned) x->life = my_life(s);
  db_fence *f;
  fence_pending(s, handle, &f);
  if (f) {
    x->context = atomic_load(&f->context);
    x->seqno = atomic_load(&f->seqno);
    x->timeline = atomic_load(&f->timeline);
    x->flags = atomic_load(&f->flags);
    fence_pending(s, handle, &f);
  }
  if (!f) {
    x->context = context;
    x->seqno = seqno;
    x->timeline = timeline;
    if (status == 1 || (status < 0 && status >= -4095)) { /* somebody has seen its end */
      x->status = status;
      x->error = status < 0 ? status : 0;
      x->timestamp = stamp;
    }
  }
  fence_look(x);
  return (PyObject *)x;
}

static void fence_dealloc(Fence *x) {
  PyTypeObject *type = Py_TYPE(x);
  if (x->s) {
    if (x->life && x->life == my_life(x->s)) { /* signalled (DmaFence saw to it) and dropped by its owner: free */
      db_fence *f;
      if (!fence_pending(x->s, x->handle, &f) && f && fifo_push(x->s, H_SLOT(x->handle))) PyErr_Clear();
    }
    Py_DECREF(x->s);
  }
  type->tp_free(x);
  Py_DECREF(type);
}

static PyObject *f_signal(Fence *x, PyObject *const *args, Py_ssize_t n, PyObject *kwnames) {
  long error = 0;
  if (n + (kwnames ? PyTuple_GET_SIZE(kwnames) : 0) > 1 ||
      (kwnames && PyTuple_GET_SIZE(kwnames) && PyUnicode_CompareWithASCIIString(PyTuple_GET_ITEM(kwnames, 0), "error"))) {
    PyErr_SetString(PyExc_TypeError, "signal() takes one optional argument, error");
    return NULL;
  }
  if (n || (kwnames && PyTuple_GET_SIZE(kwnames))) {
    error = PyLong_AsLong(args[0]);
    if (error == -1 && PyErr_Occurred()) return NULL;
    if (error > 0 || error < -4095) {
      shm_fail(x->s, EINVAL, "signal", "error", "a fence's error is a negative errno, or 0");
      return NULL;
    }
  }
  if (!x->life || x->life != my_life(x->s)) {
    shm_fail(x->s, EPERM, "signal", "a fence of another process", "signal it in the process that made its timeline");
    return NULL;
  }
  db_fence *f;
  leave_cpu(x->s);
  int past = !fence_pending(x->s, x->handle, &f) || fence_finish(x->s, x->handle, f, (int)error, 0, for_anybody(f));
  if (PyErr_Occurred()) return NULL;
  if (past) {
    shm_fail(x->s, EINVAL, "signal", "a signaled fence", "signal a fence once");
    return NULL;
  }
  Py_RETURN_NONE;
}

static PyObject *f_wait(Fence *x, PyObject *const *args, Py_ssize_t n, PyObject *kwnames) {
  PyObject *timeout = NULL;
  int interruptible = 0;
  Py_ssize_t nk = kwnames ? PyTuple_GET_SIZE(kwnames) : 0;
  if (n > 1) {
    PyErr_SetString(PyExc_TypeError, "wait(timeout=None, *, interruptible=False)");
    return NULL;
  }
  if (n) timeout = args[0];
  for (Py_ssize_t i = 0; i < nk; i++) {
    PyObject *k = PyTuple_GET_ITEM(kwnames, i);
    if (!PyUnicode_CompareWithASCIIString(k, "timeout") && !timeout)
      timeout = args[n + i];
    else if (!PyUnicode_CompareWithASCIIString(k, "interruptible"))
      interruptible = PyObject_IsTrue(args[n + i]);
    else {
      PyErr_SetString(PyExc_TypeError, "wait(timeout=None, *, interruptible=False)");
      return NULL;
    }
  }
  int64_t until;
  if (parse_timeout(x->s, timeout, &until, "wait")) return NULL;
  int r = fence_look(x) ? 1 : wait_pending(x->s, x->handle, until, interruptible);
  if (r == -1) return NULL;
  if (r == -4) {
    shm_fail(x->s, EINTR, "wait", "a fence", "a signal arrived; wait again");
    return NULL;
  }
  if (r == 1) fence_look(x);
  return PyFloat_FromDouble(r ? remaining_s(until) : 0.0);
}

static int fence_poll(Fence *x) { /* a look that may find out about a death; -1 exception */
  if (fence_look(x)) return 1;
  if (x->life && x->life == my_life(x->s)) return 0; /* ours: nobody else could have ended it */
  int k = shm_polled(x->s);
  return k > 0 ? fence_look(x) : k;
}

static PyObject *f_is_signaled(Fence *x, PyObject *u) {
  int r = fence_poll(x);
  return r < 0 ? NULL : PyBool_FromLong(r);
}

static PyObject *f_status(Fence *x, void *u) {
  if (fence_poll(x) < 0) return NULL;
  return PyLong_FromLong(x->status);
}

static PyObject *f_error(Fence *x, void *u) {
  fence_look(x);
  return PyLong_FromLong(x->error);
}

static PyObject *f_timestamp(Fence *x, void *u) {
  fence_look(x);
  return PyLong_FromUnsignedLongLong(x->timestamp);
}

static PyObject *f_owned(Fence *x, void *u) { return PyBool_FromLong(x->life && x->life == my_life(x->s)); }

static PyMethodDef fence_type_methods[] = {{"signal", (PyCFunction)(void *)f_signal, METH_FASTCALL | METH_KEYWORDS,
                                            "signal(error=0)\n--\n\nEnd the fence, once. error: a negative errno. EINVAL when signalled "
                                            "before, EPERM from another process (spec 3.4)."},
                                           {"wait", (PyCFunction)(void *)f_wait, METH_FASTCALL | METH_KEYWORDS,
                                            "wait(timeout=None, *, interruptible=False)\n--\n\nWait until signalled; returns the seconds "
                                            "left (> 0; inf for None), 0.0 when timed out. EINVAL for a negative timeout (spec 3.9)."},
                                           {"is_signaled", (PyCFunction)f_is_signaled, METH_NOARGS,
                                            "is_signaled()\n--\n\nTrue once the fence has ended, with or without an error (spec 3.6)."},
                                           {0}};
static PyGetSetDef fence_getset[] = {
    {"status", (getter)f_status, NULL, "0 pending, 1 signalled, or the negative errno it ended with (spec 3.5)", NULL},
    {"error", (getter)f_error, NULL, "the negative errno it ended with, else 0", NULL},
    {"timestamp", (getter)f_timestamp, NULL, "CLOCK_MONOTONIC ns of signalling; 0 while pending", NULL},
    {"owned", (getter)f_owned, NULL, "does this process own the fence's timeline?", NULL},
    {0}};
static PyMemberDef fence_members[] = {
    {"shm", T_OBJECT, offsetof(Fence, s), READONLY, NULL},
    {"handle", T_ULONGLONG, offsetof(Fence, handle), READONLY, "slot and generation in the domain"},
    {"context", T_ULONGLONG, offsetof(Fence, context), READONLY, "the fence context (timeline) it belongs to"},
    {"seqno", T_ULONGLONG, offsetof(Fence, seqno), READONLY, "its number on the timeline"},
    {"timeline_index", T_UINT, offsetof(Fence, timeline), READONLY, NULL},
    {"flags", T_UINT, offsetof(Fence, flags), READONLY, NULL},
    {0}};

int fence_register(PyObject *module) {
  PyType_Slot slots[] = {{Py_tp_doc, "A fence by its handle: what DmaFence is built on."},
                         {Py_tp_new, fence_new},
                         {Py_tp_dealloc, fence_dealloc},
                         {Py_tp_methods, fence_type_methods},
                         {Py_tp_getset, fence_getset},
                         {Py_tp_members, fence_members},
                         {0, NULL}};
  PyType_Spec spec = {"dmabuf._native.Fence", sizeof(Fence), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE, slots};
  Fence_Type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &spec, NULL);
  return Fence_Type ? PyModule_AddObjectRef(module, "Fence", (PyObject *)Fence_Type) : -1;
}
