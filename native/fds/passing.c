/* passing.c - one descriptor sent and received in one call each: the way of a buffer that goes round between processes.
 *
 * What is unusual (more things, other kinds, a cut message, another inode) comes back raw and is judged in Python. */
#include "fds/fds.h"
#include <fcntl.h>
#include <sys/socket.h>
#include <sys/stat.h>

#define MESSAGE  96  /* header and one buffer, see sharing/passing.py */
#define MOST_FDS 253 /* SCM_MAX_FD */
#define LONGEST  (16 + MOST_FDS * 80)

typedef struct __attribute__((packed)) {
  char magic[8];
  uint16_t things, fds;
  uint32_t zero;
  uint8_t kind, flags;
  uint16_t zero2;
  uint32_t index;
  char domain[8];
  uint64_t dev, ino;
  char nonce[16], name[32];
} message;

_Static_assert(sizeof(message) == MESSAGE, "message");

static PyObject *negative(int error) { return PyLong_FromLong(-error); }

static PyObject *send_one(PyObject *m, PyObject *const *a, Py_ssize_t n) { /* (socket fd, message, fd) -> bytes sent, or -errno */
  if (n != 3 || !PyBytes_Check(a[1])) {
    PyErr_SetString(PyExc_TypeError, "send_one(socket, message, fd)");
    return NULL;
  }
  int sock = (int)PyLong_AsLong(a[0]), fd = (int)PyLong_AsLong(a[2]);
  if (PyErr_Occurred()) return NULL;
  struct iovec iov = {PyBytes_AS_STRING(a[1]), (size_t)PyBytes_GET_SIZE(a[1])};

  union {
    struct cmsghdr head;
    char room[CMSG_SPACE(sizeof(int))];
  } control;

  memset(&control, 0, sizeof control);
  struct msghdr h = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = CMSG_LEN(sizeof(int))};
  control.head.cmsg_level = SOL_SOCKET;
  control.head.cmsg_type = SCM_RIGHTS;
  control.head.cmsg_len = CMSG_LEN(sizeof(int));
  memcpy(CMSG_DATA(&control.head), &fd, sizeof fd);
  for (;;) {
    ssize_t r;
    int error;
    Py_BEGIN_ALLOW_THREADS
    r = sendmsg(sock, &h, MSG_NOSIGNAL);
    error = errno;
    Py_END_ALLOW_THREADS
    if (r >= 0) return PyLong_FromSsize_t(r);
    if (error != EINTR) return negative(error);
    if (PyErr_CheckSignals()) return NULL;
  }
}

/* The lease on what came, if it is the sealed memfd that the message says; its size, or -1. */
static int64_t lease(int fd, const message *x) {
  struct stat st;
  struct flock lock = {.l_type = F_RDLCK, .l_whence = SEEK_SET, .l_start = 0, .l_len = 1};
  int want = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL, seals = fcntl(fd, F_GET_SEALS);
  if (seals < 0 || (seals & want) != want || fstat(fd, &st) || st.st_dev != x->dev || st.st_ino != x->ino) return -1;
  return fcntl(fd, F_OFD_SETLK, &lock) ? -1 : st.st_size;
}

static PyObject *raw(struct msghdr *h, const char *data, ssize_t n) { /* (data, [(level, type, bytes)], flags) */
  PyObject *list = PyList_New(0);
  for (struct cmsghdr *c = CMSG_FIRSTHDR(h); list && c; c = CMSG_NXTHDR(h, c)) {
    size_t most = (size_t)((char *)h->msg_control + h->msg_controllen - (char *)CMSG_DATA(c)), length = c->cmsg_len - CMSG_LEN(0);
    PyObject *item = Py_BuildValue("iiy#", c->cmsg_level, c->cmsg_type, (char *)CMSG_DATA(c), (Py_ssize_t)(length < most ? length : most));
    if (!item || PyList_Append(list, item)) Py_CLEAR(list);
    Py_XDECREF(item);
  }
  return list ? Py_BuildValue("y#Ni", data, (Py_ssize_t)n, list, h->msg_flags) : NULL;
}

static PyObject *recv_one(PyObject *m, PyObject *const *a, Py_ssize_t n) {
  /* (socket fd, bytes at most, magic) -> (fd, domain id, dev, ino, nonce, size, flags, name), (data, control, flags), or -errno */
  if (n != 3 || !PyBytes_Check(a[2]) || PyBytes_GET_SIZE(a[2]) != 8) {
    PyErr_SetString(PyExc_TypeError, "recv_one(socket, most, magic)");
    return NULL;
  }
  int sock = (int)PyLong_AsLong(a[0]);
  long most = PyLong_AsLong(a[1]);
  if (PyErr_Occurred()) return NULL;

  union {
    message one;
    char bytes[LONGEST];
  } data;

  union {
    struct cmsghdr head;
    char room[CMSG_SPACE(MOST_FDS * sizeof(int)) + CMSG_SPACE(sizeof(struct ucred))];
  } control;
  struct iovec iov = {&data, most > 0 && (size_t)most < sizeof data ? (size_t)most : sizeof data};
  struct msghdr h = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
  ssize_t r;
  for (;;) {
    int error;
    Py_BEGIN_ALLOW_THREADS
    r = recvmsg(sock, &h, MSG_CMSG_CLOEXEC);
    error = errno;
    Py_END_ALLOW_THREADS
    if (r >= 0) break;
    if (error != EINTR) return negative(error);
    if (PyErr_CheckSignals()) return NULL;
    h.msg_controllen = sizeof control;
  }
  message *x = &data.one;
  struct cmsghdr *c = CMSG_FIRSTHDR(&h);
  if (r == MESSAGE && !(h.msg_flags & (MSG_CTRUNC | MSG_TRUNC)) && c && c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS &&
      c->cmsg_len == CMSG_LEN(sizeof(int)) && !CMSG_NXTHDR(&h, c) && !memcmp(x->magic, PyBytes_AS_STRING(a[2]), 8) && x->things == 1 &&
      x->fds == 1 && x->kind == 1) {
    int fd;
    memcpy(&fd, CMSG_DATA(c), sizeof fd);
    int64_t size = lease(fd, x);
    if (size >= 0)
      return Py_BuildValue("iy#KKy#LIy#", fd, x->domain, (Py_ssize_t)8, (unsigned long long)x->dev, (unsigned long long)x->ino, x->nonce,
                           (Py_ssize_t)16, (long long)size, x->flags, x->name, (Py_ssize_t)32);
  }
  return raw(&h, data.bytes, r);
}

static PyMethodDef functions[] = {
    {"send_one", (PyCFunction)(void *)send_one, METH_FASTCALL, "Send (socket fd, message, fd) -> bytes sent, or -errno."},
    {"recv_one", (PyCFunction)(void *)recv_one, METH_FASTCALL,
     "Receive (socket fd, most bytes, magic) -> one buffer's parts, the raw message, or -errno."},
    {0}};

int passing_register(PyObject *module) { return PyModule_AddFunctions(module, functions); }
