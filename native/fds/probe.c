/* probe.c - what is behind a descriptor: asked in one call, and leased when it is a buffer. */
#include "fds/fds.h"
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

static PyObject *probe_fd(PyObject *m, PyObject *arg) {
  int fd = (int)PyLong_AsLong(arg);
  if (fd == -1 && PyErr_Occurred()) return NULL;
  struct stat st;
  if (fstat(fd, &st)) return PyErr_SetFromErrno(PyExc_OSError);
  char path[40], link[256];
  snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
  ssize_t n = readlink(path, link, sizeof link);
  if (n < 0) n = 0; /* closed by another thread meanwhile, or no /proc: not recognised */
  int seals = fcntl(fd, F_GET_SEALS);
  struct statfs fs;
  if (fstatfs(fd, &fs)) fs.f_type = 0;
  return Py_BuildValue("KKKiy#k", (unsigned long long)st.st_dev, (unsigned long long)st.st_ino, (unsigned long long)st.st_size, seals, link,
                       (Py_ssize_t)n, (unsigned long)fs.f_type);
}

static PyObject *take_buffer(PyObject *m, PyObject *args) { /* (fd, domain id) -> (dev, ino, size, nonce) | None: judge it slowly */
  int fd;
  const char *id;
  Py_ssize_t nid;
  if (!PyArg_ParseTuple(args, "is#", &fd, &id, &nid)) return NULL;
  struct stat st;
  char path[40], link[80];
  unsigned char nonce[16];
  snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
  ssize_t n = nid == 16 ? readlink(path, link, sizeof link - 1) : -1; /* /memfd:dmabuf:<16>:<32> (deleted) */
  if (n < 63 || memcmp(link, "/memfd:dmabuf:", 14) || memcmp(link + 14, id, 16) || link[30] != ':') Py_RETURN_NONE;
  link[n] = 0;
  if (link[63] && strcmp(link + 63, " (deleted)")) Py_RETURN_NONE;
  for (int i = 0; i < 32; i++) {
    char c = link[31 + i];
    int digit = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
    if (digit < 0) Py_RETURN_NONE;
    nonce[i / 2] = (unsigned char)(i & 1 ? nonce[i / 2] | digit : digit << 4);
  }
  int want = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL, seals = fcntl(fd, F_GET_SEALS);
  if (seals < 0 || (seals & want) != want || fstat(fd, &st)) Py_RETURN_NONE;
  struct flock lease = {.l_type = F_RDLCK, .l_whence = SEEK_SET, .l_start = 0, .l_len = 1};
  if (fcntl(fd, F_OFD_SETLK, &lease)) Py_RETURN_NONE;
  return Py_BuildValue("KKKy#", (unsigned long long)st.st_dev, (unsigned long long)st.st_ino, (unsigned long long)st.st_size, nonce,
                       (Py_ssize_t)16);
}

static PyObject *lease_buffer(PyObject *m, PyObject *args) { /* (fd, dev, ino) -> size, -1: not that inode, judge it slowly */
  int fd;
  unsigned long long dev, ino;
  if (!PyArg_ParseTuple(args, "iKK", &fd, &dev, &ino)) return NULL;
  struct stat st;
  struct flock lease = {.l_type = F_RDLCK, .l_whence = SEEK_SET, .l_start = 0, .l_len = 1};
  int want = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL, seals = fcntl(fd, F_GET_SEALS);
  if (seals < 0 || (seals & want) != want || fstat(fd, &st) || st.st_dev != dev || st.st_ino != ino || fcntl(fd, F_OFD_SETLK, &lease))
    return PyLong_FromLong(-1);
  return PyLong_FromLongLong((long long)st.st_size);
}

static PyMethodDef functions[] = {
    METHOD(take_buffer, METH_VARARGS,
           "Put the lease on a buffer of (fd, domain id) -> (dev, ino, size, nonce), None when something is unusual."),
    METHOD(lease_buffer, METH_VARARGS, "Put the lease on the buffer with (fd, dev, ino) -> its size, -1 when it is something else."),
    METHOD(probe_fd, METH_O, "(st_dev, st_ino, st_size, seals or -1, link text, fstatfs f_type) of an fd."),
    {0}};

int probe_register(PyObject *module) { return PyModule_AddFunctions(module, functions); }
