/* records.c - the record of a buffer: made, found, held, named, freed. What changes one under the table lock names its steps; what a
 * death between two of them leaves is what table_rebuild makes whole. */
#include "domain/step.h"
#include "domain/table.h"

static void set_bounded(char *to, uint8_t *len, const char *from, Py_ssize_t n) {
  memcpy(to, from, (size_t)n);
  *len = (uint8_t)n;
}

static PyObject *rec_create(Shm *s, PyObject *args) {
  /* rec_create(dev, ino, size, nonce, exp_name, home, name|None, kind, pid, created) -> (rec, gen, made) */
  unsigned long long dev, ino, size, created;
  const char *nonce, *exp, *home, *name;
  Py_ssize_t nnonce, nexp, nhome, nname;
  unsigned kind, pid;
  if (!PyArg_ParseTuple(args, "KKKy#y#y#z#IIK", &dev, &ino, &size, &nonce, &nnonce, &exp, &nexp, &home, &nhome, &name, &nname, &kind, &pid,
                        &created))
    return NULL;
  if (nnonce != 16 || nexp > 31 || nhome > 31 || (name && nname > 31)) {
    PyErr_SetString(PyExc_ValueError, "rec_create: nonce is 16 bytes, names at most 31");
    return NULL;
  }
  if (table_lock(s)) return NULL;
  STEP(rec_locked);
  uint32_t i = 0;
  db_rec *r = ino ? find_rec(s, dev, ino, &i) : NULL;
  uint32_t me = my_life(s);
  if (r && !memcmp(r->nonce, nonce, 16)) { /* another receiver was quicker: its record it is */
    a64 *w = held_word(s, LIFE_INDEX(me), i);
    if (w) atomic_fetch_or(w, 1ull << (i % RECS_PER));
    table_unlock(s);
    return Py_BuildValue("IIO", i, atomic_load(&r->gen), Py_False);
  }
  if (r) { /* the inode number was used again, so the buffer of this record is gone for certain */
    atomic_store(&r->state, REC_DYING);
    unlink_rec(s, i, r);
    clear_rec(s, i, r);
    atomic_store(&r->free_next, atomic_load(&hdr(s)->rec_free));
    atomic_store(&hdr(s)->rec_free, i + 1);
  }
  uint32_t v = atomic_load(&hdr(s)->rec_free);
  r = v ? rec_at(s, v - 1) : NULL;
  if (v && (!r || atomic_load(&r->state) != REC_FREE)) { /* a free list that lies is made anew */
    table_rebuild(s);
    v = atomic_load(&hdr(s)->rec_free);
    r = v ? rec_at(s, v - 1) : NULL;
  }
  if (!v) {
    int64_t c = chunk_grow(s, CH_REC, 0);
    if (c < 0) {
      table_unlock(s);
      grow_failed(s, c);
      return NULL;
    }
    for (uint32_t k = RECS_PER; k-- > 0;) {
      db_rec *x = rec_at(s, (uint32_t)c * RECS_PER + k);
      if (!x) break;
      atomic_store(&x->gen, 1);
      atomic_store(&x->free_next, atomic_load(&hdr(s)->rec_free));
      atomic_store(&hdr(s)->rec_free, (uint32_t)c * RECS_PER + k + 1);
    }
    v = atomic_load(&hdr(s)->rec_free);
    r = v ? rec_at(s, v - 1) : NULL;
  }
  if (!r) {
    table_unlock(s);
    shm_corrupt(s, "a record outside of the file");
    return NULL;
  }
  i = v - 1;
  atomic_store(&hdr(s)->rec_free, atomic_load(&r->free_next));
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
  if (name) {
    memcpy(r->name[0], name, (size_t)nname);
    r->name_len[0] = (uint8_t)(nname + 1);
  }
  STEP(rec_filled); /* FREE and in no list: table_rebuild finds it */
  a64 *w = held_word(s, LIFE_INDEX(me), i);
  if (!w) {
    table_unlock(s);
    shm_corrupt(s, "a life without its chunk");
    return NULL;
  }
  atomic_fetch_or(w, 1ull << (i % RECS_PER));
  STEP(rec_held); /* our bit on a FREE record: cleared with our life */
  atomic_store(&r->state, REC_LIVE);
  STEP(rec_live); /* LIVE, not yet found by its inode: table_rebuild links it, the sweep frees it */
  if (ino) link_rec(s, i, r);
  STEP(rec_linked);
  table_unlock(s);
  return Py_BuildValue("IIO", i, atomic_load(&r->gen), Py_True);
}

static PyObject *rec_find(Shm *s, PyObject *args) { /* rec_find(dev, ino) -> (rec, gen, nonce) | None; no lock */
  unsigned long long dev, ino;
  if (!PyArg_ParseTuple(args, "KK", &dev, &ino)) return NULL;
  uint32_t i;
  db_rec *r = find_rec(s, dev, ino, &i);
  if (!r) Py_RETURN_NONE;
  uint32_t gen = atomic_load(&r->gen);
  char nonce[16];
  memcpy(nonce, r->nonce, 16);
  bytes_read();
  /* the generation last: it only grows, so these are all of one use of the slot */
  if (atomic_load(&r->state) != REC_LIVE || r->dev != dev || r->ino != ino || atomic_load(&r->gen) != gen) Py_RETURN_NONE;
  return Py_BuildValue("IIy#", i, gen, nonce, (Py_ssize_t)16);
}

static PyObject *rec_hold(Shm *s, PyObject *args) { /* rec_hold(rec, gen) -> still that record */
  unsigned i, gen;
  if (!PyArg_ParseTuple(args, "II", &i, &gen)) return NULL;
  if (shm_need_life(s, "hold")) return NULL;
  db_rec *r = rec_at(s, i);
  a64 *w = r ? held_word(s, LIFE_INDEX(my_life(s)), i) : NULL;
  if (!w) Py_RETURN_FALSE;
  uint64_t bit = 1ull << (i % RECS_PER), before = atomic_fetch_or(w, bit);
  /* the sweep stores DYING and then looks at the bits: one of us sees the other */
  if (atomic_load(&r->state) == REC_LIVE && atomic_load(&r->gen) == gen) Py_RETURN_TRUE;
  if (!(before & bit)) atomic_fetch_and(w, ~bit);
  Py_RETURN_FALSE;
}

static PyObject *rec_drop(Shm *s, PyObject *arg) { /* rec_drop(rec) -> a living process still holds it */
  unsigned long i = PyLong_AsUnsignedLong(arg);
  if (i == (unsigned long)-1 && PyErr_Occurred()) return NULL;
  if (!my_life(s)) Py_RETURN_TRUE;
  a64 *w = rec_at(s, (uint32_t)i) ? held_word(s, LIFE_INDEX(my_life(s)), (uint32_t)i) : NULL;
  if (w) atomic_fetch_and(w, ~(1ull << (i % RECS_PER)));
  return PyBool_FromLong(held_by_living(s, (uint32_t)i));
}

static PyObject *rec_free(Shm *s, PyObject *args) { /* rec_free(rec, gen) -> freed; False while a living process holds it */
  unsigned i, gen;
  if (!PyArg_ParseTuple(args, "II", &i, &gen)) return NULL;
  if (table_lock(s)) return NULL;
  db_rec *r = rec_at(s, i);
  int done = 0;
  if (r && atomic_load(&r->gen) == gen && atomic_load(&r->state) == REC_LIVE) {
    atomic_store(&r->state, REC_DYING);
    STEP(rec_dying);
    if (held_by_living(s, i))
      atomic_store(&r->state, REC_LIVE);
    else {
      if (r->ino) unlink_rec(s, i, r);
      STEP(rec_unlinked); /* DYING in no chain: table_rebuild finishes it */
      clear_rec(s, i, r);
      STEP(rec_freed); /* FREE in no list: table_rebuild finds it */
      atomic_store(&r->free_next, atomic_load(&hdr(s)->rec_free));
      atomic_store(&hdr(s)->rec_free, i + 1);
      done = 1;
    }
  }
  table_unlock(s);
  return PyBool_FromLong(done);
}

static int rec_there(Shm *s, uint32_t i, db_rec *r) {
  uint32_t state = r ? atomic_load(&r->state) : REC_FREE;
  if (state == REC_DYING) { /* rec_free looks who holds it, and gives up when it sees our bit */
    a64 *held = my_life(s) ? held_word(s, LIFE_INDEX(my_life(s)), i) : NULL;
    if (held && atomic_load(held) >> (i % RECS_PER) & 1) state = REC_LIVE;
  }
  return state == REC_LIVE;
}

static PyObject *rec_info(Shm *s,
                          PyObject *arg) { /* what a record says, all of it of one buffer; None: free, or given to another meanwhile */
  unsigned long i = PyLong_AsUnsignedLong(arg);
  if (i == (unsigned long)-1 && PyErr_Occurred()) return NULL;
  db_rec *r = rec_at(s, (uint32_t)i);
  uint32_t gen = r ? atomic_load(&r->gen) : 0;
  if (!rec_there(s, (uint32_t)i, r)) Py_RETURN_NONE;
  char name[32];
  uint32_t v, len;
  int tries = 0;
  do { /* a rename writes the other half and then switches; two renames while we copy: copy again */
    v = atomic_load(&r->name_version);
    len = r->name_len[v & 1];
    memcpy(name, r->name[v & 1], 32);
    bytes_read();
  } while (atomic_load(&r->name_version) != v && ++tries < 1000);
  if (len > 32) len = 32;
  PyObject *n = len ? PyBytes_FromStringAndSize(name, len - 1) : Py_NewRef(Py_None);
  if (!n) return NULL;
  uint8_t el = r->exp_len > 31 ? 31 : r->exp_len, hl = r->home_len > 31 ? 31 : r->home_len;
  PyObject *out =
      Py_BuildValue("{sI,sK,sK,sK,sy#,sK,sI,sI,sI,si,sI,sI,sK,sI,sN,sy#,sy#}", "gen", gen, "dev", r->dev, "ino", r->ino, "size", r->size,
                    "nonce", (const char *)r->nonce, (Py_ssize_t)16, "created", r->created, "life", r->life, "pid", r->pid, "kind", r->kind,
                    "torn", atomic_load(&r->torn), "torn_pid", r->torn_pid, "absent", r->absent, "absent_ns", r->absent_ns, "resv",
                    r->foreign_resv, "name", n, "exp_name", r->exp_name, (Py_ssize_t)el, "home", r->home, (Py_ssize_t)hl);
  bytes_read();
  if (!out || (rec_there(s, (uint32_t)i, r) && atomic_load(&r->gen) == gen)) return out; /* in this order: see rec_find */
  Py_DECREF(out);
  Py_RETURN_NONE;
}

static PyObject *rec_name(Shm *s, PyObject *args) { /* rec_name(rec, bytes): rename */
  unsigned i;
  const char *name;
  Py_ssize_t n;
  if (!PyArg_ParseTuple(args, "Iy#", &i, &name, &n)) return NULL;
  if (n > 31) {
    PyErr_SetString(PyExc_ValueError, "rec_name: at most 31 bytes");
    return NULL;
  }
  if (table_lock(s)) return NULL;
  db_rec *r = rec_at(s, i);
  if (r && atomic_load(&r->state) == REC_LIVE) {
    uint32_t v = atomic_load(&r->name_version) + 1;
    bytes_follow(); /* who still copies this half must see that the other one counts */
    memset(r->name[v & 1], 0, 32);
    memcpy(r->name[v & 1], name, (size_t)n);
    r->name_len[v & 1] = (uint8_t)(n + 1);
    STEP(name_written); /* the old name still counts */
    atomic_store(&r->name_version, v);
    STEP(name_switched);
  }
  table_unlock(s);
  Py_RETURN_NONE;
}

static PyObject *rec_set(Shm *s, PyObject *args) { /* rec_set(rec, field, value) */
  unsigned i;
  const char *field;
  long long v;
  if (!PyArg_ParseTuple(args, "IsL", &i, &field, &v)) return NULL;
  db_rec *r = rec_at(s, i);
  if (!r) {
    shm_corrupt(s, "a record outside of the file");
    return NULL;
  }
  if (!strcmp(field, "torn"))
    atomic_store(&r->torn, (int32_t)v);
  else if (!strcmp(field, "torn_pid"))
    r->torn_pid = (uint32_t)v;
  else if (!strcmp(field, "absent"))
    r->absent = (uint32_t)v;
  else if (!strcmp(field, "absent_ns"))
    r->absent_ns = (uint64_t)v;
  else if (!strcmp(field, "resv"))
    r->foreign_resv = (uint32_t)v;
  else {
    PyErr_SetString(PyExc_ValueError, "rec_set: no such field");
    return NULL;
  }
  Py_RETURN_NONE;
}

static PyObject *rec_torn(Shm *s, PyObject *arg) { /* errno of the mark, 0: whole */
  unsigned long i = PyLong_AsUnsignedLong(arg);
  if (i == (unsigned long)-1 && PyErr_Occurred()) return NULL;
  db_rec *r = rec_at(s, (uint32_t)i);
  return PyLong_FromLong(r ? atomic_load(&r->torn) : 0);
}

static PyObject *rec_holders(Shm *s, PyObject *arg) { /* living life indices with a bit */
  unsigned long i = PyLong_AsUnsignedLong(arg);
  if (i == (unsigned long)-1 && PyErr_Occurred()) return NULL;
  PyObject *out = PyList_New(0);
  uint32_t high = atomic_load(&hdr(s)->life_high);
  for (uint32_t k = 0; out && k < high && k < DB_LIVES && rec_at(s, (uint32_t)i); k++) {
    if (atomic_load(&((db_life *)(s->base + OFF_LIVES) + k)->state) != LIFE_ALIVE) continue;
    a64 *w = held_word(s, k, (uint32_t)i);
    if (!w || !(atomic_load(w) >> (i % RECS_PER) & 1)) continue;
    PyObject *n = PyLong_FromUnsignedLong(k);
    if (!n || PyList_Append(out, n)) Py_CLEAR(out);
    Py_XDECREF(n);
  }
  return out;
}

static PyObject *rec_list(Shm *s, PyObject *unused) { /* every live record's number */
  PyObject *out = PyList_New(0);
  uint32_t n = atomic_load(&hdr(s)->nchunks);
  for (uint32_t c = 0; out && c < n && c < DB_MAX_CHUNKS; c++) {
    if (CT_TYPE(atomic_load(chunk_entry(s, c))) != CH_REC) continue;
    for (uint32_t k = 0; out && k < RECS_PER; k++) {
      db_rec *r = rec_at(s, c * RECS_PER + k);
      if (!r) break;
      if (atomic_load(&r->state) != REC_LIVE) continue;
      PyObject *x = PyLong_FromUnsignedLong(c * RECS_PER + k);
      if (!x || PyList_Append(out, x)) Py_CLEAR(out);
      Py_XDECREF(x);
    }
  }
  return out;
}

static PyObject *rec_orphans(Shm *s, PyObject *unused) { /* [(rec, gen, dev, ino, absent, absent_ns)] that no living process holds */
  PyObject *out = PyList_New(0);
  uint32_t n = atomic_load(&hdr(s)->nchunks);
  for (uint32_t c = 0; out && c < n && c < DB_MAX_CHUNKS; c++) {
    if (CT_TYPE(atomic_load(chunk_entry(s, c))) != CH_REC) continue;
    for (uint32_t i = c * RECS_PER; out && i < (c + 1) * RECS_PER; i++) {
      db_rec *r = rec_at(s, i);
      if (!r) break;
      if (atomic_load(&r->state) != REC_LIVE || held_by_living(s, i)) continue;
      PyObject *x = Py_BuildValue("IIKKIK", i, atomic_load(&r->gen), r->dev, r->ino, r->absent, r->absent_ns);
      if (!x || PyList_Append(out, x)) Py_CLEAR(out);
      Py_XDECREF(x);
    }
  }
  return out;
}

PyMethodDef record_methods[] = {
#define M(n, flags, doc) {#n, (PyCFunction)n, flags, doc}
    M(rec_create, METH_VARARGS, "Make or find the record of a buffer and hold it."),
    M(rec_find, METH_VARARGS, "Find a record by (dev, ino), without a lock."),
    M(rec_hold, METH_VARARGS, "Hold (rec, gen) for this life -> it is still that record."),
    M(rec_drop, METH_O, "Let go of a record -> a living process still holds it."),
    M(rec_free, METH_VARARGS, "Free (rec, gen) unless a living process holds it -> freed."),
    M(rec_info, METH_O, "What a record says, or None."),
    M(rec_name, METH_VARARGS, "Rename (rec, bytes)."),
    M(rec_set, METH_VARARGS, "Set (rec, field, value)."),
    M(rec_torn, METH_O, "The torn mark of a record."),
    M(rec_holders, METH_O, "Indices of the living lives that hold a record."),
    M(rec_list, METH_NOARGS, "Every live record."),
    M(rec_orphans, METH_NOARGS, "Live records that no living process holds."),
    {0}};
