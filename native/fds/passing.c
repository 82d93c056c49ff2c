/* passing.c - one descriptor sent, or received, in one call: the usual way of a buffer between processes.
 *
 * A message with anything unusual (more than one thing, another kind, a cut message, another inode) is returned raw and judged in Python.
 */
#include "fds/fds.h"
#include "fds/same.h"
#include <fcntl.h>
#include <sys/socket.h>

#define MESSAGE  96  /* bytes of a header and one buffer, see sharing/passing.py */
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

static PyObject *send_one(PyObject *module, PyObject *const *a, Py_ssize_t n) {
  if (n != 3 || !PyBytes_Check(a[1])) {
    PyErr_SetString(PyExc_TypeError, "send_one(sock, message, fd)");
    return NULL;
  }
  int sock = (int)PyLong_AsLong(a[0]), fd = (int)PyLong_AsLong(a[2]);
  if (PyErr_Occurred()) return NULL;
  const message *x = (const message *)PyBytes_AS_STRING(a[1]);
  if (PyBytes_GET_SIZE(a[1]) != MESSAGE) {
    PyErr_SetString(PyExc_ValueError, "send_one() sends a message of one buffer");
    return NULL;
  }
  fd_id id = {.dev = x->dev, .ino = x->ino, .marked = false};
  if (!fd_is(fd, &id)) return PyLong_FromLong(-ESTALE);
  struct iovec iov = {PyBytes_AS_STRING(a[1]), MESSAGE};

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
    if (error != EINTR) return PyLong_FromLong(-error);
    if (PyErr_CheckSignals()) return NULL;
  }
}

static PyObject *raw(struct msghdr *h, const char *data, ssize_t n) { /* (data, [OwnedFd], [(level, type, bytes)], flags) */
  PyObject *list = PyList_New(0), *fds = PyList_New(0);
  for (struct cmsghdr *c = CMSG_FIRSTHDR(h); c; c = CMSG_NXTHDR(h, c)) { /* to the end, whatever fails: no descriptor must stay open */
    size_t most = (size_t)((char *)h->msg_control + h->msg_controllen - (char *)CMSG_DATA(c)), length = c->cmsg_len - CMSG_LEN(0);
    if (length > most) length = most;
    if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS) {
      PyObject *some = owned_fds(CMSG_DATA(c), (Py_ssize_t)(length / sizeof(int)));
      if (!some || !fds || PyList_SetSlice(fds, PY_SSIZE_T_MAX, PY_SSIZE_T_MAX, some)) Py_CLEAR(fds);
      Py_XDECREF(some);
    } else if (list && list_add(list, Py_BuildValue("iiy#", c->cmsg_level, c->cmsg_type, (char *)CMSG_DATA(c), (Py_ssize_t)length))) {
      Py_CLEAR(list);
    }
  }
  if (list && fds) return Py_BuildValue("y#NNi", data, (Py_ssize_t)n, fds, list, h->msg_flags);
  Py_XDECREF(list);
  Py_XDECREF(fds);
  return NULL;
}

static int is_one_buffer(const message *x, ssize_t bytes, struct msghdr *h, const char *magic) {
  struct cmsghdr *c = CMSG_FIRSTHDR(h);
  return bytes == MESSAGE && !(h->msg_flags & (MSG_CTRUNC | MSG_TRUNC)) && c && c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS &&
         c->cmsg_len == CMSG_LEN(sizeof(int)) && !CMSG_NXTHDR(h, c) && !memcmp(x->magic, magic, 8) && x->things == 1 && x->fds == 1 &&
         x->kind == 1;
}

static PyObject *one_buffer(const message *x, int fd,
                            const struct stat *st) { /* what recv_one() returns; Py_BuildValue() takes twice as long */
  PyObject *result = PyTuple_New(8), *items[] = {owned_fd_of(fd, st),
                                                 PyBytes_FromStringAndSize(x->domain, sizeof x->domain),
                                                 PyLong_FromUnsignedLongLong(x->dev),
                                                 PyLong_FromUnsignedLongLong(x->ino),
                                                 PyBytes_FromStringAndSize(x->nonce, sizeof x->nonce),
                                                 PyLong_FromLongLong(st->st_size),
                                                 PyLong_FromLong(x->flags),
                                                 PyBytes_FromStringAndSize(x->name, sizeof x->name)};
  for (size_t i = 0; i < sizeof items / sizeof *items; i++) {
    if (result && items[i])
      PyTuple_SET_ITEM(result, (Py_ssize_t)i, Py_NewRef(items[i]));
    else
      Py_CLEAR(result);
    Py_XDECREF(items[i]);
  }
  return result;
}

static PyObject *recv_one(PyObject *module, PyObject *const *a, Py_ssize_t n) {
  if (n != 3 || !PyBytes_Check(a[2]) || PyBytes_GET_SIZE(a[2]) != 8) {
    PyErr_SetString(PyExc_TypeError, "recv_one(sock, most, magic)");
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
    if (error != EINTR) return PyLong_FromLong(-error);
    if (PyErr_CheckSignals()) return NULL;
    h.msg_controllen = sizeof control;
  }
  const message *x = &data.one;
  if (is_one_buffer(x, r, &h, PyBytes_AS_STRING(a[2]))) {
    int fd;
    struct stat st;
    memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&h)), sizeof fd);
    if (buffer_is_sealed(fd, &st) && st.st_dev == x->dev && st.st_ino == x->ino && buffer_reference(fd)) return one_buffer(x, fd, &st);
  }
  return raw(&h, data.bytes, r);
}

/* As kind([item]), at a third of its cost: nearly every message has one buffer. */
static PyObject *one_of(PyObject *module, PyObject *const *a, Py_ssize_t n) {
  if (n != 2 || !PyType_Check(a[0]) || !PyType_IsSubtype((PyTypeObject *)a[0], &PyList_Type))
    return PyErr_Format(PyExc_TypeError, "one_of(kind of list, item)");
  PyTypeObject *kind = (PyTypeObject *)a[0];
  PyObject *list = kind->tp_alloc(kind, 0);
  if (list && PyList_Append(list, a[1])) Py_CLEAR(list);
  return list;
}

static PyMethodDef functions[] = {
    METHOD(one_of, METH_FASTCALL, "($module, kind, item, /)", "Return a list of that type, without calling it, with one item."),
    METHOD(
        send_one, METH_FASTCALL, "($module, sock, message, fd, /)",
        "Send a message with one descriptor. Return the bytes sent, or -errno: -ESTALE if it is not of the inode that the message names."),
    METHOD(
        recv_one, METH_FASTCALL, "($module, sock, most, magic, /)",
        "Receive a message of at most that many bytes.\n\n"
        "Returns:\n"
        "    (OwnedFd, domain id, dev, ino, nonce, size, flags, name) of one buffer, which has the reference lock then; the raw message\n"
        "    as (data, [OwnedFd], [(level, type, bytes)], flags); or -errno."),
    {0}};

int passing_register(PyObject *module) { return PyModule_AddFunctions(module, functions); }
