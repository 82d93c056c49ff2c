/* stream_methods.c - methods of Shm on streams: made, found, and looked at. */
#include "domain/stream_methods.h"
#include "domain/step.h"
#include "domain/stream_slots.h"
#include "domain/streams.h"
#include "domain/table.h"

static db_rec *live(Shm *s, uint32_t i, uint32_t gen) {
  db_rec *r = rec_at(s, i);
  return r && atomic_load(&r->state) == REC_LIVE && atomic_load(&r->gen) == gen ? r : NULL;
}

static PyObject *gone(Shm *s) {
  shm_fail(s, ENODEV, "stream", "a stream", "a buffer of it is gone", "make it again");
  return NULL;
}

static PyObject *stream_create(Shm *s, PyObject *args) {
  unsigned rec, gen, slots, policy, meta;
  unsigned long long size;
  if (!PyArg_ParseTuple(args, "IIIIKI", &rec, &gen, &slots, &policy, &size, &meta)) return NULL;
  if (slots < 2 || slots > STREAM_SLOTS || policy > SP_DROP) {
    PyErr_SetString(PyExc_ValueError, "stream_create: not a number of slots, or not a policy");
    return NULL;
  }
  if (table_lock(s)) return NULL;
  db_rec *r = live(s, rec, gen);
  int64_t i = -1, failed = 0;
  if (r && !atomic_load(&r->stream)) {
    i = stream_give(s, rec, r, slots, policy, size, meta);
    if (i < 0 && (failed = chunk_grow(s, CH_STREAM, 0)) >= 0) {
      i = stream_give(s, rec, r, slots, policy, size, meta);
      failed = 0;
    }
  }
  uint32_t stream_gen = i < 0 ? 0 : atomic_load(&stream_at(s, (uint32_t)i)->gen);
  table_unlock(s);
  if (failed < 0) return grow_failed(s, failed), NULL;
  return i < 0 ? gone(s) : Py_BuildValue("LI", (long long)i, stream_gen);
}

static db_stream *present(Shm *s, uint32_t stream, uint32_t gen) { /* NULL: an exception is set */
  db_stream *x = stream_at(s, stream);
  if (x && atomic_load(&x->owner) && atomic_load(&x->gen) == gen) return x;
  shm_fail(s, ESTALE, "stream", "a stream", "it is over", "open it again");
  return NULL;
}

static PyObject *stream_entries(Shm *s, PyObject *args) {
  unsigned stream, gen, k;
  if (!PyArg_ParseTuple(args, "III", &stream, &gen, &k)) return NULL;
  return Py_BuildValue("KK", (unsigned long long)stream_handle(stream, k % STREAM_SLOTS, gen, ENTRY_WRITE),
                       (unsigned long long)stream_handle(stream, k % STREAM_SLOTS, gen, ENTRY_READ));
}

static PyObject *stream_set_slot(Shm *s, PyObject *args) {
  unsigned stream, gen, k, rec, rec_gen;
  if (!PyArg_ParseTuple(args, "IIIII", &stream, &gen, &k, &rec, &rec_gen)) return NULL;
  if (table_lock(s)) return NULL;
  db_stream *x = stream_at(s, stream);
  db_rec *r = live(s, rec, rec_gen);
  int error = 0;
  if (!x || !atomic_load(&x->owner) || atomic_load(&x->gen) != gen || k >= stream_slots(x) || !r)
    error = ENODEV;
  else if (stream_entry_of(s, r, ENTRY_WRITE))
    error = EBUSY;
  else {
    db_slot *slot = &x->slot[k];
    atomic_store(&r->stream_gen, gen);
    atomic_store(&r->stream, PART_MAKE(stream_number(stream, k), 1));
    STEP_OF(stream_slotted, x, k);           /* accesses heed the stream, which doesn't use the slot yet */
    atomic_store(&slot->foreign, S_FOREIGN); /* an access that came before may be in the list */
    atomic_store(&slot->rec_gen, rec_gen);
    atomic_store(&slot->rec, rec + 1);
  }
  table_unlock(s);
  return PyLong_FromLong(error);
}

static PyObject *stream_part(Shm *s, PyObject *args) {
  unsigned rec, gen;
  if (!PyArg_ParseTuple(args, "II", &rec, &gen)) return NULL;
  db_rec *r = live(s, rec, gen);
  uint32_t part = r ? atomic_load(&r->stream) : 0, number = part ? PART_NUMBER(part) : 0;
  db_stream *x = part ? stream_at(s, number / STREAM_SLOTS) : NULL;
  if (!x || !atomic_load(&x->owner) || atomic_load(&x->gen) != atomic_load(&r->stream_gen) || !live(s, rec, gen)) Py_RETURN_NONE;
  return Py_BuildValue("IIi", number / STREAM_SLOTS, atomic_load(&x->gen), PART_OF_SLOT(part) ? (int)(number % STREAM_SLOTS) : -1);
}

#define LOOKS 64 /* at a place or a slot: a use of it takes longer */

/* A place as it was at one moment: its user is the same before and after the look. NULL: it is nobody's. */
static PyObject *reader_item(db_stream *x, uint32_t i) {
  db_reader *r = &x->reader[i];
  uint32_t owner, role, group;
  uint64_t joined, cursor, claims, lost, seen, next, name;
  for (int look = 0; look < LOOKS; look++) {
    owner = atomic_load(&r->owner);
    joined = atomic_load(&r->joined);
    role = atomic_load(&r->role);
    group = atomic_load(&r->group);
    cursor = atomic_load(&r->cursor);
    claims = atomic_load(&r->claims);
    lost = atomic_load(&r->lost);
    seen = atomic_load(&r->seen);
    next = stream_is_member(role) ? SEQ_OF(atomic_load(&x->group_cursor[group % STREAM_GROUPS])) : 0;
    name = atomic_load(&x->group_name[group % STREAM_GROUPS]);
    if (owner == atomic_load(&r->owner) && joined == atomic_load(&r->joined) && role == atomic_load(&r->role) &&
        group == atomic_load(&r->group))
      break;
  }
  if (!owner || !(stream_places(x) >> i & 1)) return NULL;
  return Py_BuildValue("{sI,sI,sI,sK,sK,sK,sK,sK,sK,sK}", "place", i, "life", owner == STREAM_ORPHAN ? 0 : owner, "role", role, "group",
                       (unsigned long long)name, "cursor", (unsigned long long)(cursor >= STREAM_READY ? 0 : cursor), "next",
                       (unsigned long long)next, "claims", (unsigned long long)claims, "lost", (unsigned long long)lost, "seen",
                       (unsigned long long)seen, "joined", (unsigned long long)joined);
}

/* A slot as it was at one moment: its state is the same before and after the look. */
static PyObject *slot_item(db_stream *x, uint32_t k) {
  db_slot *slot = &x->slot[k];
  uint64_t state, used, stamp;
  uint32_t rec, rec_gen, foreign, torn;
  for (int look = 0; look < LOOKS; look++) {
    state = atomic_load(&slot->state);
    rec = atomic_load(&slot->rec);
    rec_gen = atomic_load(&slot->rec_gen);
    foreign = atomic_load(&slot->foreign);
    torn = atomic_load(&slot->torn);
    used = atomic_load(&slot->used);
    stamp = atomic_load(&slot->stamp);
    if (atomic_load(&slot->state) == state) break;
  }
  return Py_BuildValue("{sI,sI,sK,sN,sN,sI,sK,sK}", "rec", rec, "rec_gen", rec_gen, "seq", (unsigned long long)SEQ_OF(state), "writing",
                       PyBool_FromLong((long)(state & S_WRITING)), "foreign", PyBool_FromLong((long)(foreign & S_FOREIGN)), "torn", torn,
                       "used", (unsigned long long)used, "stamp", (unsigned long long)stamp);
}

static PyObject *stream_info(Shm *s, PyObject *args) {
  unsigned stream, gen;
  if (!PyArg_ParseTuple(args, "II", &stream, &gen)) return NULL;
  db_stream *x = present(s, stream, gen);
  if (!x) return NULL;
  PyObject *readers = PyList_New(0), *slots = PyList_New(0), *out = NULL, *item;
  for (uint64_t on = stream_places(x); readers && on; on &= on - 1)
    if ((item = reader_item(x, (uint32_t)__builtin_ctzll(on)))) {
      if (list_add(readers, item)) Py_CLEAR(readers);
    } else if (PyErr_Occurred()) {
      Py_CLEAR(readers);
    }
  for (uint32_t k = 0, n = stream_slots(x); slots && k < n; k++)
    if (list_add(slots, slot_item(x, k))) Py_CLEAR(slots);
  uint64_t prod = atomic_load(&x->prod);
  if (readers && slots)
    out = Py_BuildValue("{sI,sK,sI,sK,sI,sI,sO,sO}", "policy", atomic_load(&x->policy), "size", (unsigned long long)atomic_load(&x->size),
                        "meta_bytes", atomic_load(&x->meta), "published", (unsigned long long)SEQ_OF(atomic_load(&x->head)), "why",
                        (unsigned)(prod & 255), "producer", (unsigned)(prod >> 8), "readers", readers, "slots", slots);
  Py_XDECREF(readers);
  Py_XDECREF(slots);
  if (out && !present(s, stream, gen)) Py_CLEAR(out);
  return out;
}

static PyObject *py_stream_look(Shm *s, PyObject *arg) {
  uint64_t handle;
  if (arg_u64(arg, &handle)) return NULL;
  stream_look(s, handle);
  Py_RETURN_NONE;
}

static PyObject *py_stream_await(Shm *s, PyObject *args) {
  unsigned stream, gen, word;
  if (!PyArg_ParseTuple(args, "III", &stream, &gen, &word) || shm_need_life(s, "await")) return NULL;
  if (word != SW_NEWS && word != SW_SPACE && word != SW_ASK) return PyErr_Format(PyExc_ValueError, "stream_await: not a word of a stream");
  db_stream *x = present(s, stream, gen);
  uint64_t fence = x ? stream_await(s, x, word) : 0;
  return fence ? PyLong_FromUnsignedLongLong(fence) : NULL;
}

static PyObject *stream_list(Shm *s, PyObject *unused) {
  PyObject *out = PyList_New(0);
  for (uint32_t c = 0, n = chunk_count(s); out && c < n; c++) {
    if (CT_TYPE(atomic_load(chunk_entry(s, c))) != CH_STREAM) continue;
    for (uint32_t i = c * STREAMS_PER; out && i < (c + 1) * STREAMS_PER; i++) {
      db_stream *x = stream_at(s, i);
      uint32_t owner = x ? atomic_load(&x->owner) : 0;
      if (owner && list_add(out, Py_BuildValue("III", i, atomic_load(&x->gen), owner - 1))) Py_CLEAR(out);
    }
  }
  return out;
}

PyMethodDef stream_methods[] = {
    METHOD(stream_create, METH_VARARGS, "($self, rec, gen, slots, policy, size, meta, /)",
           "Make a stream that belongs to a record. Return its number and its generation."),
    METHOD(stream_entries, METH_VARARGS, "($self, stream, gen, slot, /)",
           "Return the two entries for the list of fences of a slot's buffer, of usage WRITE and READ."),
    METHOD(stream_set_slot, METH_VARARGS, "($self, stream, gen, slot, rec, rec_gen, /)",
           "Let a buffer, whose list has the slot's entries, be the slot. Return 0, EBUSY (it is another stream's), or ENODEV."),
    METHOD(stream_part, METH_VARARGS, "($self, rec, gen, /)",
           "Return (stream, generation, slot) of the stream that a record is part of; slot -1: it is the stream's own. None: of none."),
    METHOD(stream_info, METH_VARARGS, "($self, stream, gen, /)", "Return what the stream says of itself, its readers and its slots."),
    {"stream_look", (PyCFunction)py_stream_look, METH_O,
     "stream_look($self, fence, /)\n--\n\nEnd a fence that somebody asked for, if what it stands for is over."},
    {"stream_await", (PyCFunction)py_stream_await, METH_VARARGS,
     "stream_await($self, stream, gen, word, /)\n--\n\nReturn a fence that ends with the next wake-up of a word. Look once more, and then "
     "await it."},
    METHOD(stream_list, METH_NOARGS, "($self, /)", "Return [(stream, generation, record)] of all streams."),
    {0}};
