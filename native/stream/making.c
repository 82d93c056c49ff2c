/* making.c - the block of a frame that is made: `with stream.produce() as frame`. */
#include "stream/making.h"
#include "access/entering.h"
#include "domain/sleep.h"
#include "later.h"

static PyTypeObject *making_type;

typedef struct {
  PyObject_HEAD
  Port *port;
  int64_t until;
  PyObject *timeout;
  uint64_t seq; /* of the frame that it made; 0 */
} Making;

static int begin_producing(Port *p) { /* 0; -1: an exception is set */
  if (p->role == ROLE_PRODUCER) return 0;
  PyObject *result = port_rule("begin", (PyObject *)p, PyTuple_New(0));
  Py_XDECREF(result);
  if (result && p->role != ROLE_PRODUCER) return port_failed(p, "produce", EBUSY);
  return result ? 0 : -1;
}

static PyObject *make_frame_until(Port *p, int64_t until, bool quiet) { /* quiet: None if there is no slot yet */
  if (p->turn) return port_failed(p, "produce", EINPROGRESS), NULL;
  if (port_go_in(p, "produce")) return NULL;
  int got = produce_take(p, until);
  p->busy = false;
  if (quiet && got == -ETIMEDOUT) Py_RETURN_NONE;
  if (port_checked(p, "produce", got)) return NULL;
  PyObject *frame = frame_open(p, (uint32_t)p->found, p->n);
  if (!frame) produce_back(p, false);
  return frame;
}

PyObject *make_frame(Port *p, PyObject *timeout) {
  int64_t until;
  if (port_need(p, "produce") || begin_producing(p) || parse_timeout(p->shm, timeout, &until, "produce")) return NULL;
  return make_frame_until(p, until, false);
}

static PyObject *making_enter(Making *m, PyObject *unused) {
  if (m->seq) return PyErr_Format(PyExc_ValueError, "the block was entered already: call produce() for each frame");
  PyObject *frame = make_frame(m->port, m->timeout);
  if (frame) m->seq = m->port->turn;
  return frame;
}

static PyObject *making_try(Making *m, PyObject *unused) {
  if (m->seq) return PyErr_Format(PyExc_ValueError, "the block was entered already: call produce() for each frame");
  if (port_need(m->port, "produce") || begin_producing(m->port)) return NULL;
  PyObject *frame = make_frame_until(m->port, 0, true);
  if (frame && frame != Py_None) m->seq = m->port->turn;
  return frame;
}

static PyObject *making_aenter(Making *m, PyObject *unused) { return port_rule("enter", (PyObject *)m, PyTuple_New(0)); }

static int making_end(Making *m, bool failed) {
  uint64_t seq = m->seq;
  m->seq = 0;
  if (!seq || m->port->turn != seq) return 0; /* discarded, or closed */
  return failed ? frame_discard(m->port) : frame_publish(m->port);
}

static PyObject *making_exit(Making *m, PyObject *const *a, Py_ssize_t n) {
  if (making_end(m, n > 0 && a[0] != Py_None)) return NULL;
  Py_RETURN_NONE;
}

static PyObject *making_aexit(Making *m, PyObject *const *a, Py_ssize_t n) {
  if (making_end(m, n > 0 && a[0] != Py_None)) return NULL;
  return entering_new(NULL, Py_None);
}

static int making_traverse(Making *m, visitproc visit, void *arg) {
  Py_VISIT(Py_TYPE(m));
  Py_VISIT(m->port);
  return 0;
}

static Making *spare; /* the memory of the last one is used again */

static void making_dealloc(Making *m) { /* entered and never left: as if the block had raised */
  PyTypeObject *type = Py_TYPE(m);
  PyObject_GC_UnTrack(m);
  if (m->seq) {
    PyObject *kind, *value, *trace;
    PyErr_Fetch(&kind, &value, &trace);
    if (making_end(m, true)) report_later((PyObject *)m->port);
    PyErr_Restore(kind, value, trace);
  }
  Py_CLEAR(m->port);
  Py_CLEAR(m->timeout);
  if (!spare) {
    spare = m; /* it keeps its reference to the type */
    return;
  }
  PyObject_GC_Del(m);
  Py_DECREF(type);
}

static PyMethodDef making_methods[] = {
    {"__enter__", (PyCFunction)making_enter, METH_NOARGS, NULL},
    {"__exit__", (PyCFunction)(void *)making_exit, METH_FASTCALL, NULL},
    {"__aenter__", (PyCFunction)making_aenter, METH_NOARGS, NULL},
    {"__aexit__", (PyCFunction)(void *)making_aexit, METH_FASTCALL, NULL},
    {"attempt", (PyCFunction)making_try, METH_NOARGS, "attempt($self, /)\n--\n\nEnter the block if a slot is free; else None."},
    {0}};
static PyMemberDef making_members[] = {{"port", T_OBJECT, offsetof(Making, port), READONLY, "The producer."},
                                       {"timeout", T_OBJECT, offsetof(Making, timeout), READONLY, "Seconds to wait, or None."},
                                       {0}};
static PyType_Slot making_slots[] = {{Py_tp_doc, "The block of a frame that is made."},
                                     {Py_tp_traverse, making_traverse},
                                     {Py_tp_dealloc, making_dealloc},
                                     {Py_tp_methods, making_methods},
                                     {Py_tp_members, making_members},
                                     {0, NULL}};
static PyType_Spec making_spec = {
    .name = "dmabuf._native.FrameMaking",
    .basicsize = sizeof(Making),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_HAVE_GC,
    .slots = making_slots,
};

PyObject *port_produce(Port *p, PyObject *const *a, Py_ssize_t n, PyObject *names) {
  PyObject *timeout = timeout_of(a, n, names, "produce");
  if (!timeout) return NULL;
  Making *m = spare;
  spare = NULL;
  if (m)
    Py_SET_REFCNT(m, 1);
  else if (!(m = PyObject_GC_New(Making, making_type)))
    return NULL;
  m->port = (Port *)Py_NewRef((PyObject *)p);
  m->timeout = Py_NewRef(timeout);
  m->seq = 0;
  PyObject_GC_Track(m);
  return (PyObject *)m;
}

int making_register(PyObject *module) {
  if (!making_type && !(making_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &making_spec, NULL))) return -1;
  return 0;
}
