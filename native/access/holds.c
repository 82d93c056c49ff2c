/* holds.c - Hold, the object behind an export of a View.
 *
 * Some consumers keep the buffer and some only its object (`torch.frombuffer`, `np.ndarray(buffer=…)`). The object that an export refers to
 * is therefore a Hold, of which each has one of its own, and an access is over when its last hold is gone.
 *
 * It is no object of the garbage collector, and nothing that it refers to leads back to it. So a cycle of its users is collected without
 * it, and it goes with them.
 */
#include "access/holds.h"

static PyTypeObject *hold_type;

hold *hold_new(Block *b, char *base, Py_ssize_t n, Py_ssize_t stride, bool readonly) {
  hold *h = PyObject_New(hold, hold_type);
  if (!h) return NULL;
  h->block = (Block *)Py_NewRef((PyObject *)b);
  h->mapping = (Mapping *)Py_NewRef((PyObject *)b->mapping);
  h->mapping->views++;
  h->base = base;
  h->n = n;
  h->stride = stride;
  h->readonly = readonly;
  h->counted = true;
  h->prev = NULL;
  h->next = b->holds;
  if (h->next) h->next->prev = h;
  b->holds = h;
  b->kept_count++;
  return h;
}

static void unlist(hold *h) {
  if (h->prev)
    h->prev->next = h->next;
  else
    h->block->holds = h->next;
  if (h->next) h->next->prev = h->prev;
  h->block->kept_count--;
}

static void hold_dealloc(hold *h) {
  PyTypeObject *type = Py_TYPE(h);
  Block *b = h->block;
  Mapping *mapping = h->mapping;
  mapping->views--;
  if (h->counted) unlist(h);
  if (h->counted && !b->kept_count && b->state == LEFT) {
    PyObject *kind, *value, *trace;
    PyErr_Fetch(&kind, &value, &trace);
    block_end(b);
    PyErr_Restore(kind, value, trace);
  }
  Py_DECREF(b);
  Py_DECREF(mapping);
  PyObject_Free(h);
  Py_DECREF(type);
}

int hold_fill(hold *h, Py_buffer *buffer, int flags) {
  buffer->obj = NULL;
  if ((flags & PyBUF_WRITABLE) && h->readonly) {
    PyErr_SetString(PyExc_BufferError, "a read() view is read-only: use a write() block, or copy it");
    return -1;
  }
  bool strided = h->stride != 1 && h->n > 1;
  if (strided && ((flags & PyBUF_STRIDES) != PyBUF_STRIDES || (flags & (PyBUF_ANY_CONTIGUOUS & ~PyBUF_STRIDES)) ||
                  (flags & (PyBUF_C_CONTIGUOUS & ~PyBUF_STRIDES)) || (flags & (PyBUF_F_CONTIGUOUS & ~PyBUF_STRIDES)))) {
    PyErr_SetString(PyExc_BufferError, "the slice has a step, and its consumer wants bytes without gaps: copy it with tobytes()");
    return -1;
  }
  buffer->buf = h->base;
  buffer->len = h->n;
  buffer->itemsize = 1;
  buffer->readonly = h->readonly;
  buffer->ndim = 1;
  buffer->format = flags & PyBUF_FORMAT ? "B" : NULL;
  buffer->shape = flags & PyBUF_ND ? &h->n : NULL;
  buffer->strides = (flags & PyBUF_STRIDES) == PyBUF_STRIDES ? &h->stride : NULL;
  buffer->suboffsets = NULL;
  buffer->internal = NULL;
  buffer->obj = Py_NewRef((PyObject *)h);
  return 0;
}

static int hold_getbuffer(hold *h, Py_buffer *buffer, int flags) { return hold_fill(h, buffer, flags); }

static PyObject *hold_repr(hold *h) {
  return PyUnicode_FromFormat("<hold on a %s() access, %zd bytes>", h->block->write ? "write" : "read", h->n);
}

static PyMemberDef members[] = {{"access", T_OBJECT, offsetof(hold, block), READONLY, "The access that it keeps."}, {0}};
static PyType_Slot slots[] = {{Py_tp_doc, "What keeps an access: an array, or another object that was made from its view, refers to it."},
                              {Py_tp_dealloc, hold_dealloc},
                              {Py_tp_repr, hold_repr},
                              {Py_tp_members, members},
                              {Py_bf_getbuffer, hold_getbuffer},
                              {0, NULL}};
static PyType_Spec spec = {
    .name = "dmabuf._native.Hold",
    .basicsize = sizeof(hold),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = slots,
};

int holds_register(PyObject *module) {
  if (!hold_type && !(hold_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &spec, NULL))) return -1;
  return PyModule_AddType(module, hold_type);
}
