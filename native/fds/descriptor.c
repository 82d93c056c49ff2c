/* descriptor.c - OwnedFd: a descriptor that is closed with its last reference, in C.
 *
 * A __del__ in Python would not do: a signal handler that raises may end it before its first line. Whoever makes descriptors by system
 * calls puts them into one of these without a line of Python in between, see dmabuf/uapi/call.py. */
#include "fds/fds.h"
#include <sys/syscall.h>
#include <unistd.h>

#ifndef SYS_pidfd_getfd
#define SYS_pidfd_getfd 438 /* the same on every architecture; older C libraries don't name it */
#endif

typedef struct {
  PyObject_HEAD
  int number; /* -1: given on or closed */
} OwnedFd;

/* One interpreter (sub-interpreters are not supported), so one type. */
static PyTypeObject *owned_type;

static PyObject *owned_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
  int number;
  if (!PyArg_ParseTuple(args, "i:OwnedFd", &number)) return NULL;
  if (number < 0) {
    PyErr_Format(PyExc_ValueError, "OwnedFd: %d is no descriptor", number);
    return NULL;
  }
  OwnedFd *self = (OwnedFd *)type->tp_alloc(type, 0);
  if (!self) {
    close(number);
    return NULL;
  }
  self->number = number;
  return (PyObject *)self;
}

static void owned_close(OwnedFd *self) {
  int number = self->number;
  self->number = -1;
  if (number < 0) return;
  Py_BEGIN_ALLOW_THREADS /* a last reference may free much memory */
  close(number);
  Py_END_ALLOW_THREADS
}

static void owned_dealloc(OwnedFd *self) {
  PyTypeObject *type = Py_TYPE(self);
  PyObject *kind, *value, *trace;
  PyErr_Fetch(&kind, &value, &trace);
  owned_close(self);
  PyErr_Restore(kind, value, trace);
  type->tp_free(self);
  Py_DECREF(type);
}

static PyObject *owned_repr(OwnedFd *self) {
  return self->number < 0 ? PyUnicode_FromString("<dmabuf fd, given on or closed>") : PyUnicode_FromFormat("<dmabuf fd %d>", self->number);
}

static PyObject *owned_fileno(OwnedFd *self, PyObject *unused) { return PyLong_FromLong(self->number); }

static PyObject *owned_take(OwnedFd *self, PyObject *unused) {
  int number = self->number;
  self->number = -1;
  return PyLong_FromLong(number);
}

static PyObject *owned_close_py(OwnedFd *self, PyObject *unused) {
  owned_close(self);
  Py_RETURN_NONE;
}

static PyObject *owned_enter(PyObject *self, PyObject *unused) { return Py_NewRef(self); }

static PyObject *owned_exit(OwnedFd *self, PyObject *args) {
  owned_close(self);
  Py_RETURN_NONE;
}

/* Another process's descriptor, if ptrace(2) would allow a look into it (pidfd_getfd(2), Linux 5.6). */
static PyObject *fd_of(PyObject *m, PyObject *args) { /* (pidfd, number) -> OwnedFd */
  int pidfd, theirs;
  if (!PyArg_ParseTuple(args, "ii", &pidfd, &theirs)) return NULL;
  OwnedFd *self = (OwnedFd *)owned_type->tp_alloc(owned_type, 0);
  if (!self) return NULL;
  self->number = (int)syscall(SYS_pidfd_getfd, pidfd, theirs, 0);
  if (self->number >= 0) return (PyObject *)self;
  PyErr_SetFromErrno(PyExc_OSError);
  Py_DECREF(self);
  return NULL;
}

static PyMethodDef functions[] = {{"fd_of", fd_of, METH_VARARGS, "(pidfd, number) -> OwnedFd: another process's descriptor."}, {0}};
static PyMethodDef methods[] = {
    {"fileno", (PyCFunction)owned_fileno, METH_NOARGS, "The descriptor, borrowed; -1 when it was given on or closed."},
    {"take", (PyCFunction)owned_take, METH_NOARGS, "Give it on: the caller closes it from now on; -1 when it was before."},
    {"close", (PyCFunction)owned_close_py, METH_NOARGS, "Close it now; again: nothing."},
    {"__enter__", owned_enter, METH_NOARGS, NULL},
    {"__exit__", (PyCFunction)owned_exit, METH_VARARGS, NULL},
    {0}};
static PyMemberDef members[] = {{"number", T_INT, offsetof(OwnedFd, number), READONLY, "fileno(), as an attribute."}, {0}};
static PyType_Slot slots[] = {
    {Py_tp_doc, (void *)"OwnedFd(number)\n--\n\nA descriptor that is closed with its last reference, unless somebody took it."},
    {Py_tp_new, owned_new},
    {Py_tp_dealloc, owned_dealloc},
    {Py_tp_repr, owned_repr},
    {Py_tp_methods, methods},
    {Py_tp_members, members},
    {0, NULL}};
static PyType_Spec spec = {
    .name = "dmabuf._native.OwnedFd", .basicsize = sizeof(OwnedFd), .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE, .slots = slots};

int descriptor_register(PyObject *module) {
  if (!owned_type && !(owned_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &spec, NULL))) return -1;
  return PyModule_AddType(module, owned_type) || PyModule_AddFunctions(module, functions) ? -1 : 0;
}
