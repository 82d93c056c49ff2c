/* resv.c - the list of fences of a reservation object.
 *
 * The list is an array of words, each a fence and its usage, and a 0 ends it. Adding is one store, and so is replacing. The entry of a
 * signaled fence stays until an entry overwrites it or it is cut off at the end. The list never has a hole and no entry ever moves, so a
 * reader without the lock can't miss a pending fence.
 */
#include "domain/resv.h"
#include "domain/fence.h"
#include "domain/resv_lock.h"
#include "domain/sleep.h"
#include "domain/step.h"

#define ENTRIES_MAX (1u << 22)

/* ---- reading ---- */

a64 *entry_in_block(cursor *c, uint32_t i) {
  i %= BLOCK_ENTRIES;
  if (!i) {
    db_block *b = c->blocks ? block_at(c->s, c->block - 1) : NULL;
    c->block = c->blocks ? (b ? atomic_load(&b->next) : 0) : atomic_load(&c->r->block);
    if (++c->blocks > c->s->known * BLOCKS_PER) c->block = 0; /* more blocks than there are: the file has a circle */
  }
  db_block *b = c->block ? block_at(c->s, c->block - 1) : NULL;
  if (!b || atomic_load(&b->owner) != c->rec + 1) return NULL;
  return &b->entry[i];
}

/* Read an entry, and whether its fence is pending. Read it again if it was replaced meanwhile: the new fence was there before the old one
 * was signaled, so even without the lock there is no instant at which neither is seen. */
static uint64_t entry_read(Shm *s, a64 *p, int *pending) {
  uint64_t e = atomic_load(p);
  *pending = 0;
  for (int k = 0; e && !(*pending = fence_pending(s, E_HANDLE(e), NULL)) && k < 64; k++) {
    uint64_t now = atomic_load(p);
    if (now == e) break;
    e = now;
  }
  return e;
}

static uint64_t first_pending(Shm *s, db_resv *r, uint32_t rec, uint32_t usage) {
  cursor c = cursor_of(s, r, rec);
  for (a64 *p; (p = entry_next(&c));) {
    int pending;
    uint64_t e = entry_read(s, p, &pending);
    if (!e) break;
    if (E_USAGE(e) <= usage && pending) return E_HANDLE(e);
  }
  return 0;
}

static PyObject *resv_entries(Shm *s, PyObject *args) {
  unsigned rec, usage;
  int pending_only;
  if (!PyArg_ParseTuple(args, "IIp", &rec, &usage, &pending_only)) return NULL;
  db_resv *r = resv_of(s, rec);
  if (r && pending_only && first_pending(s, r, rec, usage) && shm_notice_deaths(s) < 0) return NULL;
  PyObject *out = r ? PyList_New(0) : NULL;
  cursor c = cursor_of(s, r, rec);
  for (a64 *p; out && (p = entry_next(&c));) {
    int pending;
    uint64_t e = entry_read(s, p, &pending);
    if (!e) break;
    if (E_USAGE(e) > usage || (pending_only && !pending)) continue;
    if (list_add(out, Py_BuildValue("KI", (unsigned long long)E_HANDLE(e), E_USAGE(e)))) Py_CLEAR(out);
  }
  return out;
}

static PyObject *resv_pending(Shm *s, PyObject *args) {
  unsigned rec, usage;
  unsigned long long but;
  if (!PyArg_ParseTuple(args, "IIK", &rec, &usage, &but)) return NULL;
  db_resv *r = resv_of(s, rec);
  if (r && first_pending(s, r, rec, usage) && shm_notice_deaths(s) < 0) return NULL;
  PyObject *out = r ? PyList_New(0) : NULL;
  cursor c = cursor_of(s, r, rec);
  for (a64 *p; out && (p = entry_next(&c));) {
    int pending;
    uint64_t e = entry_read(s, p, &pending);
    if (!e) break;
    if (E_USAGE(e) > usage || E_HANDLE(e) == but || !pending) continue;
    if (list_add(out, PyLong_FromUnsignedLongLong(E_HANDLE(e)))) Py_CLEAR(out);
  }
  return out;
}

static PyObject *resv_busy(Shm *s, PyObject *args) {
  unsigned rec, usage;
  if (!PyArg_ParseTuple(args, "II", &rec, &usage)) return NULL;
  db_resv *r = resv_of(s, rec);
  if (!r) return NULL;
  uint64_t h = first_pending(s, r, rec, usage);
  if (h) {
    int k = shm_notice_deaths(s);
    if (k < 0) return NULL;
    if (k) h = first_pending(s, r, rec, usage);
  }
  return PyLong_FromUnsignedLongLong(h);
}

/* ---- changing, with the lock ---- */

static int entries_grow(Shm *s, db_resv *r, uint32_t rec, uint32_t cap,
                        uint32_t n) { /* Have room for n more than cap. 0, -errno, RAISED. */
  a32 *link = &r->block;
  for (uint32_t k = 0; atomic_load(link) && k < s->known * BLOCKS_PER; k++) {
    db_block *b = block_at(s, atomic_load(link) - 1);
    if (!b || atomic_load(&b->owner) != rec + 1) {
      atomic_store(link, 0); /* not a block of this record: the list ends here */
      break;
    }
    link = &b->next;
  }
  uint32_t more = (n + BLOCK_ENTRIES - 1) / BLOCK_ENTRIES;
  if ((uint64_t)more * BLOCK_ENTRIES + cap > ENTRIES_MAX) return -ENOMEM;
  return blocks_add(s, rec, link, more) ? RAISED : 0;
}

int entries_reserve(Shm *s, db_resv *r, uint32_t rec, uint32_t n) {
  cursor c = cursor_of(s, r, rec);
  uint32_t room = 0, cap = 0, used = 0;
  a64 *tail[16];
  for (a64 *p; (p = entry_next(&c)); cap++) {
    uint64_t e = atomic_load(p);
    if (!e || !fence_pending(s, E_HANDLE(e), NULL)) room++;
    if (e) {
      tail[used & 15] = p;
      used++;
    }
  }
  if (used > INLINE_ENTRIES) /* a list that has grown long shrinks a little each time, from its end */
    for (uint32_t k = 0; k < 16; k++) {
      a64 *p = tail[(used - 1 - k) & 15];
      if (fence_pending(s, E_HANDLE(atomic_load(p)), NULL)) break;
      atomic_store(p, 0);
    }
  return room >= n ? 0 : entries_grow(s, r, rec, cap, n - room);
}

/* Is a, whose number is seqno, later than b of the same context? See semantics 3.10. */
static int is_later(db_fence *a, uint64_t seqno, db_fence *b) {
  uint64_t other = atomic_load(&b->seqno);
  return atomic_load(&a->flags) & FF_SEQNO64 ? seqno > other : (int32_t)((uint32_t)seqno - (uint32_t)other) > 0;
}

static void entry_store(a64 *p, uint64_t handle, db_fence *f, uint32_t usage) {
  if (f) fence_flag(handle, f, FW_SHARED);
  atomic_store(p, E_MAKE(handle, usage));
}

int entries_add(Shm *s, db_resv *r, uint32_t rec, uint64_t handle, uint32_t usage, long room) {
  db_fence *f;
  fence_pending(s, handle, &f);
  uint64_t context = f ? atomic_load(&f->context) : 0, seqno = f ? atomic_load(&f->seqno) : 0;
  cursor c = cursor_of(s, r, rec);
  for (a64 *p; (p = entry_next(&c));) {
    uint64_t e = atomic_load(p);
    if (!e && !room) return -1;
    db_fence *o;
    if (!e || !fence_pending(s, E_HANDLE(e), &o) ||
        (f && o && atomic_load(&o->context) == context && E_USAGE(e) >= usage && (E_HANDLE(e) == handle || is_later(f, seqno, o)))) {
      entry_store(p, handle, f, usage);
      STEP(resv_added); /* added: each entry is complete at every instant */
      return !e;
    }
  }
  return -1;
}

static PyObject *resv_reserve(Shm *s, PyObject *args) {
  unsigned rec, n;
  if (!PyArg_ParseTuple(args, "II", &rec, &n)) return NULL;
  db_resv *r = resv_of(s, rec);
  if (!r) return NULL;
  int result = entries_reserve(s, r, rec, n);
  return result == RAISED ? NULL : PyLong_FromLong(result);
}

static PyObject *resv_add(Shm *s, PyObject *args) {
  unsigned rec, usage;
  unsigned long long handle;
  long room;
  if (!PyArg_ParseTuple(args, "IKIl", &rec, &handle, &usage, &room)) return NULL;
  db_resv *r = resv_of(s, rec);
  if (!r) return NULL;
  if (usage > 3) {
    PyErr_SetString(PyExc_ValueError, "resv_add: a usage must be 0 to 3");
    return NULL;
  }
  return PyLong_FromLong(entries_add(s, r, rec, handle, usage, room));
}

/* The pending entries of a list, to be freed by the caller. 0, or RAISED. */
static int pending_entries(Shm *s, db_resv *r, uint32_t rec, uint64_t **entries, uint32_t *count) {
  uint32_t room = 0;
  cursor c = cursor_of(s, r, rec);
  for (a64 *p; (p = entry_next(&c));) {
    uint64_t e = atomic_load(p);
    if (!e) break;
    if (!fence_pending(s, E_HANDLE(e), NULL)) continue;
    if (*count == room) {
      uint64_t *bigger = PyMem_Realloc(*entries, (room += 64 + room) * sizeof *bigger);
      if (!bigger) {
        PyErr_NoMemory();
        return RAISED;
      }
      *entries = bigger;
    }
    (*entries)[(*count)++] = e;
  }
  return 0;
}

/* Append the new entries, then write them over the old ones from the front, then cut the list at its end, one entry at a time. At every
 * instant, and so after a death at any, the list holds all of the new ones and perhaps some of the old, without a hole. */
static PyObject *resv_copy(Shm *s, PyObject *args) {
  unsigned rec, source;
  if (!PyArg_ParseTuple(args, "II", &rec, &source)) return NULL;
  db_resv *r = resv_of(s, rec), *from = resv_of(s, source);
  if (!r || !from) return NULL;
  uint32_t n = 0, used = 0, cap = 0, ended = 0;
  uint64_t *new = NULL;
  a64 **at = NULL;
  int result = pending_entries(s, from, source, &new, &n);
  if (result) goto out;
  cursor c = cursor_of(s, r, rec);
  for (a64 *p; (p = entry_next(&c)); cap++) used += !(ended |= !atomic_load(p));
  if (cap - used < n && (result = entries_grow(s, r, rec, cap, n - (cap - used)))) goto out;
  at = PyMem_Malloc((used + n + 1) * sizeof *at);
  if (!at) {
    PyErr_NoMemory();
    result = RAISED;
    goto out;
  }
  c = cursor_of(s, r, rec);
  for (uint32_t i = 0; i < used + n; i++)
    if (!(at[i] = entry_next(&c))) {
      shm_corrupt(s, "a list of fences lacks its blocks");
      result = RAISED;
      goto out;
    }
  for (uint32_t i = 0; i < n; i++) {
    atomic_store(at[used + i], new[i]);
    STEP(resv_copied); /* the old ones, and some of the new */
  }
  for (uint32_t i = 0; i < n; i++) {
    atomic_store(at[i], new[i]);
    STEP(resv_copied); /* all of the new ones, some of them twice, and some of the old */
  }
  for (uint32_t i = used + n; i > n; i--) {
    atomic_store(at[i - 1], 0);
    STEP(resv_cut); /* all of the new ones, and behind them some that are signaled, old, or there twice */
  }
out:
  PyMem_Free(at);
  PyMem_Free(new);
  return result == RAISED ? NULL : PyLong_FromLong(result);
}

static PyObject *resv_replace(Shm *s, PyObject *args) {
  unsigned rec, usage;
  unsigned long long context, handle;
  if (!PyArg_ParseTuple(args, "IKKI", &rec, &context, &handle, &usage)) return NULL;
  db_resv *r = resv_of(s, rec);
  if (!r) return NULL;
  db_fence *f;
  fence_pending(s, handle, &f);
  cursor c = cursor_of(s, r, rec);
  unsigned n = 0;
  for (a64 *p; (p = entry_next(&c));) {
    uint64_t e = atomic_load(p);
    if (!e) break;
    db_fence *o;
    fence_pending(s, E_HANDLE(e), &o);
    if (!o || atomic_load(&o->context) != context) continue;
    entry_store(p, handle, f, usage & 3);
    n++;
  }
  return PyLong_FromUnsignedLong(n);
}

PyMethodDef resv_methods[] = {
    METHOD(resv_entries, METH_VARARGS, "($self, rec, usage, pending_only, /)", "Return [(handle, usage)] of the entries up to a usage."),
    METHOD(resv_pending, METH_VARARGS, "($self, rec, usage, but, /)", "Return the pending handles up to a usage, except one."),
    METHOD(resv_busy, METH_VARARGS, "($self, rec, usage, /)", "Return a pending handle up to a usage, 0: none."),
    METHOD(resv_reserve, METH_VARARGS, "($self, rec, n, /)", "With the lock: have room for n more entries. Return 0 or -errno."),
    METHOD(resv_add, METH_VARARGS, "($self, rec, handle, usage, room, /)",
           "With the lock: add a fence. Return 1 if it took room, 0 if it replaced another one, -1 if there is no room."),
    METHOD(resv_copy, METH_VARARGS, "($self, rec, source, /)",
           "With the lock of rec: let it have the pending fences of source, instead of its own. Return 0 or -errno."),
    METHOD(resv_replace, METH_VARARGS, "($self, rec, context, handle, usage, /)",
           "With the lock: let a fence replace every entry of a fence context. Return how many there were."),
    {0}};
