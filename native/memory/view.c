/* view.c - View, the bytes of a Mapping during one access.
 *
 * The exports of a view are counted apart from all others, so that the end of the access is known:
 *
 *   open  --retire(), exports left-->  retired  --last export released-->  done
 *   open  --retire(), no exports------------------------------------->     done
 *
 * When it becomes done, it calls on_release() exactly once. Until then it keeps its mapping open. A view that is collected while open never
 * calls it: the code that opened the access ends it by retire().
 */
#include "memory/view.h"
#include "memory/mapping.h"

typedef struct {
  PyObject_HEAD
  Mapping *mapping;     /* NULL: done */
  PyObject *on_release; /* NULL: none, or called already */
  char *base;
  Py_ssize_t length;
  Py_ssize_t exports;
  bool readonly;
  bool retired;
  PyObject *weakrefs;
} View;

/* One interpreter (sub-interpreters are not supported), so one type. */
static PyTypeObject *view_type;

static View *view_open(Mapping *mapping, PyObject *on_release, bool readonly, Py_ssize_t offset, Py_ssize_t length) {
  if (on_release != Py_None && !PyCallable_Check(on_release)) {
    PyErr_Format(PyExc_TypeError, "on_release must be a callable or None, not %s", Py_TYPE(on_release)->tp_name);
    return NULL;
  }
  if (offset < 0 || offset >= mapping->length || length <= 0 || length > mapping->length - offset) {
    os_error(EINVAL, "view: mapping: %zd bytes at %zd are not within its %zd bytes (EINVAL); pass a range of the mapping", length, offset,
             mapping->length);
    return NULL;
  }
  if (!readonly && !mapping->writable) {
    PyErr_SetString(PyExc_BufferError, "view: mapping: it is read-only; map it writable, or take a read-only view");
    return NULL;
  }
  mapping->views++; /* first: the allocation may collect garbage, whose finalizers may close a mapping that nothing uses */
  View *self = PyObject_GC_New(View, view_type);
  if (!self) {
    mapping->views--;
    return NULL;
  }
  self->mapping = (Mapping *)Py_NewRef(mapping);
  self->on_release = on_release == Py_None ? NULL : Py_NewRef(on_release);
  self->base = mapping->base + offset;
  self->length = length;
  self->exports = 0;
  self->readonly = readonly;
  self->retired = false;
  self->weakrefs = NULL;
  PyObject_GC_Track(self);
  return self;
}

static PyObject *view_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
  static char *names[] = {"mapping", "on_release", "readonly", "offset", "length", NULL};
  PyObject *object, *on_release, *length_object = Py_None;
  int readonly = -1;
  Py_ssize_t offset = 0, length = 0;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO|$pnO:View", names, &object, &on_release, &readonly, &offset, &length_object))
    return NULL;
  if (readonly < 0) {
    PyErr_SetString(PyExc_TypeError, "View() needs the keyword argument readonly");
    return NULL;
  }
  if (length_object != Py_None) {
    length = PyNumber_AsSsize_t(length_object, PyExc_OverflowError);
    if (length == -1 && PyErr_Occurred()) return NULL;
  }
  Mapping *mapping = mapping_of(object); /* after __index__ of the length, which may close it */
  if (!mapping) return NULL;
  if (length_object == Py_None && offset >= 0 && offset < mapping->length) length = mapping->length - offset;
  return (PyObject *)view_open(mapping, on_release, readonly != 0, offset, length);
}

static void leave_mapping(View *self) {
  Mapping *mapping = self->mapping;
  if (!mapping) return;
  self->mapping = NULL;
  self->base = NULL;
  mapping->views--;
  Py_DECREF(mapping);
}

static void become_done(View *self) {
  Py_INCREF(self);     /* the callback may drop the last reference to the view */
  leave_mapping(self); /* first, so that the callback may close the mapping */
  call_once(&self->on_release);
  Py_DECREF(self);
}

static int view_traverse(View *self, visitproc visit, void *arg) {
  Py_VISIT(Py_TYPE(self));
  Py_VISIT(self->mapping);
  Py_VISIT(self->on_release);
  return 0;
}

/* Called for a view that only garbage refers to, before any of that garbage is taken apart. The exports that keep a retired view from being
 * done are garbage too, so the access ends here, while everything that on_release() needs is whole. */
static void view_finalize(View *self) {
  if (self->retired) call_once(&self->on_release);
}

static int view_clear(View *self) {
  /* An export in the same garbage shows the memory. When that is cleared it is released, and then the view is done. */
  if (self->exports > 0) return 0;
  leave_mapping(self);
  Py_CLEAR(self->on_release);
  return 0;
}

static void view_dealloc(View *self) {
  PyTypeObject *type = Py_TYPE(self);
  PyObject_GC_UnTrack(self);
  if (self->weakrefs) PyObject_ClearWeakRefs((PyObject *)self);
  leave_mapping(self); /* every export owns a reference, so none is left */
  Py_CLEAR(self->on_release);
  type->tp_free(self);
  Py_DECREF(type);
}

static int view_getbuffer(View *self, Py_buffer *buffer, int flags) {
  buffer->obj = NULL;
  if (self->retired || !self->mapping) {
    PyErr_SetString(PyExc_ValueError, "the block is over, and so is this view of the buffer");
    return -1;
  }
  if (PyBuffer_FillInfo(buffer, (PyObject *)self, self->base, self->length, self->readonly, flags) < 0) return -1;
  self->exports++;
  return 0;
}

static void view_releasebuffer(View *self, Py_buffer *buffer) {
  self->exports--;
  if (self->exports == 0 && self->retired) become_done(self);
}

static PyObject *view_retire(View *self, PyObject *unused) {
  self->retired = true;
  if (self->exports > 0) Py_RETURN_FALSE;
  become_done(self);
  Py_RETURN_TRUE;
}

static PyObject *view_repr(View *self) {
  const char *state = !self->mapping ? "done" : self->retired ? "retired" : "open";
  return PyUnicode_FromFormat("<View of %zd bytes, %s, %s, %zd exports>", self->length, self->readonly ? "read-only" : "writable", state,
                              self->exports);
}

static PyMethodDef methods[] = {{"retire", (PyCFunction)view_retire, METH_NOARGS,
                                 "retire($self, /)\n--\n\n"
                                 "Refuse new exports, and let the view be done with the release of the last one. May be repeated.\n\n"
                                 "Returns:\n"
                                 "    True if no export is left, so that the view is done now."},
                                {0}};
static PyMemberDef members[] = {{"exports", T_PYSSIZET, offsetof(View, exports), READONLY, "Buffers taken from the view and not released."},
                                {"size", T_PYSSIZET, offsetof(View, length), READONLY, "The bytes that it shows."},
                                {"readonly", T_BOOL, offsetof(View, readonly), READONLY, "Whether its buffers are read-only."},
                                {"retired", T_BOOL, offsetof(View, retired), READONLY, "Whether retire() was called."},
                                {"__weaklistoffset__", T_PYSSIZET, offsetof(View, weakrefs), READONLY, NULL},
                                {0}};
static PyType_Slot slots[] = {
    {Py_tp_doc, "View(mapping, on_release, *, readonly, offset=0, length=None)\n--\n\n"
                "The bytes of a mapping during one access.\n\n"
                "It exports a flat buffer. The mapping can't be closed until the view is done: retired, and with no export left.\n\n"
                "Args:\n"
                "    on_release: Called exactly once, when the view is done. sys.unraisablehook is told what it raises.\n"
                "    length: Bytes to show from the offset; None shows the rest of the mapping.\n\n"
                "Raises:\n"
                "    TypeError: Not a Mapping, or not callable.\n"
                "    ValueError: The mapping is closed.\n"
                "    BufferError: The mapping is read-only, and readonly is False.\n"
                "    OSError: The range is not within the mapping (EINVAL)."},
    {Py_tp_new, view_new},
    {Py_tp_dealloc, view_dealloc},
    {Py_tp_traverse, view_traverse},
    {Py_tp_clear, view_clear},
    {Py_tp_finalize, view_finalize},
    {Py_tp_repr, view_repr},
    {Py_tp_methods, methods},
    {Py_tp_members, members},
    {Py_bf_getbuffer, view_getbuffer},
    {Py_bf_releasebuffer, view_releasebuffer},
    {0, NULL}};
static PyType_Spec spec = {
    .name = "dmabuf._native.View",
    .basicsize = sizeof(View),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = slots,
};

static PyObject *open_view(PyObject *module, PyObject *const *args, Py_ssize_t count) {
  if (count != 3) return PyErr_Format(PyExc_TypeError, "open_view() takes 3 arguments, not %zd", count);
  int readonly = PyObject_IsTrue(args[2]);
  if (readonly < 0) return NULL;
  Mapping *mapping = mapping_of(args[0]);
  if (!mapping) return NULL;
  PyObject *view = (PyObject *)view_open(mapping, args[1], readonly != 0, 0, mapping->length);
  if (!view) return NULL;
  PyObject *memory = PyMemoryView_FromObject(view), *pair = memory ? PyTuple_New(2) : NULL;
  if (!pair) {
    Py_XDECREF(memory);
    Py_DECREF(view);
    return NULL;
  }
  PyTuple_SET_ITEM(pair, 0, view);
  PyTuple_SET_ITEM(pair, 1, memory);
  return pair;
}

static PyMethodDef functions[] = {METHOD(open_view, METH_FASTCALL, "($module, mapping, on_release, readonly, /)",
                                         "Return a view of the whole mapping and a memoryview of it. Raises what View() raises."),
                                  {0}};

int view_register(PyObject *module) {
  if (!view_type && !(view_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &spec, NULL))) return -1;
  return PyModule_AddType(module, view_type) || PyModule_AddFunctions(module, functions) ? -1 : 0;
}
