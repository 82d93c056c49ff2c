/* handle.c - HandleBase: the attributes of a handle, which one call makes, its closing where nothing is special, and its end.
 *
 * A buffer that circulates has a new handle in each process that it comes to. Made and closed in Python it would cost as much as several
 * system calls, and so would a __del__ that only finds that the handle was closed.
 */
#include "access/handle.h"
#include "domain/guard.h"
#include "fds/fds.h"
#include "fds/same.h"
#include "later.h"
#include <unistd.h>

typedef struct {
  PyObject_HEAD
  PyObject *weakrefs;
  PyObject *fd, *left, *leaving, *life, *shared, *size, *domain, *path, *device_view, *known_resv, *resv_record, *polls, *ending;
  fd_id id; /* of the descriptor that it was made with; ino 0: unknown here */
} Handle;

static PyTypeObject *handle_type;
static PyObject *zero, *minus_one;
static PyObject *s_handle, *s_size, *s_domain, *s_drop, *s_close_all, *s_leave, *s_free_gone, *s_backing, *s_resv_ref, *s_dev, *s_ino;

static struct {
  PyObject **name;
  const char *text;
} const names[] = {{&s_handle, "_handle"}, {&s_size, "size"},           {&s_domain, "domain"},   {&s_drop, "drop"},
                   {&s_leave, "leave"},    {&s_close_all, "close_all"}, {&s_backing, "backing"}, {&s_free_gone, "free_gone"},
                   {&s_dev, "dev"},        {&s_resv_ref, "resv_ref"},   {&s_ino, "ino"}};

/* Is the interpreter about to end? Modules may be empty then. */
static int interpreter_ends(void) {
#if PY_VERSION_HEX >= 0x030d0000
  return Py_IsFinalizing();
#else
  return _Py_IsFinalizing();
#endif
}

PyObject *handle_path(PyObject *handle) { return PyObject_TypeCheck(handle, handle_type) ? ((Handle *)handle)->path : NULL; }

/* All of a handle but its descriptor, open or not. */
static int handle_fill(Handle *h, PyObject *shared) {
  h->shared = Py_NewRef(shared);
  if (!(h->size = PyObject_GetAttr(shared, s_size)) || !(h->domain = PyObject_GetAttr(shared, s_domain))) return -1;
  h->path = Py_NewRef(Py_None);
  h->device_view = Py_NewRef(Py_None);
  h->known_resv = Py_NewRef(Py_None);
  h->polls = Py_NewRef(Py_None);
  h->ending = Py_NewRef(Py_None);
  h->leaving = Py_NewRef(Py_False);
  h->life = Py_NewRef(zero);
  return 0;
}

/* From the descriptor to the handle that owns it, all of this is C: no signal handler can raise between the two. */
static PyObject *open_handle(PyObject *module, PyObject *const *a, Py_ssize_t n) {
  if (n != 4 || !PyType_Check(a[0]) || !PyType_Check(a[1]) || !PyType_IsSubtype((PyTypeObject *)a[1], handle_type))
    return PyErr_Format(PyExc_TypeError, "open_handle(face, kind, fd, shared)");
  PyTypeObject *face = (PyTypeObject *)a[0], *kind = (PyTypeObject *)a[1];
  PyObject *made = face->tp_alloc(face, 0), *handle = made ? kind->tp_alloc(kind, 0) : NULL;
  Handle *h = (Handle *)handle;
  if (!h || handle_fill(h, a[3]) || PyObject_SetAttr(made, s_handle, handle)) goto failed;
  if (!(h->fd = PyLong_Check(a[2]) ? Py_NewRef(a[2]) : owned_take_number(a[2], &h->id))) goto failed;
  h->left = Py_NewRef(Py_False);
  Py_DECREF(handle);
  return made;
failed:
  Py_XDECREF(handle);
  Py_XDECREF(made);
  return NULL;
}

static void field_set(PyObject **field, PyObject *value) { Py_XSETREF(*field, Py_NewRef(value)); }

/* Is it None? 1, 0, or -1 with an exception set. */
static int attribute_is_none(PyObject *object, PyObject *name) {
  PyObject *value = PyObject_GetAttr(object, name);
  Py_XDECREF(value);
  return value ? value == Py_None : -1;
}

/* Was the handle only passed on, or mapped by hand, and is its memory plain? Then only the record and the descriptor are left to close. */
static int handle_is_plain(Handle *h) {
  if (h->path != Py_None || h->polls != Py_None || h->leaving != Py_False || !h->shared || !h->fd) return 0;
  int plain = attribute_is_none(h->shared, s_backing);
  return plain > 0 ? attribute_is_none(h->shared, s_resv_ref) : plain;
}

static int handle_identify(Handle *h, PyObject *shared) {
  PyObject *dev = PyObject_GetAttr(shared, s_dev), *ino = dev ? PyObject_GetAttr(shared, s_ino) : NULL;
  uint64_t d = 0, i = 0;
  int bad = !ino || arg_u64(dev, &d) || arg_u64(ino, &i);
  h->id = (fd_id){.dev = d, .ino = i, .marked = false};
  Py_XDECREF(dev);
  Py_XDECREF(ino);
  return bad ? -1 : 0;
}

static int handle_close_fd(Handle *h, PyObject *shared) {
  int fd = (int)PyLong_AsLong(h->fd);
  if ((fd == -1 && PyErr_Occurred()) || (!h->id.ino && handle_identify(h, shared))) return -1;
  fd_id id = h->id;
  field_set(&h->fd, minus_one);
  Py_BEGIN_ALLOW_THREADS /* to close the last descriptor of a file may free much memory */
  fd_close(fd, &id);     /* if somebody else closed it, nothing is left to close */
  Py_END_ALLOW_THREADS
  return 0;
}

/* Drop the reference to the record, close the descriptor, and free what that ended. What fails can be called again, by close_all(). */
static int handle_close_plain(Handle *h) {
  field_set(&h->device_view, Py_None);
  field_set(&h->known_resv, Py_None);
  field_set(&h->leaving, Py_True);
  PyObject *shared = Py_NewRef(h->shared), *fd = Py_NewRef(h->fd); /* another thread may close the handle too */
  PyObject *args[] = {shared, (PyObject *)h, fd}, *watch = PyObject_VectorcallMethod(s_leave, args, 3, NULL);
  int bad = !watch || handle_close_fd(h, shared);
  if (!bad && watch != Py_None) {
    PyObject *freed = PyObject_CallMethodNoArgs(watch, s_free_gone);
    bad = !freed;
    Py_XDECREF(freed);
  }
  if (!bad) field_set(&h->left, Py_True);
  Py_XDECREF(watch);
  Py_DECREF(shared);
  Py_DECREF(fd);
  return bad;
}

static PyObject *handle_close(Handle *h, PyObject *unused) {
  if (h->left == Py_True) Py_RETURN_NONE;
  int plain = handle_is_plain(h);
  if (plain < 0) return NULL;
  if (!plain) return PyObject_CallMethodNoArgs((PyObject *)h, s_close_all);
  if (!handle_close_plain(h)) Py_RETURN_NONE;
  if (!in_main_thread() || guard_is_own()) return NULL;
  PyObject *error = take_exception(); /* which a signal handler may have raised: close() ends nevertheless */
  PyObject *done = PyObject_CallMethodNoArgs((PyObject *)h, s_close_all);
  if (done) PyErr_SetObject((PyObject *)Py_TYPE(error), error);
  Py_XDECREF(done);
  Py_DECREF(error);
  return NULL;
}

static void handle_finalize(PyObject *self) {
  Handle *h = (Handle *)self;
  if (!h->left || h->left == Py_True || interpreter_ends()) return;
  PyObject *kind, *value, *trace;
  PyErr_Fetch(&kind, &value, &trace);
  PyObject *drop = PyObject_GetAttr(self, s_drop), *result = drop ? guard_finish(drop, NULL, 0, NULL, true) : NULL;
  if (!result) PyErr_WriteUnraisable(self);
  Py_XDECREF(result);
  Py_XDECREF(drop);
  PyErr_Restore(kind, value, trace);
}

static int handle_traverse(Handle *h, visitproc visit, void *arg) {
  Py_VISIT(Py_TYPE(h));
  for (PyObject **field = &h->fd; field <= &h->ending; field++) Py_VISIT(*field);
  return 0;
}

static int handle_clear(Handle *h) {
  for (PyObject **field = &h->fd; field <= &h->ending; field++) Py_CLEAR(*field);
  return 0;
}

static void handle_dealloc(Handle *h) {
  PyTypeObject *type = Py_TYPE(h);
  PyObject_GC_UnTrack(h);
  if (h->weakrefs) PyObject_ClearWeakRefs((PyObject *)h);
  handle_clear(h);
  type->tp_free(h);
  Py_DECREF(type);
}

#define FIELD(name, member) {name, T_OBJECT_EX, offsetof(Handle, member), 0, NULL}

static PyMemberDef members[] = {FIELD("fd", fd),
                                FIELD("left", left),
                                FIELD("leaving", leaving),
                                FIELD("_life", life),
                                FIELD("shared", shared),
                                FIELD("size", size),
                                FIELD("domain", domain),
                                FIELD("path", path),
                                FIELD("device_view", device_view),
                                FIELD("known_resv", known_resv),
                                FIELD("resv_record", resv_record),
                                FIELD("polls", polls),
                                FIELD("ending", ending),
                                {"__weaklistoffset__", T_PYSSIZET, offsetof(Handle, weakrefs), READONLY, NULL},
                                {0}};
static PyMethodDef methods[] = {{"close", (PyCFunction)handle_close, METH_NOARGS,
                                 "close($self, /)\n--\n\nClose the handle; closing twice has no effect. A handle of which more is left "
                                 "than its descriptor calls its own\n"
                                 "close_all(). A signal handler that raises can't cut it short."},
                                {0}};
static PyType_Slot slots[] = {
    {Py_tp_doc, "The attributes of a handle. One that ends without having `left` calls its own drop(), again until it ends."},
    {Py_tp_traverse, handle_traverse},
    {Py_tp_clear, handle_clear},
    {Py_tp_finalize, handle_finalize},
    {Py_tp_dealloc, handle_dealloc},
    {Py_tp_members, members},
    {Py_tp_methods, methods},
    {0, NULL}};
static PyType_Spec spec = {
    .name = "dmabuf._native.HandleBase",
    .basicsize = sizeof(Handle),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = slots,
};

static PyMethodDef functions[] = {
    METHOD(open_handle, METH_FASTCALL, "($module, face, kind, fd, shared, /)",
           "Return a face of a new handle of a buffer, which owns the descriptor, a number or an OwnedFd, from then on."),
    {0}};

int handle_register(PyObject *module) {
  for (size_t i = 0; i < sizeof names / sizeof *names; i++)
    if (!*names[i].name && !(*names[i].name = PyUnicode_InternFromString(names[i].text))) return -1;
  if ((!zero && !(zero = PyLong_FromLong(0))) || (!minus_one && !(minus_one = PyLong_FromLong(-1)))) return -1;
  if (!handle_type && !(handle_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &spec, NULL))) return -1;
  return PyModule_AddType(module, handle_type) || PyModule_AddFunctions(module, functions) ? -1 : 0;
}
