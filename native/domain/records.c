/* records.c - the record of a buffer: made, found, referenced, renamed, freed.
 *
 * What changes a record under the table lock has crash points. A death between two of them leaves a state that table_rebuild() makes whole.
 */
#include "domain/records.h"
#include "domain/buffer_layout.h"
#include "domain/step.h"
#include "domain/table.h"

#define NAME_MAX_BYTES 31

static void set_bounded(char *to, uint8_t *len, const char *from, Py_ssize_t n) {
  memcpy(to, from, (size_t)n);
  *len = (uint8_t)n;
}

/* Tell a `domain.records.Record` (or None) that this life references record i, in the step that takes the reference: so no signal handler
 * that raises between two bytecodes leaves a reference of which nobody knows. -1: out of memory. */
static int tell(PyObject *record, PyObject *index, PyObject *gen, PyObject *life) {
  static PyObject *names[3];
  if (record == Py_None) return 0;
  if (!names[2] && (!(names[0] = PyUnicode_InternFromString("index")) || !(names[1] = PyUnicode_InternFromString("gen")) ||
                    !(names[2] = PyUnicode_InternFromString("life"))))
    return -1;
  return PyObject_SetAttr(record, names[0], index) || PyObject_SetAttr(record, names[1], gen) || PyObject_SetAttr(record, names[2], life)
             ? -1
             : 0;
}

static db_rec *first_free(Shm *s, uint32_t *at) { /* the head of the free list, NULL: the list is empty, or lies */
  uint32_t v = atomic_load(&hdr(s)->rec_free);
  *at = v - 1;
  return v ? rec_at(s, v - 1) : NULL;
}

/* With the table lock: take a record out of the free list, into which more are put if it is empty. NULL: *failed is a reason for
 * grow_failed(), or 0 if the file is corrupt. */
static db_rec *take_free(Shm *s, uint32_t *at, int64_t *failed) {
  db_rec *r = first_free(s, at);
  *failed = 0;
  if (atomic_load(&hdr(s)->rec_free) && (!r || atomic_load(&r->state) != REC_FREE)) { /* the list lies: make it again */
    table_rebuild(s);
    r = first_free(s, at);
  }
  if (!atomic_load(&hdr(s)->rec_free)) {
    int64_t c = chunk_grow(s, CH_REC, 0);
    if (c < 0) {
      *failed = c;
      return NULL;
    }
    for (uint32_t k = RECS_PER; k-- > 0;) {
      db_rec *x = rec_at(s, (uint32_t)c * RECS_PER + k);
      if (!x) break;
      rec_push(s, (uint32_t)c * RECS_PER + k, x);
    }
    r = first_free(s, at);
  }
  if (r) atomic_store(&hdr(s)->rec_free, atomic_load(&r->free_next));
  return r;
}

/* With the table lock: give a record a layout, in a new chunk if it must be. -1: *failed is a reason for grow_failed(), or 0 if the file
 * is corrupt. */
static int give_layout(Shm *s, uint32_t i, db_rec *r, uint32_t part, const char *bytes, size_t n, int64_t *failed) {
  *failed = 0;
  if (layout_give(s, i, r, part, bytes, n)) return 0;
  int64_t c = chunk_grow(s, CH_LAYOUT, 0);
  if (c < 0) {
    *failed = c;
    return -1;
  }
  layouts_add(s, (uint32_t)c);
  return layout_give(s, i, r, part, bytes, n) ? 0 : -1;
}

/* What rec_create() returns; NULL: out of memory, and the reference is given back. */
static PyObject *created_as(Shm *s, PyObject *record, uint32_t i, uint32_t gen, PyObject *fresh) {
  PyObject *made = Py_BuildValue("IIO", i, gen, fresh), *life = PyLong_FromUnsignedLong(my_life(s));
  if (!made || !life || tell(record, PyTuple_GET_ITEM(made, 0), PyTuple_GET_ITEM(made, 1), life)) {
    a64 *w = ref_word(s, LIFE_INDEX(my_life(s)), i);
    if (w) atomic_fetch_and(w, ~ref_bit(i));
    Py_CLEAR(made);
  }
  Py_XDECREF(life);
  return made;
}

static PyObject *rec_create(Shm *s, PyObject *args) {
  unsigned long long dev, ino, size, created;
  const char *nonce, *exp, *home, *name, *layout = NULL;
  Py_ssize_t nnonce, nexp, nhome, nname, nlayout = 0;
  unsigned kind, pid, part = 0;
  PyObject *record = Py_None;
  if (!PyArg_ParseTuple(args, "KKKy#y#y#z#IIK|Iz#O", &dev, &ino, &size, &nonce, &nnonce, &exp, &nexp, &home, &nhome, &name, &nname, &kind,
                        &pid, &created, &part, &layout, &nlayout, &record))
    return NULL;
  if (nlayout > (Py_ssize_t)LAYOUT_BYTES) {
    PyErr_SetString(PyExc_ValueError, "rec_create: a layout must have at most 256 bytes");
    return NULL;
  }
  if (nnonce != 16 || nexp > NAME_MAX_BYTES || nhome > NAME_MAX_BYTES || (name && nname > NAME_MAX_BYTES)) {
    PyErr_SetString(PyExc_ValueError, "rec_create: a nonce must have 16 bytes, a name at most 31");
    return NULL;
  }
  if (table_lock(s)) return NULL;
  STEP(rec_locked); /* nothing has changed */
  uint32_t i = 0;
  db_rec *r = ino ? rec_by_inode(s, dev, ino, &i) : NULL;
  uint32_t me = my_life(s);
  if (r && !memcmp(r->nonce, nonce, 16)) { /* another receiver was quicker: share its record */
    a64 *w = ref_word(s, LIFE_INDEX(me), i);
    if (w) atomic_fetch_or(w, ref_bit(i));
    table_unlock(s);
    return created_as(s, record, i, atomic_load(&r->gen), Py_False);
  }
  if (r) { /* the inode number is in use again, so the buffer of this record is certainly gone */
    atomic_store(&r->state, REC_DYING);
    rec_unlink(s, i, r);
    rec_clear(s, i, r);
    rec_push(s, i, r);
  }
  int64_t failed;
  r = take_free(s, &i, &failed);
  if (!r) {
    table_unlock(s);
    failed ? grow_failed(s, failed) : shm_corrupt(s, "a record lies outside of it");
    return NULL;
  }
  bytes_follow();
  r->dev = dev;
  r->ino = ino;
  r->size = size;
  r->created = created;
  memcpy(r->nonce, nonce, 16);
  r->life = me;
  r->pid = pid;
  r->kind = kind;
  set_bounded(r->exp_name, &r->exp_len, exp, nexp);
  set_bounded(r->home, &r->home_len, home, nhome);
  /* Every field is written, because a process that died at the next step may have left its own in a free record. */
  memset(r->name, 0, sizeof r->name);
  if (name) memcpy(r->name[0], name, (size_t)nname);
  r->name_len[0] = (uint8_t)(name ? nname + 1 : 0);
  r->name_len[1] = 0;
  atomic_store(&r->name_version, 0);
  atomic_store(&r->torn, 0);
  atomic_store(&r->absent, 0);
  atomic_store(&r->absent_ns, 0);
  atomic_store(&r->foreign_resv, 0);
  atomic_store(&r->layout, 0);
  atomic_store(&r->stream, 0);
  if (layout && give_layout(s, i, r, part, layout, (size_t)nlayout, &failed)) {
    rec_push(s, i, r);
    table_unlock(s);
    failed ? grow_failed(s, failed) : shm_corrupt(s, "a layout lies outside of it");
    return NULL;
  }
  STEP_OF(rec_filled, r, atomic_load(&r->gen)); /* FREE and in no list: table_rebuild() puts it into the free list */
  a64 *w = ref_word(s, LIFE_INDEX(me), i);
  if (!w) {
    table_unlock(s);
    shm_corrupt(s, "a life has no chunk");
    return NULL;
  }
  atomic_fetch_or(w, ref_bit(i));
  STEP_OF(rec_held, r, atomic_load(&r->gen)); /* FREE, with this life's reference: the reaper clears that */
  atomic_store(&r->state, REC_LIVE);
  STEP_OF(rec_live, r,
          atomic_load(&r->gen)); /* LIVE and not found by its inode: table_rebuild() links it, and the sweep of records frees it */
  if (ino) rec_link(s, i, r);
  STEP_OF(rec_linked, r, atomic_load(&r->gen)); /* complete: the sweep of records frees it */
  table_unlock(s);
  return created_as(s, record, i, atomic_load(&r->gen), Py_True);
}

static PyObject *rec_find(Shm *s, PyObject *args) {
  unsigned long long dev, ino;
  if (!PyArg_ParseTuple(args, "KK", &dev, &ino)) return NULL;
  uint32_t i;
  db_rec *r = rec_by_inode(s, dev, ino, &i);
  if (!r) Py_RETURN_NONE;
  uint32_t gen = atomic_load(&r->gen);
  char nonce[16];
  memcpy(nonce, r->nonce, 16);
  bytes_read();
  /* Look at the generation last. It only grows, so if it is the same, all of this belongs to one use of the slot. */
  if (atomic_load(&r->state) != REC_LIVE || r->dev != dev || r->ino != ino || atomic_load(&r->gen) != gen) Py_RETURN_NONE;
  return Py_BuildValue("IIy#", i, gen, nonce, (Py_ssize_t)16);
}

static PyObject *rec_get(Shm *s, PyObject *const *a, Py_ssize_t n) {
  uint32_t i, gen;
  if (n != 2 && n != 3) return PyErr_Format(PyExc_TypeError, "rec_get(rec, gen, record=None)");
  if (arg_u32(a[0], &i) || arg_u32(a[1], &gen)) return NULL;
  if (shm_need_life(s, "reference")) return NULL;
  db_rec *r = rec_at(s, i);
  a64 *w = r ? ref_word(s, LIFE_INDEX(my_life(s)), i) : NULL;
  if (!w) Py_RETURN_FALSE;
  PyObject *life = PyLong_FromUnsignedLong(my_life(s));
  if (!life) return NULL;
  uint64_t before = atomic_fetch_or(w, ref_bit(i));
  /* rec_free() stores DYING and then looks at the bits; this sets the bit and then looks at the state. One of the two sees the other. */
  int got = atomic_load(&r->state) == REC_LIVE && atomic_load(&r->gen) == gen;
  int failed = got && n == 3 && tell(a[2], a[0], a[1], life);
  if ((!got || failed) && !(before & ref_bit(i))) atomic_fetch_and(w, ~ref_bit(i));
  Py_DECREF(life);
  return failed ? NULL : PyBool_FromLong(got);
}

static PyObject *rec_put(Shm *s, PyObject *arg) {
  uint32_t i;
  if (arg_u32(arg, &i)) return NULL;
  if (!my_life(s)) Py_RETURN_TRUE; /* a forked child has no reference, and nothing to do when it was the last */
  a64 *w = rec_at(s, i) ? ref_word(s, LIFE_INDEX(my_life(s)), i) : NULL;
  if (w) atomic_fetch_and(w, ~ref_bit(i));
  return PyBool_FromLong(rec_referenced(s, i));
}

static PyObject *rec_free(Shm *s, PyObject *args) {
  unsigned i, gen;
  if (!PyArg_ParseTuple(args, "II", &i, &gen)) return NULL;
  if (table_lock(s)) return NULL;
  db_rec *r = rec_at(s, i);
  int done = 0;
  if (r && atomic_load(&r->gen) == gen && atomic_load(&r->state) == REC_LIVE) {
    atomic_store(&r->state, REC_DYING);
    STEP_OF(rec_dying, r, atomic_load(&r->gen)); /* DYING and in its chain: table_rebuild() frees it unless it is referenced */
    if (rec_referenced(s, i))
      atomic_store(&r->state, REC_LIVE);
    else {
      if (r->ino) rec_unlink(s, i, r);
      STEP_OF(rec_unlinked, r, atomic_load(&r->gen)); /* DYING and in no chain: table_rebuild() does the rest */
      rec_clear(s, i, r);
      STEP_OF(rec_freed, r, atomic_load(&r->gen)); /* FREE and in no list: table_rebuild() puts it into the free list */
      rec_push(s, i, r);
      done = 1;
    }
  }
  table_unlock(s);
  return PyBool_FromLong(done);
}

static int rec_live(Shm *s, uint32_t i, db_rec *r) {
  uint32_t state = r ? atomic_load(&r->state) : REC_FREE;
  if (state == REC_DYING && my_life(s)) { /* rec_free() goes back to LIVE when it sees this life's reference */
    a64 *w = ref_word(s, LIFE_INDEX(my_life(s)), i);
    if (w && (atomic_load(w) & ref_bit(i))) return 1;
  }
  return state == REC_LIVE;
}

static PyObject *rec_info(Shm *s, PyObject *arg) {
  uint32_t i;
  if (arg_u32(arg, &i)) return NULL;
  db_rec *r = rec_at(s, i);
  uint32_t gen = r ? atomic_load(&r->gen) : 0;
  if (!rec_live(s, i, r)) Py_RETURN_NONE;
  char name[32];
  uint32_t version, len;
  int tries = 0;
  do { /* a rename writes the other name and then switches: after two renames during the copy, copy again */
    version = atomic_load(&r->name_version);
    len = r->name_len[version & 1];
    memcpy(name, r->name[version & 1], 32);
    bytes_read();
  } while (atomic_load(&r->name_version) != version && ++tries < 1000);
  if (len > 32) len = 32;
  PyObject *n = len ? PyBytes_FromStringAndSize(name, len - 1) : Py_NewRef(Py_None);
  if (!n) return NULL;
  Py_ssize_t nexp = r->exp_len > NAME_MAX_BYTES ? NAME_MAX_BYTES : r->exp_len,
             nhome = r->home_len > NAME_MAX_BYTES ? NAME_MAX_BYTES : r->home_len;
  uint64_t torn = atomic_load(&r->torn);
  uint32_t resv = atomic_load(&r->foreign_resv), resv_gen = atomic_load(&r->foreign_gen); /* in this order: rec_set_resv() */
  uint32_t absent = atomic_load(&r->absent);
  uint64_t absent_ns = atomic_load(&r->absent_ns);
  PyObject *out = Py_BuildValue("{sI,sK,sK,sK,sy#,sK,sI,sI,sI,si,sI,sI,sK,sI,sI,sN,sy#,sy#}", "gen", gen, "dev", r->dev, "ino", r->ino,
                                "size", r->size, "nonce", (const char *)r->nonce, (Py_ssize_t)16, "created", r->created, "life", r->life,
                                "pid", r->pid, "kind", r->kind, "torn", (int)(uint32_t)torn, "torn_pid", (uint32_t)(torn >> 32), "absent",
                                absent, "absent_ns", (unsigned long long)absent_ns, "resv", resv, "resv_gen", resv_gen, "name", n,
                                "exp_name", r->exp_name, nexp, "home", r->home, nhome);
  bytes_read();
  if (!out || (rec_live(s, i, r) && atomic_load(&r->gen) == gen)) return out; /* the generation last, as in rec_find() */
  Py_DECREF(out);
  Py_RETURN_NONE;
}

static PyObject *rec_name(Shm *s, PyObject *args) {
  unsigned i;
  const char *name;
  Py_ssize_t n;
  if (!PyArg_ParseTuple(args, "Iy#", &i, &name, &n)) return NULL;
  if (n > NAME_MAX_BYTES) {
    PyErr_SetString(PyExc_ValueError, "rec_name: a name must have at most 31 bytes");
    return NULL;
  }
  if (table_lock(s)) return NULL;
  db_rec *r = rec_at(s, i);
  if (r && atomic_load(&r->state) == REC_LIVE) {
    uint32_t version = atomic_load(&r->name_version) + 1;
    bytes_follow(); /* a reader that still copies this half must see that the other one counts */
    memset(r->name[version & 1], 0, 32);
    memcpy(r->name[version & 1], name, (size_t)n);
    r->name_len[version & 1] = (uint8_t)(n + 1);
    STEP_OF(name_written, r, atomic_load(&r->gen)); /* the old name counts */
    atomic_store(&r->name_version, version);
    STEP_OF(name_switched, r, atomic_load(&r->gen)); /* the new name counts */
  }
  table_unlock(s);
  Py_RETURN_NONE;
}

static PyObject *rec_layout(Shm *s, PyObject *args) {
  unsigned i, gen;
  if (!PyArg_ParseTuple(args, "II", &i, &gen)) return NULL;
  db_rec *r = rec_at(s, i);
  layout_copy copy;
  if (!r || !layout_read(s, i, r, &copy)) Py_RETURN_NONE;
  if (!rec_live(s, i, r) || atomic_load(&r->gen) != gen) Py_RETURN_NONE; /* last, as in rec_find() */
  return Py_BuildValue("Iy#", copy.part, (const char *)copy.bytes, (Py_ssize_t)copy.length);
}

static PyObject *rec_set_layout(Shm *s, PyObject *args) {
  unsigned i, gen, part;
  const char *bytes;
  Py_ssize_t n;
  if (!PyArg_ParseTuple(args, "IIIy#", &i, &gen, &part, &bytes, &n)) return NULL;
  if (n > (Py_ssize_t)LAYOUT_BYTES) {
    PyErr_SetString(PyExc_ValueError, "rec_set_layout: a layout must have at most 256 bytes");
    return NULL;
  }
  if (table_lock(s)) return NULL;
  db_rec *r = rec_at(s, i);
  int64_t failed = 0;
  int live = r && atomic_load(&r->state) == REC_LIVE && atomic_load(&r->gen) == gen;
  int none = live && !atomic_load(&r->layout), lacks = none && give_layout(s, i, r, part, bytes, (size_t)n, &failed);
  table_unlock(s);
  if (lacks) {
    failed ? grow_failed(s, failed) : shm_corrupt(s, "a layout lies outside of it");
    return NULL;
  }
  return PyBool_FromLong(none);
}

static PyObject *rec_set_absent(Shm *s, PyObject *args) {
  unsigned i, gen, passes;
  unsigned long long ns;
  if (!PyArg_ParseTuple(args, "IIIK", &i, &gen, &passes, &ns)) return NULL;
  if (table_lock(s)) return NULL; /* so that the record is not given to another buffer, which would be judged gone too early */
  db_rec *r = rec_at(s, i);
  if (r && atomic_load(&r->state) == REC_LIVE && atomic_load(&r->gen) == gen) {
    atomic_store(&r->absent_ns, ns); /* first: a death before the next store makes the record stay longer, not shorter */
    atomic_store(&r->absent, passes);
  }
  table_unlock(s);
  if (r) Py_RETURN_NONE;
  shm_corrupt(s, "a record lies outside of it");
  return NULL;
}

static PyObject *rec_set_resv(Shm *s, PyObject *args) {
  unsigned i, resv, gen;
  if (!PyArg_ParseTuple(args, "III", &i, &resv, &gen)) return NULL;
  db_rec *r = rec_at(s, i);
  if (!r) {
    shm_corrupt(s, "a record lies outside of it");
    return NULL;
  }
  atomic_store(&r->foreign_gen, gen); /* first: without the other number it counts for nothing */
  atomic_store(&r->foreign_resv, resv);
  Py_RETURN_NONE;
}

static PyObject *rec_torn(Shm *s, PyObject *arg) {
  uint32_t i;
  if (arg_u32(arg, &i)) return NULL;
  db_rec *r = rec_at(s, i);
  return PyLong_FromLong(r ? (int)(uint32_t)atomic_load(&r->torn) : 0);
}

static PyObject *rec_holders(Shm *s, PyObject *arg) {
  uint32_t i;
  if (arg_u32(arg, &i)) return NULL;
  PyObject *out = PyList_New(0);
  for (uint32_t k = 0, high = life_high(s); out && k < high && rec_at(s, i); k++) {
    if (atomic_load(&life_at(s, k)->state) != LIFE_ALIVE) continue;
    a64 *w = ref_word(s, k, i);
    if (w && (atomic_load(w) & ref_bit(i)) && list_add(out, PyLong_FromUnsignedLong(k))) Py_CLEAR(out);
  }
  return out;
}

/* Call entry(i, r) for each live record of the domain, and return the list of what it returns; it returns Py_None to be left out. */
static PyObject *list_live(Shm *s, PyObject *(*entry)(Shm *s, uint32_t i, db_rec *r)) {
  PyObject *out = PyList_New(0);
  for (uint32_t c = 0, n = chunk_count(s); out && c < n; c++) {
    if (CT_TYPE(atomic_load(chunk_entry(s, c))) != CH_REC) continue;
    for (uint32_t i = c * RECS_PER; out && i < (c + 1) * RECS_PER; i++) {
      db_rec *r = rec_at(s, i);
      if (!r) break;
      if (atomic_load(&r->state) != REC_LIVE) continue;
      PyObject *x = entry(s, i, r);
      if (x == Py_None)
        Py_DECREF(x);
      else if (list_add(out, x))
        Py_CLEAR(out);
    }
  }
  return out;
}

static PyObject *number_of(Shm *s, uint32_t i, db_rec *r) { return PyLong_FromUnsignedLong(i); }

static PyObject *orphan_of(Shm *s, uint32_t i, db_rec *r) {
  if (rec_referenced(s, i)) Py_RETURN_NONE;
  uint32_t gen = atomic_load(&r->gen);
  uint32_t absent = atomic_load(&r->absent); /* before its time: a later time only makes the record stay longer */
  uint64_t absent_ns = atomic_load(&r->absent_ns), dev = atomic_load(&r->dev), ino = atomic_load(&r->ino);
  if (atomic_load(&r->state) != REC_LIVE || atomic_load(&r->gen) != gen) Py_RETURN_NONE; /* last, as in rec_find() */
  return Py_BuildValue("IIKKIK", i, gen, dev, ino, absent, absent_ns);
}

static PyObject *rec_list(Shm *s, PyObject *unused) { return list_live(s, number_of); }

static PyObject *rec_orphans(Shm *s, PyObject *unused) { return list_live(s, orphan_of); }

PyMethodDef record_methods[] = {
    METHOD(rec_create, METH_VARARGS,
           "($self, dev, ino, size, nonce, exp_name, home, name, kind, pid, created, part=0, layout=None, record=None, /)",
           "Make or find the record of a buffer and reference it. Return (rec, gen, whether it was made). See rec_get for `record`."),
    METHOD(rec_find, METH_VARARGS, "($self, dev, ino, /)",
           "Return (rec, gen, nonce) of the record of an inode, or None. Takes no lock: the record may be freed at any time."),
    METHOD(
        rec_get, METH_FASTCALL, "($self, rec, gen, record=None, /)",
        "Reference a record for this life. Return False if it is another record by now. An object `record` is told index, gen and life."),
    METHOD(rec_put, METH_O, "($self, rec, /)", "Drop this life's reference. Return True if a living process still references the record."),
    METHOD(rec_free, METH_VARARGS, "($self, rec, gen, /)",
           "Free a record unless a living process references it. Return whether it was freed."),
    METHOD(rec_info, METH_O, "($self, rec, /)",
           "Return what a record says, all of it of one buffer; None if it is free or another one by now."),
    METHOD(rec_name, METH_VARARGS, "($self, rec, name, /)", "Rename a buffer."),
    METHOD(rec_layout, METH_VARARGS, "($self, rec, gen, /)",
           "Return (which of a picture's buffers it is, the layout's bytes) of a buffer, None if it has no layout or is gone."),
    METHOD(rec_set_layout, METH_VARARGS, "($self, rec, gen, part, layout, /)",
           "Give a buffer its layout. Return False if it has one already, or is gone."),
    METHOD(rec_set_absent, METH_VARARGS, "($self, rec, gen, passes, ns, /)",
           "Note how many passes found no reference lock on the buffer, and when the last one was (CLOCK_MONOTONIC ns)."),
    METHOD(rec_set_resv, METH_VARARGS, "($self, rec, resv, gen, /)",
           "Note the record + 1 of the reservation object that the exporter gave, and that record's generation."),
    METHOD(rec_torn, METH_O, "($self, rec, /)", "Return the errno of the write() that did not end well, 0: the content is whole."),
    METHOD(rec_holders, METH_O, "($self, rec, /)", "Return the slot indices of the living processes that reference a record."),
    METHOD(rec_list, METH_NOARGS, "($self, /)", "Return the numbers of all live records."),
    METHOD(rec_orphans, METH_NOARGS, "($self, /)",
           "Return (rec, gen, dev, ino, absent, absent_ns) of each live record that no living process references."),
    {0}};
