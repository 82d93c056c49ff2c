/* probe.c - what is behind a descriptor, asked in one call; and the reference lock on it if it is a buffer. */
#include "fds/fds.h"
#include "fds/same.h"
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/vfs.h>
#include <unistd.h>

#define LINK_PREFIX "/memfd:dmabuf:" /* then 16 digits of the domain's identity, a colon, 32 of the nonce, and perhaps " (deleted)" */
#define LINK_BYTES  63

/* st_dev of ordinary memfds. Those of huge pages have seals too, but a touch may find no page, which is SIGBUS. */
static dev_t memfd_device(void) {
  static dev_t device;
  struct stat st;
  if (device) return device;
  int fd = memfd_create("dmabuf-device", MFD_CLOEXEC);
  if (fd < 0) return 0; /* no descriptor is free: asked again */
  if (!fstat(fd, &st)) device = st.st_dev;
  close(fd);
  return device;
}

int buffer_is_sealed(int fd, struct stat *st) {
  int wanted = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL, seals = fcntl(fd, F_GET_SEALS);
  if (seals < 0 || (seals & wanted) != wanted || fd_stat(fd, st)) return 0;
  dev_t device = memfd_device();
  return !device || st->st_dev == device;
}

int buffer_reference(int fd) {
  struct flock lock = {.l_type = F_RDLCK, .l_whence = SEEK_SET, .l_start = 0, .l_len = 1};
  return !fcntl(fd, F_OFD_SETLK, &lock);
}

static ssize_t link_of(int fd, char *link, size_t size) {
  char path[40];
  snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
  return readlink(path, link, size);
}

static PyObject *probe_fd(PyObject *module, PyObject *arg) {
  int fd = (int)PyLong_AsLong(arg);
  if (fd == -1 && PyErr_Occurred()) return NULL;
  struct stat st;
  if (fstat(fd, &st)) return PyErr_SetFromErrno(PyExc_OSError);
  char link[256];
  ssize_t n = link_of(fd, link, sizeof link);
  if (n < 0) n = 0; /* another thread has closed it, or there is no /proc: it is not recognized */
  int seals = fcntl(fd, F_GET_SEALS);
  struct statfs fs;
  if (fstatfs(fd, &fs)) fs.f_type = 0;
  return Py_BuildValue("KKKiy#k", (unsigned long long)st.st_dev, (unsigned long long)st.st_ino, (unsigned long long)st.st_size, seals, link,
                       n, (unsigned long)fs.f_type);
}

static int hex_digit(char c) { return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1; }

static PyObject *recognize_buffer(PyObject *module, PyObject *args) {
  int fd;
  const char *id;
  Py_ssize_t nid;
  if (!PyArg_ParseTuple(args, "is#", &fd, &id, &nid)) return NULL;
  char link[80];
  ssize_t n = nid == 16 ? link_of(fd, link, sizeof link - 1) : -1;
  if (n < LINK_BYTES || memcmp(link, LINK_PREFIX, 14) || memcmp(link + 14, id, 16) || link[30] != ':') Py_RETURN_NONE;
  link[n] = 0;
  if (link[LINK_BYTES] && strcmp(link + LINK_BYTES, " (deleted)")) Py_RETURN_NONE;
  unsigned char nonce[16];
  for (int i = 0; i < 16; i++) {
    int high = hex_digit(link[31 + 2 * i]), low = hex_digit(link[32 + 2 * i]);
    if (high < 0 || low < 0) Py_RETURN_NONE;
    nonce[i] = (unsigned char)(high << 4 | low);
  }
  struct stat st;
  if (!buffer_is_sealed(fd, &st) || !buffer_reference(fd)) Py_RETURN_NONE;
  return Py_BuildValue("KKKy#", (unsigned long long)st.st_dev, (unsigned long long)st.st_ino, (unsigned long long)st.st_size, nonce,
                       (Py_ssize_t)16);
}

static PyObject *reference_buffer(PyObject *module, PyObject *args) {
  int fd;
  unsigned long long dev, ino;
  if (!PyArg_ParseTuple(args, "iKK", &fd, &dev, &ino)) return NULL;
  struct stat st;
  if (!buffer_is_sealed(fd, &st) || st.st_dev != dev || st.st_ino != ino || !buffer_reference(fd)) return PyLong_FromLong(-1);
  return PyLong_FromLongLong((long long)st.st_size);
}

static PyMethodDef functions[] = {
    METHOD(probe_fd, METH_O, "($module, fd, /)", "Return (st_dev, st_ino, st_size, seals or -1, link text, f_type of fstatfs(2))."),
    METHOD(recognize_buffer, METH_VARARGS, "($module, fd, domain_id, /)",
           "Put the reference lock on a buffer of the domain and return (dev, ino, size, nonce); None if anything about it is unusual."),
    METHOD(reference_buffer, METH_VARARGS, "($module, fd, dev, ino, /)",
           "Put the reference lock on the buffer with that inode and return its size; -1 if it is anything else."),
    {0}};

int probe_register(PyObject *module) { return PyModule_AddFunctions(module, functions); }
