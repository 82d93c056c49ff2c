/* pools.c - contexts and timelines: slots that one life owns. Only the owner writes them, and once it is dead its reaper. */
#include "domain/pools.h"
#include "domain/step.h"
#include "domain/table.h"

#define NAME_MAX_BYTES 63

/* Does this process own the chunk? It may have left since the caller took the slot, and then it is another life's. 0, or raise. */
static int need_owner(Shm *s, uint32_t chunk, const char *op) {
  if (my_life(s) && CT_LIFE(atomic_load(chunk_entry(s, chunk))) == my_life(s)) return 0;
  return shm_fail(s, EOWNERDEAD, op, "an object of an earlier life", "this process left the domain meanwhile", "make a new one");
}

uint64_t pool_ctx_open(Shm *s, uint32_t i, uint32_t tid, int real, uint64_t stamp) {
  db_ctx *c = ctx_at(s, i);
  if (!c) {
    shm_corrupt(s, "a context lies outside of it");
    return 0;
  }
  if (need_owner(s, i / CTX_PER, "open a context")) return 0;
  uint32_t gen = atomic_load(&c->gen) + 1;
  if (!gen) gen = 1;
  atomic_store(&c->stamp, stamp);
  atomic_store(&c->tid, tid);
  atomic_store(&c->real, real != 0);
  atomic_store(&c->waits_on, 0);
  atomic_store(&c->return_to, 0);
  atomic_store(&c->gen, gen);
  atomic_store(&c->life, my_life(s)); /* last: a context without a life is closed, whatever the other fields say */
  return (uint64_t)gen << 32 | i;
}

void pool_ctx_close(Shm *s, uint64_t w) {
  db_ctx *c = ctx_at(s, CTX_INDEX(w));
  if (!c || !my_life(s) || atomic_load(&c->gen) != CTX_GEN(w)) return;
  STEP_NOTE(ctx_closing, c, w);
  atomic_fetch_add(&c->gen, 1); /* from here on every lock that it named can be taken */
  atomic_store(&c->waits_on, 0);
  atomic_store(&c->life, 0);
}

static PyObject *ctx_open(Shm *s, PyObject *args) {
  unsigned i, tid, real;
  unsigned long long stamp;
  if (!PyArg_ParseTuple(args, "IIIK", &i, &tid, &real, &stamp)) return NULL;
  uint64_t word = pool_ctx_open(s, i, tid, (int)real, stamp);
  return word ? PyLong_FromUnsignedLongLong(word) : NULL;
}

static PyObject *ctx_close(Shm *s, PyObject *arg) {
  uint64_t w;
  if (arg_u64(arg, &w)) return NULL;
  pool_ctx_close(s, w);
  Py_RETURN_NONE;
}

static PyObject *ctx_waits(Shm *s, PyObject *args) {
  unsigned long long w, h, stamp;
  if (!PyArg_ParseTuple(args, "KKK", &w, &h, &stamp)) return NULL;
  db_ctx *c = ctx_at(s, CTX_INDEX(w));
  if (c && atomic_load(&c->gen) == CTX_GEN(w)) {
    atomic_store(&c->waits_on, 0); /* no wait has the stamp of another: ctx_info() reads this word before the stamp, and after it */
    atomic_store(&c->wait_stamp, stamp);
    atomic_store(&c->waits_on, h);
  }
  Py_RETURN_NONE;
}

static PyObject *ctx_info(Shm *s, PyObject *arg) {
  uint64_t w;
  if (arg_u64(arg, &w)) return NULL;
  db_ctx *c = ctx_at(s, CTX_INDEX(w));
  if (!c) Py_RETURN_NONE;
  for (int tries = 0; tries < 1000; tries++) {
    uint64_t waits_on = atomic_load(&c->waits_on);
    uint64_t wait_stamp = atomic_load(&c->wait_stamp);
    uint32_t life = atomic_load(&c->life), tid = atomic_load(&c->tid), real = atomic_load(&c->real);
    uint64_t stamp = atomic_load(&c->stamp);
    STEP(ctx_read);
    if (atomic_load(&c->waits_on) != waits_on) continue;    /* another wait began or ended: its stamp is another one */
    if (atomic_load(&c->gen) != CTX_GEN(w)) Py_RETURN_NONE; /* last: whatever was read was of this use of the slot, or doesn't count */
    return Py_BuildValue("IIIKKK", life, tid, real, stamp, waits_on, wait_stamp);
  }
  Py_RETURN_NONE; /* only a lie of the file changes that often */
}

int pool_timeline_open(Shm *s, uint32_t i, uint64_t context, const char *driver, size_t ndriver, const char *name, size_t nname) {
  db_timeline *t = timeline_at(s, i);
  if (!t) return shm_corrupt(s, "a timeline lies outside of it");
  if (ndriver > NAME_MAX_BYTES || nname > NAME_MAX_BYTES) {
    PyErr_SetString(PyExc_ValueError, "timeline_open: a name must have at most 63 bytes");
    return -1;
  }
  if (need_owner(s, i / TIMELINES_PER, "open a timeline")) return -1;
  uint32_t gen = atomic_load(&t->gen) + 1;
  db_origin *o = &t->origin[gen & 1];
  atomic_store(&t->open, 0);
  bytes_follow(); /* a reader that still copies this half must see that the other one counts */
  memset(o->driver, 0, sizeof o->driver);
  memset(o->name, 0, sizeof o->name);
  memcpy(o->driver, driver, ndriver);
  STEP(timeline_half); /* free, with the names of its last use */
  memcpy(o->name, name, nname);
  atomic_store(&o->context, context);
  atomic_store(&o->life, my_life(s));
  for (uint32_t k = 0; k < RING_SLOTS; k++) atomic_store(&t->ring[k], 0);
  STEP(timeline_filled); /* the same */
  atomic_store(&t->gen, gen);
  STEP(timeline_switched); /* free, with the new names */
  atomic_store(&t->open, 1);
  return 0;
}

static PyObject *timeline_open(Shm *s, PyObject *args) {
  unsigned i;
  unsigned long long context;
  const char *driver, *name;
  Py_ssize_t ndriver, nname;
  if (!PyArg_ParseTuple(args, "IKy#y#", &i, &context, &driver, &ndriver, &name, &nname)) return NULL;
  if (pool_timeline_open(s, i, context, driver, (size_t)ndriver, name, (size_t)nname)) return NULL;
  return PyLong_FromUnsignedLong(atomic_load(&timeline_at(s, i)->gen));
}

static PyObject *timeline_close(Shm *s, PyObject *arg) {
  uint32_t i;
  if (arg_u32(arg, &i)) return NULL;
  db_timeline *t = timeline_at(s, i);
  if (t && my_life(s) && CT_LIFE(atomic_load(chunk_entry(s, i / TIMELINES_PER))) == my_life(s)) atomic_store(&t->open, 0);
  Py_RETURN_NONE;
}

static PyObject *timeline_info(Shm *s, PyObject *arg) {
  uint32_t i;
  if (arg_u32(arg, &i)) return NULL;
  db_timeline *t = timeline_at(s, i);
  if (!t) Py_RETURN_NONE;
  char driver[sizeof t->origin->driver], name[sizeof t->origin->name];
  uint32_t gen, open, life;
  uint64_t context;
  for (int tries = 0;; tries++) {
    gen = atomic_load(&t->gen);
    db_origin *o = &t->origin[gen & 1];
    open = atomic_load(&t->open);
    context = atomic_load(&o->context);
    life = atomic_load(&o->life);
    memcpy(driver, o->driver, sizeof driver);
    memcpy(name, o->name, sizeof name);
    bytes_read();
    if (atomic_load(&t->gen) == gen) break; /* else the slot was opened twice during the copy, or is about to be */
    if (tries < 1000) continue;
    *driver = *name = 0;
    break;
  }
  return Py_BuildValue("IIKIy#y#", gen, open, (unsigned long long)context, life, driver, (Py_ssize_t)strnlen(driver, NAME_MAX_BYTES), name,
                       (Py_ssize_t)strnlen(name, NAME_MAX_BYTES));
}

PyMethodDef pool_methods[] = {
    METHOD(ctx_open, METH_VARARGS, "($self, index, tid, real, stamp, /)",
           "Open a context and return its word; real: a WwAcquireContext, not one made for a single lock or access."),
    METHOD(ctx_close, METH_O, "($self, ctx, /)", "Close a context: every lock that it holds can be taken from then on."),
    METHOD(ctx_waits, METH_VARARGS, "($self, ctx, handle, stamp, /)", "Publish for which fence a context waits, 0: none."),
    METHOD(ctx_info, METH_O, "($self, ctx, /)", "Return (life, tid, real, stamp, waits_on, wait_stamp), None for a closed context."),
    METHOD(timeline_open, METH_VARARGS, "($self, index, context, driver, name, /)", "Open a timeline and return its generation."),
    METHOD(timeline_close, METH_O, "($self, index, /)", "Close a timeline: its slot can be used again."),
    METHOD(timeline_info, METH_O, "($self, index, /)",
           "Return (gen, open, context, life, driver, name), all of one use of the slot; None if there is no such slot."),
    {0}};
