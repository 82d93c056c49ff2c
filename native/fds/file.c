/* file.c - what Python's os module leaves out: room and holes, inotify, and which files have locks. */
#include "fds/fds.h"
#include "fds/locks.h"
#include "fds/same.h"
#include <fcntl.h>
#include <sys/inotify.h>
#include <sys/syscall.h>
#include <unistd.h>

static PyObject *change_range(PyObject *args, const char *format, int mode) {
  int fd, r, error;
  long long start, length;
  if (!PyArg_ParseTuple(args, format, &fd, &start, &length)) return NULL;
  do {
    Py_BEGIN_ALLOW_THREADS
    r = fallocate(fd, mode, (off_t)start, (off_t)length);
    error = errno;
    Py_END_ALLOW_THREADS
  } while (r && error == EINTR && !PyErr_CheckSignals());
  if (!r) Py_RETURN_NONE;
  if (PyErr_Occurred()) return NULL;
  errno = error;
  return PyErr_SetFromErrno(PyExc_OSError);
}

static PyObject *allocate_range(PyObject *module, PyObject *args) { return change_range(args, "iLL:allocate_range", 0); }

static PyObject *punch(PyObject *module, PyObject *args) {
  return change_range(args, "iLL:punch", FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE);
}

/* renameat2(2) with RENAME_NOREPLACE: rename(2) would replace an empty directory that another process has just made. */
static PyObject *rename_new(PyObject *module, PyObject *args) {
  PyObject *old, *new = NULL;
  if (!PyArg_ParseTuple(args, "O&O&:rename_new", PyUnicode_FSConverter, &old, PyUnicode_FSConverter, &new)) return NULL;
  int r;
  Py_BEGIN_ALLOW_THREADS
  r = (int)syscall(SYS_renameat2, AT_FDCWD, PyBytes_AS_STRING(old), AT_FDCWD, PyBytes_AS_STRING(new), 1u);
  Py_END_ALLOW_THREADS
  Py_DECREF(old);
  Py_DECREF(new);
  if (r) return PyErr_SetFromErrno(PyExc_OSError);
  Py_RETURN_NONE;
}

static PyObject *locks_seen(PyObject *module, PyObject *unused) {
  lock_pass pass;
  int r, error;
  Py_BEGIN_ALLOW_THREADS
  r = lock_pass_believed(&pass);
  error = errno;
  Py_END_ALLOW_THREADS
  if (r && error != EMFILE && error != ENFILE && error != ENOMEM) Py_RETURN_NONE; /* nobody can say */
  if (r) {
    errno = error;
    return PyErr_SetFromErrno(PyExc_OSError);
  }
  PyObject *out = PyList_New(0);
  for (size_t i = 0; out && i < pass.count; i++) {
    const lock_file *f = &pass.files[i];
    if (i && f->dev == f[-1].dev && f->ino == f[-1].ino) continue;
    if (list_add(out, Py_BuildValue("KK", (unsigned long long)f->dev, (unsigned long long)f->ino))) Py_CLEAR(out);
  }
  lock_pass_free(&pass);
  return out;
}

static PyObject *watch_open(PyObject *module, PyObject *unused) { return owned_fd(inotify_init1(IN_CLOEXEC | IN_NONBLOCK), true); }

static PyObject *watch_add(PyObject *module, PyObject *args) {
  PyObject *object;
  int fd;
  fd_id id = {.marked = false};
  if (!PyArg_ParseTuple(args, "OiKK:watch_add", &object, &fd, &id.dev, &id.ino)) return NULL;
  int watch = owned_checked(object, "watch");
  if (watch < 0) return NULL;
  char path[40];
  snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
  int wd = fd_is(fd, &id) ? inotify_add_watch(watch, path, IN_DELETE_SELF) : -1;
  if (wd >= 0 && fd_is(fd, &id)) return PyLong_FromLong(wd);
  if (wd >= 0) inotify_rm_watch(watch, wd); /* a file of somebody else */
  return fd_error("watch", fd);
}

static PyObject *watch_read(PyObject *module, PyObject *object) {
  int watch = owned_checked(object, "watch");
  if (watch < 0) return NULL;
  char events[4096];
  ssize_t n;
  do n = read(watch, events, sizeof events);
  while (n < 0 && errno == EINTR);
  if (n < 0 && errno != EAGAIN) return PyErr_SetFromErrno(PyExc_OSError);
  return PyBytes_FromStringAndSize(events, n < 0 ? 0 : n);
}

static PyMethodDef functions[] = {
    METHOD(
        allocate_range, METH_VARARGS, "($module, fd, start, length, /)",
        "Allocate memory or disk space for a range of a file, which becomes as long as that. Never by writing, unlike posix_fallocate(3)."),
    METHOD(punch, METH_VARARGS, "($module, fd, start, length, /)",
           "Free the memory or disk space of a range of a file. It reads as zeros then, in every mapping too, and the size stays."),
    METHOD(rename_new, METH_VARARGS, "($module, old, new, /)", "Rename a file or directory. FileExistsError: something has the new name."),
    METHOD(locks_seen, METH_NOARGS, "($module, /)",
           "Return (st_dev, st_ino) of every file that has an open file description lock, from a pass over /proc/locks that misses none.\n"
           "Return None if no pass can be believed now."),
    METHOD(watch_open, METH_NOARGS, "($module, /)", "Return a new inotify descriptor, which doesn't block, as OwnedFd."),
    METHOD(watch_add, METH_VARARGS, "($module, watch, fd, dev, ino, /)",
           "Watch for the end of the inode, of which fd is a descriptor, with an inotify descriptor. Return the watch descriptor."),
    METHOD(watch_read, METH_O, "($module, watch, /)", "Return the events that wait in an inotify descriptor, b\"\" if there are none."),
    {0}};

int file_register(PyObject *module) { return PyModule_AddFunctions(module, functions); }
