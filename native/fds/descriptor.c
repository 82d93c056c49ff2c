/* descriptor.c - OwnedFd: a descriptor that is closed with the last reference to the object, in C.
 *
 * A __del__ in Python would not do: a signal handler that raises may end it before its first line. Code that makes descriptors by system
 * calls puts them into one of these without a line of Python in between, see dmabuf/uapi/call.py.
 */
#include "fds/fds.h"
#include <sys/syscall.h>
#include <unistd.h>

#ifndef SYS_pidfd_getfd
#define SYS_pidfd_getfd 438 /* the same on every architecture; older C libraries don't name it */
#endif

typedef struct {
  PyObject_HEAD
  int number; /* -1: taken or closed */
} OwnedFd;

/* One interpreter (sub-interpreters are not supported), so one type. */
static PyTypeObject *owned_type;

static PyObject *owned_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
  int number;
  if (!PyArg_ParseTuple(args, "i:OwnedFd", &number)) return NULL;
  if (number < 0) {
    PyErr_Format(PyExc_ValueError, "OwnedFd: %d is not a descriptor", number);
    return NULL;
  }
  OwnedFd *self = (OwnedFd *)type->tp_alloc(type, 0);
  if (self)
    self->number = number;
  else
    close(number);
  return (PyObject *)self;
}

static void owned_shut(OwnedFd *self) {
  int number = self->number;
  self->number = -1;
  if (number < 0) return;
  Py_BEGIN_ALLOW_THREADS /* to close the last descriptor of a file may free much memory */
  close(number);
  Py_END_ALLOW_THREADS
}

static void owned_dealloc(OwnedFd *self) {
  PyTypeObject *type = Py_TYPE(self);
  PyObject *kind, *value, *trace;
  PyErr_Fetch(&kind, &value, &trace);
  owned_shut(self);
  PyErr_Restore(kind, value, trace);
  type->tp_free(self);
  Py_DECREF(type);
}

static PyObject *owned_repr(OwnedFd *self) {
  if (self->number < 0) return PyUnicode_FromString("<dmabuf fd, taken or closed>");
  return PyUnicode_FromFormat("<dmabuf fd %d>", self->number);
}

static PyObject *owned_fileno(OwnedFd *self, PyObject *unused) { return PyLong_FromLong(self->number); }

static PyObject *owned_take(OwnedFd *self, PyObject *unused) {
  int number = self->number;
  self->number = -1;
  return PyLong_FromLong(number);
}

static PyObject *owned_close(OwnedFd *self, PyObject *unused) {
  owned_shut(self);
  Py_RETURN_NONE;
}

static PyObject *owned_enter(PyObject *self, PyObject *unused) { return Py_NewRef(self); }

static PyObject *owned_exit(OwnedFd *self, PyObject *args) { return owned_close(self, NULL); }

static PyObject *fd_of(PyObject *module, PyObject *args) {
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

static PyMethodDef functions[] = {
    METHOD(
        fd_of, METH_VARARGS, "($module, pidfd, number, /)",
        "Return a duplicate of another process's descriptor, as OwnedFd. The kernel asks the rights of ptrace(2) for it (pidfd_getfd(2))."),
    {0}};
static PyMethodDef methods[] = {
    {"fileno", (PyCFunction)owned_fileno, METH_NOARGS,
     "fileno($self, /)\n--\n\nReturn the descriptor, which the object keeps owning; -1 once it was taken or closed."},
    {"take", (PyCFunction)owned_take, METH_NOARGS,
     "take($self, /)\n--\n\nReturn the descriptor, which the caller owns from now on; -1 if it was taken or closed before."},
    {"close", (PyCFunction)owned_close, METH_NOARGS, "close($self, /)\n--\n\nClose the descriptor. Closing twice has no effect."},
    {"__enter__", owned_enter, METH_NOARGS, NULL},
    {"__exit__", (PyCFunction)owned_exit, METH_VARARGS, NULL},
    {0}};
static PyMemberDef members[] = {{"number", T_INT, offsetof(OwnedFd, number), READONLY, "What fileno() returns."}, {0}};
static PyType_Slot slots[] = {
    {Py_tp_doc, "OwnedFd(number, /)\n--\n\nA descriptor that is closed with the last reference to the object, unless it was taken."},
    {Py_tp_new, owned_new},
    {Py_tp_dealloc, owned_dealloc},
    {Py_tp_repr, owned_repr},
    {Py_tp_methods, methods},
    {Py_tp_members, members},
    {0, NULL}};
static PyType_Spec spec = {
    .name = "dmabuf._native.OwnedFd",
    .basicsize = sizeof(OwnedFd),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = slots,
};

int descriptor_register(PyObject *module) {
  if (!owned_type && !(owned_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &spec, NULL))) return -1;
  return PyModule_AddType(module, owned_type) || PyModule_AddFunctions(module, functions) ? -1 : 0;
}
