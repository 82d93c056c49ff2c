/* shm.c - the mapped domain: bounded loads and stores, the sleep that every wait is built of, the token that tells a
 * forked child from its parent, and the page that holds a life's lock. */
#include "domain/access.h"
#include "domain/fence.h"
#include "domain/lend.h"
#include "domain/reap.h"
#include "domain/resv.h"
#include "domain/resv_lock.h"
#include "domain/sleep.h"
#include <fcntl.h>
#include <linux/futex.h>
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <sys/inotify.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <sys/syscall.h>
#include <unistd.h>

static long futex(a32 *word, int op, uint32_t value, const struct timespec *timeout) {
  return syscall(SYS_futex, word, op, value, timeout, NULL, 0);
}
void word_wake(a32 *word, int n) { futex(word, FUTEX_WAKE, (uint32_t)n, NULL); }

/* ---- errors ---- */
int shm_fail(Shm *s, int err, const char *op, const char *obj, const char *remedy) {
  PyObject *e = s->fail ? PyObject_CallFunction(s->fail, "isss", err, op, obj, remedy) : NULL;
  if (e) {
    PyErr_SetObject((PyObject *)Py_TYPE(e), e);
    Py_DECREF(e);
  } else if (!PyErr_Occurred()) {
    errno = err;
    PyErr_SetFromErrno(PyExc_OSError);
  }
  return -1;
}
int shm_corrupt(Shm *s, const char *what) {
  return shm_fail(s, EUCLEAN, "domain", what, "the domain file holds impossible values: end its processes and let the next opener set it aside");
}
int shm_need_life(Shm *s, const char *op) {
  if (my_life(s)) return 0;
  return shm_fail(s, EPERM, op, "an object of another process",
                  "what a fork inherits is inert in the child: make the object in this process");
}

/* ---- the ticker: one thread a process, only while somebody sleeps ---- */
#define SLEEPERS 256
typedef struct { a32 running; } proc_page; /* wiped by fork: the child has no such thread */
static proc_page *proc;
static _Atomic(a32 *) sleepers[SLEEPERS];
static a32 ticks, parked;

static void *ticker(void *unused) {
  (void)unused;
  for (int idle = 0;;) {
    struct timespec t = {0, DB_TICK_NS};
    nanosleep(&t, NULL);
    atomic_fetch_add(&ticks, 1);
    int busy = 0;
    for (int i = 0; i < SLEEPERS; i++) {
      a32 *w = atomic_load(&sleepers[i]);
      if (w) { busy = 1; word_wake(w, INT32_MAX); }
    }
    if (busy) { idle = 0; continue; }
    if (++idle < 25) continue;
    atomic_store(&parked, 1); /* a sleeper that comes now either sees this or is seen by the look below */
    for (int i = 0; i < SLEEPERS; i++) busy |= atomic_load(&sleepers[i]) != NULL;
    while (!busy && atomic_load(&parked)) futex(&parked, FUTEX_WAIT_PRIVATE, 1, NULL);
    atomic_store(&parked, 0);
    idle = 0;
  }
  return NULL;
}
static int ticker_start(void) { /* GIL held */
  for (int i = 0; i < SLEEPERS; i++) atomic_store(&sleepers[i], NULL); /* after a fork these are the parent's */
  atomic_store(&parked, 0);
  pthread_t thread;
  pthread_attr_t attr;
  sigset_t all, old;
  sigfillset(&all);
  pthread_attr_init(&attr);
  pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
  pthread_attr_setstacksize(&attr, 65536);
  pthread_sigmask(SIG_SETMASK, &all, &old); /* Python's signals belong to Python's threads */
  int r = pthread_create(&thread, &attr, ticker, NULL);
  pthread_sigmask(SIG_SETMASK, &old, NULL);
  pthread_attr_destroy(&attr);
  if (!r) atomic_store(&proc->running, 1);
  return r;
}
static int sleeper_enter(a32 *word) { /* GIL held; -1: no room or no thread, the caller sleeps with a timeout */
  if (!atomic_load(&proc->running) && ticker_start()) return -1;
  for (int i = 0; i < SLEEPERS; i++) {
    a32 *none = NULL;
    if (!atomic_load(&sleepers[i]) && atomic_compare_exchange_strong(&sleepers[i], &none, word)) {
      if (atomic_load(&parked)) {
        atomic_store(&parked, 0);
        futex(&parked, FUTEX_WAKE_PRIVATE, 1, NULL);
      }
      return i;
    }
  }
  return -1;
}

static int signal_pending(const sigset_t *blocked) { /* is there one that waits only because this thread blocks more than these? */
  sigset_t found;
  struct sigaction act;
  sigpending(&found);
  for (int i = 1; i < NSIG; i++) /* one without a handler ends the process or nothing */
    if (sigismember(&found, i) == 1 && !sigismember(blocked, i) && !sigaction(i, NULL, &act) && act.sa_handler != SIG_DFL && act.sa_handler != SIG_IGN) return 1;
  return 0;
}
int shm_sleep(Shm *s, a32 *word, uint32_t expected, int64_t until, int kind, uint64_t value) {
  int64_t limit = -1;
  if (until >= 0) {
    limit = until - now_ns();
    if (limit <= 0) return 0;
  }
  uint32_t before = atomic_load(&ticks);
  int slot = sleeper_enter(word), alone = 0;
  if (slot < 0 && (limit < 0 || limit > DB_TICK_NS)) { limit = DB_TICK_NS; alone = 1; }
  struct timespec t = {limit / 1000000000, limit % 1000000000};
  long r;
  int err, tick, signalled;
  sigset_t all, old;
  Py_BEGIN_ALLOW_THREADS
  r = futex(word, FUTEX_WAIT, expected, limit < 0 ? NULL : &t);
  err = errno;
  signalled = r < 0 && err == EINTR;
  tick = atomic_load(&ticks) != before || (alone && r < 0 && err == ETIMEDOUT);
  if (tick && !signalled) { /* the GIL may be long in coming: a signal in that time ends the sleep as one before it does */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
  }
  Py_END_ALLOW_THREADS
  if (slot >= 0) atomic_store(&sleepers[slot], NULL);
  if (tick && !signalled) {
    signalled = signal_pending(&old);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
  }
  if (signalled) return PyErr_CheckSignals() ? -1 : -2;
  if (tick) {
    if (PyErr_CheckSignals()) return -1; /* a signal that came just before the sleep did not end it */
    return shm_tick(s, kind, value) ? -1 : 1;
  }
  return 0;
}
int shm_tick(Shm *s, int kind, uint64_t value) {
  if (!s->tick) return 0;
  PyObject *x = PyObject_CallFunction(s->tick, "iK", kind, (unsigned long long)value);
  Py_XDECREF(x);
  return x ? 0 : -1;
}
int shm_polled(Shm *s) { /* who only polls must find out about deaths too, though no sleep of his ever ticks */
  int64_t age = now_ns() - (int64_t)atomic_load(&hdr(s)->sweep_ns);
  if (age >= 0 && age < DB_TICK_NS) return 0;
  return shm_tick(s, TICK_POLL, 0) ? -1 : 1;
}
double remaining_s(int64_t until) {
  if (until < 0) return HUGE_VAL;
  int64_t left = until - now_ns();
  return left > 0 ? left / 1e9 : 1e-9; /* success is always > 0 */
}
int parse_timeout(Shm *s, PyObject *obj, int64_t *until, const char *op) {
  *until = -1;
  if (!obj || obj == Py_None) return 0;
  double t = PyFloat_AsDouble(obj);
  if (t == -1.0 && PyErr_Occurred()) return -1;
  if (!(t >= 0)) return shm_fail(s, EINVAL, op, "timeout", "a timeout is seconds >= 0, or None for ever");
  if (t < 4e9) *until = now_ns() + (int64_t)(t * 1e9);
  return 0;
}

/* ---- bounds ---- */
static int refresh(Shm *s, uint32_t want) { /* make chunks below the published count known, if the file really has them */
  uint32_t n = atomic_load(&hdr(s)->nchunks);
  if (n > DB_MAX_CHUNKS || want >= n) return -1;
  struct stat st;
  if (fstat(s->fd, &st) || (uint64_t)st.st_size < DB_HEADER_BYTES + (uint64_t)n * DB_CHUNK) return -1;
  s->known = n;
  return 0;
}
int chunks_known(Shm *s, uint32_t n) { /* can n be the published count? It never shrinks, and the file has what it counts */
  if (n > DB_MAX_CHUNKS || n < s->known) return 0;
  return n == s->known || !refresh(s, n - 1);
}
char *chunk_at(Shm *s, uint32_t i, uint32_t type) {
  if (i >= DB_MAX_CHUNKS || (i >= s->known && refresh(s, i))) return NULL;
  if (CT_TYPE(atomic_load(chunk_entry(s, i))) != type) return NULL;
  return s->base + DB_HEADER_BYTES + (size_t)i * DB_CHUNK;
}
static char *bounded(Shm *s, unsigned long long off, size_t n) {
  uint64_t end = off + n;
  if (end < off || end > s->length) goto bad;
  if (end > DB_HEADER_BYTES) {
    uint32_t last = (uint32_t)((end - 1 - DB_HEADER_BYTES) / DB_CHUNK);
    if (last >= s->known && refresh(s, last)) goto bad;
  }
  return s->base + off;
bad:
  shm_corrupt(s, "an offset outside of the domain");
  return NULL;
}

/* ---- the type ---- */
static PyObject *shm_new(PyTypeObject *type, PyObject *args, PyObject *kw) {
  static char *names[] = {"fd", "fail", NULL};
  int fd;
  PyObject *fail = NULL;
  if (!PyArg_ParseTupleAndKeywords(args, kw, "i|O", names, &fd, &fail)) return NULL;
  Shm *s = (Shm *)type->tp_alloc(type, 0);
  if (!s) return NULL;
  s->fd = fd;
  s->length = DB_HEADER_BYTES + (size_t)DB_MAX_CHUNKS * DB_CHUNK;
  Py_XINCREF(fail);
  s->fail = fail;
  struct stat st;
  if (fstat(fd, &st)) goto os;
  if ((uint64_t)st.st_size < DB_HEADER_BYTES) { shm_corrupt(s, "a file shorter than its header"); goto out; }
  void *p = mmap(NULL, s->length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
  if (p == MAP_FAILED) goto os;
  s->base = p;
  madvise(p, s->length, MADV_DONTDUMP);
  p = mmap(NULL, DB_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) goto os;
  s->token = p;
  if (madvise(p, DB_PAGE, MADV_WIPEONFORK)) goto os;
  db_header *h = hdr(s);
  if (memcmp(h->magic, DB_MAGIC, 8) || h->version != DB_VERSION || h->header_bytes != DB_HEADER_BYTES ||
      h->chunk_bytes != DB_CHUNK || h->max_chunks != DB_MAX_CHUNKS || h->lives != DB_LIVES || h->buckets != DB_BUCKETS) {
    shm_corrupt(s, "a header of another layout");
    goto out;
  }
  return (PyObject *)s;
os:
  PyErr_SetFromErrno(PyExc_OSError);
out:
  Py_DECREF(s);
  return NULL;
}
static int shm_traverse(Shm *s, visitproc visit, void *arg) {
  Py_VISIT(Py_TYPE(s));
  Py_VISIT(s->tick);
  Py_VISIT(s->on_local);
  Py_VISIT(s->on_sync);
  Py_VISIT(s->fail);
  return 0;
}
static int shm_clear(Shm *s) {
  Py_CLEAR(s->tick);
  Py_CLEAR(s->on_local);
  Py_CLEAR(s->on_sync);
  return 0;
}
static void shm_dealloc(Shm *s) {
  PyTypeObject *type = Py_TYPE(s);
  PyObject_GC_UnTrack(s);
  if (s->weakrefs) PyObject_ClearWeakRefs((PyObject *)s);
  shm_clear(s);
  Py_CLEAR(s->fail);
  if (s->base) munmap(s->base, s->length);
  if (s->owns_fd) close(s->fd);
  if (s->token) munmap(s->token, DB_PAGE);
  PyMem_Free(s->fifo);
  type->tp_free(s);
  Py_DECREF(type);
}

#define WORD_METHODS(bits, type)                                                                     \
  static type *word##bits(Shm *s, unsigned long long off) {                                          \
    if (off % sizeof(type)) { shm_corrupt(s, "an unaligned offset"); return NULL; }                  \
    return (type *)bounded(s, off, sizeof(type));                                                    \
  }                                                                                                  \
  static PyObject *shm_load##bits(Shm *s, PyObject *arg) {                                           \
    unsigned long long off = PyLong_AsUnsignedLongLong(arg);                                         \
    if (off == (unsigned long long)-1 && PyErr_Occurred()) return NULL;                              \
    type *w = word##bits(s, off);                                                                    \
    return w ? PyLong_FromUnsignedLongLong(atomic_load(w)) : NULL;                                   \
  }                                                                                                  \
  static PyObject *shm_store##bits(Shm *s, PyObject *args) {                                         \
    unsigned long long off, v;                                                                       \
    if (!PyArg_ParseTuple(args, "KK", &off, &v)) return NULL;                                        \
    type *w = word##bits(s, off);                                                                    \
    if (!w) return NULL;                                                                             \
    atomic_store(w, (uint##bits##_t)v);                                                              \
    Py_RETURN_NONE;                                                                                  \
  }                                                                                                  \
  static PyObject *shm_cas##bits(Shm *s, PyObject *args) {                                           \
    unsigned long long off, old, v;                                                                  \
    if (!PyArg_ParseTuple(args, "KKK", &off, &old, &v)) return NULL;                                 \
    type *w = word##bits(s, off);                                                                    \
    if (!w) return NULL;                                                                             \
    uint##bits##_t want = (uint##bits##_t)old;                                                       \
    return PyBool_FromLong(atomic_compare_exchange_strong(w, &want, (uint##bits##_t)v));             \
  }                                                                                                  \
  static PyObject *shm_add##bits(Shm *s, PyObject *args) {                                           \
    unsigned long long off, v;                                                                       \
    if (!PyArg_ParseTuple(args, "KK", &off, &v)) return NULL;                                        \
    type *w = word##bits(s, off);                                                                    \
    return w ? PyLong_FromUnsignedLongLong(atomic_fetch_add(w, (uint##bits##_t)v)) : NULL;           \
  }
WORD_METHODS(32, a32)
WORD_METHODS(64, a64)

static PyObject *shm_read(Shm *s, PyObject *args) {
  unsigned long long off, n;
  if (!PyArg_ParseTuple(args, "KK", &off, &n)) return NULL;
  char *p = bounded(s, off, n);
  return p ? PyBytes_FromStringAndSize(p, (Py_ssize_t)n) : NULL;
}
static PyObject *shm_wake(Shm *s, PyObject *arg) {
  unsigned long long off = PyLong_AsUnsignedLongLong(arg);
  if (off == (unsigned long long)-1 && PyErr_Occurred()) return NULL;
  a32 *w = word32(s, off);
  if (!w) return NULL;
  word_wake(w, INT32_MAX);
  Py_RETURN_NONE;
}
static PyObject *shm_wait(Shm *s, PyObject *args) { /* wait32(off, expected, timeout, ticking): one sleep */
  unsigned long long off, expected;
  PyObject *timeout;
  int64_t until;
  if (!PyArg_ParseTuple(args, "KKO", &off, &expected, &timeout)) return NULL;
  a32 *w = word32(s, off);
  if (!w || parse_timeout(s, timeout, &until, "wait")) return NULL;
  int r = shm_sleep(s, w, (uint32_t)expected, until, TICK_BELL, off);
  return r == -1 ? NULL : PyLong_FromLong(r);
}
static PyObject *shm_idle(Shm *s, PyObject *args) { /* idle(off, expected): sleep without a bound and without ticks */
  unsigned long long off, expected;
  if (!PyArg_ParseTuple(args, "KK", &off, &expected)) return NULL;
  a32 *w = word32(s, off);
  if (!w) return NULL;
  Py_BEGIN_ALLOW_THREADS
  futex(w, FUTEX_WAIT, (uint32_t)expected, NULL);
  Py_END_ALLOW_THREADS
  if (PyErr_CheckSignals()) return NULL;
  Py_RETURN_NONE;
}
static PyObject *get_life(Shm *s, void *u) { return PyLong_FromUnsignedLong(my_life(s)); }
static int set_life(Shm *s, PyObject *v, void *u) {
  unsigned long id = v ? PyLong_AsUnsignedLong(v) : 0;
  if (PyErr_Occurred()) return -1;
  atomic_store(s->token, id);
  return 0;
}
static PyMethodDef shm_methods[] = {
#define M(n, flags, doc) {#n, (PyCFunction)shm_##n, flags, doc}
    M(load32, METH_O, "Load the word at an offset."), M(store32, METH_VARARGS, "Store (offset, value)."),
    M(cas32, METH_VARARGS, "Compare and swap (offset, old, new) -> done."), M(add32, METH_VARARGS, "Fetch and add (offset, n)."),
    M(load64, METH_O, "Load the word at an offset."), M(store64, METH_VARARGS, "Store (offset, value)."),
    M(cas64, METH_VARARGS, "Compare and swap (offset, old, new) -> done."), M(add64, METH_VARARGS, "Fetch and add (offset, n)."),
    M(read, METH_VARARGS, "Bytes (offset, n)."), M(wake, METH_O, "Wake everybody who sleeps on the word."),
    M(wait, METH_VARARGS, "One sleep (offset, expected, timeout) with ticks."),
    M(idle, METH_VARARGS, "One sleep (offset, expected) without ticks."),
    {0}};
static PyMemberDef shm_members[] = {
    {"tick", T_OBJECT, offsetof(Shm, tick), 0, "called at each tick of a wait"},
    {"on_local", T_OBJECT, offsetof(Shm, on_local), 0, "called when a fence with callbacks here is signalled here"},
    {"on_sync", T_OBJECT, offsetof(Shm, on_sync), 0, "called when a fence that a sync file's descriptor waits for has ended -> done"},
    {"fail", T_OBJECT, offsetof(Shm, fail), 0, "makes an error: fail(errno, operation, object, remedy)"},
    {"fd", T_INT, offsetof(Shm, fd), READONLY, "the domain's fd"},
    {"owns_fd", T_BOOL, offsetof(Shm, owns_fd), 0, "is the fd closed with the mapping?"},
    {"__weaklistoffset__", T_PYSSIZET, offsetof(Shm, weakrefs), READONLY, NULL},
    {0}};
static PyGetSetDef shm_getset[] = {
    {"life", (getter)get_life, (setter)set_life, "this process's life in the domain; 0: none, or forked since", NULL}, {0}};

PyTypeObject *Shm_Type;

static PyObject *py_hold_page(PyObject *m, PyObject *arg) {
  int fd = (int)PyLong_AsLong(arg);
  if (fd == -1 && PyErr_Occurred()) return NULL;
  void *p = mmap(NULL, DB_PAGE, PROT_READ, MAP_SHARED, fd, 0);
  if (p == MAP_FAILED) return PyErr_SetFromErrno(PyExc_OSError);
  if (madvise(p, DB_PAGE, MADV_DONTFORK)) {
    PyErr_SetFromErrno(PyExc_OSError);
    munmap(p, DB_PAGE);
    return NULL;
  }
  return PyLong_FromVoidPtr(p);
}
static PyObject *py_drop_page(PyObject *m, PyObject *arg) {
  void *p = PyLong_AsVoidPtr(arg);
  if (!p && PyErr_Occurred()) return NULL;
  munmap(p, DB_PAGE);
  Py_RETURN_NONE;
}
static PyObject *py_probe_fd(PyObject *m, PyObject *arg) {
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
  return Py_BuildValue("KKKiy#k", (unsigned long long)st.st_dev, (unsigned long long)st.st_ino,
                       (unsigned long long)st.st_size, seals, link, (Py_ssize_t)n, (unsigned long)fs.f_type);
}
static PyObject *py_take_buffer(PyObject *m, PyObject *args) { /* (fd, domain id) -> (dev, ino, size, nonce) | None: judge it slowly */
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
  return Py_BuildValue("KKKy#", (unsigned long long)st.st_dev, (unsigned long long)st.st_ino, (unsigned long long)st.st_size, nonce, (Py_ssize_t)16);
}
static PyObject *py_lease_buffer(PyObject *m, PyObject *args) { /* (fd, dev, ino) -> size, -1: not that inode, judge it slowly */
  int fd;
  unsigned long long dev, ino;
  if (!PyArg_ParseTuple(args, "iKK", &fd, &dev, &ino)) return NULL;
  struct stat st;
  struct flock lease = {.l_type = F_RDLCK, .l_whence = SEEK_SET, .l_start = 0, .l_len = 1};
  int want = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL, seals = fcntl(fd, F_GET_SEALS);
  if (seals < 0 || (seals & want) != want || fstat(fd, &st) || st.st_dev != dev || st.st_ino != ino || fcntl(fd, F_OFD_SETLK, &lease)) return PyLong_FromLong(-1);
  return PyLong_FromLongLong((long long)st.st_size);
}
static PyObject *py_watch_open(PyObject *m, PyObject *unused) {
  int fd = inotify_init1(IN_CLOEXEC | IN_NONBLOCK);
  return fd < 0 ? PyErr_SetFromErrno(PyExc_OSError) : PyLong_FromLong(fd);
}
static PyObject *py_watch_add(PyObject *m, PyObject *args) {
  int watch, fd;
  if (!PyArg_ParseTuple(args, "ii", &watch, &fd)) return NULL;
  char path[40];
  snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
  int wd = inotify_add_watch(watch, path, IN_DELETE_SELF);
  return wd < 0 ? PyErr_SetFromErrno(PyExc_OSError) : PyLong_FromLong(wd);
}
static PyMethodDef functions[] = {
    {"watch_open", py_watch_open, METH_NOARGS, "A non-blocking inotify descriptor."},
    {"watch_add", py_watch_add, METH_VARARGS, "Watch (inotify, fd) for the end of fd's inode -> watch descriptor."},
    {"hold_page", py_hold_page, METH_O, "Map one page of fd that no fork inherits; returns its address."},
    {"drop_page", py_drop_page, METH_O, "Unmap a page that hold_page mapped."},
    {"take_buffer", py_take_buffer, METH_VARARGS, "Put the lease on a buffer of (fd, domain id) -> (dev, ino, size, nonce), None when something is unusual."},
    {"lease_buffer", py_lease_buffer, METH_VARARGS, "Put the lease on the buffer with (fd, dev, ino) -> its size, -1 when it is something else."},
    {"probe_fd", py_probe_fd, METH_O, "(st_dev, st_ino, st_size, seals or -1, link text, fstatfs f_type) of an fd."},
    {0}};

int shm_register(PyObject *module) {
  proc = mmap(NULL, DB_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (proc == MAP_FAILED || madvise(proc, DB_PAGE, MADV_WIPEONFORK)) {
    PyErr_SetFromErrno(PyExc_OSError);
    return -1;
  }
  size_t n = 0;
  static PyMethodDef all[96];
  PyMethodDef *sets[] = {shm_methods, table_methods, record_methods, pool_methods, fence_methods, reap_methods, resv_methods, resv_lock_methods, access_methods, lend_methods};
  for (size_t k = 0; k < sizeof sets / sizeof *sets; k++)
    for (PyMethodDef *d = sets[k]; d->ml_name; d++) {
      if (n + 1 >= sizeof all / sizeof *all) { PyErr_SetString(PyExc_SystemError, "more methods of Shm than there is room for"); return -1; }
      all[n++] = *d;
    }
  PyType_Slot slots[] = {
      {Py_tp_doc, "A domain's file, mapped: bounded atomics, pools, fences and reservation locks."},
      {Py_tp_new, shm_new},           {Py_tp_dealloc, shm_dealloc}, {Py_tp_traverse, shm_traverse},
      {Py_tp_clear, shm_clear},       {Py_tp_methods, all},         {Py_tp_members, shm_members},
      {Py_tp_getset, shm_getset},     {0, NULL}};
  PyType_Spec spec = {"dmabuf._native.Shm", sizeof(Shm), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_BASETYPE, slots};
  Shm_Type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &spec, NULL);
  if (!Shm_Type || PyModule_AddFunctions(module, functions)) return -1;
  return PyModule_AddObjectRef(module, "Shm", (PyObject *)Shm_Type);
}
