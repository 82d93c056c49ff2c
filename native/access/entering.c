/* entering.c - the awaitable of `async with`: it enters a block or a group in the task that awaits it.
 *
 * What waits is a coroutine in Python. This object runs it, and so sees whatever ends it: if it returns, the block is shown, and if it
 * raises, is closed or is dropped, the block is abandoned. A signal handler can't come in between.
 */
#include "access/entering.h"
#include "access/arrive.h"

static PyTypeObject *entering_type;

typedef struct {
  PyObject_HEAD
  PyObject *whole;     /* NULL: it is done */
  PyObject *result;    /* of one that is done */
  PyObject *coroutine; /* NULL: not begun */
  PyObject *owner;     /* of the coroutine */
  bool running;        /* somebody is inside of it */
} Entering;

static Block **blocks_of(PyObject **whole, Py_ssize_t *n) {
  if (Py_IS_TYPE(*whole, Group_Type)) {
    Group *g = (Group *)*whole;
    *n = PyTuple_GET_SIZE(g->parts);
    return (Block **)((PyTupleObject *)g->parts)->ob_item;
  }
  *n = 1;
  return (Block **)whole;
}

PyObject *entering_new(PyObject *whole, PyObject *result) {
  Entering *e = (Entering *)entering_type->tp_alloc(entering_type, 0);
  if (!e) return NULL;
  e->whole = Py_XNewRef(whole);
  e->result = Py_XNewRef(result);
  return (PyObject *)e;
}

/* The coroutine has ended, or wasn't needed. The result; NULL: an exception is set. */
static PyObject *settle(Entering *e, bool granted) {
  Py_ssize_t n;
  PyObject *whole = e->whole, *view = NULL;
  Block **blocks = blocks_of(&whole, &n);
  if (granted)
    view = accesses_show(blocks, n, whole);
  else if (e->owner)
    block_waited(e->owner);
  if (!view) accesses_abandon(blocks, n);
  e->whole = NULL;
  Py_DECREF(whole);
  return view;
}

/* What settles at once, if nothing is in the way. 1: *view is the result; 0: the coroutine goes on; -1 */
static int start(Entering *e, PyObject **view) {
  Py_ssize_t n;
  Block **blocks = blocks_of(&e->whole, &n);
  PyObject *timeout = Py_IS_TYPE(e->whole, Group_Type) ? ((Group *)e->whole)->timeout : blocks[0]->timeout;
  int64_t until = accesses_until(e->whole, timeout);
  if (until == -1 && PyErr_Occurred()) {
    Py_CLEAR(e->whole);
    return -1;
  }
  if (!n) {
    Py_CLEAR(e->whole);
    return (*view = PyTuple_New(0)) ? 1 : -1;
  }
  if (accesses_begin(blocks, n)) {
    Py_CLEAR(e->whole);
    return -1;
  }
  PyObject *owner = accesses_owner(blocks, n), *pending = NULL;
  int got = owner ? accesses_arrive(blocks, n, owner, until, false, &pending) : -1;
  if (!got && !pending && accesses_are_plain(blocks, n)) {
    Py_DECREF(owner);
    return (*view = settle(e, true)) ? 1 : -1;
  }
  if (!got && !pending) pending = PyList_New(0);
  if (got >= 0 && (got == 1 || pending)) {
    PyObject *number = PyLong_FromLongLong(until), *args[] = {e->whole, owner, got ? Py_None : pending, number};
    e->coroutine = number ? rule_call(RULE_ARRIVE, args, 4) : NULL;
    Py_XDECREF(number);
  }
  Py_XDECREF(pending);
  e->owner = owner;
  if (e->coroutine) return 0;
  settle(e, false);
  return -1;
}

static PySendResult go_on(Entering *e, PyObject *value, PyObject **result) {
  if (!e->whole) {
    if (!(*result = e->result)) {
      PyErr_SetString(PyExc_RuntimeError, "the block was awaited already");
      return PYGEN_ERROR;
    }
    e->result = NULL;
    return PYGEN_RETURN;
  }
  if (!e->coroutine) {
    int got = start(e, result);
    if (got) return got > 0 ? PYGEN_RETURN : PYGEN_ERROR;
  }
  PyObject *given = NULL;
  PySendResult sent = PyIter_Send(e->coroutine, value, &given);
  if (sent == PYGEN_NEXT) {
    *result = given;
    return sent;
  }
  Py_XDECREF(given);
  *result = settle(e, sent == PYGEN_RETURN);
  return *result ? PYGEN_RETURN : PYGEN_ERROR;
}

/* Code that runs inside, as an exporter's, must not come in again. */
static bool may_run(Entering *e) {
  if (!e->running) return e->running = true;
  PyErr_SetString(PyExc_ValueError, "the block is being entered by this awaitable already");
  return false;
}

static PySendResult entering_send(Entering *e, PyObject *value, PyObject **result) {
  *result = NULL;
  if (!may_run(e)) return PYGEN_ERROR;
  Py_INCREF(e); /* what runs inside may drop it */
  PySendResult sent = go_on(e, value, result);
  e->running = false;
  Py_DECREF(e);
  return sent;
}

/* For those who don't know the slot: what send() returned, or StopIteration with the result. */
static PyObject *given(PySendResult sent, PyObject *result) {
  if (sent != PYGEN_RETURN) return result;
  PyObject *stop = PyObject_CallOneArg(PyExc_StopIteration, result);
  Py_DECREF(result);
  if (stop) PyErr_SetObject(PyExc_StopIteration, stop);
  Py_XDECREF(stop);
  return NULL;
}

static PyObject *entering_next(Entering *e) {
  PyObject *result;
  PySendResult sent = entering_send(e, Py_None, &result);
  return given(sent, result);
}

static PyObject *entering_send_method(Entering *e, PyObject *value) {
  PyObject *result;
  PySendResult sent = entering_send(e, value, &result);
  return given(sent, result);
}

static PyObject *throw_in(Entering *e, PyObject *args) {
  if (!e->whole || !e->coroutine) { /* nothing is entered */
    PyObject *kind, *value = NULL, *trace = NULL;
    if (!PyArg_UnpackTuple(args, "throw", 1, 3, &kind, &value, &trace)) return NULL;
    Py_CLEAR(e->whole);
    Py_CLEAR(e->result);
    if (PyExceptionInstance_Check(kind))
      PyErr_SetObject((PyObject *)Py_TYPE(kind), kind);
    else
      PyErr_SetObject(kind, value && value != Py_None ? value : NULL);
    return NULL;
  }
  PyObject *method = PyObject_GetAttrString(e->coroutine, "throw"), *result = method ? PyObject_CallObject(method, args) : NULL;
  Py_XDECREF(method);
  if (result) return result;
  bool ended = PyErr_ExceptionMatches(PyExc_StopIteration);
  if (ended) PyErr_Clear();
  PyObject *view = settle(e, ended);
  return view ? given(PYGEN_RETURN, view) : NULL;
}

static PyObject *entering_throw(Entering *e, PyObject *args) {
  if (!may_run(e)) return NULL;
  Py_INCREF(e);
  PyObject *result = throw_in(e, args);
  e->running = false;
  Py_DECREF(e);
  return result;
}

static void give_up(Entering *e) {
  if (!e->whole || !e->coroutine) return;
  PyObject *kind, *value, *trace;
  PyErr_Fetch(&kind, &value, &trace);
  settle(e, false);
  PyErr_Restore(kind, value, trace);
}

static PyObject *entering_close(Entering *e, PyObject *unused) {
  if (!may_run(e)) return NULL;
  PyObject *result = e->coroutine ? PyObject_CallMethod(e->coroutine, "close", NULL) : NULL;
  bool failed = e->coroutine && !result;
  give_up(e);
  Py_CLEAR(e->result);
  Py_XDECREF(result);
  e->running = false;
  if (failed) return NULL;
  Py_RETURN_NONE;
}

static int entering_traverse(Entering *e, visitproc visit, void *arg) {
  Py_VISIT(Py_TYPE(e));
  Py_VISIT(e->whole);
  Py_VISIT(e->result);
  Py_VISIT(e->coroutine);
  Py_VISIT(e->owner);
  return 0;
}

static void entering_finalize(Entering *e) {
  PyObject *kind, *value, *trace;
  PyErr_Fetch(&kind, &value, &trace);
  PyObject *closed = entering_close(e, NULL);
  if (!closed) PyErr_WriteUnraisable((PyObject *)e);
  Py_XDECREF(closed);
  PyErr_Restore(kind, value, trace);
}

static int entering_clear(Entering *e) {
  Py_CLEAR(e->whole);
  Py_CLEAR(e->result);
  Py_CLEAR(e->coroutine);
  Py_CLEAR(e->owner);
  return 0;
}

static void entering_dealloc(Entering *e) {
  PyTypeObject *type = Py_TYPE(e);
  if (e->whole && e->coroutine && PyObject_CallFinalizerFromDealloc((PyObject *)e)) return;
  PyObject_GC_UnTrack(e);
  entering_clear(e);
  type->tp_free(e);
  Py_DECREF(type);
}

static PyObject *myself(PyObject *self) { return Py_NewRef(self); }

static PyMethodDef methods[] = {{"send", (PyCFunction)entering_send_method, METH_O, NULL},
                                {"throw", (PyCFunction)entering_throw, METH_VARARGS, NULL},
                                {"close", (PyCFunction)entering_close, METH_NOARGS, NULL},
                                {0}};
static PyType_Slot slots[] = {{Py_tp_doc, "What `async with` awaits to enter a block, or to leave it."},
                              {Py_tp_traverse, entering_traverse},
                              {Py_tp_clear, entering_clear},
                              {Py_tp_finalize, entering_finalize},
                              {Py_tp_dealloc, entering_dealloc},
                              {Py_tp_iter, myself},
                              {Py_tp_iternext, entering_next},
                              {Py_am_await, myself},
                              {Py_am_send, entering_send},
                              {Py_tp_methods, methods},
                              {0, NULL}};
static PyType_Spec spec = {
    .name = "dmabuf._native.Entering",
    .basicsize = sizeof(Entering),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_HAVE_GC,
    .slots = slots,
};

int entering_register(PyObject *module) {
  if (!entering_type && !(entering_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &spec, NULL))) return -1;
  return PyModule_AddType(module, entering_type);
}
