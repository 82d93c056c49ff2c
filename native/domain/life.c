/* life.c - a life: a process's membership in a domain, which a lock proves, and which another process ends if the process dies.
 *
 * A life is a process slot, and the write lock on one byte of the file. The lock belongs to the description behind a page that forks don't
 * inherit, so the kernel drops it with the process's memory. The slot says ALIVE from just after the byte is locked until a reaper is done.
 *
 * The end of a life has two parts, each with the byte locked and without Python. Between them the byte is free, and what Python must do is
 * done: the sync files of the fences that ended become readable. The slot stays ALIVE meanwhile, so if the process dies there, the next
 * reaper does all of it again. A CLEAN slot therefore says that nothing is left, in the directory either. Callbacks of this process run at
 * the very end, when nothing is locked.
 *
 * The GIL is held while a byte is locked through a descriptor that is open, so no fork of Python's gives a child a share in the lock.
 */
#include "domain/life.h"
#include "domain/bytes.h"
#include "domain/fence.h"
#include "domain/reap.h"
#include "domain/step.h"
#include "domain/ticker.h"
#include "later.h"
#include <stdlib.h>
#include <unistd.h>

_Static_assert(offsetof(db_life, state) % 8 == 0 && offsetof(db_life, gen) == offsetof(db_life, state) + 4, "one word with the state");

/* ---- beginning ---- */

/* Lock the byte of a slot that is CLEAN. Its index; DB_LIVES: none is left; -1: errno. */
static int64_t lock_clean_slot(Shm *s, int own) {
  for (uint32_t i = 0; i < DB_LIVES; i++) {
    if (atomic_load(&life_at(s, i)->state) != LIFE_CLEAN) continue;
    int got = byte_lock(s, own, F_WRLCK, LIFE_BYTE + i);
    if (got < 0) return -1;
    if (!got) continue;
    if (atomic_load(&life_at(s, i)->state) == LIFE_CLEAN) return i;
    byte_lock(s, own, F_UNLCK, LIFE_BYTE + i);
  }
  return DB_LIVES;
}

static PyObject *life_begin(Shm *s, PyObject *args) {
  unsigned pid, uid;
  unsigned long long start, joined;
  const char *comm;
  Py_ssize_t n;
  if (!PyArg_ParseTuple(args, "IIKKy#", &pid, &uid, &start, &joined, &comm, &n)) return NULL;
  if (my_life(s)) {
    PyErr_SetString(PyExc_ValueError, "life_begin: this process has a life in the domain");
    return NULL;
  }
  int own = description_of(s);
  if (own < 0) return shm_lost(s, "join"), NULL;
  int64_t index = lock_clean_slot(s, own);
  if (index < 0 || index == DB_LIVES) {
    int error = errno;
    close(own);
    errno = error;
    if (index < 0) return shm_lost(s, "join"), NULL;
    shm_fail(s, ENOSPC, "join", "the domain", "it has as many processes as it can", "use a second domain (DMABUF_DOMAIN)");
    return NULL;
  }
  STEP_OF(life_locked, life_at(s, (uint32_t)index), 0); /* a locked byte of a CLEAN slot: the kernel frees it if this process dies */
  lock_hold hold;
  int fd = shm_file(s);
  if (fd < 0) {
    close(own);
    return shm_lost(s, "join"), NULL;
  }
  if (hold_keep(own, fd, LIFE_BYTE + index, &hold)) return PyErr_SetFromErrno(PyExc_OSError);
  db_life *l = life_at(s, (uint32_t)index);
  uint32_t gen = (atomic_load(&l->gen) + 1) & 0xfffffu;
  if (!gen) gen = 1;
  uint32_t id = LIFE_ID((uint32_t)index, gen);
  atomic_store(&l->gen, gen);
  atomic_store(&l->pid, pid);
  atomic_store(&l->uid, uid);
  atomic_store(&l->start, start | (hold.by_thread ? LIFE_BY_THREAD : 0));
  atomic_store(&l->joined, joined);
  memset(l->comm, 0, sizeof l->comm);
  memcpy(l->comm, comm, (size_t)n < sizeof l->comm ? (size_t)n : sizeof l->comm - 1);
  atomic_store(&l->chunk, 0);
  atomic_store(&l->doorbell, 0);
  atomic_store(&l->served, 0);
  /* Before ALIVE: nobody looks for dead lives in the slots behind it. */
  uint32_t high = atomic_load(&hdr(s)->life_high);
  while (high <= index && !atomic_compare_exchange_weak(&hdr(s)->life_high, &high, (uint32_t)index + 1)) {}
  atomic_store(&l->state, LIFE_ALIVE);
  STEP_OF(life_alive, l, id); /* ALIVE without a chunk: the reaper has nothing to end */
  int64_t chunk = chunk_claim_first(s, id);
  if (chunk < 0) { /* leave nothing: the slot is CLEAN, and then its byte is free */
    atomic_store(&l->state, LIFE_CLEAN);
    hold_drop(&hold);
    return NULL;
  }
  STEP_OF(life_chunk, l, id); /* the chunk names this life as its owner: the reaper returns it */
  atomic_store(&l->chunk, (uint32_t)chunk + 1);
  atomic_store(&s->own->here, 1);
  s->own->hold = hold;
  atomic_store(&s->own->life, id); /* last: from here on other threads use it */
  return PyLong_FromLongLong(chunk);
}

/* ---- ending ---- */

static void free_lists(endings *e) {
  free(e->local.handles);
  free(e->sync.handles);
}

/* What follows the end of fences, but not callbacks: remove(life), and sync files become readable. Nothing is locked. */
static void finish_outside(Shm *s, uint32_t life, PyObject *remove, endings *e) {
  PyObject *x = PyObject_CallFunction(remove, "I", life);
  if (!x) report_later(remove);
  Py_XDECREF(x);
  STEP_OF(reap_outside, life_slot(s, life), life); /* ALIVE: the next reaper does it again */
  for (uint32_t i = 0; i < e->sync.count; i++) {
    db_fence *f = fence_at(s, H_SLOT(e->sync.handles[i]));
    if (f) fence_wake_sync_files(s, e->sync.handles[i], f);
  }
}

static PyObject *life_leave(Shm *s, PyObject *remove) {
  uint32_t life = my_life(s);
  PyObject *local = PyList_New(0);
  if (!life || !local) return local;
  endings e = {.me = life};
  lock_hold hold = s->own->hold;
  db_life *l = life_slot(s, life);
  /* First: from here on no thread of this process begins anything in this life. A thread that is in the middle of something is inside a
   * wait, and looks at this when it wakes. */
  STEP_NOTE(life_leaving, l, life);
  atomic_store(&s->own->life, 0);
  s->own->hold.address = NULL;
  life_end(s, life, &e);
  atomic_fetch_add(&l->doorbell, (uint32_t)SLOT_MASK + 1); /* the dispatcher of this life sees that it is over */
  word_wake(&l->doorbell, INT32_MAX);
  finish_outside(s, life, remove, &e);
  life_clean(s, life); /* if a sync file can't be made readable now, the slot stays ALIVE, and the next reaper goes on */
  hold_drop(&hold);
  for (uint32_t i = 0; local && i < e.local.count; i++)
    if (list_add(local, PyLong_FromUnsignedLongLong(e.local.handles[i]))) Py_CLEAR(local);
  free_lists(&e);
  return local;
}

/* Lock a dead life's byte, through a description of the reaper's own, or the domain's if no descriptor is left. The descriptor, or -1: the
 * life is alive, or another process reaps it; errno is 0, or says what failed. */
static int lock_dead(Shm *s, uint32_t index) {
  int fd = description_of(s);
  if (fd < 0 && (errno == EMFILE || errno == ENFILE)) fd = s->fd;
  if (fd < 0) return -1;
  int got = byte_lock(s, fd, F_WRLCK, LIFE_BYTE + index), error = errno;
  if (got == 1) return fd;
  if (fd != s->fd) fd_close(fd, &s->id);
  errno = got ? error : 0;
  return -1;
}

static void unlock_dead(Shm *s, uint32_t index, int fd) {
  STEP_NOTE(reap_unlocking, life_at(s, index), 0);
  byte_lock(s, fd, F_UNLCK, LIFE_BYTE + index); /* closing would not be enough, as a raw fork may share the description */
  if (fd != s->fd) fd_close(fd, &s->id);
}

static int table_is_left(Shm *s) { return (atomic_load(&hdr(s)->table_lock) & ~TL_WAITERS) == TL_NOBODY; }

/* Nobody need wait for the next change of the table to have it whole. 0, or -1 with an exception set. */
static int mend_table(Shm *s) {
  if (!my_life(s) || !table_is_left(s)) return 0;
  if (table_lock(s)) return -1;
  table_unlock(s);
  return 0;
}

static PyObject *life_reap(Shm *s, PyObject *args) {
  unsigned life;
  PyObject *remove;
  if (!PyArg_ParseTuple(args, "IO", &life, &remove)) return NULL;
  uint32_t index = LIFE_INDEX(life);
  int fd = lock_dead(s, index);
  if (fd < 0 && errno) return shm_lost(s, "reap"), NULL;
  if (fd < 0) Py_RETURN_FALSE;
  STEP_OF(reap_locked, life_at(s, index), life);
  /* Only now: while the byte was free, another process may have reaped it, and a new one have taken the slot. */
  int current = life_current(s, life);
  endings e = {.me = my_life(s)};
  if (current) life_end(s, life, &e);
  unlock_dead(s, index, fd);
  if (!current) Py_RETURN_FALSE; /* another reaper was faster */
  finish_outside(s, life, remove, &e);
  int done = 0;
  fd = lock_dead(s, index);
  if (fd >= 0) {
    STEP_NOTE(reap_again, life_at(s, index), life);
    done = life_clean(s, life) == 1;
    unlock_dead(s, index, fd);
  }
  PyObject *error = mend_table(s) ? take_exception() : NULL;
  for (uint32_t i = 0; i < e.local.count; i++) fence_run_local(s, e.local.handles[i]);
  free_lists(&e);
  if (!error) return PyBool_FromLong(done);
  PyErr_SetObject((PyObject *)Py_TYPE(error), error);
  Py_DECREF(error);
  return NULL;
}

static PyObject *chunks_of(Shm *s, PyObject *arg) {
  uint32_t life;
  if (arg_u32(arg, &life)) return NULL;
  PyObject *out = PyList_New(0);
  for (uint32_t c = 0, n = chunk_count(s); out && c < n; c++) {
    uint64_t e = atomic_load(chunk_entry(s, c));
    if (CT_LIFE(e) == life && list_add(out, Py_BuildValue("II", c, CT_TYPE(e)))) Py_CLEAR(out);
  }
  return out;
}

PyMethodDef life_methods[] = {METHOD(life_begin, METH_VARARGS, "($self, pid, uid, start, joined, comm, /)",
                                     "Begin a life of this process, in a slot that is CLEAN. Return its first chunk."),
                              METHOD(life_leave, METH_O, "($self, remove, /)",
                                     "End this process's life as if the process had died.\n\n"
                                     "Args:\n"
                                     "    remove: remove(life) removes what the life left outside of the file.\n\n"
                                     "Returns:\n"
                                     "    The fences with callbacks in this process. The caller runs those when it holds no lock."),
                              METHOD(life_reap, METH_VARARGS, "($self, index, remove, /)",
                                     "End the dead life of a slot. Return False if it is alive, or another process reaps it."),
                              METHOD(chunks_of, METH_O, "($self, life, /)", "Return [(chunk, type)] of the chunks that a life owns."),
                              {0}};
