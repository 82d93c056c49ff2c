/* same.c - calls on a descriptor that compare first whether it is still the one that it was. */
#include "fds/same.h"
#include "errors.h"
#include <fcntl.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

/* The signal for asynchronous input, which this library never asks for, so no signal comes. Nobody else chooses the last one. */
#define MARK SIGRTMAX

bool stat_is(const struct stat *st, const fd_id *id) { return st->st_dev == id->dev && st->st_ino == id->ino; }

int fd_stat(int fd, struct stat *st) { return (int)syscall(SYS_fstat, fd, st); }

int fd_identify(int fd, fd_id *id) {
  struct stat st;
  if (fd_stat(fd, &st)) return -1;
  id->dev = (unsigned long long)st.st_dev;
  id->ino = (unsigned long long)st.st_ino;
  id->marked = false;
  return 0;
}

int fd_mark(int fd, fd_id *id) {
  struct stat st;
  if (fstat(fd, &st) || fd_identify(fd, id)) return -1;
  if (st.st_mode & S_IFMT) return 0; /* its inode is its own */
  if (fcntl(fd, F_SETSIG, MARK)) return -1;
  id->marked = true;
  return 0;
}

bool fd_is(int fd, const fd_id *id) {
  struct stat st;
  if (fd >= 0 && !fd_stat(fd, &st) && stat_is(&st, id) && (!id->marked || fcntl(fd, F_GETSIG) == MARK)) return true;
  errno = ESTALE;
  return false;
}

int fd_close(int fd, const fd_id *id) {
  struct stat st;
  /* The directory of a process in /proc can't be asked any more once that process has ended. It is no file of somebody else. */
  if (fd >= 0 && fd_stat(fd, &st) && (errno == ENOENT || errno == ESRCH)) return close(fd);
  return fd_is(fd, id) ? close(fd) : -1;
}

/* A descriptor that was just made from a number: was it the right one? The new one is nobody else's, so this is certain. */
static int made(int fd, const fd_id *id) {
  if (fd < 0 && errno == EBADF) errno = ESTALE;
  if (fd < 0 || fd_is(fd, id)) return fd;
  close(fd);
  errno = ESTALE;
  return -1;
}

int fd_dup(int fd, const fd_id *id, int command, int lowest) { return made(fcntl(fd, command, lowest), id); }

int fd_reopen(int fd, const fd_id *id, int flags) {
  char path[40];
  snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
  if (!fd_is(fd, id)) return -1; /* first, since to open a device, or a FIFO, has effects */
  return made(open(path, flags | O_CLOEXEC | O_NONBLOCK | O_NOCTTY), id);
}

int fd_renew(int fd, const fd_id *id, long long byte) {
  struct flock lock = {.l_type = F_RDLCK, .l_whence = SEEK_SET, .l_start = byte, .l_len = 1};
  int made = fd_reopen(fd, id, O_RDWR), result = -1;
  if (made < 0) return -1;
  int flags = fcntl(fd, F_GETFD);
  if (!fcntl(made, F_OFD_SETLK, &lock) && flags >= 0 && fd_is(fd, id))
    result = dup3(made, fd, flags & FD_CLOEXEC ? O_CLOEXEC : 0) < 0 ? -1 : 0;
  int error = errno;
  close(made);
  errno = error;
  return result;
}

int fd_set_lock(int fd, const fd_id *id, int kind, long long start, long long length, bool wait) {
  struct flock lock = {.l_type = (short)kind, .l_whence = SEEK_SET, .l_start = start, .l_len = length};
  if (!fd_is(fd, id)) return -1;
  if (fcntl(fd, wait ? F_OFD_SETLKW : F_OFD_SETLK, &lock)) return errno == EAGAIN || errno == EACCES ? 0 : -1;
  return kind == F_UNLCK || fd_is(fd, id) ? 1 : -1; /* again: a lock on a file of somebody else proves nothing */
}

int fd_get_lock(int fd, const fd_id *id, int kind, long long start, long long length) {
  struct flock lock = {.l_type = (short)kind, .l_whence = SEEK_SET, .l_start = start, .l_len = length};
  int r = fcntl(fd, F_OFD_GETLK, &lock), error = errno;
  if (!fd_is(fd, id)) return -1; /* after the call: an answer about a file of somebody else is none */
  if (r) {
    errno = error;
    return -1;
  }
  return lock.l_type != F_UNLCK;
}

PyObject *fd_error(const char *op, int fd) {
  if (errno != ESTALE) return PyErr_SetFromErrno(PyExc_OSError);
  char name[24];
  snprintf(name, sizeof name, "fd %d", fd);
  raise_error(EBADF, op, name, "it was closed by somebody else, and the number may be another file's now",
              "close the object, not its descriptor");
  return NULL;
}

/* ---- for objects that keep the number and know the inode otherwise ---- */

static int arguments(PyObject *const *a, Py_ssize_t n, Py_ssize_t wanted, int *fd, fd_id *id) {
  uint64_t dev, ino;
  if (n != wanted) return PyErr_Format(PyExc_TypeError, "%zd arguments are required, not %zd", wanted, n), -1;
  *fd = (int)PyLong_AsLong(a[0]);
  if (PyErr_Occurred() || arg_u64(a[1], &dev) || arg_u64(a[2], &ino)) return -1;
  *id = (fd_id){.dev = dev, .ino = ino, .marked = false};
  return 0;
}

static PyObject *is_same(PyObject *module, PyObject *const *a, Py_ssize_t n) {
  int fd;
  fd_id id;
  return arguments(a, n, 3, &fd, &id) ? NULL : PyBool_FromLong(fd_is(fd, &id));
}

static PyObject *close_same(PyObject *module, PyObject *const *a, Py_ssize_t n) {
  int fd, r;
  fd_id id;
  if (arguments(a, n, 3, &fd, &id)) return NULL;
  Py_BEGIN_ALLOW_THREADS /* to close the last descriptor of a file may free much memory */
  r = fd_close(fd, &id);
  Py_END_ALLOW_THREADS
  return PyBool_FromLong(!r);
}

/* Close the descriptor whose number is an attribute, which is -1 afterwards: in one call, so that a signal handler that raises can't come
 * between the two. */
static PyObject *close_attribute(PyObject *module, PyObject *const *a, Py_ssize_t n) {
  if (n != 4) return PyErr_Format(PyExc_TypeError, "close_attribute(object, name, dev, ino)");
  PyObject *number = PyObject_GetAttr(a[0], a[1]), *none = PyLong_FromLong(-1);
  PyObject *args[] = {number, a[2], a[3]};
  int fd, r = -1;
  fd_id id;
  int bad = !number || !none || arguments(args, 3, 3, &fd, &id) || PyObject_SetAttr(a[0], a[1], none);
  Py_XDECREF(number);
  Py_XDECREF(none);
  if (bad) return NULL;
  Py_BEGIN_ALLOW_THREADS
  r = fd < 0 ? -1 : fd_close(fd, &id);
  Py_END_ALLOW_THREADS
  return PyBool_FromLong(!r);
}

/* In one call, so that of two threads one gets it. */
static PyObject *take_attribute(PyObject *module, PyObject *const *a, Py_ssize_t n) {
  if (n != 2) return PyErr_Format(PyExc_TypeError, "take_attribute(object, name)");
  PyObject *number = PyObject_GetAttr(a[0], a[1]), *none = PyLong_FromLong(-1);
  if (!number || !none || PyObject_SetAttr(a[0], a[1], none)) Py_CLEAR(number);
  Py_XDECREF(none);
  return number;
}

static PyObject *dup_same(PyObject *module, PyObject *const *a, Py_ssize_t n) {
  int fd, cloexec;
  fd_id id;
  if (arguments(a, n, 4, &fd, &id) || (cloexec = PyObject_IsTrue(a[3])) < 0) return NULL;
  int made = fd_dup(fd, &id, cloexec ? F_DUPFD_CLOEXEC : F_DUPFD, 0);
  return made < 0 ? fd_error("dup", fd) : PyLong_FromLong(made);
}

static PyMethodDef functions[] = {
    METHOD(close_attribute, METH_FASTCALL, "($module, object, name, dev, ino, /)",
           "Close the descriptor whose number is an attribute as close_same() does, and make the attribute -1."),
    METHOD(take_attribute, METH_FASTCALL, "($module, object, name, /)",
           "Return the descriptor whose number is an attribute, which the caller owns from now on, and make the attribute -1."),
    METHOD(is_same, METH_FASTCALL, "($module, fd, dev, ino, /)", "Return True if the descriptor is one of the file with that inode."),
    METHOD(close_same, METH_FASTCALL, "($module, fd, dev, ino, /)",
           "Close the descriptor if it is one of the file with that inode. Return False if it isn't; it stays open then."),
    METHOD(dup_same, METH_FASTCALL, "($module, fd, dev, ino, cloexec, /)",
           "Return a duplicate of the descriptor if it is one of the file with that inode.\n\n"
           "Raises:\n"
           "    ClosedError: It is another file's (EBADF).\n"
           "    OSError: No descriptor is free (EMFILE)."),
    {0}};

int same_register(PyObject *module) { return PyModule_AddFunctions(module, functions); }
