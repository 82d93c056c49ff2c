/* resv.c - the list of fences of a reservation object.
 *
 * The list is an array of words, each a fence and its usage, and a 0 ends it. Adding is one store, and so is replacing. The entry of a
 * signaled fence stays until an entry overwrites it or it is cut off at the end. The list never has a hole and no entry ever moves.
 *
 * What a reader without the lock is told: a fence that it gets was in the list, and pending, at an instant of the call. If it gets none,
 * then at an instant of the call no fence of the list was pending. One look would not do for that: a fence can be put into a place that the
 * reader has passed, before the one is signaled to which it comes. So each change of the list is counted before it is made, and the reader
 * looks twice. Without a change counted meanwhile, at most one store, by the process that held the lock before, came during the two looks,
 * so during one of them none did. All fences that this look saw are signaled when it ends.
 */
#include "domain/resv.h"
#include "domain/fence.h"
#include "domain/resv_lock.h"
#include "domain/sleep.h"
#include "domain/step.h"
#include "domain/streams.h"

#define ENTRIES_MAX (1u << 22)
#define BUT_STREAMS 1ull /* instead of a handle that doesn't count: entries of streams */

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

/* ---- entries of streams (stream_words.h), which are no fences and never leave the list ---- */

static int entry_pending(Shm *s, uint64_t handle, db_fence **out) { return fence_pending(s, handle, out) || stream_pending(s, handle); }

static int entry_stays(Shm *s, uint64_t handle) { return fence_pending(s, handle, NULL) || stream_of(s, handle); }

/* A pending fence instead of a stream's entry, or the handle itself. 0: it isn't pending any more. *failed: RAISED, an exception is set. */
static uint64_t as_fence(Shm *s, uint64_t handle, int *failed) {
  if (!handle || !stream_of(s, handle)) return handle;
  handle = stream_ask(s, handle);
  if (!handle && PyErr_Occurred()) *failed = RAISED;
  return handle;
}

/* Read an entry, and whether its fence is pending. Read it again if it was replaced meanwhile: the new fence was there before the old one
 * was signaled, so even without the lock there is no instant at which neither is seen. */
static uint64_t entry_read(Shm *s, a64 *p, int *pending) {
  uint64_t e = atomic_load(p);
  *pending = 0;
  for (int k = 0; e && !(*pending = entry_pending(s, E_HANDLE(e), NULL)) && k < 64; k++) {
    uint64_t now = atomic_load(p);
    if (now == e) break;
    e = now;
  }
  return e;
}

/* One look: a pending handle up to the usage, but not one; 0: none. *last: some entry's handle. */
static uint64_t look(Shm *s, db_resv *r, uint32_t rec, uint32_t usage, uint64_t but, uint64_t *last) {
  cursor c = cursor_of(s, r, rec);
  for (a64 *p; (p = entry_next(&c));) {
    int pending;
    uint64_t e = entry_read(s, p, &pending);
    STEP(resv_read);
    if (!e) break;
    *last = E_HANDLE(e);
    if (E_USAGE(e) <= usage && pending && E_HANDLE(e) != but && (but != BUT_STREAMS || !stream_of(s, E_HANDLE(e)))) return E_HANDLE(e);
  }
  return 0;
}

/* A pending handle up to a usage, but not `but`; 0: at an instant of the call there was none. */
static uint64_t first_pending(Shm *s, db_resv *r, uint32_t rec, uint32_t usage, uint64_t but) {
  uint64_t last = 0;
  for (int tries = 0; tries < 1000; tries++) {
    uint32_t seen = atomic_load(&r->changes);
    uint64_t h = look(s, r, rec, usage, but, &last);
    if (!h) h = look(s, r, rec, usage, but, &last);
    if (h || atomic_load(&r->changes) == seen) return h;
  }
  return last; /* others add fences without a pause: this one is signaled, so a waiter comes back at once */
}

uint64_t resv_foreign(Shm *s, uint32_t rec, uint32_t usage) {
  db_rec *r = rec_at(s, rec);
  return r ? first_pending(s, &r->resv, rec, usage, BUT_STREAMS) : 0;
}

/* The same, as a fence. *failed: RAISED, an exception is set. */
static uint64_t first_fence(Shm *s, db_resv *r, uint32_t rec, uint32_t usage, uint64_t but, int *failed) {
  uint64_t h = 0;
  for (int tries = 0; tries < 1000; tries++) {
    if (!(h = first_pending(s, r, rec, usage, but))) return 0;
    uint64_t f = as_fence(s, h, failed);
    if (f || *failed) return f;
  }
  return h; /* a stream's entry is over again each time: so is this handle, and a waiter comes back at once */
}

/* Add to a list what `item` returns for each entry up to the usage; pending_only: of a pending fence that is not `but`. 0 or -1. */
static int list_entries(Shm *s, db_resv *r, uint32_t rec, uint32_t usage, int pending_only, uint64_t but, PyObject *out,
                        PyObject *(*item)(uint64_t e)) {
  for (int tries = 0;; tries++) {
    cursor c = cursor_of(s, r, rec);
    for (a64 *p; (p = entry_next(&c));) {
      int pending, failed = 0;
      uint64_t e = entry_read(s, p, &pending), h = E_HANDLE(e);
      if (!e) break;
      if (E_USAGE(e) > usage || ((pending_only || stream_of(s, h)) && (!pending || h == but))) continue;
      if ((h = as_fence(s, h, &failed)) && list_add(out, item(E_MAKE(h, E_USAGE(e))))) return -1;
      if (failed) return -1;
    }
    /* An empty list says that none was pending at an instant, as first_pending() does. */
    int failed = 0;
    uint64_t h = pending_only && !PyList_GET_SIZE(out) ? first_fence(s, r, rec, usage, but, &failed) : 0;
    if (!h) return failed ? -1 : 0;
    if (tries == 1000) return list_add(out, item(E_MAKE(h, usage)));
  }
}

static PyObject *handle_item(uint64_t e) { return PyLong_FromUnsignedLongLong(E_HANDLE(e)); }

static PyObject *usage_item(uint64_t e) { return Py_BuildValue("KI", (unsigned long long)E_HANDLE(e), E_USAGE(e)); }

static PyObject *resv_entries(Shm *s, PyObject *args) {
  unsigned rec, usage;
  int pending_only;
  if (!PyArg_ParseTuple(args, "IIp", &rec, &usage, &pending_only)) return NULL;
  db_resv *r = resv_of(s, rec);
  if (r && pending_only && first_pending(s, r, rec, usage, 0) && shm_notice_deaths(s) < 0) return NULL;
  PyObject *out = r ? PyList_New(0) : NULL;
  if (out && list_entries(s, r, rec, usage, pending_only, 0, out, usage_item)) Py_CLEAR(out);
  return out;
}

static PyObject *resv_pending(Shm *s, PyObject *args) {
  unsigned rec, usage;
  unsigned long long but;
  if (!PyArg_ParseTuple(args, "IIK", &rec, &usage, &but)) return NULL;
  db_resv *r = resv_of(s, rec);
  if (r && first_pending(s, r, rec, usage, but) && shm_notice_deaths(s) < 0) return NULL;
  PyObject *out = r ? PyList_New(0) : NULL;
  if (out && list_entries(s, r, rec, usage, 1, but, out, handle_item)) Py_CLEAR(out);
  return out;
}

static PyObject *resv_busy(Shm *s, PyObject *args) {
  unsigned rec, usage;
  if (!PyArg_ParseTuple(args, "II", &rec, &usage)) return NULL;
  db_resv *r = resv_of(s, rec);
  if (!r) return NULL;
  int failed = 0;
  uint64_t h = first_fence(s, r, rec, usage, 0, &failed);
  if (h) {
    int k = shm_notice_deaths(s);
    if (k < 0) return NULL;
    if (k) h = first_fence(s, r, rec, usage, 0, &failed);
  }
  return failed ? NULL : PyLong_FromUnsignedLongLong(h);
}

/* Look from a cursor on. Return a pending handle up to the usage, and its place; 0: none, which says nothing about an instant. */
static uint64_t look_on(Shm *s, cursor c, uint32_t usage, unsigned long long *place) {
  for (cursor here = c;; here = c) {
    a64 *p = entry_next(&c);
    int pending = 0;
    uint64_t e = p ? entry_read(s, p, &pending) : 0;
    STEP(resv_read);
    if (!e) return 0;
    *place = (uint64_t)here.i << 32 | here.block;
    if (E_USAGE(e) <= usage && pending) return E_HANDLE(e);
  }
}

/* Look from an entry on, where an earlier look found a pending fence, and only then from the first. So a list whose fences end one after
 * the other is read once, and not once for each. `place` is that entry and its block, and worth nothing but time: a block that belongs to
 * another record by now ends the look. */
static PyObject *resv_busy_from(Shm *s, PyObject *args) {
  unsigned rec, usage;
  unsigned long long place;
  if (!PyArg_ParseTuple(args, "IIK", &rec, &usage, &place)) return NULL;
  db_resv *r = resv_of(s, rec);
  if (!r) return NULL;
  cursor c = cursor_of(s, r, rec);
  c.i = (uint32_t)(place >> 32);
  c.block = (uint32_t)place;
  c.blocks = c.i > INLINE_ENTRIES ? (c.i - INLINE_ENTRIES + BLOCK_ENTRIES - 1) / BLOCK_ENTRIES : 0;
  uint64_t h = look_on(s, c, usage, &place);
  if (!h && c.i) h = look_on(s, cursor_of(s, r, rec), usage, &place);
  if (h && shm_notice_deaths(s) < 0) return NULL;
  int failed = 0;
  if (h) h = as_fence(s, h, &failed);
  if (!h && !failed) {
    h = first_fence(s, r, rec, usage, 0, &failed);
    place = 0;
  }
  if (failed) return NULL;
  return Py_BuildValue("KK", (unsigned long long)h, (unsigned long long)place);
}

/* ---- changing, with the lock ---- */

/* Every store into the list is one of these. A death between the two counts a change that did not come. */
static void entry_put(db_resv *r, a64 *p, uint64_t value) {
  atomic_store(&r->changes, atomic_load(&r->changes) + 1);
  atomic_store(p, value);
}

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
    if (!e || !entry_stays(s, E_HANDLE(e))) room++;
    if (e) {
      tail[used & 15] = p;
      used++;
    }
  }
  if (used > INLINE_ENTRIES) /* a list that has grown long shrinks a little each time, from its end */
    for (uint32_t k = 0; k < 16; k++) {
      a64 *p = tail[(used - 1 - k) & 15];
      if (entry_stays(s, E_HANDLE(atomic_load(p)))) break;
      entry_put(r, p, 0);
    }
  return room >= n ? 0 : entries_grow(s, r, rec, cap, n - room);
}

/* Is a, whose number is seqno, later than b of the same context? See semantics 3.10. */
static int is_later(db_fence *a, uint64_t seqno, db_fence *b) {
  uint64_t other = atomic_load(&b->seqno);
  return atomic_load(&a->flags) & FF_SEQNO64 ? seqno > other : (int32_t)((uint32_t)seqno - (uint32_t)other) > 0;
}

static void entry_store(Shm *s, db_resv *r, uint32_t rec, a64 *p, uint64_t handle, db_fence *f, uint32_t usage) {
  db_rec *x = f ? rec_at(s, rec) : NULL;
  if (f) fence_flag(handle, f, FW_SHARED);
  if (x) stream_mark_fence(x, f);
  entry_put(r, p, E_MAKE(handle, usage));
}

static void note_foreign(Shm *s, uint32_t rec) {
  db_rec *x = rec_at(s, rec);
  if (x) stream_note_foreign(s, x);
}

int entries_add(Shm *s, db_resv *r, uint32_t rec, uint64_t handle, uint32_t usage, long room) {
  db_fence *f;
  fence_pending(s, handle, &f);
  uint64_t context = f ? atomic_load(&f->context) : 0, seqno = f ? atomic_load(&f->seqno) : 0;
  cursor c = cursor_of(s, r, rec);
  for (a64 *p; (p = entry_next(&c));) {
    uint64_t e = atomic_load(p);
    if (!e && !room) return -1;
    db_fence *o = NULL;
    if (!e || !(fence_pending(s, E_HANDLE(e), &o) || stream_of(s, E_HANDLE(e))) ||
        (f && o && atomic_load(&o->context) == context && E_USAGE(e) >= usage && (E_HANDLE(e) == handle || is_later(f, seqno, o)))) {
      entry_store(s, r, rec, p, handle, f, usage);
      STEP_OF(resv_added, r, handle); /* added: each entry is complete at every instant */
      if (f) note_foreign(s, rec);
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

/* Append the pending entries of a list, or of its own list those that stay, to be freed by the caller. 0, or RAISED. */
static int add_entries(Shm *s, db_resv *r, uint32_t rec, bool own, uint64_t **entries, uint32_t *count, uint32_t *room_of) {
  uint32_t room = *room_of;
  cursor c = cursor_of(s, r, rec);
  for (a64 *p; (p = entry_next(&c));) {
    uint64_t e = atomic_load(p), h = E_HANDLE(e);
    int failed = 0;
    if (!e) break;
    if (own ? !stream_of(s, h) : !entry_pending(s, h, NULL)) continue;
    if (!own && !(h = as_fence(s, h, &failed))) {
      if (failed) return failed;
      continue;
    }
    e = E_MAKE(h, E_USAGE(e));
    if (*count == room) {
      uint64_t *bigger = PyMem_Realloc(*entries, (room += 64 + room) * sizeof *bigger);
      if (!bigger) {
        PyErr_NoMemory();
        return RAISED;
      }
      *entries = bigger;
      *room_of = room;
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
  uint32_t n = 0, room = 0, used = 0, cap = 0, ended = 0;
  uint64_t *new = NULL;
  a64 **at = NULL;
  int result = add_entries(s, r, rec, true, &new, &n, &room);
  if (result || (result = add_entries(s, from, source, false, &new, &n, &room))) goto out;
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
    db_fence *f;
    db_rec *x = fence_pending(s, E_HANDLE(new[i]), &f) && f ? rec_at(s, rec) : NULL;
    if (x) stream_mark_fence(x, f);
    entry_put(r, at[used + i], new[i]);
    STEP_OF(resv_copied, r, new[i]); /* the old ones, and some of the new */
  }
  for (uint32_t i = 0; i < n; i++) {
    entry_put(r, at[i], new[i]);
    STEP_OF(resv_copied, r, new[i]); /* all of the new ones, some of them twice, and some of the old */
  }
  for (uint32_t i = used + n; i > n; i--) {
    entry_put(r, at[i - 1], 0);
    STEP_OF(resv_cut, r, 0); /* all of the new ones, and behind them some that are signaled, old, or there twice */
  }
  note_foreign(s, rec);
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
    entry_store(s, r, rec, p, handle, f, usage & 3);
    n++;
  }
  if (n) note_foreign(s, rec);
  return PyLong_FromUnsignedLong(n);
}

PyMethodDef resv_methods[] = {
    METHOD(resv_entries, METH_VARARGS, "($self, rec, usage, pending_only, /)", "Return [(handle, usage)] of the entries up to a usage."),
    METHOD(resv_pending, METH_VARARGS, "($self, rec, usage, but, /)", "Return the pending handles up to a usage, except one."),
    METHOD(resv_busy_from, METH_VARARGS, "($self, rec, usage, place, /)",
           "Return (a pending handle up to a usage, its place), (0, 0): none. It begins at the place that an earlier call returned."),
    METHOD(resv_busy, METH_VARARGS, "($self, rec, usage, /)", "Return a pending handle up to a usage, 0: none."),
    METHOD(resv_reserve, METH_VARARGS, "($self, rec, n, /)", "With the lock: have room for n more entries. Return 0 or -errno."),
    METHOD(resv_add, METH_VARARGS, "($self, rec, handle, usage, room, /)",
           "With the lock: add a fence. Return 1 if it took room, 0 if it replaced another one, -1 if there is no room."),
    METHOD(resv_copy, METH_VARARGS, "($self, rec, source, /)",
           "With the lock of rec: let it have the pending fences of source, instead of its own. Return 0 or -errno."),
    METHOD(resv_replace, METH_VARARGS, "($self, rec, context, handle, usage, /)",
           "With the lock: let a fence replace every entry of a fence context. Return how many there were."),
    {0}};
