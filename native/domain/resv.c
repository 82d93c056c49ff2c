/* resv.c - the reservation object's list of fences.
 *
 * The list is an array of words, each a fence and its usage; a 0 ends it. Adding is one store, replacing is one store.
 * Entries of signalled fences stay until a later add overwrites them or they are trimmed from the end, so a reader without
 * the lock can never miss a pending fence. */
#include "domain/resv.h"
#include "domain/fence.h"
#include "domain/resv_lock.h"
#include "domain/sleep.h"
#include "domain/step.h"

a64 *entry_in_block(cursor *c, uint32_t i) {
  i %= BLOCK_ENTRIES;
  if (!i) {
    db_block *b = c->blocks ? block_at(c->s, c->block - 1) : NULL;
    c->block = c->blocks ? (b ? atomic_load(&b->next) : 0) : atomic_load(&c->r->block);
    if (++c->blocks > c->s->known * BLOCKS_PER) c->block = 0; /* more than there are: a circle */
  }
  db_block *b = c->block ? block_at(c->s, c->block - 1) : NULL;
  if (!b || atomic_load(&b->owner) != c->rec + 1) return NULL;
  return &b->entry[i];
}

/* An entry and whether its fence is pending. One that is replaced while we look is looked at again: the new fence was there before the
 * old one ended, so without the lock, too, there is no instant at which neither is seen. */
static uint64_t entry_look(Shm *s, a64 *p, int *pending) {
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
  cursor c = {s, r, 0, 0, 0, rec};
  for (a64 *p; (p = entry_next(&c));) {
    int pending;
    uint64_t e = entry_look(s, p, &pending);
    if (!e) break;
    if (E_USAGE(e) <= usage && pending) return E_HANDLE(e);
  }
  return 0;
}

static PyObject *resv_entries(Shm *s, PyObject *args) { /* (rec, usage, pending_only) -> [handle, usage, ...] flat pairs */
  unsigned rec, usage;
  int pending;
  if (!PyArg_ParseTuple(args, "IIp", &rec, &usage, &pending)) return NULL;
  db_resv *r = resv_of(s, rec);
  if (r && pending && first_pending(s, r, rec, usage) && shm_polled(s) < 0) return NULL;
  PyObject *out = r ? PyList_New(0) : NULL;
  cursor c = {s, r, 0, 0, 0, rec};
  for (a64 *p; out && (p = entry_next(&c));) {
    int now;
    uint64_t e = entry_look(s, p, &now);
    if (!e) break;
    if (E_USAGE(e) > usage || (pending && !now)) continue;
    PyObject *t = Py_BuildValue("KI", (unsigned long long)E_HANDLE(e), E_USAGE(e));
    if (!t || PyList_Append(out, t)) Py_CLEAR(out);
    Py_XDECREF(t);
  }
  return out;
}

static PyObject *resv_pending(Shm *s, PyObject *args) { /* (rec, usage, not) -> [handle] of pending fences but `not` */
  unsigned rec, usage;
  unsigned long long not;
  if (!PyArg_ParseTuple(args, "IIK", &rec, &usage, &not)) return NULL;
  db_resv *r = resv_of(s, rec);
  if (r && first_pending(s, r, rec, usage) && shm_polled(s) < 0) return NULL;
  PyObject *out = r ? PyList_New(0) : NULL;
  cursor c = {s, r, 0, 0, 0, rec};
  for (a64 *p; out && (p = entry_next(&c));) {
    int pending;
    uint64_t e = entry_look(s, p, &pending);
    if (!e) break;
    if (E_USAGE(e) > usage || E_HANDLE(e) == not || !pending) continue;
    PyObject *h = PyLong_FromUnsignedLongLong(E_HANDLE(e));
    if (!h || PyList_Append(out, h)) Py_CLEAR(out);
    Py_XDECREF(h);
  }
  return out;
}

static PyObject *resv_busy(Shm *s, PyObject *args) { /* (rec, usage) -> a pending fence of at most that usage, or 0 */
  unsigned rec, usage;
  if (!PyArg_ParseTuple(args, "II", &rec, &usage)) return NULL;
  db_resv *r = resv_of(s, rec);
  if (!r) return NULL;
  uint64_t h = first_pending(s, r, rec, usage);
  if (h) {
    int k = shm_polled(s);
    if (k < 0) return NULL;
    if (k) h = first_pending(s, r, rec, usage);
  }
  return PyLong_FromUnsignedLongLong(h);
}

static int grow(Shm *s, db_resv *r, uint32_t rec, uint32_t cap, uint32_t n) { /* lock held: n entries more than cap; 0, -errno or RAISED */
  a32 *link = &r->block;
  for (uint32_t k = 0; atomic_load(link) && k < s->known * BLOCKS_PER; k++) {
    db_block *b = block_at(s, atomic_load(link) - 1);
    if (!b || atomic_load(&b->owner) != rec + 1) {
      atomic_store(link, 0);
      break;
    }
    link = &b->next;
  }
  uint32_t more = (n + BLOCK_ENTRIES - 1) / BLOCK_ENTRIES;
  if ((uint64_t)more * BLOCK_ENTRIES + cap > 1u << 22) return -ENOMEM;
  return blocks_add(s, rec, link, more) ? RAISED : 0;
}

int make_room(Shm *s, db_resv *r, uint32_t rec, uint32_t n) { /* lock held: 0, a negative errno, or RAISED */
  cursor c = {s, r, 0, 0, 0, rec};
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
  if (used > INLINE_ENTRIES) /* a list that grew long once shrinks a little each time */
    for (uint32_t k = 0; k < 16; k++) {
      a64 *p = tail[(used - 1 - k) & 15];
      if (fence_pending(s, E_HANDLE(atomic_load(p)), NULL)) break;
      atomic_store(p, 0); /* only the last entry goes, so the list never has a hole */
    }
  return room >= n ? 0 : grow(s, r, rec, cap, n - room);
}

static PyObject *resv_reserve(Shm *s, PyObject *args) { /* (rec, n): room for n more; lock held */
  unsigned rec, n;
  if (!PyArg_ParseTuple(args, "II", &rec, &n)) return NULL;
  db_resv *r = resv_of(s, rec);
  if (!r) return NULL;
  int result = make_room(s, r, rec, n);
  return result == RAISED ? NULL : PyLong_FromLong(result);
}

static int later(db_fence *a, uint64_t seqno,
                 db_fence *b) { /* is a, whose number is seqno, later than b of the same context? (spec 3.10) */
  uint64_t other = atomic_load(&b->seqno);
  return atomic_load(&a->flags) & FF_SEQNO64 ? seqno > other : (int32_t)((uint32_t)seqno - (uint32_t)other) > 0;
}

int put(Shm *s, db_resv *r, uint32_t rec, uint64_t handle, uint32_t usage, long room) { /* 1 took room, 0 replaced, -1 no room */
  db_fence *f;
  fence_pending(s, handle, &f);
  uint64_t context = f ? atomic_load(&f->context) : 0, seqno = f ? atomic_load(&f->seqno) : 0;
  cursor c = {s, r, 0, 0, 0, rec};
  for (a64 *p; (p = entry_next(&c));) {
    uint64_t e = atomic_load(p);
    if (!e) {
      if (!room) return -1;
      if (f) fence_flag(handle, f, FW_SHARED);
      atomic_store(p, E_MAKE(handle, usage));
      STEP(resv_added);
      return 1;
    }
    db_fence *o;
    int pending = fence_pending(s, E_HANDLE(e), &o);
    if (!pending ||
        (f && o && atomic_load(&o->context) == context && E_USAGE(e) >= usage && (E_HANDLE(e) == handle || later(f, seqno, o)))) {
      if (f) fence_flag(handle, f, FW_SHARED);
      atomic_store(p, E_MAKE(handle, usage));
      STEP(resv_added);
      return 0;
    }
  }
  return -1;
}

static PyObject *resv_add(Shm *s, PyObject *args) { /* (rec, handle, usage, room) */
  unsigned rec, usage;
  unsigned long long handle;
  long room;
  if (!PyArg_ParseTuple(args, "IKIl", &rec, &handle, &usage, &room)) return NULL;
  db_resv *r = resv_of(s, rec);
  if (!r) return NULL;
  if (usage > 3) {
    PyErr_SetString(PyExc_ValueError, "resv_add: usage is 0 to 3");
    return NULL;
  }
  return PyLong_FromLong(put(s, r, rec, handle, usage, room));
}

/* resv_copy(rec, source): the entries of rec, whose lock is held, become those of source that are pending -> 0 or -errno.
 *
 * The new ones are appended first, then written over the old ones from the front, then the list is cut at its end, one entry at a time.
 * So at any instant, and after a death at any, the list holds all of the new ones and perhaps some of the old, without a hole. */
static PyObject *resv_copy(Shm *s, PyObject *args) {
  unsigned rec, source;
  if (!PyArg_ParseTuple(args, "II", &rec, &source)) return NULL;
  db_resv *r = resv_of(s, rec), *from = resv_of(s, source);
  if (!r || !from) return NULL;
  uint32_t n = 0, used = 0, cap = 0, room = 0, ended = 0;
  uint64_t *new = NULL;
  a64 **at = NULL;
  int result = 0;
  cursor c = {s, from, 0, 0, 0, source};
  for (a64 *p; (p = entry_next(&c));) {
    uint64_t e = atomic_load(p);
    if (!e) break;
    if (!fence_pending(s, E_HANDLE(e), NULL)) continue;
    if (n == room) {
      uint64_t *bigger = PyMem_Realloc(new, (room += 64 + room) * sizeof *new);
      if (!bigger) {
        PyErr_NoMemory();
        result = RAISED;
        goto out;
      }
      new = bigger;
    }
    new[n++] = e;
  }
  c = (cursor){s, r, 0, 0, 0, rec};
  for (a64 *p; (p = entry_next(&c)); cap++) used += !(ended |= !atomic_load(p));
  if (cap - used < n && (result = grow(s, r, rec, cap, n - (cap - used)))) goto out;
  at = PyMem_Malloc((used + n + 1) * sizeof *at);
  if (!at) {
    PyErr_NoMemory();
    result = RAISED;
    goto out;
  }
  c = (cursor){s, r, 0, 0, 0, rec};
  for (uint32_t i = 0; i < used + n; i++)
    if (!(at[i] = entry_next(&c))) {
      shm_corrupt(s, "a list of fences without its blocks");
      result = RAISED;
      goto out;
    }
  for (uint32_t i = 0; i < n; i++) {
    atomic_store(at[used + i], new[i]);
    STEP(resv_copied);
  }
  for (uint32_t i = 0; i < n; i++) {
    atomic_store(at[i], new[i]);
    STEP(resv_copied);
  }
  for (uint32_t i = used + n; i > n; i--) {
    atomic_store(at[i - 1], 0);
    STEP(resv_cut);
  }
out:
  PyMem_Free(at);
  PyMem_Free(new);
  return result == RAISED ? NULL : PyLong_FromLong(result);
}

static PyObject *resv_replace(Shm *s, PyObject *args) { /* (rec, context, handle, usage): every entry of the context */
  unsigned rec, usage;
  unsigned long long context, handle;
  if (!PyArg_ParseTuple(args, "IKKI", &rec, &context, &handle, &usage)) return NULL;
  db_resv *r = resv_of(s, rec);
  if (!r) return NULL;
  db_fence *f;
  fence_pending(s, handle, &f);
  cursor c = {s, r, 0, 0, 0, rec};
  unsigned n = 0;
  for (a64 *p; (p = entry_next(&c));) {
    uint64_t e = atomic_load(p);
    if (!e) break;
    db_fence *o;
    fence_pending(s, E_HANDLE(e), &o);
    if (!o || atomic_load(&o->context) != context) continue;
    if (f) fence_flag(handle, f, FW_SHARED);
    atomic_store(p, E_MAKE(handle, usage & 3));
    n++;
  }
  return PyLong_FromUnsignedLong(n);
}

PyMethodDef resv_methods[] = {
#define M(n, flags, doc) {#n, (PyCFunction)n, flags, doc}
    M(resv_entries, METH_VARARGS, "Entries (rec, usage, pending_only) -> [(handle, usage)]."),
    M(resv_pending, METH_VARARGS, "Pending handles (rec, usage, but)."),
    M(resv_busy, METH_VARARGS, "A pending handle (rec, usage), or 0."),
    M(resv_reserve, METH_VARARGS, "Make room (rec, n)."),
    M(resv_add, METH_VARARGS, "Add (rec, handle, usage, room) -> 1, 0, -1."),
    M(resv_copy, METH_VARARGS, "Copy (rec, source rec) -> 0 or -errno."),
    M(resv_replace, METH_VARARGS, "Replace (rec, context, handle, usage) -> count."),
    {0}};
