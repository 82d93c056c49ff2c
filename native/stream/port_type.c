/* port_type.c - Port, of which dmabuf.Stream (it may produce) and dmabuf.StreamReader are made. */
#include "stream/port_type.h"
#include "domain/sleep.h"
#include "later.h"
#include "stream/making.h"

PyTypeObject *Port_Type;

/* ---- making frames ---- */

static PyObject *port_begin(Port *p, PyObject *unused) {
  if (port_need(p, "produce")) return NULL;
  return PyLong_FromLong(p->role == ROLE_NONE ? -produce_begin(p) : p->role == ROLE_PRODUCER ? 0 : EINVAL);
}

static PyObject *port_drain(Port *p, PyObject *const *a, Py_ssize_t n, PyObject *names) {
  PyObject *timeout = timeout_of(a, n, names, "drain");
  int64_t until;
  if (!timeout || port_need(p, "drain") || parse_timeout(p->shm, timeout, &until, "drain")) return NULL;
  if (p->role != ROLE_PRODUCER) Py_RETURN_NONE;
  if (port_go_in(p, "drain")) return NULL;
  int got = port_wait(p, SW_SPACE, until, produce_drained);
  p->busy = false;
  if (port_checked(p, "drain", got)) return NULL;
  Py_RETURN_NONE;
}

/* Take the slot of a buffer that exists already, and publish it when its content is there. */
static PyObject *port_take_slot(Port *p, PyObject *args) {
  PyObject *timeout;
  int slot;
  if (!PyArg_ParseTuple(args, "Oi", &timeout, &slot)) return NULL;
  p->only = slot;
  PyObject *frame = make_frame(p, timeout);
  p->only = -1;
  return frame;
}

static PyObject *port_finish(Port *p, PyObject *args) {
  if (!p->turn || p->role != ROLE_PRODUCER) return PyErr_Format(PyExc_ValueError, "no frame is being made");
  if (frame_publish(p)) return NULL;
  Py_RETURN_NONE;
}

/* ---- reading ---- */

static PyObject *port_join(Port *p, PyObject *args) {
  int role, newest, takeover;
  unsigned long long group, history;
  if (!PyArg_ParseTuple(args, "iKpKp", &role, &group, &newest, &history, &takeover)) return NULL;
  if (port_need(p, "reader")) return NULL;
  if (p->role != ROLE_NONE || role < SR_QUEUE || role > SR_REDELIVER) return PyErr_Format(PyExc_ValueError, "the port has a part already");
  p->takeover = takeover;
  int error = read_join(p, role, group, newest, history);
  return error == RAISED ? NULL : PyLong_FromLong(-error);
}

static PyObject *tell_taken(void *port) { return port_rule("taken", port, Py_BuildValue("(K)", (unsigned long long)((Port *)port)->vain)); }

static PyObject *next_frame(Port *p, int64_t until, bool quiet, bool once) { /* quiet: NULL without an exception is the end; once: None */
  if (p->role < 0 || p->role >= ROLE_PRODUCER) return port_failed(p, "next", EBADF), NULL;
  if (frame_close(p, false) || port_go_in(p, "next")) return NULL;
  p->vain = 0;
  int got = read_take(p, until);
  p->busy = false;
  PyObject *frame = got == 1 ? frame_open(p, (uint32_t)p->found, p->n) : NULL;
  if (frame) p->due &= ~(1ull << p->found);
  if (got == 1 && !frame) { /* no memory: the frame stays the next one */
    PyObject *kind, *value, *trace;
    PyErr_Fetch(&kind, &value, &trace);
    if (!stream_is_member((uint32_t)p->role)) { /* a member's is nobody else's, and stays found */
      if (!p->promised) read_unclaim(p, (uint32_t)p->found);
      p->found = -1;
    }
    PyErr_Restore(kind, value, trace);
  }
  if (__builtin_expect(p->watched, 0) && got != RAISED && (frame || got != 1)) call_till_done(tell_taken, p, (PyObject *)p);
  if (frame || got == 1 || (quiet && got == -ENODATA)) return frame;
  if (once && got == -ETIMEDOUT) Py_RETURN_NONE;
  port_checked(p, "next", got);
  return NULL;
}

static PyObject *port_next(Port *p, PyObject *const *a, Py_ssize_t n, PyObject *names) {
  PyObject *timeout = timeout_of(a, n, names, "next");
  int64_t until = -1;
  if (!timeout || port_need(p, "next") || (timeout != Py_None && parse_timeout(p->shm, timeout, &until, "next"))) return NULL;
  return next_frame(p, until, false, false);
}

static PyObject *port_iternext(Port *p) {
  if (port_need(p, "next")) return NULL;
  return next_frame(p, -1, true, false);
}

static PyObject *port_try(Port *p, PyObject *unused) {
  if (port_need(p, "next")) return NULL;
  return next_frame(p, 0, false, true);
}

static PyObject *get_fence(Port *p, void *unused) {
  int error;
  db_stream *x = p->found >= 0 ? port_stream(p, &error) : NULL;
  return PyLong_FromUnsignedLongLong(x ? atomic_load(&x->slot[p->found].fence) : 0);
}

static PyObject *port_end_turn(Port *p, PyObject *unused) {
  int r = p->role == ROLE_PRODUCER ? frame_discard(p) : frame_close(p, false);
  if (r) return NULL;
  Py_RETURN_NONE;
}

/* ---- its life ---- */

static PyObject *port_attach(Port *p, PyObject *args) {
  Shm *shm;
  PyObject *slots, *meta;
  unsigned stream, gen, meta_bytes;
  if (!PyArg_ParseTuple(args, "O!IIO!OI", Shm_Type, &shm, &stream, &gen, &PyTuple_Type, &slots, &meta, &meta_bytes)) return NULL;
  Py_ssize_t n = PyTuple_GET_SIZE(slots);
  if (p->shm || n < 1 || n > (Py_ssize_t)STREAM_SLOTS) return PyErr_Format(PyExc_ValueError, "the port is attached, or has no slots");
  db_stream *x = stream_at(shm, stream);
  if (!x || atomic_load(&x->gen) != gen || atomic_load(&x->slots) != (uint32_t)n)
    return PyErr_Format(PyExc_ValueError, "the stream has another number of slots, or is gone");
  for (Py_ssize_t i = 0; i < n; i++) {
    PyObject *buf, *handle;
    if (!PyArg_ParseTuple(PyTuple_GET_ITEM(slots, i), "OO", &buf, &handle)) return NULL;
    Py_XSETREF(p->slot[i].buf, Py_NewRef(buf));
    Py_XSETREF(p->slot[i].handle, Py_NewRef(handle));
    p->slot[i].port = p;
  }
  p->slots = (uint32_t)n;
  p->stream = stream;
  p->gen = gen;
  p->policy = atomic_load(&x->policy);
  p->meta_bytes = meta_bytes;
  p->meta = meta == Py_None ? NULL : Py_NewRef(meta);
  p->life = my_life(shm);
  p->shm = (Shm *)Py_NewRef((PyObject *)shm);
  Py_RETURN_NONE;
}

static void forget(Port *p) {
  for (uint32_t k = 0; k < STREAM_SLOTS; k++) {
    if (p->slot[k].block) p->slot[k].block->over = NULL;
    Py_CLEAR(p->slot[k].block);
    Py_CLEAR(p->slot[k].buf);
    Py_CLEAR(p->slot[k].handle);
  }
  Py_CLEAR(p->meta);
  Py_CLEAR(p->shm);
}

/* End its part in the stream. What is kept of frames is detached first; if something can't be, the place stays this process's. */
static void end_part(Port *p) {
  if (!p->shm) return;
  Py_INCREF(p);
  if (p->role == ROLE_PRODUCER) {
    if (p->turn && frame_discard(p)) report_later((PyObject *)p);
    produce_end(p);
  } else if (p->role >= 0) {
    if (p->turn && frame_close(p, false)) report_later((PyObject *)p);
    if (frames_clear(p))
      p->role = ROLE_NONE;
    else
      read_leave(p);
  }
  Py_DECREF(p);
}

static PyObject *port_close(Port *p, PyObject *unused) {
  if (p->busy) return port_failed(p, "close", EALREADY), NULL;
  if (p->current) p->current->seq = 0;
  end_part(p);
  forget(p);
  Py_RETURN_NONE;
}

static PyObject *port_stop(Port *p, PyObject *unused) {
  if (p->busy) return port_failed(p, "close", EALREADY), NULL;
  end_part(p);
  Py_RETURN_NONE;
}

static PyObject *port_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
  Port *p = (Port *)type->tp_alloc(type, 0);
  if (!p) return NULL;
  p->role = ROLE_NONE;
  p->found = p->only = -1;
  return (PyObject *)p;
}

static int port_traverse(Port *p, visitproc visit, void *arg) {
  Py_VISIT(Py_TYPE(p));
  Py_VISIT(p->shm);
  Py_VISIT(p->meta);
  for (uint32_t k = 0; k < STREAM_SLOTS; k++) {
    Py_VISIT(p->slot[k].buf);
    Py_VISIT(p->slot[k].handle);
    Py_VISIT(p->slot[k].block);
  }
  return 0;
}

static void port_finalize(Port *p) {
  PyObject *kind, *value, *trace;
  PyErr_Fetch(&kind, &value, &trace);
  end_part(p);
  PyErr_Restore(kind, value, trace);
}

static int port_clear(Port *p) {
  forget(p);
  return 0;
}

static void port_dealloc(Port *p) {
  PyTypeObject *type = Py_TYPE(p);
  if (PyObject_CallFinalizerFromDealloc((PyObject *)p)) return;
  PyObject_GC_UnTrack(p);
  forget(p);
  type->tp_free(p);
  Py_DECREF(type);
}

static PyObject *get_lag(Port *p, void *unused) {
  int error;
  db_stream *x = port_stream(p, &error);
  if (!x) return port_failed(p, "lag", error), NULL;
  uint64_t head = SEQ_OF(atomic_load(&x->head)), next = p->turn ? p->turn + 1 : p->n;
  if (p->role < 0 || p->role >= ROLE_PRODUCER) return PyLong_FromLong(0);
  if (stream_is_member((uint32_t)p->role)) next = SEQ_OF(atomic_load(&x->group_cursor[p->group]));
  return PyLong_FromUnsignedLongLong((head >= next ? head - next + 1 : 0) + (p->role == SR_REDELIVER ? read_waiting(p) : 0));
}

static PyObject *get_ended(Port *p, void *unused) { return PyBool_FromLong(read_ended(p)); }

static PyObject *get_news(Port *p, void *unused) {
  int error;
  db_stream *x = port_stream(p, &error);
  return PyLong_FromUnsignedLongLong(x ? (uint64_t)atomic_load(&x->count[0]) + 1 : 0);
}

static PyObject *get_lost(Port *p, void *unused) { return PyLong_FromUnsignedLongLong(p->lost); }

static PyObject *get_watched(Port *p, void *unused) { return PyBool_FromLong(p->watched); }

static int set_watched(Port *p, PyObject *value, void *unused) {
  p->watched = value == Py_True;
  return 0;
}

static PyObject *get_current(Port *p, void *unused) { return PyBool_FromLong(p->shm && p->life && my_life(p->shm) == p->life); }

static PyObject *get_role(Port *p, void *unused) { return PyLong_FromLong(p->role); }

static PyObject *get_place(Port *p, void *unused) { return PyLong_FromUnsignedLong(p->place); }

static PyObject *get_making(Port *p, void *unused) { return PyBool_FromLong(p->role == ROLE_PRODUCER && p->turn); }

static PyObject *get_attached(Port *p, void *unused) { return PyBool_FromLong(p->shm != NULL); }

static PyObject *get_held(Port *p, void *unused) {
  uint64_t held = 0;
  for (uint32_t k = 0; k < p->slots; k++) held |= (uint64_t)((p->slot[k].held & (HELD_FRAME | HELD_VIEW)) != 0) << k;
  return PyLong_FromUnsignedLongLong(held);
}

#define FAST(f) (PyCFunction)(void *) f, METH_FASTCALL | METH_KEYWORDS
static PyMethodDef methods[] = {
    {"produce", FAST(port_produce),
     "produce($self, /, timeout=None)\n--\n\n"
     "Return the block of a new frame: `with stream.produce() as frame`. At its end the frame is published; if it raises, discarded.\n\n"
     "Args:\n    timeout: Seconds to wait for a slot that is free; None without limit."},
    {"drain", FAST(port_drain),
     "drain($self, /, timeout=None)\n--\n\nWait until all readers have given all frames back.\n\n"
     "Args:\n    timeout: Seconds; None without limit."},
    {"next", FAST(port_next),
     "next($self, /, timeout=None)\n--\n\nReturn the next frame. The one before is over.\n\n"
     "Args:\n    timeout: Seconds to wait for it; None without limit."},
    {"attempt", (PyCFunction)port_try, METH_NOARGS, "attempt($self, /)\n--\n\nReturn the next frame, or None if there is none yet."},
    {"begin_producing", (PyCFunction)port_begin, METH_NOARGS,
     "begin_producing($self, /)\n--\n\nBecome the producer. Return 0 or an errno."},
    {"_take", (PyCFunction)port_take_slot, METH_VARARGS,
     "_take($self, timeout, slot, /)\n--\n\nReturn a frame to be made, without a block."},
    {"_finish", (PyCFunction)port_finish, METH_NOARGS, "_finish($self, /)\n--\n\nPublish the frame of _take()."},
    {"_join", (PyCFunction)port_join, METH_VARARGS,
     "_join($self, role, group, newest, history, takeover, /)\n--\n\nTake a reader's place. Return 0 or an errno."},
    {"_end_turn", (PyCFunction)port_end_turn, METH_NOARGS, "_end_turn($self, /)\n--\n\nEnd the present frame."},
    {"_attach", (PyCFunction)port_attach, METH_VARARGS,
     "_attach($self, shm, stream, gen, slots, meta, meta_bytes, /)\n--\n\nBelong to a stream. slots: (buffer, handle) of each."},
    {"_stop", (PyCFunction)port_stop, METH_NOARGS, "_stop($self, /)\n--\n\nEnd its part in the stream."},
    {"_close", (PyCFunction)port_close, METH_NOARGS, "_close($self, /)\n--\n\nEnd its part, and forget the stream."},
    {0}};
static PyGetSetDef getset[] = {
    {"lag", (getter)get_lag, NULL, "Frames that are published and that this reader has not had.", NULL},
    {"lost", (getter)get_lost, NULL, "Frames that this reader has passed over, since it came.", NULL},
    {"news", (getter)get_news, NULL, "How often who waits for frames was woken, + 1.", NULL},
    {"ended", (getter)get_ended, NULL, "Whether no frame will come to this reader any more.", NULL},
    {"waits_for", (getter)get_fence, NULL, "The fence for which the next frame waits, 0: none.", NULL},
    {"_watched", (getter)get_watched, (setter)set_watched, "Whether the rule is told of frames that are taken.", NULL},
    {"_role", (getter)get_role, NULL, "What it does.", NULL},
    {"_place", (getter)get_place, NULL, "Its place among the readers.", NULL},
    {"_making", (getter)get_making, NULL, "Whether a frame is being made.", NULL},
    {"is_current", (getter)get_current, NULL, "Whether this process is the one that it was attached in.", NULL},
    {"_attached", (getter)get_attached, NULL, "Whether it belongs to a stream.", NULL},
    {"_held", (getter)get_held, NULL, "Bits of the slots that it keeps.", NULL},
    {0}};
static PyType_Slot slots[] = {{Py_tp_doc, "What a process has of a stream."},
                              {Py_tp_new, port_new},
                              {Py_tp_traverse, port_traverse},
                              {Py_tp_clear, port_clear},
                              {Py_tp_finalize, port_finalize},
                              {Py_tp_dealloc, port_dealloc},
                              {Py_tp_iter, PyObject_SelfIter},
                              {Py_tp_iternext, port_iternext},
                              {Py_tp_methods, methods},
                              {Py_tp_getset, getset},
                              {0, NULL}};
static PyType_Spec spec = {
    .name = "dmabuf._native.Port",
    .basicsize = sizeof(Port),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = slots,
};

int port_type_register(PyObject *module) {
  if (!Port_Type && !(Port_Type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &spec, NULL))) return -1;
  return PyModule_AddType(module, Port_Type);
}
