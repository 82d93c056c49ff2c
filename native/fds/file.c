/* file.c - what Python's os module leaves out: holes, pages that carry a lock, and inotify. */
#include "domain/layout.h"
#include "fds/fds.h"
#include "fds/same.h"
#include <fcntl.h>
#include <sys/inotify.h>
#include <sys/mman.h>
#include <unistd.h>

static PyObject *punch(PyObject *module, PyObject *args) {
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

/* The mapping refers to the fd's open file description, so the OFD locks of that description last as long as the mapping. */
static PyObject *hold_page(PyObject *module, PyObject *arg) {
  int fd = (int)PyLong_AsLong(arg);
  if (fd == -1 && PyErr_Occurred()) return NULL;
  void *page = mmap(NULL, DB_PAGE, PROT_READ, MAP_SHARED, fd, 0);
  if (page == MAP_FAILED) return PyErr_SetFromErrno(PyExc_OSError);
  if (!madvise(page, DB_PAGE, MADV_DONTFORK)) return PyLong_FromVoidPtr(page);
  PyErr_SetFromErrno(PyExc_OSError);
  munmap(page, DB_PAGE);
  return NULL;
}

static PyObject *drop_page(PyObject *module, PyObject *arg) {
  void *page = PyLong_AsVoidPtr(arg);
  if (!page && PyErr_Occurred()) return NULL;
  munmap(page, DB_PAGE);
  Py_RETURN_NONE;
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
    METHOD(punch, METH_VARARGS, "($module, fd, start, length, /)",
           "Free the memory or disk space of a range of a file. It reads as zeros then, in every mapping too, and the size stays."),
    METHOD(hold_page, METH_O, "($module, fd, /)", "Map the first page of fd, which no fork inherits, and return its address."),
    METHOD(drop_page, METH_O, "($module, address, /)", "Unmap a page that hold_page() mapped."),
    METHOD(watch_open, METH_NOARGS, "($module, /)", "Return a new inotify descriptor, which doesn't block, as OwnedFd."),
    METHOD(watch_add, METH_VARARGS, "($module, watch, fd, dev, ino, /)",
           "Watch for the end of the inode, of which fd is a descriptor, with an inotify descriptor. Return the watch descriptor."),
    METHOD(watch_read, METH_O, "($module, watch, /)", "Return the events that wait in an inotify descriptor, b\"\" if there are none."),
    {0}};

int file_register(PyObject *module) { return PyModule_AddFunctions(module, functions); }
