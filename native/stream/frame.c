/* frame.c - Frame, the picture, tensor or bytes in a slot of a stream, for as long as its block or loop turn lasts.
 *
 * Its view is that of a block (access/block.h) without a fence: the stream's words keep others out. So what is kept of a frame is found and
 * detached by the same rules.
 */
#include "access/arrays.h"
#include "access/arrive.h"
#include "access/detach.h"
#include "access/leave.h"
#include "later.h"
#include "stream/port.h"

PyTypeObject *Frame_Type;

static bool is_open(Frame *f) {
  if (f->seq && f->port) return true;
  PyErr_SetString(PyExc_ValueError, "the frame is over: its block or its turn of the loop has ended; frame.keep() makes it last longer");
  return false;
}

static bool is_written(Frame *f) { return f->port->role == ROLE_PRODUCER; }

/* ---- how it begins ---- */

/* The use of a slot's block is over, for its turn or for what was kept. */
static void block_over(Block *b, void *with) {
  port_slot *slot = with;
  if (!(slot->held & HELD_VIEW)) return;
  slot->held &= ~(uint32_t)HELD_VIEW;
  if (!slot->held) read_unclaim(slot->port, (uint32_t)(slot - slot->port->slot));
}

static void meta_none(Port *p);

/* Frames come and go at the speed of the stream: the memory of a few is used again. */
static Frame *spare[8];
static int spares;

static Frame *frame_new(void) {
  if (!spares) return PyObject_GC_New(Frame, Frame_Type);
  Frame *f = spare[--spares];
  Py_SET_REFCNT(f, 1);
  return f;
}

static void frame_put(Frame *f) {
  if (spares < (int)(sizeof spare / sizeof *spare)) {
    spare[spares++] = f; /* it keeps its reference to the type */
    return;
  }
  PyTypeObject *type = Py_TYPE(f);
  PyObject_GC_Del(f);
  Py_DECREF(type);
}

PyObject *frame_open(Port *p, uint32_t k, uint64_t seq) {
  Frame *f = frame_new();
  if (!f) return NULL;
  f->port = (Port *)Py_NewRef((PyObject *)p);
  f->view = NULL;
  f->seq = seq;
  f->slot = k;
  f->kept = false;
  f->sized = !is_written(f) && (p->bits & S_SIZED);
  p->slot[k].held = HELD_TURN;
  p->turn = seq;
  p->turn_slot = k;
  p->used = UINT64_MAX;
  p->fence = 0;
  p->current = f;
  p->described = false;
  PyObject_GC_Track(f);
  return (PyObject *)f;
}

/* ---- how it ends ---- */

/* Leave its block. -1: an exception is set; the block is left in any case. */
static int leave_view(port_slot *slot, Frame *f, bool failed) {
  if (f) Py_CLEAR(f->view);
  Block *b = slot->block;
  int r = b && b->state == OPEN ? block_leave(b, failed) : 0;
  if (b && b->state == LEFT) slot->held |= HELD_VIEW;
  return r;
}

int frame_close(Port *p, bool failed) {
  if (!p->turn) return 0;
  Frame *f = p->current;
  uint32_t k = p->turn_slot;
  uint64_t seq = p->turn;
  port_slot *slot = &p->slot[k];
  int r = 0;
  p->turn = 0;
  p->current = NULL;
  p->found = -1;
  slot->held = 0;
  if (f && f->kept) {
    slot->held = HELD_FRAME;
  } else {
    if (f) f->seq = 0;
    r = leave_view(slot, f, failed);
  }
  if (p->shm) read_give(p, k, seq); /* else its end ran code that closed the port */
  return r;
}

/* The turn of a producer ends, and the use of its slot's block. -1: an exception is set. */
static int end_making(Port *p, bool failed) {
  Frame *f = p->current;
  port_slot *slot = &p->slot[p->turn_slot];
  p->turn = 0;
  p->current = NULL;
  slot->held = 0;
  if (f) f->seq = 0;
  return leave_view(slot, f, failed);
}

static void publish(Port *p, uint64_t used, uint64_t fence) {
  if (!p->described) meta_none(p); /* not before: without a use of it, the frame that was in the slot may stay */
  produce_publish(p, used, fence);
}

int frame_publish(Port *p) {
  if (!p->turn) return 0;
  uint64_t used = p->used, fence = p->fence;
  if (!end_making(p, false)) {
    publish(p, used, fence);
    return 0;
  }
  PyObject *kind, *value, *trace;
  PyErr_Fetch(&kind, &value, &trace);
  if (kind && PyErr_GivenExceptionMatches(kind, PyExc_Warning)) /* what was kept is detached, and the warning of it is an error */
    publish(p, used, fence);
  else
    produce_back(p, true);
  PyErr_Restore(kind, value, trace);
  return -1;
}

int frame_discard(Port *p) {
  if (!p->turn) return 0;
  Block *b = p->slot[p->turn_slot].block;
  bool seen = b && b->state == OPEN;
  int r = end_making(p, true);
  produce_back(p, seen);
  return r;
}

static int release(Frame *f) { /* a kept frame */
  Port *p = f->port;
  port_slot *slot = &p->slot[f->slot];
  f->seq = 0;
  f->kept = false;
  slot->held &= ~(uint32_t)HELD_FRAME;
  int r = leave_view(slot, f, false);
  if (!slot->held && p->shm) read_unclaim(p, f->slot);
  return r;
}

int frames_clear(Port *p) {
  int result = 0;
  for (uint32_t k = 0; k < p->slots; k++) {
    Block *b = p->slot[k].block;
    if (!b) continue;
    if (b->state == OPEN && block_leave(b, true)) report_later((PyObject *)b);
    if (b->state == LEFT) {
      int detached = block_detach(b);
      if (detached >= 0) block_end(b);
      if (detached > 0) block_left_zeros(b);
      result |= detached < 0;
    }
    p->slot[k].held = 0;
  }
  return result ? -1 : 0;
}

/* ---- what it shows ---- */

static PyObject *get_view(Frame *f, void *unused) {
  if (f->view) return Py_NewRef(f->view);
  if (!is_open(f)) return NULL;
  Port *p = f->port;
  port_slot *slot = &p->slot[f->slot];
  int error;
  db_stream *x = port_stream(p, &error);
  if (!x) return port_failed(p, "frame.view", error), NULL;
  if (!slot->block && !(slot->block = block_bare(slot->buf, slot->handle, is_written(f), block_over, slot))) return NULL;
  slot->block->length = -1;
  uint64_t used = f->sized ? atomic_load(&x->slot[f->slot].used) : UINT64_MAX, size = atomic_load(&x->size);
  if (used < size && used < (uint64_t)PY_SSIZE_T_MAX) slot->block->length = (Py_ssize_t)used;
  f->view = bare_open(slot->block);
  return Py_XNewRef(f->view);
}

static PyObject *frame_array(Frame *f, PyObject *args, PyObject *kwargs) {
  PyObject *view = get_view(f, NULL), *array = view ? view_array((View *)view, args, kwargs) : NULL;
  Py_XDECREF(view);
  return array;
}

static PyObject *by_view(Frame *f, const char *name, PyObject *args, PyObject *kwargs) {
  PyObject *view = get_view(f, NULL), *method = view ? PyObject_GetAttrString(view, name) : NULL;
  PyObject *result = method ? PyObject_Call(method, args, kwargs) : NULL;
  Py_XDECREF(method);
  Py_XDECREF(view);
  return result;
}

static PyObject *frame_planes(Frame *f, PyObject *args, PyObject *kwargs) { return by_view(f, "planes", args, kwargs); }

static PyObject *frame_tensor(Frame *f, PyObject *args, PyObject *kwargs) { return by_view(f, "tensor", args, kwargs); }

static PyObject *get_seq(Frame *f, void *unused) { return is_open(f) ? PyLong_FromUnsignedLongLong(f->seq) : NULL; }

static PyObject *get_stamp(Frame *f, void *unused) {
  int error;
  if (!is_open(f)) return NULL;
  db_stream *x = port_stream(f->port, &error);
  if (!x) return port_failed(f->port, "frame.timestamp_ns", error), NULL;
  return PyLong_FromUnsignedLongLong(is_written(f) ? 0 : atomic_load(&x->slot[f->slot].stamp));
}

static PyObject *get_used(Frame *f, void *unused) {
  int error;
  if (!is_open(f)) return NULL;
  db_stream *x = port_stream(f->port, &error);
  if (!x) return port_failed(f->port, "frame.used", error), NULL;
  uint64_t size = atomic_load(&x->size), used = f->sized ? atomic_load(&x->slot[f->slot].used) : UINT64_MAX;
  if (is_written(f)) used = f->port->used;
  return PyLong_FromUnsignedLongLong(used < size ? used : size);
}

static int set_used(Frame *f, PyObject *value, void *unused) {
  int error;
  if (!is_open(f)) return -1;
  db_stream *x = port_stream(f->port, &error);
  if (!x) return port_failed(f->port, "frame.used", error);
  if (!is_written(f) || !value) {
    PyErr_SetString(PyExc_AttributeError, "frame.used can be set by the producer only, before the frame is published");
    return -1;
  }
  Py_ssize_t n = PyNumber_AsSsize_t(value, PyExc_OverflowError);
  if (n == -1 && PyErr_Occurred()) return -1;
  if (n < 0 || (uint64_t)n > atomic_load(&x->size)) {
    PyErr_Format(PyExc_ValueError, "frame.used: %zd bytes; the frame has 0 to %llu", n, (unsigned long long)atomic_load(&x->size));
    return -1;
  }
  f->port->used = (uint64_t)n;
  return 0;
}

/* ---- metadata: bytes in the stream's own memory, [length 32 | kind 32] and then they; a rule in Python makes objects of them ---- */

static char *meta_of(Frame *f, Py_ssize_t *room) {
  Port *p = f->port;
  Mapping *m = p->meta ? mapping_of(p->meta) : NULL;
  Py_ssize_t each = (Py_ssize_t)p->meta_bytes + META_HEAD, at = (Py_ssize_t)f->slot * each;
  if (!m || !m->base || !p->meta_bytes || at + each > m->length) {
    PyErr_SetString(PyExc_ValueError, "frame.meta: the stream was made without room for metadata: Stream.create(..., meta_bytes=...)");
    return NULL;
  }
  *room = (Py_ssize_t)p->meta_bytes;
  return m->base + at;
}

/* The frame that is about to be published has none. */
static void meta_none(Port *p) {
  Mapping *m = p->meta && p->meta_bytes && p->found >= 0 ? mapping_of(p->meta) : NULL;
  Py_ssize_t at = (Py_ssize_t)p->found * ((Py_ssize_t)p->meta_bytes + META_HEAD);
  if (m && m->base && at + META_HEAD <= m->length) memset(m->base + at, 0, META_HEAD);
}

static PyObject *get_meta(Frame *f, void *unused) {
  Py_ssize_t room;
  if (!is_open(f)) return NULL;
  char *at = f->port->meta_bytes ? meta_of(f, &room) : NULL;
  if (!at) return f->port->meta_bytes ? NULL : Py_NewRef(Py_None);
  if (is_written(f) && !f->port->described) Py_RETURN_NONE; /* what is there is another frame's */
  uint32_t head[2];
  memcpy(head, at, sizeof head);
  if (head[0] > room) head[0] = 0, head[1] = 0; /* not written by a producer */
  return port_rule("meta", (PyObject *)f->port, Py_BuildValue("Iy#", head[1], at + META_HEAD, (Py_ssize_t)head[0]));
}

static int set_meta(Frame *f, PyObject *value, void *unused) {
  Py_ssize_t room;
  if (!is_open(f)) return -1;
  if (!is_written(f) || !value) {
    PyErr_SetString(PyExc_AttributeError, "frame.meta can be set by the producer only, before the frame is published");
    return -1;
  }
  char *at = meta_of(f, &room);
  PyObject *packed = at ? port_rule("pack_meta", (PyObject *)f->port, Py_BuildValue("(O)", value)) : NULL;
  const char *bytes;
  Py_ssize_t n;
  uint32_t head[2] = {0};
  int r = packed && PyArg_ParseTuple(packed, "Iy#", &head[1], &bytes, &n) ? 0 : -1;
  if (!r && n > room) {
    PyErr_Format(PyExc_ValueError, "frame.meta: %zd bytes; the stream has room for %zd: Stream.create(..., meta_bytes=...)", n, room);
    r = -1;
  }
  if (!r && f->seq && (at = meta_of(f, &room)) && n <= room) { /* packing has run Python code */
    head[0] = (uint32_t)n;
    f->port->described = true;
    memcpy(at, head, sizeof head);
    memcpy(at + META_HEAD, bytes, (size_t)n);
  }
  Py_XDECREF(packed);
  return r;
}

/* The fence for which readers wait: one that whoever fills the buffer signals. */
static PyObject *get_fence(Frame *f, void *unused) {
  int error;
  if (!is_open(f)) return NULL;
  db_stream *x = port_stream(f->port, &error);
  if (!x) return port_failed(f->port, "frame.fence", error), NULL;
  uint64_t fence = is_written(f) ? f->port->fence : atomic_load(&x->slot[f->slot].fence);
  return fence ? port_rule("fence", (PyObject *)f->port, Py_BuildValue("(K)", (unsigned long long)fence)) : Py_NewRef(Py_None);
}

static int set_fence(Frame *f, PyObject *value, void *unused) {
  if (!is_open(f)) return -1;
  if (!is_written(f) || !value) {
    PyErr_SetString(PyExc_AttributeError, "frame.fence can be set by the producer only, before the frame is published");
    return -1;
  }
  PyObject *number = port_rule("handle_of_fence", (PyObject *)f->port, Py_BuildValue("(O)", value));
  unsigned long long handle = number ? PyLong_AsUnsignedLongLong(number) : 0;
  Py_XDECREF(number);
  if (PyErr_Occurred()) return -1;
  f->port->fence = handle;
  return 0;
}

static PyObject *get_buf(Frame *f, void *unused) { return is_open(f) ? Py_NewRef(f->port->slot[f->slot].buf) : NULL; }

static PyObject *get_port(Frame *f, void *unused) { return Py_NewRef((PyObject *)f->port); }

static PyObject *get_slot(Frame *f, void *unused) { return PyLong_FromUnsignedLong(f->slot); }

static PyObject *get_open(Frame *f, void *unused) { return PyBool_FromLong(f->seq != 0); }

static PyObject *get_written(Frame *f, void *unused) { return PyBool_FromLong(is_written(f)); }

static PyObject *get_kept(Frame *f, void *unused) { return PyBool_FromLong(f->kept); }

/* ---- what it does ---- */

static PyObject *frame_keep(Frame *f, PyObject *unused) {
  if (!is_open(f)) return NULL;
  if (is_written(f)) return PyErr_Format(PyExc_ValueError, "a frame that is being made can't be kept: readers keep frames");
  f->kept = true;
  return Py_NewRef((PyObject *)f);
}

static PyObject *frame_release(Frame *f, PyObject *unused) {
  if (!f->seq || !f->port) Py_RETURN_NONE;
  if (is_written(f)) return PyErr_Format(PyExc_ValueError, "a frame that is being made is published or discarded, and not released");
  int r = f->port->current == f ? (f->kept = false, frame_close(f->port, false)) : release(f);
  if (r) return NULL;
  Py_RETURN_NONE;
}

static PyObject *discard(Frame *f, PyObject *unused) {
  if (!is_open(f)) return NULL;
  if (!is_written(f) || f->port->current != f)
    return PyErr_Format(PyExc_ValueError, "only the producer can discard a frame, before its end");
  if (frame_discard(f->port)) return NULL;
  Py_RETURN_NONE;
}

static PyObject *frame_enter(Frame *f, PyObject *unused) { return is_open(f) ? Py_NewRef((PyObject *)f) : NULL; }

static PyObject *frame_exit(Frame *f, PyObject *const *a, Py_ssize_t n) {
  if (!f->seq || !f->port || is_written(f)) Py_RETURN_NONE;
  bool failed = n > 0 && a[0] != Py_None;
  int r = f->port->current == f ? frame_close(f->port, failed) : 0;
  if (r) return NULL;
  Py_RETURN_NONE;
}

/* ---- the type ---- */

static int frame_traverse(Frame *f, visitproc visit, void *arg) {
  Py_VISIT(Py_TYPE(f));
  Py_VISIT(f->port);
  Py_VISIT(f->view);
  return 0;
}

static void frame_dealloc(Frame *f) {
  Port *p = f->port;
  PyObject_GC_UnTrack(f);
  if (p->current == f) {
    p->current = NULL; /* the turn goes on */
    Py_CLEAR(f->view);
  } else if (f->seq && f->kept && p->shm) {
    PyObject *kind, *value, *trace;
    PyErr_Fetch(&kind, &value, &trace);
    if (release(f)) report_later((PyObject *)p);
    PyErr_Restore(kind, value, trace);
  }
  Py_CLEAR(f->view);
  frame_put(f);
  Py_DECREF(p);
}

#define KEYWORDS(f) (PyCFunction)(void *) f, METH_VARARGS | METH_KEYWORDS
static PyMethodDef methods[] = {
    {"array", KEYWORDS(frame_array),
     "array($self, /, dtype=None, shape=None, offset=0, strides=None)\n--\n\nReturn an array of the frame, as View.array() does."},
    {"planes", KEYWORDS(frame_planes), "planes($self, /)\n--\n\nReturn an array for each plane of the picture, as View.planes() does."},
    {"tensor", KEYWORDS(frame_tensor),
     "tensor($self, /, dtype=None, shape=None, offset=0, strides=None, *, copy=False)\n--\n\n"
     "Return a tensor of torch of the frame, as View.tensor() does."},
    {"keep", (PyCFunction)frame_keep, METH_NOARGS,
     "keep($self, /)\n--\n\nHave the frame last beyond its block or loop turn, until release() or until nothing refers to it any more.\n\n"
     "The stream has a slot less meanwhile. Returns the frame."},
    {"release", (PyCFunction)frame_release, METH_NOARGS, "release($self, /)\n--\n\nGive the frame back now. Its view is over."},
    {"discard", (PyCFunction)discard, METH_NOARGS, "discard($self, /)\n--\n\nDon't publish the frame that is being made."},
    {"__enter__", (PyCFunction)frame_enter, METH_NOARGS, NULL},
    {"__exit__", (PyCFunction)(void *)frame_exit, METH_FASTCALL, NULL},
    {0}};
static PyGetSetDef getset[] = {
    {"view", (getter)get_view, NULL, "The bytes of the frame, a View: read-only for readers, and of `used` bytes.", NULL},
    {"seq", (getter)get_seq, NULL, "The number of the frame in its stream, from 1 on.", NULL},
    {"timestamp_ns", (getter)get_stamp, NULL, "When it was published, time.monotonic_ns(); 0 for the producer.", NULL},
    {"used", (getter)get_used, (setter)set_used, "Bytes of the slot that the frame has. The producer may set it; without that, all.", NULL},
    {"meta", (getter)get_meta, (setter)set_meta, "What the producer sent along: bytes, or what JSON can say; None: nothing.", NULL},
    {"fence", (getter)get_fence, (setter)set_fence, "A fence for which readers wait before the frame is theirs; None: none.", NULL},
    {"buf", (getter)get_buf, NULL, "The buffer of the slot.", NULL},
    {"port", (getter)get_port, NULL, "The producer or reader.", NULL},
    {"slot", (getter)get_slot, NULL, "Which slot of the stream it is in.", NULL},
    {"open", (getter)get_open, NULL, "Whether it isn't over.", NULL},
    {"written", (getter)get_written, NULL, "Whether it is being made.", NULL},
    {"kept", (getter)get_kept, NULL, "Whether keep() was called.", NULL},
    {0}};
static PyType_Slot slots[] = {{Py_tp_doc, "A frame of a stream."},
                              {Py_tp_traverse, frame_traverse},
                              {Py_tp_dealloc, frame_dealloc},
                              {Py_tp_methods, methods},
                              {Py_tp_getset, getset},
                              {0, NULL}};
static PyType_Spec spec = {
    .name = "dmabuf.Frame",
    .basicsize = sizeof(Frame),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_HAVE_GC,
    .slots = slots,
};

int frame_register(PyObject *module) {
  if (!Frame_Type && !(Frame_Type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &spec, NULL))) return -1;
  return PyModule_AddType(module, Frame_Type);
}
