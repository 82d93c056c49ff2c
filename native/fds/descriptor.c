/* descriptor.c - OwnedFd: a descriptor that is closed with the last reference to the object, in C, if it is still the one that it was.
 *
 * A __del__ in Python would not do: a signal handler that raises may end it before its first line. Code that makes descriptors by system
 * calls puts them into one of these without a line of Python in between, see dmabuf/uapi/call.py.
 *
 * Other code of the program may close the number, and open a file of its own that gets it: a library that closes what it was lent, a daemon
 * that closes all descriptors. So each method compares the inode in the same call (same.h), and a file of somebody else stays as it is.
 */
#include "errors.h"
#include "fds/fds.h"
#include "fds/same.h"
#include <fcntl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef SYS_pidfd_getfd
#define SYS_pidfd_getfd 438 /* the same on every architecture; older C libraries don't name it */
#endif

typedef struct {
  PyObject_HEAD
  int number; /* -1: taken or closed */
  fd_id id;
} OwnedFd;

/* One interpreter (sub-interpreters are not supported), so one type. */
static PyTypeObject *owned_type;

PyObject *owned_fd(int number, int mark) {
  if (number < 0) return PyErr_SetFromErrno(PyExc_OSError);
  OwnedFd *self = (OwnedFd *)owned_type->tp_alloc(owned_type, 0);
  if (self && !(mark ? fd_mark(number, &self->id) : fd_identify(number, &self->id))) {
    self->number = number;
    return (PyObject *)self;
  }
  if (self) PyErr_SetFromErrno(PyExc_OSError);
  int open = !self || errno != EBADF;
  if (self) self->number = -1;
  Py_XDECREF(self);
  if (open) close(number);
  return NULL;
}

PyObject *owned_fd_of(int number, const struct stat *st) {
  OwnedFd *self = (OwnedFd *)owned_type->tp_alloc(owned_type, 0);
  if (!self) {
    close(number);
    return NULL;
  }
  self->number = number;
  self->id = (fd_id){.dev = (unsigned long long)st->st_dev, .ino = (unsigned long long)st->st_ino, .marked = false};
  return (PyObject *)self;
}

static PyObject *owned_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
  int number;
  if (!PyArg_ParseTuple(args, "i:OwnedFd", &number)) return NULL;
  if (number >= 0) return owned_fd(number, false);
  return PyErr_Format(PyExc_ValueError, "OwnedFd: %d is not a descriptor", number);
}

static void owned_shut(OwnedFd *self) {
  int number = self->number;
  self->number = -1;
  if (number < 0) return;
  Py_BEGIN_ALLOW_THREADS /* to close the last descriptor of a file may free much memory */
  fd_close(number, &self->id);
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

static PyObject *owned_fileno(OwnedFd *self, PyObject *unused) {
  if (self->number >= 0 && !fd_is(self->number, &self->id)) return fd_error("fileno", self->number);
  return PyLong_FromLong(self->number);
}

static PyObject *owned_take(OwnedFd *self, PyObject *unused) {
  PyObject *number = PyLong_FromLong(self->number);
  if (number) self->number = -1;
  return number;
}

PyObject *owned_take_number(PyObject *object, fd_id *id) {
  if (Py_IS_TYPE(object, owned_type)) {
    *id = ((OwnedFd *)object)->id;
    return owned_take((OwnedFd *)object, NULL);
  }
  return PyErr_Format(PyExc_TypeError, "an OwnedFd is required, not %s", Py_TYPE(object)->tp_name);
}

static PyObject *owned_close(OwnedFd *self, PyObject *unused) {
  owned_shut(self);
  Py_RETURN_NONE;
}

static PyObject *owned_enter(PyObject *self, PyObject *unused) { return Py_NewRef(self); }

static PyObject *owned_exit(OwnedFd *self, PyObject *args) { return owned_close(self, NULL); }

int owned_checked(PyObject *object, const char *op) {
  if (!Py_IS_TYPE(object, owned_type)) {
    PyErr_Format(PyExc_TypeError, "an OwnedFd is required, not %s", Py_TYPE(object)->tp_name);
    return -1;
  }
  OwnedFd *self = (OwnedFd *)object;
  if (fd_is(self->number, &self->id)) return self->number;
  fd_error(op, self->number);
  return -1;
}

/* ---- calls on the file ---- */

static PyObject *owned_dup(OwnedFd *self, PyObject *unused) {
  int fd = fd_dup(self->number, &self->id, F_DUPFD_CLOEXEC, 3);
  return fd < 0 ? fd_error("dup", self->number) : owned_fd(fd, false);
}

static PyObject *reopen_error(const char *op, int fd) {
  if (errno != ENOENT) return fd_error(op, fd);
  raise_error(ENOSYS, op, "/proc", "there is no /proc", "mount it");
  return NULL;
}

static PyObject *owned_reopen(OwnedFd *self, PyObject *args) {
  int flags = O_RDWR;
  if (!PyArg_ParseTuple(args, "|i:reopen", &flags)) return NULL;
  int fd = fd_reopen(self->number, &self->id, flags);
  return fd < 0 ? reopen_error("reopen", self->number) : owned_fd(fd, false);
}

static PyObject *owned_renew(OwnedFd *self, PyObject *args) {
  long long byte;
  if (!PyArg_ParseTuple(args, "L:renew", &byte)) return NULL;
  if (fd_renew(self->number, &self->id, byte)) return reopen_error("renew", self->number);
  Py_RETURN_NONE;
}

static PyObject *owned_set_lock(OwnedFd *self, PyObject *args) {
  int kind, wait = 0, r;
  long long start, length = 1;
  if (!PyArg_ParseTuple(args, "iL|Lp:set_lock", &kind, &start, &length, &wait)) return NULL;
  do {
    Py_BEGIN_ALLOW_THREADS
    r = fd_set_lock(self->number, &self->id, kind, start, length, wait);
    Py_END_ALLOW_THREADS
  } while (r < 0 && errno == EINTR && !PyErr_CheckSignals());
  if (PyErr_Occurred()) return NULL;
  return r < 0 ? fd_error("lock", self->number) : PyBool_FromLong(r);
}

static PyObject *owned_get_lock(OwnedFd *self, PyObject *args) {
  int kind = F_WRLCK;
  long long start, length = 1;
  if (!PyArg_ParseTuple(args, "L|Li:get_lock", &start, &length, &kind)) return NULL;
  int r = fd_get_lock(self->number, &self->id, kind, start, length);
  return r < 0 ? fd_error("lock", self->number) : PyBool_FromLong(r);
}

static PyObject *owned_size(OwnedFd *self, PyObject *unused) {
  struct stat st;
  if (fd_stat(self->number, &st) || !stat_is(&st, &self->id)) {
    errno = ESTALE;
    return fd_error("size", self->number);
  }
  return PyLong_FromLongLong(st.st_size);
}

/* Read or write at an offset, once. */
static PyObject *moved(OwnedFd *self, PyObject *args, bool write, const char *op) {
  Py_buffer data;
  long long offset;
  ssize_t n;
  int error;
  if (!PyArg_ParseTuple(args, write ? "y*L" : "w*L", &data, &offset)) return NULL;
  do {
    Py_BEGIN_ALLOW_THREADS
    if (!fd_is(self->number, &self->id)) {
      n = -1;
    } else if (write) {
      n = pwrite(self->number, data.buf, (size_t)data.len, offset);
    } else {
      n = pread(self->number, data.buf, (size_t)data.len, offset);
    }
    error = errno;
    Py_END_ALLOW_THREADS
  } while (n < 0 && error == EINTR && !PyErr_CheckSignals());
  PyBuffer_Release(&data);
  if (PyErr_Occurred()) return NULL;
  if (n >= 0) return PyLong_FromSsize_t(n);
  if (!write && (error == EPERM || error == ENOSYS)) { /* to read needs no right: a filter of system calls refuses it */
    char name[24];
    snprintf(name, sizeof name, "fd %d", self->number);
    raise_error(error, op, name, "a filter of system calls (seccomp) refuses pread64", "allow pread64 in the sandbox");
    return NULL;
  }
  errno = error;
  return fd_error(op, self->number);
}

static PyObject *owned_pwrite(OwnedFd *self, PyObject *args) { return moved(self, args, true, "write"); }

static PyObject *owned_pread(OwnedFd *self, PyObject *args) { return moved(self, args, false, "read"); }

/* Reserve a range, or free one. */
static PyObject *allocated(OwnedFd *self, PyObject *args, int mode, const char *op) {
  long long start, length;
  int r, error;
  if (!PyArg_ParseTuple(args, "LL", &start, &length)) return NULL;
  do {
    Py_BEGIN_ALLOW_THREADS
    if (!fd_is(self->number, &self->id)) {
      r = -1;
      error = errno;
    } else if (mode) {
      r = fallocate(self->number, mode, start, length);
      error = errno;
    } else {
      r = error = posix_fallocate(self->number, start, length); /* also on a file system that can't: it writes */
    }
    Py_END_ALLOW_THREADS
  } while (r && error == EINTR && !PyErr_CheckSignals());
  if (PyErr_Occurred()) return NULL;
  if (!r) Py_RETURN_NONE;
  errno = error;
  return fd_error(op, self->number);
}

static PyObject *owned_reserve(OwnedFd *self, PyObject *args) { return allocated(self, args, 0, "reserve"); }

static PyObject *owned_punch(OwnedFd *self, PyObject *args) {
  return allocated(self, args, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, "punch");
}

static PyObject *owned_add_one(OwnedFd *self, PyObject *unused) {
  uint64_t one = 1;
  ssize_t r;
  int error;
  do {
    Py_BEGIN_ALLOW_THREADS
    r = fd_is(self->number, &self->id) ? write(self->number, &one, sizeof one) : -1;
    error = errno;
    Py_END_ALLOW_THREADS
  } while (r < 0 && error == EINTR && !PyErr_CheckSignals());
  if (PyErr_Occurred()) return NULL;
  errno = error;
  if (r >= 0 || error == EAGAIN) Py_RETURN_NONE; /* at its most it is readable anyway */
  return fd_error("write", self->number);
}

static PyObject *owned_mark(OwnedFd *self, PyObject *unused) {
  if (fd_is(self->number, &self->id) && !fd_mark(self->number, &self->id)) Py_RETURN_NONE;
  return fd_error("mark", self->number);
}

/* ---- descriptors of other processes ---- */

static PyObject *fd_of(PyObject *module, PyObject *args) {
  int pidfd, theirs;
  if (!PyArg_ParseTuple(args, "ii", &pidfd, &theirs)) return NULL;
  return owned_fd((int)syscall(SYS_pidfd_getfd, pidfd, theirs, 0), false);
}

/* Call a function that returns a new descriptor, and own that in the same step. */
static PyObject *owned(PyObject *module, PyObject *const *a, Py_ssize_t n) {
  if (n < 1) return PyErr_Format(PyExc_TypeError, "owned() takes a function and its arguments");
  PyObject *made = PyObject_Vectorcall(a[0], a + 1, (size_t)n - 1, NULL);
  if (!made) return NULL;
  int number = (int)PyLong_AsLong(made);
  Py_DECREF(made);
  return PyErr_Occurred() ? NULL : owned_fd(number, false);
}

PyObject *owned_fds(const void *numbers, Py_ssize_t count) {
  PyObject *list = PyList_New(0);
  for (Py_ssize_t i = 0; i < count; i++) {
    int fd;
    memcpy(&fd, (const char *)numbers + (size_t)i * sizeof fd, sizeof fd);
    if (!list)
      close(fd); /* an error has come already: the rest must not stay open */
    else if (list_add(list, owned_fd(fd, false)))
      Py_CLEAR(list);
  }
  return list;
}

/* What socket.recvmsg() returns, with its descriptors owned: (data, descriptors, [(level, type, bytes)], flags). */
static PyObject *owned_rights(PyObject *module, PyObject *received) {
  PyObject *data, *control, *address, *fds = PyList_New(0), *rest = PyList_New(0), *result = NULL;
  int flags;
  if (fds && rest && PyArg_ParseTuple(received, "OO!iO", &data, &PyList_Type, &control, &flags, &address)) {
    Py_ssize_t i, n = PyList_GET_SIZE(control);
    for (i = 0; i < n; i++) {
      PyObject *item = PyList_GET_ITEM(control, i);
      int level, kind;
      const char *bytes;
      Py_ssize_t length;
      if (!PyArg_ParseTuple(item, "iiy#", &level, &kind, &bytes, &length)) break;
      if (level != SOL_SOCKET || kind != SCM_RIGHTS) {
        if (PyList_Append(rest, item)) break;
        continue;
      }
      PyObject *some = owned_fds(bytes, length / (Py_ssize_t)sizeof(int));
      if (!some || PyList_SetSlice(fds, PY_SSIZE_T_MAX, PY_SSIZE_T_MAX, some)) {
        Py_XDECREF(some);
        break;
      }
      Py_DECREF(some);
    }
    if (i == n) result = Py_BuildValue("OOOi", data, fds, rest, flags);
  }
  Py_XDECREF(fds);
  Py_XDECREF(rest);
  return result;
}

static PyMethodDef functions[] = {
    METHOD(owned, METH_FASTCALL, "($module, fn, /, *args)", "Return the new descriptor that fn(*args) returns, as OwnedFd, in one call."),
    METHOD(owned_rights, METH_O, "($module, received, /)",
           "Return (data, descriptors, control, flags) for what socket.recvmsg() returned, with each descriptor as OwnedFd."),
    METHOD(
        fd_of, METH_VARARGS, "($module, pidfd, number, /)",
        "Return a duplicate of another process's descriptor, as OwnedFd. The kernel asks the rights of ptrace(2) for it (pidfd_getfd(2))."),
    {0}};

#define OWNED(name, flags, signature, doc) {#name, (PyCFunction)(void *)owned_##name, flags, #name signature "\n--\n\n" doc}

static PyMethodDef methods[] = {
    OWNED(fileno, METH_NOARGS, "($self, /)", "Return the descriptor, which the object keeps owning; -1 once it was taken or closed."),
    OWNED(take, METH_NOARGS, "($self, /)",
          "Return the descriptor, which the caller owns from now on; -1 if it was taken or closed before."),
    OWNED(close, METH_NOARGS, "($self, /)", "Close the descriptor, unless the number is another file's now. Closing twice has no effect."),
    OWNED(dup, METH_NOARGS, "($self, /)", "Return a duplicate, which exec doesn't inherit."),
    OWNED(reopen, METH_VARARGS, "($self, flags=O_RDWR, /)", "Return another open file description of the file, opened through /proc."),
    OWNED(renew, METH_VARARGS, "($self, byte, /)",
          "Give the descriptor a new open file description of the file, with a read lock on a byte. Duplicates keep the old one."),
    OWNED(set_lock, METH_VARARGS, "($self, kind, start, length=1, wait=False, /)",
          "Set an open-file-description lock (fcntl(2)). Return False if the lock of another description conflicts."),
    OWNED(get_lock, METH_VARARGS, "($self, start, length=1, kind=F_WRLCK, /)",
          "Return True if another description holds a lock on the bytes that conflicts with this kind."),
    OWNED(size, METH_NOARGS, "($self, /)", "Return the size of the file."),
    OWNED(pread, METH_VARARGS, "($self, buffer, offset, /)", "Fill the buffer from an offset. Return how many bytes there were."),
    OWNED(pwrite, METH_VARARGS, "($self, data, offset, /)", "Write at an offset. Return how many bytes were written."),
    OWNED(reserve, METH_VARARGS, "($self, start, length, /)", "Reserve the space of a range (posix_fallocate(3))."),
    OWNED(punch, METH_VARARGS, "($self, start, length, /)",
          "Free the memory or disk space of a range. It reads as zeros then, in every mapping too, and the size stays."),
    OWNED(add_one, METH_NOARGS, "($self, /)", "Add 1 to an eventfd."),
    OWNED(mark, METH_NOARGS, "($self, /)",
          "Tell this eventfd, or other anonymous inode, from all others, whose inode is the same. A descriptor with an inode of its own\n"
          "needs no mark."),
    {"__enter__", owned_enter, METH_NOARGS, NULL},
    {"__exit__", (PyCFunction)owned_exit, METH_VARARGS, NULL},
    {0}};
static PyMemberDef members[] = {
    {"number", T_INT, offsetof(OwnedFd, number), READONLY, "The descriptor, unchecked; -1 once it was taken or closed."},
    {"dev", T_ULONGLONG, offsetof(OwnedFd, id.dev), READONLY, "st_dev of the file."},
    {"ino", T_ULONGLONG, offsetof(OwnedFd, id.ino), READONLY, "st_ino of the file."},
    {0}};
static PyType_Slot slots[] = {
    {Py_tp_doc,
     "OwnedFd(number, /)\n--\n\nA descriptor that is closed with the last reference to the object, unless it was taken.\n\n"
     "Each method compares the inode with that of the beginning, in the same call, and raises ClosedError (EBADF) if somebody else closed\n"
     "the number, or uses it again. close() leaves the other file open then."},
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
