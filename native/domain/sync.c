/* sync.c - sync files: a descriptor that becomes readable when all fences of the sync file are signaled.
 *
 * The descriptor is a socket with a name (fds/pollable.h), so any process can make it readable: it needs neither the maker nor a file. A
 * sync file waits for one pending fence at a time, as the kernel does with chains. The fence's word has the mark FW_SYNC, and its sync word
 * says which sync file waits. The process that signals the fence, or the reaper of its owner, *advances* the sync file: it marks the next
 * pending fence, or makes the descriptor readable. It clears the fence's mark last.
 *
 * Several processes may advance a sync file at once, and one may have stopped in the middle until the slots are used for another. So each
 * store by a process other than the maker is a compare-and-swap from a value that no other use of the slot has, except for `at`, which is a
 * hint: before the descriptor is made readable, every fence is looked at. Once `waits` isn't 0, whoever finds its fence signaled advances
 * the sync file, so a death in the middle leaves something that any process can take up.
 *
 * The maker alone uses a slot again, and only when the name of its last use is free, which no process that has a descriptor can fake.
 */
#include "domain/sync.h"
#include "domain/fence.h"
#include "domain/step.h"
#include "domain/table.h"
#include "fds/fds.h"
#include "fds/pollable.h"
#include "later.h"
#include <stdio.h>
#include <unistd.h>

#define TEXT_BYTES         31
#define RESULT_OPEN(gen)   ((uint64_t)(gen) << 32)
#define RESULT_KNOWN       0x1000u
#define HEAD_OF(slot, gen) ((uint64_t)(gen) << 32 | ((slot) + 1))

static void name_of(Shm *s, uint32_t slot, uint32_t gen, pollable_name *n) {
  char text[64];
  int length = snprintf(text, sizeof text, "dmabuf/sync-%.16s-%08x%08x", hdr(s)->id, slot, gen);
  pollable_set(n, text, (size_t)length);
}

/* ---- the fences of a sync file ---- */

typedef struct {
  Shm *s;
  db_sync *f;
  uint32_t slot, gen, count;
} file;

/* One use of a slot. 0: it is being made, or the slot was never used. */
static int file_at(Shm *s, uint32_t slot, file *x) {
  db_sync *f = sync_at(s, slot);
  if (!f) return 0;
  *x = (file){s, f, slot, atomic_load(&f->gen), atomic_load(&f->count)};
  return x->count != 0;
}

static db_leaf *leaf_of(file *x, uint32_t slot_and_1) { /* NULL: not a fence of this sync file */
  db_leaf *l = slot_and_1 ? leaf_at(x->s, slot_and_1 - 1) : NULL;
  return l && atomic_load(&l->head) == HEAD_OF(x->slot, x->gen) ? l : NULL;
}

/* Is the fence signaled? Note how, while its slot still says so. */
static int leaf_ended(Shm *s, db_leaf *l) {
  uint32_t gen = atomic_load(&l->gen);
  uint64_t h = atomic_load(&l->handle), open = RESULT_OPEN(gen), none = STAMP_NONE(gen), stamp;
  if (atomic_load(&l->result) != open) return 1;
  for (;;) {
    db_fence *f, *again;
    if (fence_pending(s, h, &f)) return 0;
    int error = f ? END_ERROR(atomic_load(&f->end)) : fence_past_error(s, h, atomic_load(&l->timeline), atomic_load(&l->seqno));
    stamp = f ? fence_stamp(f, h) : 0;
    fence_pending(s, h, &again);
    if (f && !again) continue; /* its slot was used again during the reading */
    if (stamp) atomic_compare_exchange_strong(&l->timestamp, &none, stamp);
    atomic_compare_exchange_strong(&l->result, &open, open | RESULT_KNOWN | (uint32_t)-error);
    return 1;
  }
}

/* Look for a pending fence from one on to the last. 1: *found; 0: none; -EUCLEAN: the fences make no sense. */
static int pending_from(file *x, uint32_t first, uint32_t *found, uint64_t *handle) {
  uint32_t seen = 0, last = 0;
  for (uint32_t v = first; v && seen < x->count; seen++) {
    db_leaf *l = leaf_of(x, v);
    if (!l) return -EUCLEAN;
    if (!leaf_ended(x->s, l)) {
      *found = v;
      *handle = atomic_load(&l->handle);
      return 1;
    }
    last = atomic_load(&l->index);
    v = atomic_load(&l->next);
  }
  return last + 1 == x->count ? 0 : -EUCLEAN;
}

static int next_pending(file *x, uint32_t *found, uint64_t *handle) {
  uint32_t at = atomic_load(&x->f->at), first = atomic_load(&x->f->first);
  int r = leaf_of(x, at) ? pending_from(x, at, found, handle) : 0;
  return r == 1 || at == first ? r : pending_from(x, first, found, handle);
}

/* ---- advancing ---- */

/* All fences are signaled. 0 or -errno. */
static int finish(file *x, uint64_t waits) {
  STEP(sync_done); /* the results are there */
  pollable_name n;
  name_of(x->s, x->slot, x->gen, &n);
  int r = pollable_wake(&n, atomic_load(&x->f->net));
  if (r == -EREMOTE) return 0; /* a process of that network namespace does it: one that has the SyncFile, or the next that sweeps */
  if (r < 0) return r;
  STEP(sync_readable); /* readable, unless no process has it; it is done again */
  if (waits) atomic_compare_exchange_strong(&x->f->waits, &waits, 0);
  STEP(sync_over);
  return 0;
}

/* Say in the fence that a sync file waits for it. */
static void leave_hint(db_fence *f, uint64_t handle, uint32_t slot) {
  uint64_t gen = H_GEN(handle), v = atomic_load(&f->sync), new;
  do {
    if (v >> 24 > gen || (v >> 24 == gen && ((v & SYNC_MANY) == SYNC_MANY || (v & SYNC_MANY) == slot + 1))) return;
    new = gen << 24 | (v >> 24 == gen ? SYNC_MANY : slot + 1);
  } while (!atomic_compare_exchange_weak(&f->sync, &v, new));
}

/* maker: the slot says nothing yet. 0 or -errno. */
static int advance(Shm *s, uint32_t slot, int maker) {
  file x;
  if (!file_at(s, slot, &x)) return 0;
  for (;;) {
    uint64_t waits = atomic_load(&x.f->waits), h;
    uint32_t at;
    if ((!waits && !maker) || atomic_load(&x.f->gen) != x.gen) return 0;
    int r = next_pending(&x, &at, &h);
    if (r <= 0) return finish(&x, waits); /* of nonsense too: somebody looks at the fences then, and from_fd() says what is wrong */
    if (h != waits) {
      if (!atomic_compare_exchange_strong(&x.f->waits, &waits, h)) continue;
      atomic_store(&x.f->at, at);
      if (maker)
        STEP(sync_registered); /* no other process has the descriptor yet */
      else
        STEP(sync_moved); /* the fence before is signaled and still marked: its signaler's reaper advances it again */
      maker = 0;
    }
    db_fence *f;
    if (!fence_pending(s, h, &f)) continue;
    STEP(fence_marking);
    leave_hint(f, h, slot);
    fence_flag(h, f, FW_SYNC); /* in the fence's own word: its signaler sees the mark, or this process sees that it is signaled */
    STEP(sync_marked);
    if (fence_pending(s, h, NULL)) return 0;
  }
}

/* Advance every sync file that waits for a fence; rearm: those whose fence is pending too. */
static int advance_all(Shm *s, int rearm, int ended) {
  int result = 0;
  for (uint32_t c = 0, n = chunk_count(s); c < n; c++) {
    if (CT_TYPE(atomic_load(chunk_entry(s, c))) != CH_SYNC) continue;
    for (uint32_t i = c * SYNC_PER; i < (c + 1) * SYNC_PER; i++) {
      file x;
      uint64_t waits = file_at(s, i, &x) ? atomic_load(&x.f->waits) : 0;
      if (!waits || (!rearm && fence_pending(s, waits, NULL))) continue;
      int r = ended ? finish(&x, waits) : advance(s, i, 0);
      if (r < 0) result = r;
    }
  }
  return result;
}

int sync_wake_all(Shm *s, int ended) { return advance_all(s, 1, ended); }

int sync_wake(Shm *s, uint64_t handle, db_fence *f) {
  uint64_t v = atomic_load(&f->sync);
  if (v >> 24 != H_GEN(handle) || (v & SYNC_MANY) == SYNC_MANY) return advance_all(s, 0, 0);
  return v & SYNC_MANY ? advance(s, (uint32_t)(v & SYNC_MANY) - 1, 0) : 0;
}

void fence_wake_sync_files(Shm *s, uint64_t handle, db_fence *f) {
  if (s->ending) { /* the end of a life, with its byte locked: this follows when it is free */
    list_handle(&s->ending->sync, handle);
    return;
  }
  if (sync_wake(s, handle, f) >= 0) { /* while the bit is set, the process that reaps the slot wakes them again */
    uint32_t w = atomic_load(&f->word);
    while (FW_GEN(w) == WORD_OF(H_GEN(handle)) && (w & FW_SYNC) && !atomic_compare_exchange_weak(&f->word, &w, w & ~FW_SYNC)) {}
    return;
  }
  PyObject *call = Py_XNewRef(s->on_sync); /* another thread may replace it during the call */
  if (call) call_hook(call, handle);
  Py_XDECREF(call);
}

void sync_note_results(Shm *s) {
  for (uint32_t c = 0, n = chunk_count(s); c < n; c++) {
    if (CT_TYPE(atomic_load(chunk_entry(s, c))) != CH_LEAF) continue;
    for (uint32_t i = c * SYNC_PER; i < (c + 1) * SYNC_PER; i++) {
      db_leaf *l = leaf_at(s, i);
      if (l && atomic_load(&l->head)) leaf_ended(s, l);
    }
  }
}

/* ---- slots ---- */

static int file_exists(Shm *s, uint32_t slot, uint32_t gen) { /* Does a process have the descriptor? 1 if that can't be known */
  db_sync *f = sync_at(s, slot);
  if (!f || !gen || atomic_load(&f->gen) != gen) return 0;
  pollable_name n;
  name_of(s, slot, gen, &n);
  return pollable_exists(&n, atomic_load(&f->net)) != 0;
}

typedef struct {
  uint64_t head;
  int exists;
} known; /* what is known of the sync file of the last fence */

static int slot_in_use(Shm *s, uint32_t type, uint32_t slot, known *last) {
  if (type == CH_SYNC) {
    db_sync *f = sync_at(s, slot);
    return !f || file_exists(s, slot, atomic_load(&f->gen));
  }
  db_leaf *l = leaf_at(s, slot);
  uint64_t head = l ? atomic_load(&l->head) : 0;
  if (!head) return !l;
  if (head != last->head) *last = (known){head, file_exists(s, (uint32_t)head - 1, (uint32_t)(head >> 32))};
  return last->exists;
}

int sync_chunk_unused(Shm *s, uint32_t chunk) {
  known last = {0};
  uint32_t type = CT_TYPE(atomic_load(chunk_entry(s, chunk)));
  for (uint32_t i = 0; i < SYNC_PER; i++)
    if (slot_in_use(s, type, chunk * SYNC_PER + i, &last)) return 0;
  return 1;
}

static PyObject *sync_slots(Shm *s, PyObject *arg) {
  uint32_t c;
  known last = {0};
  if (arg_u32(arg, &c)) return NULL;
  uint32_t type = c < DB_MAX_CHUNKS ? CT_TYPE(atomic_load(chunk_entry(s, c))) : CH_NONE;
  PyObject *out = type == CH_SYNC || type == CH_LEAF ? PyList_New(0) : (shm_corrupt(s, "a chunk lies outside of it"), NULL);
  for (uint32_t i = c * SYNC_PER; out && i < (c + 1) * SYNC_PER; i++)
    if (!slot_in_use(s, type, i, &last) && list_add(out, PyLong_FromUnsignedLong(i))) Py_CLEAR(out);
  return out;
}

static PyObject *sync_exists(Shm *s, PyObject *args) {
  unsigned slot, gen;
  if (!PyArg_ParseTuple(args, "II", &slot, &gen)) return NULL;
  return PyBool_FromLong(file_exists(s, slot, gen));
}

/* ---- making one ---- */

static int is_mine(Shm *s, uint32_t slot, uint32_t type) {
  uint64_t e = slot / SYNC_PER < DB_MAX_CHUNKS ? atomic_load(chunk_entry(s, slot / SYNC_PER)) : 0;
  return CT_TYPE(e) == type && CT_LIFE(e) == my_life(s) && my_life(s);
}

static void set_text(char to[TEXT_BYTES + 1], const char *from, Py_ssize_t n) {
  memset(to, 0, TEXT_BYTES + 1);
  memcpy(to, from, n > TEXT_BYTES ? TEXT_BYTES : (size_t)n);
}

/* Write one fence of a sync file that is being made. 0, or -1 with an exception set. */
static int fill_leaf(Shm *s, uint32_t head, uint32_t head_gen, PyObject *slots, Py_ssize_t i, PyObject *leaf) {
  unsigned long long handle, context, seqno, stamp;
  unsigned timeline;
  int status;
  const char *driver, *name;
  Py_ssize_t ndriver, nname;
  if (!PyArg_ParseTuple(leaf, "KKKIiKy#y#", &handle, &context, &seqno, &timeline, &status, &stamp, &driver, &ndriver, &name, &nname))
    return -1;
  uint32_t slot, next = 0;
  if (arg_u32(PyTuple_GET_ITEM(slots, i), &slot) || (i + 1 < PyTuple_GET_SIZE(slots) && arg_u32(PyTuple_GET_ITEM(slots, i + 1), &next)))
    return -1;
  db_leaf *l = is_mine(s, slot, CH_LEAF) ? leaf_at(s, slot) : NULL;
  if (!l) return shm_corrupt(s, "a fence of a sync file lies outside of it");
  uint32_t gen = atomic_load(&l->gen) + 1;
  atomic_store(&l->head, 0); /* of no sync file, until all of it is written */
  atomic_store(&l->gen, gen);
  bytes_follow();
  set_text(l->driver, driver, ndriver);
  set_text(l->name, name, nname);
  atomic_store(&l->handle, handle);
  atomic_store(&l->context, context);
  atomic_store(&l->seqno, seqno);
  atomic_store(&l->timeline, timeline);
  atomic_store(&l->index, (uint32_t)i);
  atomic_store(&l->next, i + 1 < PyTuple_GET_SIZE(slots) ? next + 1 : 0);
  atomic_store(&l->timestamp, stamp ? stamp : STAMP_NONE(gen));
  atomic_store(&l->result, RESULT_OPEN(gen) | (status ? RESULT_KNOWN | (uint32_t)(status < 0 ? -status & 0xfff : 0) : 0));
  atomic_store(&l->head, HEAD_OF(head, head_gen));
  return 0;
}

/* The descriptor belongs to no other process until this returns, so a death at any step leaves slots that are free, as no name is taken. */
static PyObject *sync_make(Shm *s, PyObject *args) {
  unsigned slot;
  PyObject *slots, *leaves, *made = NULL;
  const char *name;
  Py_ssize_t nname;
  if (!PyArg_ParseTuple(args, "IO!y#O!", &slot, &PyTuple_Type, &slots, &name, &nname, &PyTuple_Type, &leaves)) return NULL;
  Py_ssize_t count = PyTuple_GET_SIZE(slots);
  if (!count || PyTuple_GET_SIZE(leaves) != count) {
    PyErr_SetString(PyExc_ValueError, "sync_make: a sync file has one slot for each fence, and at least one fence");
    return NULL;
  }
  db_sync *f = is_mine(s, slot, CH_SYNC) ? sync_at(s, slot) : NULL;
  if (!f) {
    shm_corrupt(s, "a sync file lies outside of it");
    return NULL;
  }
  uint32_t gen = atomic_load(&f->gen) + 1, first;
  if (arg_u32(PyTuple_GET_ITEM(slots, 0), &first)) return NULL;
  if (!gen) gen = 1;
  atomic_store(&f->count, 0); /* from here on nobody advances it */
  atomic_store(&f->waits, 0);
  atomic_store(&f->gen, gen);
  pollable_name n;
  name_of(s, slot, gen, &n);
  int fd = pollable_bind(&n), r = fd;
  atomic_store(&f->net, fd < 0 ? 0 : pollable_net(fd));
  STEP(sync_bound); /* a name that ends with this process */
  for (Py_ssize_t i = 0; r >= 0 && i < count; i++)
    if (fill_leaf(s, slot, gen, slots, i, PyTuple_GET_ITEM(leaves, i))) goto out;
  if (r >= 0) {
    set_text(f->name, name, nname);
    atomic_store(&f->first, first + 1);
    atomic_store(&f->at, first + 1);
    atomic_store(&f->count, (uint32_t)count);
    STEP(sync_written); /* the same */
    r = pollable_listen(fd);
  }
  if (r >= 0) r = advance(s, slot, 1);
  if (r >= 0) {
    PyObject *own = owned_fd(fd, 0);
    fd = -1;
    made = own ? Py_BuildValue("NI", own, gen) : NULL;
  } else {
    errno = -r;
    PyErr_SetFromErrno(PyExc_OSError);
  }
out:
  if (fd >= 0) close(fd);
  return made;
}

/* ---- looking one up ---- */

static PyObject *leaf_item(Shm *s, db_leaf *l) {
  char driver[TEXT_BYTES + 1], name[TEXT_BYTES + 1];
  uint32_t gen = atomic_load(&l->gen);
  leaf_ended(s, l);
  uint64_t result = atomic_load(&l->result), stamp = atomic_load(&l->timestamp);
  memcpy(driver, l->driver, sizeof driver);
  memcpy(name, l->name, sizeof name);
  bytes_read();
  int known = result != RESULT_OPEN(gen);
  return Py_BuildValue("KKKIiKy#y#", atomic_load(&l->handle), atomic_load(&l->context), atomic_load(&l->seqno), atomic_load(&l->timeline),
                       !known              ? 0
                       : END_ERROR(result) ? END_ERROR(result)
                                           : 1,
                       known && !(stamp >> 63) ? stamp : 0, driver, (Py_ssize_t)strnlen(driver, TEXT_BYTES), name,
                       (Py_ssize_t)strnlen(name, TEXT_BYTES));
}

static PyObject *sync_info(Shm *s, PyObject *args) {
  unsigned slot, gen;
  if (!PyArg_ParseTuple(args, "II", &slot, &gen)) return NULL;
  file x;
  char text[TEXT_BYTES + 1];
  if (!file_at(s, slot, &x) || x.gen != gen) Py_RETURN_NONE;
  memcpy(text, x.f->name, sizeof text);
  bytes_read();
  PyObject *out = PyList_New(0);
  uint32_t seen = 0;
  for (uint32_t v = atomic_load(&x.f->first); out && v && seen < x.count; seen++) {
    db_leaf *l = leaf_of(&x, v);
    if (!l || atomic_load(&l->index) != seen) break;
    if (list_add(out, leaf_item(s, l))) Py_CLEAR(out);
    v = atomic_load(&l->next);
  }
  if (out && atomic_load(&x.f->gen) != gen) { /* the caller's descriptor is not of this sync file, whatever its name says */
    Py_DECREF(out);
    Py_RETURN_NONE;
  }
  if (out && seen != x.count) {
    Py_CLEAR(out);
    shm_corrupt(s, "a sync file lacks its fences");
  }
  return out ? Py_BuildValue("y#N", text, (Py_ssize_t)strnlen(text, TEXT_BYTES), out) : NULL;
}

static PyObject *sync_advance(Shm *s, PyObject *args) {
  unsigned slot, gen;
  if (!PyArg_ParseTuple(args, "II", &slot, &gen)) return NULL;
  file x;
  return PyBool_FromLong(!file_at(s, slot, &x) || x.gen != gen || advance(s, slot, 0) >= 0);
}

static PyObject *py_sync_wake(Shm *s, PyObject *arg) {
  uint64_t h;
  if (arg_u64(arg, &h)) return NULL;
  db_fence *f;
  return PyBool_FromLong(fence_pending(s, h, &f) || (f ? sync_wake(s, h, f) : advance_all(s, 0, 0)) >= 0);
}

static PyObject *py_sync_wake_all(Shm *s, PyObject *arg) {
  int ended = PyObject_IsTrue(arg);
  return ended < 0 ? NULL : PyBool_FromLong(sync_wake_all(s, ended) >= 0);
}

static PyObject *sync_wake_missed(Shm *s, PyObject *unused) { return PyBool_FromLong(advance_all(s, 0, 0) >= 0); }

static PyObject *sync_count(Shm *s, PyObject *unused) {
  unsigned long found = 0;
  for (uint32_t c = 0, n = chunk_count(s); c < n; c++)
    for (uint32_t i = 0; CT_TYPE(atomic_load(chunk_entry(s, c))) == CH_SYNC && i < SYNC_PER; i++) {
      file x;
      found += file_at(s, c * SYNC_PER + i, &x) && file_exists(s, x.slot, x.gen);
    }
  return PyLong_FromUnsignedLong(found);
}

PyMethodDef sync_methods[] = {
    METHOD(sync_make, METH_VARARGS, "($self, slot, slots, name, leaves, /)",
           "Make the descriptor of a sync file. Return (OwnedFd, generation of the slot).\n\n"
           "Args:\n"
           "    slot: A free slot of this life for it.\n"
           "    slots: One for each fence.\n"
           "    leaves: Of each fence (handle, context, seqno, timeline, status, timestamp, driver, name)."),
    METHOD(sync_slots, METH_O, "($self, chunk, /)", "Return the slots of a chunk of this life that are not in use."),
    METHOD(sync_exists, METH_VARARGS, "($self, slot, gen, /)", "Return True if a process has the descriptor of a sync file."),
    METHOD(sync_info, METH_VARARGS, "($self, slot, gen, /)",
           "Return (name, leaves) of a sync file, for one who has its descriptor; None: the domain began again since."),
    METHOD(sync_advance, METH_VARARGS, "($self, slot, gen, /)",
           "Do for a sync file what the signaler of its last fence may have died before it did. Return False to be called again."),
    {"sync_wake", (PyCFunction)py_sync_wake, METH_O,
     "sync_wake($self, handle, /)\n--\n\nAdvance the sync files that wait for a signaled fence. Return False to be called again."},
    {"sync_wake_all", (PyCFunction)py_sync_wake_all, METH_O,
     "sync_wake_all($self, ended, /)\n--\n\nAdvance all sync files; ended: every fence is signaled. Return False to be called again."},
    METHOD(sync_wake_missed, METH_NOARGS, "($self, /)",
           "Advance the sync files that wait for a fence which has ended, as after one that was signaled from another network namespace.\n"
           "Return False to be called again."),
    METHOD(sync_count, METH_NOARGS, "($self, /)",
           "Return how many sync files some process has the descriptor of. Asks the kernel for each."),
    {0}};
