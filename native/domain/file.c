/* file.c - the descriptor of a domain's file.
 *
 * All state is reached through the mapping, which nobody can close by mistake. The descriptor is for what a mapping can't do: to ask who
 * holds which lock, to make the file larger, to learn its size. A daemon that closes all descriptors closes this one too, and opens other
 * files under its number. An answer of such a file would be terrible: "no lock" on it is no death. So each use compares the inode. Where it
 * is another one, the file is opened anew: through the mapping if this process may (/proc/self/map_files needs a capability), or by its
 * path if that still leads to it. If neither works, locks can't be seen and the file can't grow, which are errors, and everything else
 * goes on.
 */
#include "domain/file.h"
#include "domain/shm.h"
#include "fds/fds.h"
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22 /* since Linux 5.14 */
#endif

static int opened(Shm *s, const char *path) {
  int fd = open(path, O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY);
  if (fd < 0 || fd_is(fd, &s->id)) return fd;
  close(fd);
  return -1;
}

int shm_file(Shm *s) {
  if (fd_is(s->fd, &s->id)) return s->fd;
  char path[64];
  snprintf(path, sizeof path, "/proc/self/map_files/%lx-%lx", (unsigned long)s->base, (unsigned long)(s->base + s->length));
  int fd = open(path, O_RDWR | O_CLOEXEC | O_NONBLOCK | O_NOCTTY); /* a link */
  if (fd >= 0 && !fd_is(fd, &s->id)) {
    close(fd);
    fd = -1;
  }
  if (fd < 0 && s->path) fd = opened(s, PyBytes_AS_STRING(s->path));
  if (fd < 0) {
    errno = ESTALE;
    return -1;
  }
  if (fd < 3) { /* of a standard stream that is closed: left to the program */
    int high = fcntl(fd, F_DUPFD_CLOEXEC, 3);
    close(fd);
    if (high < 0) return -1;
    fd = high;
  }
  s->fd = fd; /* what has the number before is somebody else's, and stays open */
  return fd;
}

int shm_lost(Shm *s, const char *op) {
  if (errno != ESTALE) {
    PyErr_SetFromErrno(PyExc_OSError);
    return -1;
  }
  return shm_fail(s, EBADF, op, "the domain's file", "its descriptor was closed by somebody else, and it can't be opened again",
                  "leave dmabuf's descriptors open, or import dmabuf after closing all");
}

int shm_has(Shm *s, uint64_t from, uint64_t end) {
  struct stat st;
  int fd = shm_file(s);
  if (fd >= 0 && !fstat(fd, &st) && stat_is(&st, &s->id)) return (uint64_t)st.st_size >= end;
  /* Ask the mapping: pages behind the end of the file can't be populated. They are allocated already. */
  uint64_t first = from / DB_PAGE * DB_PAGE;
  return !madvise(s->base + first, end - first, MADV_POPULATE_READ);
}

static PyObject *reopen(Shm *s, PyObject *unused) {
  if (shm_file(s) < 0) return shm_lost(s, "open"), NULL;
  int fd = fd_reopen(s->fd, &s->id, O_RDWR);
  if (fd >= 0) return owned_fd(fd, false);
  if (errno == ENOENT) return shm_fail(s, ENOSYS, "open domain", "/proc", "there is no /proc", "mount it"), NULL;
  return shm_lost(s, "open"), NULL;
}

static PyObject *locked(Shm *s, PyObject *args) {
  long long start, length = 1;
  if (!PyArg_ParseTuple(args, "L|L:locked", &start, &length)) return NULL;
  int fd = shm_file(s), r = fd < 0 ? -1 : fd_get_lock(fd, &s->id, F_WRLCK, start, length);
  return r < 0 ? (shm_lost(s, "look at locks"), NULL) : PyBool_FromLong(r);
}

PyMethodDef file_methods[] = {
    METHOD(reopen, METH_NOARGS, "($self, /)",
           "Return another open file description of the domain's file, as OwnedFd.\n\n"
           "Raises:\n"
           "    ClosedError: Somebody else closed the descriptor, and the file can't be opened again (EBADF).\n"
           "    OSError: No descriptor is free (EMFILE)."),
    METHOD(locked, METH_VARARGS, "($self, start, length=1, /)",
           "Return True if another open file description than the domain's has a lock on the bytes.\n\n"
           "Raises:\n"
           "    ClosedError: Nobody can say: somebody else closed the descriptor, and the file can't be opened again (EBADF)."),
    {0}};
