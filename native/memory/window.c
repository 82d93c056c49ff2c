/* Window: the bytes of a Mapping for the time of one access.
 *
 * A window exports the bytes of a Mapping for one access.  Its exports are
 * counted apart from everybody else's, so that the end of the access is known:
 *
 *   open     --retire(), exports left-->  retired  --last export gone-->  done
 *   open     --retire(), no exports---------------------------------->    done
 *
 * Entering "done" calls on_release() exactly once.  Until then the window keeps
 * its mapping open.  A window collected while still open never calls it: whoever
 * opened the access ends it by retire().
 */
#include "memory/window.h"
#include "memory/mapping.h"

#include <errno.h>
#include <structmember.h>

typedef struct {
  PyObject_HEAD
  PyObject *mapping;    /* owned; NULL: done */
  PyObject *on_release; /* owned; NULL: none, or already called */
  char *base;
  Py_ssize_t length;
  Py_ssize_t exports;
  bool readonly;
  bool retired;
  PyObject *weakrefs;
} Window;

/* As with Mapping, one type: see there. */
static PyTypeObject *window_type;

static Window *window_open(PyObject *mapping, PyObject *on_release, bool readonly, Py_ssize_t offset, Py_ssize_t length) {
  char *base;
  Py_ssize_t whole;
  if (mapping_memory(mapping, &base, &whole) < 0) return NULL;
  if (on_release != Py_None && !PyCallable_Check(on_release)) {
    PyErr_Format(PyExc_TypeError, "on_release is a callable or None, not %s", Py_TYPE(on_release)->tp_name);
    return NULL;
  }
  if (offset < 0 || offset >= whole || length <= 0 || length > whole - offset) {
    os_error(EINVAL, "window: %zd bytes at %zd do not lie in the %zd bytes of the mapping", length, offset, whole);
    return NULL;
  }
  if (!readonly && !mapping_writable(mapping)) {
    PyErr_SetString(PyExc_BufferError, "window: a writable window needs a writable mapping");
    return NULL;
  }
  Window *self = PyObject_GC_New(Window, window_type);
  if (self == NULL) return NULL;
  self->mapping = Py_NewRef(mapping);
  self->on_release = on_release == Py_None ? NULL : Py_NewRef(on_release);
  self->base = base + offset;
  self->length = length;
  self->exports = 0;
  self->readonly = readonly;
  self->retired = false;
  self->weakrefs = NULL;
  mapping_windows(mapping, 1);
  PyObject_GC_Track(self);
  return self;
}

static PyObject *window_new(PyTypeObject *Py_UNUSED(type), PyObject *args, PyObject *kwargs) {
  static char *names[] = {"mapping", "on_release", "readonly", "offset", "length", NULL};
  PyObject *mapping, *on_release, *length_object = Py_None;
  int readonly = -1;
  Py_ssize_t offset = 0, length;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO|$pnO:Window", names, &mapping, &on_release, &readonly, &offset, &length_object))
    return NULL;
  if (readonly < 0) {
    PyErr_SetString(PyExc_TypeError, "Window() needs the keyword argument readonly");
    return NULL;
  }
  char *base;
  if (length_object != Py_None) {
    length = PyNumber_AsSsize_t(length_object, PyExc_OverflowError);
    if (length == -1 && PyErr_Occurred()) return NULL;
  } else {
    if (mapping_memory(mapping, &base, &length) < 0) return NULL;
    length = offset >= 0 && offset < length ? length - offset : 0;
  }
  return (PyObject *)window_open(mapping, on_release, readonly != 0, offset, length);
}

static void window_let_go(Window *self) {
  PyObject *mapping = self->mapping;
  if (mapping == NULL) return;
  self->mapping = NULL;
  self->base = NULL;
  mapping_windows(mapping, -1);
  Py_DECREF(mapping);
}

/* Calls on_release the first time.  An export may go while an exception is on
 * its way, which must arrive untouched. */
static void window_tell(Window *self) {
  PyObject *on_release = self->on_release;
  if (on_release == NULL) return;
  self->on_release = NULL;
#if PY_VERSION_HEX >= 0x030C0000
  PyObject *pending = PyErr_GetRaisedException();
#else
  PyObject *type, *value, *traceback;
  PyErr_Fetch(&type, &value, &traceback);
#endif
  PyObject *result = PyObject_CallNoArgs(on_release);
  if (result == NULL) PyErr_WriteUnraisable(on_release);
  Py_XDECREF(result);
  Py_DECREF(on_release);
#if PY_VERSION_HEX >= 0x030C0000
  PyErr_SetRaisedException(pending);
#else
  PyErr_Restore(type, value, traceback);
#endif
}

static void window_done(Window *self) {
  /* The callback may drop the last reference to the window. */
  Py_INCREF(self);
  window_let_go(self); /* first, so that on_release may close the mapping */
  window_tell(self);
  Py_DECREF(self);
}

static int window_traverse(PyObject *op, visitproc visit, void *arg) {
  Window *self = (Window *)op;
  Py_VISIT(Py_TYPE(op));
  Py_VISIT(self->mapping);
  Py_VISIT(self->on_release);
  return 0;
}

/* Runs for a window that only garbage refers to, before any of that garbage is
 * taken apart.  The views that hold a retired window back are garbage too, so
 * the access ends here, while what on_release needs is still whole. */
static void window_finalize(PyObject *op) {
  Window *self = (Window *)op;
  if (self->retired) window_tell(self);
}

static int window_clear(PyObject *op) {
  Window *self = (Window *)op;
  /* A view elsewhere in the garbage still shows the memory: its own clear
   * releases the export, which ends the window. */
  if (self->exports > 0) return 0;
  window_let_go(self);
  Py_CLEAR(self->on_release);
  return 0;
}

static void window_dealloc(PyObject *op) {
  Window *self = (Window *)op;
  PyTypeObject *type = Py_TYPE(op);
  PyObject_GC_UnTrack(op);
  if (self->weakrefs != NULL) PyObject_ClearWeakRefs(op);
  window_let_go(self); /* every export owns a reference: none is left */
  Py_CLEAR(self->on_release);
  type->tp_free(op);
  Py_DECREF(type);
}

static int window_getbuffer(PyObject *op, Py_buffer *view, int flags) {
  Window *self = (Window *)op;
  view->obj = NULL;
  if (self->retired || self->mapping == NULL) {
    PyErr_SetString(PyExc_ValueError, "the access is over: its window is retired");
    return -1;
  }
  if (PyBuffer_FillInfo(view, op, self->base, self->length, self->readonly, flags) < 0) return -1;
  self->exports++;
  return 0;
}

static void window_releasebuffer(PyObject *op, Py_buffer *Py_UNUSED(view)) {
  Window *self = (Window *)op;
  self->exports--;
  if (self->exports == 0 && self->retired) window_done(self);
}

static PyObject *window_retire(PyObject *op, PyObject *Py_UNUSED(ignored)) {
  Window *self = (Window *)op;
  self->retired = true;
  if (self->exports > 0) Py_RETURN_FALSE;
  window_done(self);
  Py_RETURN_TRUE;
}

static PyObject *window_repr(PyObject *op) {
  Window *self = (Window *)op;
  const char *state = self->mapping == NULL ? "done" : self->retired ? "retired" : "open";
  return PyUnicode_FromFormat("<Window of %zd bytes, %s, %s, %zd exports>", self->length, self->readonly ? "read-only" : "writable", state,
                              self->exports);
}

PyDoc_STRVAR(window_doc, "Window(mapping, on_release, *, readonly, offset=0, length=None)\n--\n\n"
                         "The bytes of a mapping for the time of one access.\n\n"
                         "Exports a flat buffer of length bytes from offset (None: to the end). The mapping\n"
                         "can't be closed until the window is done: retired, and its last export gone. Then\n"
                         "on_release() is called, exactly once; what it raises goes to sys.unraisablehook.\n"
                         "Raises TypeError (not a Mapping, not callable), ValueError (the mapping is closed),\n"
                         "BufferError (writable window of a read-only mapping), OSError EINVAL (range).\n"
                         "Source: design 3.7.");

static PyMethodDef window_methods[] = {
    {"retire", window_retire, METH_NOARGS,
     PyDoc_STR("retire($self, /)\n--\n\n"
               "Refuse new exports and end the access with the last one.\n\n"
               "True if none is left, so that the access has ended now. May be repeated.")},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef window_members[] = {
    {"exports", T_PYSSIZET, offsetof(Window, exports), READONLY, PyDoc_STR("Buffers taken from the window and not yet released.")},
    {"size", T_PYSSIZET, offsetof(Window, length), READONLY, PyDoc_STR("Bytes shown.")},
    {"readonly", T_BOOL, offsetof(Window, readonly), READONLY, PyDoc_STR("Whether its buffers are read-only.")},
    {"retired", T_BOOL, offsetof(Window, retired), READONLY, PyDoc_STR("Whether retire() was called.")},
    {"__weaklistoffset__", T_PYSSIZET, offsetof(Window, weakrefs), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot window_slots[] = {
    {Py_tp_doc, (void *)window_doc},
    {Py_tp_new, window_new},
    {Py_tp_dealloc, window_dealloc},
    {Py_tp_traverse, window_traverse},
    {Py_tp_clear, window_clear},
    {Py_tp_finalize, window_finalize},
    {Py_tp_repr, window_repr},
    {Py_tp_methods, window_methods},
    {Py_tp_members, window_members},
    {Py_bf_getbuffer, window_getbuffer},
    {Py_bf_releasebuffer, window_releasebuffer},
    {0, NULL},
};

static PyType_Spec window_spec = {
    .name = "dmabuf._native.Window",
    .basicsize = sizeof(Window),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = window_slots,
};

PyDoc_STRVAR(window_view_doc, "window_view($module, mapping, on_release, readonly, /)\n--\n\n"
                              "A window of the whole mapping and a memoryview of it, in one call.\n\n"
                              "Errors: as Window.");

static PyObject *window_view(PyObject *Py_UNUSED(module), PyObject *const *args, Py_ssize_t count) {
  if (count != 3) return PyErr_Format(PyExc_TypeError, "window_view() takes 3 arguments, not %zd", count);
  int readonly = PyObject_IsTrue(args[2]);
  if (readonly < 0) return NULL;
  char *base;
  Py_ssize_t length;
  if (mapping_memory(args[0], &base, &length) < 0) return NULL;
  PyObject *window = (PyObject *)window_open(args[0], args[1], readonly != 0, 0, length);
  if (window == NULL) return NULL;
  PyObject *view = PyMemoryView_FromObject(window);
  if (view == NULL) {
    Py_DECREF(window);
    return NULL;
  }
  PyObject *pair = PyTuple_New(2);
  if (pair == NULL) {
    Py_DECREF(view);
    Py_DECREF(window);
    return NULL;
  }
  PyTuple_SET_ITEM(pair, 0, window);
  PyTuple_SET_ITEM(pair, 1, view);
  return pair;
}

static PyMethodDef functions[] = {
    {"window_view", (PyCFunction)(void (*)(void))window_view, METH_FASTCALL, window_view_doc},
    {NULL, NULL, 0, NULL},
};

int window_register(PyObject *module) {
  if (window_type == NULL) window_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &window_spec, NULL);
  if (window_type == NULL || PyModule_AddType(module, window_type) < 0) return -1;
  return PyModule_AddFunctions(module, functions);
}
