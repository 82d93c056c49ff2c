/* file.c - what Python's os module leaves out about files: to give a range of one back to the system (fallocate(2)).
 *
 * The range reads as zeros afterwards, in every mapping too; the size stays. */
#include "domain/layout.h"
#include "fds/fds.h"
#include <fcntl.h>
#include <sys/inotify.h>
#include <sys/mman.h>

static PyObject *punch(PyObject *m, PyObject *args) { /* punch(fd, start, length); OSError */
  int fd, r, error;
  long long start, length;
  if (!PyArg_ParseTuple(args, "iLL:punch", &fd, &start, &length)) return NULL;
  do {
    Py_BEGIN_ALLOW_THREADS
    r = fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)start, (off_t)length);
    error = errno;
    Py_END_ALLOW_THREADS
  } while (r && error == EINTR && !PyErr_CheckSignals());
  if (!r) Py_RETURN_NONE;
  if (PyErr_Occurred()) return NULL;
  errno = error;
  return PyErr_SetFromErrno(PyExc_OSError);
}

static PyObject *hold_page(PyObject *m, PyObject *arg) {
  int fd = (int)PyLong_AsLong(arg);
  if (fd == -1 && PyErr_Occurred()) return NULL;
  void *p = mmap(NULL, DB_PAGE, PROT_READ, MAP_SHARED, fd, 0);
  if (p == MAP_FAILED) return PyErr_SetFromErrno(PyExc_OSError);
  if (madvise(p, DB_PAGE, MADV_DONTFORK)) {
    PyErr_SetFromErrno(PyExc_OSError);
    munmap(p, DB_PAGE);
    return NULL;
  }
  return PyLong_FromVoidPtr(p);
}

static PyObject *drop_page(PyObject *m, PyObject *arg) {
  void *p = PyLong_AsVoidPtr(arg);
  if (!p && PyErr_Occurred()) return NULL;
  munmap(p, DB_PAGE);
  Py_RETURN_NONE;
}

static PyObject *watch_open(PyObject *m, PyObject *unused) {
  int fd = inotify_init1(IN_CLOEXEC | IN_NONBLOCK);
  return fd < 0 ? PyErr_SetFromErrno(PyExc_OSError) : PyLong_FromLong(fd);
}

static PyObject *watch_add(PyObject *m, PyObject *args) {
  int watch, fd;
  if (!PyArg_ParseTuple(args, "ii", &watch, &fd)) return NULL;
  char path[40];
  snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
  int wd = inotify_add_watch(watch, path, IN_DELETE_SELF);
  return wd < 0 ? PyErr_SetFromErrno(PyExc_OSError) : PyLong_FromLong(wd);
}

static PyMethodDef methods[] = {METHOD(punch, METH_VARARGS, "Give a range of a file's memory or disk space back."),
                                METHOD(watch_open, METH_NOARGS, "A non-blocking inotify descriptor."),
                                METHOD(watch_add, METH_VARARGS, "Watch (inotify, fd) for the end of fd's inode -> watch descriptor."),
                                METHOD(hold_page, METH_O, "Map one page of fd that no fork inherits; returns its address."),
                                METHOD(drop_page, METH_O, "Unmap a page that hold_page mapped."),
                                {0}};

int file_register(PyObject *module) { return PyModule_AddFunctions(module, methods); }
