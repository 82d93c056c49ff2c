/* messages.c - messages between clients and servers: sent and received on a socket that is still the one that it was. */
#include "fds/fds.h"
#include "fds/same.h"
#include <sys/socket.h>

#define MOST_FDS 16 /* more than a message of sharing/messages.py has */

typedef union {
  struct cmsghdr head;
  char room[CMSG_SPACE(MOST_FDS * sizeof(int))];
} control_room;

static PyObject *send_message(PyObject *module, PyObject *args) {
  int sock, flags, fds[MOST_FDS];
  fd_id id = {.marked = false};
  Py_buffer data;
  PyObject *list;
  if (!PyArg_ParseTuple(args, "iKKy*O!i:send_message", &sock, &id.dev, &id.ino, &data, &PyList_Type, &list, &flags)) return NULL;
  Py_ssize_t count = PyList_GET_SIZE(list);
  if (count > MOST_FDS) PyErr_Format(PyExc_ValueError, "send_message: %zd descriptors, and %d are the most", count, MOST_FDS);
  for (Py_ssize_t i = 0; i < count && !PyErr_Occurred(); i++) fds[i] = (int)PyLong_AsLong(PyList_GET_ITEM(list, i));
  control_room control;
  memset(&control, 0, sizeof control);
  struct iovec iov = {data.buf, (size_t)data.len};
  struct msghdr h = {.msg_iov = &iov, .msg_iovlen = 1};
  if (count && !PyErr_Occurred()) {
    h.msg_control = &control;
    h.msg_controllen = CMSG_SPACE((size_t)count * sizeof(int));
    control.head = (struct cmsghdr){.cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS, .cmsg_len = CMSG_LEN((size_t)count * sizeof(int))};
    memcpy(CMSG_DATA(&control.head), fds, (size_t)count * sizeof(int));
  }
  ssize_t r = -1;
  int error = 0;
  while (!PyErr_Occurred()) {
    Py_BEGIN_ALLOW_THREADS
    r = fd_is(sock, &id) ? sendmsg(sock, &h, flags | MSG_NOSIGNAL) : -1;
    error = errno;
    Py_END_ALLOW_THREADS
    if (r >= 0 || error != EINTR || PyErr_CheckSignals()) break;
  }
  PyBuffer_Release(&data);
  if (PyErr_Occurred()) return NULL;
  if (r >= 0) Py_RETURN_NONE;
  errno = error;
  return fd_error("send", sock);
}

static PyObject *receive_message(PyObject *module, PyObject *args) {
  int sock, error;
  fd_id id = {.marked = false};
  Py_ssize_t most;
  if (!PyArg_ParseTuple(args, "iKKn:receive_message", &sock, &id.dev, &id.ino, &most)) return NULL;
  PyObject *list = PyList_New(0), *data = list ? PyBytes_FromStringAndSize(NULL, most) : NULL;
  if (!data) {
    Py_XDECREF(list);
    return NULL;
  }
  control_room control;
  struct iovec iov = {PyBytes_AS_STRING(data), (size_t)most};
  struct msghdr h;
  ssize_t r;
  do {
    h = (struct msghdr){.msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
    Py_BEGIN_ALLOW_THREADS
    r = fd_is(sock, &id) ? recvmsg(sock, &h, MSG_CMSG_CLOEXEC) : -1;
    error = errno;
    Py_END_ALLOW_THREADS
  } while (r < 0 && error == EINTR && !PyErr_CheckSignals());
  if (r >= 0) /* every descriptor is in the list, whatever happens from here on */
    for (struct cmsghdr *c = CMSG_FIRSTHDR(&h); c; c = CMSG_NXTHDR(&h, c))
      if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS)
        for (size_t at = 0; CMSG_LEN(at + sizeof(int)) <= c->cmsg_len; at += sizeof(int)) {
          int fd;
          memcpy(&fd, CMSG_DATA(c) + at, sizeof fd);
          PyObject *own = owned_fd(fd, 0);
          if (own && !PyErr_Occurred())
            list_add(list, own);
          else
            Py_XDECREF(own); /* closes it */
        }
  if (r < 0 && !PyErr_Occurred()) {
    errno = error;
    fd_error("recv", sock);
  }
  if (PyErr_Occurred() || _PyBytes_Resize(&data, r)) {
    Py_DECREF(list);
    Py_XDECREF(data);
    return NULL;
  }
  return Py_BuildValue("NNi", data, list, h.msg_flags);
}

static PyMethodDef functions[] = {
    METHOD(send_message, METH_VARARGS, "($module, sock, dev, ino, data, fds, flags, /)",
           "Send a message with descriptors on the socket with that inode.\n\n"
           "Raises:\n"
           "    ClosedError: The descriptor is not the socket's any more (EBADF).\n"
           "    OSError: As sendmsg(2)."),
    METHOD(receive_message, METH_VARARGS, "($module, sock, dev, ino, most, /)",
           "Return (data, [OwnedFd], flags) of a message of at most that many bytes. Raises: as send_message()."),
    {0}};

int messages_register(PyObject *module) { return PyModule_AddFunctions(module, functions); }
