/* hold.c - what keeps a lock for a process: a mapping, or a thread where a mapping doesn't.
 *
 * On nearly every file system a mapping refers to the open file description that was mapped, so the description's locks last as long as
 * the mapping. On overlayfs, and on a FUSE file system that passes through, it refers to the file below. There the locks end with the last
 * descriptor, so a thread holds one, in a table of descriptors of its own. No fork inherits that table, no other thread can close what is
 * in it, and the kernel frees it with the thread: when the process ends, dies, or executes another program.
 *
 * The kernel ends the threads of a process in any order. A lock that a thread keeps may therefore be free a little before the last of them
 * stops (see domain/proved.py).
 */
#include "fds/hold.h"
#include "domain/layout.h"
#include "fds/fds.h"
#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef SYS_close_range
#define SYS_close_range 436 /* the same on every architecture; older C libraries don't name it */
#endif
#define UNSHARE 2u /* CLOSE_RANGE_UNSHARE: give the thread a table of its own first */

enum { BEGINS, HOLDS, FAILED, ENDS };

typedef struct {
  pthread_t thread;
  int fd, error;
  a32 state;
} holder;

static void holder_set(holder *h, uint32_t state) {
  atomic_store(&h->state, state);
  syscall(SYS_futex, &h->state, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
}

static void holder_wait(holder *h, uint32_t state) { /* Wait until the state is another one. */
  while (atomic_load(&h->state) == state) syscall(SYS_futex, &h->state, FUTEX_WAIT_PRIVATE, state, NULL, NULL, 0);
}

static void *holder_run(void *arg) {
  holder *h = arg;
  unsigned fd = (unsigned)h->fd;
  if (syscall(SYS_close_range, fd + 1, ~0u, UNSHARE) || (fd && syscall(SYS_close_range, 0u, fd - 1, 0u))) {
    h->error = errno;
    holder_set(h, FAILED);
    return NULL;
  }
  holder_set(h, HOLDS);
  holder_wait(h, HOLDS);
  close(h->fd);
  return NULL;
}

static holder *holder_start(int fd) { /* NULL: errno */
  holder *h = calloc(1, sizeof *h);
  if (!h) return NULL;
  h->fd = fd;
  sigset_t all, old;
  pthread_attr_t attr;
  sigfillset(&all);
  pthread_attr_init(&attr);
  pthread_attr_setstacksize(&attr, 65536);
  pthread_sigmask(SIG_SETMASK, &all, &old); /* signals are for Python's threads */
  int r = pthread_create(&h->thread, &attr, holder_run, h);
  pthread_sigmask(SIG_SETMASK, &old, NULL);
  pthread_attr_destroy(&attr);
  if (!r) holder_wait(h, BEGINS);
  if (!r && atomic_load(&h->state) == FAILED) {
    pthread_join(h->thread, NULL);
    r = h->error;
  }
  if (!r) return h;
  free(h);
  errno = r;
  return NULL;
}

static void holder_end(holder *h) {
  holder_set(h, ENDS);
  pthread_join(h->thread, NULL);
  free(h);
}

static int set_lock(int fd, short kind, off_t byte) {
  struct flock lock = {.l_type = kind, .l_whence = SEEK_SET, .l_start = byte, .l_len = 1};
  return fcntl(fd, F_OFD_SETLK, &lock);
}

static int is_locked(int fd, off_t byte) {
  struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = byte, .l_len = 1};
  return !fcntl(fd, F_OFD_GETLK, &lock) && lock.l_type != F_UNLCK;
}

static int keep_by_page(int own, lock_hold *h) {
  void *page = mmap(NULL, DB_PAGE, PROT_READ, MAP_SHARED, own, 0);
  if (page == MAP_FAILED) return -1;
  h->address = page;
  h->by_thread = false;
  return madvise(page, DB_PAGE, MADV_DONTFORK);
}

static int keep_by_thread(int fd, off_t byte, lock_hold *h) {
  char path[40];
  snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
  int own = open(path, O_RDWR | O_CLOEXEC);
  if (own < 0) return -1;
  holder *thread = NULL;
  if (!set_lock(own, F_WRLCK, byte) && !(thread = holder_start(own))) {
    set_lock(own, F_UNLCK, byte); /* a raw fork may share the description */
    errno = ENOTSUP;
  }
  int error = errno;
  close(own);
  errno = error;
  h->address = thread;
  h->by_thread = true;
  return thread ? 0 : -1;
}

int hold_keep(int own, int fd, off_t byte, lock_hold *h) {
  h->address = NULL;
  int r = keep_by_page(own, h), error = errno;
  if (r) set_lock(own, F_UNLCK, byte);
  close(own);
  if (!r && is_locked(fd, byte)) return 0;
  hold_drop(h);
  if (r) {
    errno = error;
    return -1;
  }
  if (keep_by_thread(fd, byte, h)) return -1;
  if (is_locked(fd, byte)) return 0;
  hold_drop(h);
  errno = ENOTSUP;
  return -1;
}

void hold_drop(lock_hold *h) {
  void *address = h->address;
  h->address = NULL;
  if (!address) return;
  if (h->by_thread)
    holder_end(address);
  else
    munmap(address, DB_PAGE);
}

/* ---- functions ---- */

static PyObject *py_hold_keep(PyObject *module, PyObject *args) {
  PyObject *own, *hold;
  int fd;
  long long byte;
  if (!PyArg_ParseTuple(args, "OiLO:hold_keep", &own, &fd, &byte, &hold)) return NULL;
  int number = owned_checked(own, "hold");
  PyObject *taken = number < 0 ? NULL : PyObject_CallMethod(own, "take", NULL);
  if (!taken) return NULL;
  Py_DECREF(taken);
  lock_hold h;
  if (hold_keep(number, fd, byte, &h)) return PyErr_SetFromErrno(PyExc_OSError);
  PyObject *address = PyLong_FromVoidPtr(h.address);
  if (!address || PyObject_SetAttrString(hold, "by_thread", h.by_thread ? Py_True : Py_False) ||
      PyObject_SetAttrString(hold, "_address", address)) {
    Py_XDECREF(address);
    hold_drop(&h);
    return NULL;
  }
  Py_DECREF(address);
  Py_RETURN_NONE;
}

static PyObject *py_hold_drop(PyObject *module, PyObject *args) {
  PyObject *address;
  int by_thread;
  if (!PyArg_ParseTuple(args, "Op:hold_drop", &address, &by_thread)) return NULL;
  lock_hold h = {PyLong_AsVoidPtr(address), by_thread};
  if (!h.address && PyErr_Occurred()) return NULL;
  hold_drop(&h);
  Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"hold_keep", py_hold_keep, METH_VARARGS,
     "hold_keep($module, own, fd, byte, hold, /)\n--\n\n"
     "Keep the write lock that `own`, an OwnedFd, has on a byte, and close `own`. Note in hold._address what keeps it, and in\n"
     "hold.by_thread whether that is a thread, in the same call.\n\n"
     "That others see the lock is proved through `fd`, another description of the file. ENOTSUP: nothing keeps it."},
    {"hold_drop", py_hold_drop, METH_VARARGS,
     "hold_drop($module, address, by_thread, /)\n--\n\nEnd what hold_keep() returned. The lock is free when this returns."},
    {0}};

int hold_register(PyObject *module) { return PyModule_AddFunctions(module, functions); }
