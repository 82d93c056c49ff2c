/* pollable.c - descriptors that any process can make readable, by their name alone. */
#include "fds/pollable.h"
#include "fds/fds.h"
#include <asm/socket.h>
#include <sched.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef SO_NETNS_COOKIE
#define SO_NETNS_COOKIE 71 /* older C libraries don't name it */
#endif

void pollable_set(pollable_name *n, const char *text, size_t length) {
  memset(n, 0, sizeof *n);
  n->address.sun_family = AF_UNIX; /* the first byte of the path stays 0: an abstract name, which is no file */
  if (length > sizeof n->address.sun_path - 1) length = sizeof n->address.sun_path - 1;
  memcpy(n->address.sun_path + 1, text, length);
  n->length = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + length);
}

static int new_socket(void) {
  int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  return fd < 0 ? -errno : fd;
}

int pollable_bind(const pollable_name *n) {
  int fd = new_socket();
  if (fd < 0 || !bind(fd, (const struct sockaddr *)&n->address, n->length)) return fd;
  int r = -errno;
  close(fd);
  return r;
}

int pollable_listen(int fd) { return listen(fd, 0) ? -errno : 0; } /* a queue for one connection */

uint64_t pollable_net(int fd) {
  uint64_t cookie = 0;
  socklen_t size = sizeof cookie;
  return getsockopt(fd, SOL_SOCKET, SO_NETNS_COOKIE, &cookie, &size) ? 0 : cookie; /* Linux 5.14 */
}

static int is_remote(int fd, uint64_t net) { return net && net != pollable_net(fd); }

/* ---- making it readable ---- */

static int wake(const pollable_name *n, uint64_t net) {
  int fd = new_socket(), r = 1;
  if (fd < 0) return fd;
  if (is_remote(fd, net))
    r = -EREMOTE;
  else if (connect(fd, (const struct sockaddr *)&n->address, n->length) && errno != EAGAIN) /* EAGAIN: a connection waits already */
    r = errno == ECONNREFUSED ? 0 : -errno;
  close(fd);
  return r;
}

typedef struct {
  const pollable_name *name;
  uint64_t net;
  int result;
} request;

/* In a child that has this process's memory and a copy of its table of descriptors, in which any number can be given up. */
static int wake_in_child(void *arg) {
  request *r = arg;
  close(0);
  r->result = wake(r->name, r->net);
  return 0;
}

/* The child runs while this thread waits, so it can use its memory. It sends no SIGCHLD, and is not found by wait(2) of others. */
static int wake_without_descriptor(const pollable_name *n, uint64_t net) {
  static _Alignas(16) char stack[16384]; /* the caller has the GIL, so nobody else is here */
  request r = {n, net, -EMFILE};
  sigset_t all, old;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &old);
  int pid = clone(wake_in_child, stack + sizeof stack, CLONE_VM | CLONE_VFORK, &r);
  while (pid > 0 && waitpid(pid, NULL, __WALL) < 0 && errno == EINTR) {}
  pthread_sigmask(SIG_SETMASK, &old, NULL);
  return r.result;
}

int pollable_wake(const pollable_name *n, uint64_t net) {
  int r = wake(n, net);
  return r == -EMFILE ? wake_without_descriptor(n, net) : r;
}

int pollable_exists(const pollable_name *n, uint64_t net) {
  int fd = new_socket(), r = 0;
  if (fd < 0) return fd;
  if (is_remote(fd, net))
    r = -EREMOTE;
  else if (bind(fd, (const struct sockaddr *)&n->address, n->length))
    r = errno == EADDRINUSE ? 1 : -errno;
  close(fd);
  return r;
}

/* ---- functions ---- */

static int parse_name(PyObject *arg, pollable_name *n) {
  char *text;
  Py_ssize_t length;
  if (PyBytes_AsStringAndSize(arg, &text, &length)) return -1;
  pollable_set(n, text, (size_t)length);
  return 0;
}

static PyObject *answer(int r) {
  if (r >= 0) return PyBool_FromLong(r);
  errno = -r;
  return PyErr_SetFromErrno(PyExc_OSError);
}

static PyObject *pollable_open_(PyObject *module, PyObject *arg) {
  pollable_name n;
  if (parse_name(arg, &n)) return NULL;
  int fd = pollable_bind(&n), r = fd < 0 ? fd : pollable_listen(fd);
  if (r >= 0) return owned_fd(fd, false);
  if (fd >= 0) close(fd);
  return answer(r);
}

static PyObject *pollable_wake_(PyObject *module, PyObject *arg) {
  pollable_name n;
  return parse_name(arg, &n) ? NULL : answer(pollable_wake(&n, 0));
}

static PyObject *pollable_exists_(PyObject *module, PyObject *arg) {
  pollable_name n;
  return parse_name(arg, &n) ? NULL : answer(pollable_exists(&n, 0));
}

static PyMethodDef functions[] = {
    {"pollable_open", pollable_open_, METH_O,
     "pollable_open($module, name, /)\n--\n\nReturn a descriptor that pollable_wake() of its name makes readable, as OwnedFd."},
    {"pollable_wake", pollable_wake_, METH_O,
     "pollable_wake($module, name, /)\n--\n\nMake the descriptor of that name readable. Return False if no process has it."},
    {"pollable_exists", pollable_exists_, METH_O,
     "pollable_exists($module, name, /)\n--\n\nReturn True if a process has the descriptor of that name, or a message in flight."},
    {0}};

int pollable_register(PyObject *module) { return PyModule_AddFunctions(module, functions); }
