/* pools.c - slots that one life owns: contexts and timelines. Only the owner writes them, and the reaper once the owner is dead. */
#include "domain/table.h"

static PyObject *ctx_open(Shm *s, PyObject *args) { /* ctx_open(index, tid, real, stamp) -> word */
  unsigned i, tid, real;
  unsigned long long stamp;
  if (!PyArg_ParseTuple(args, "IIIK", &i, &tid, &real, &stamp)) return NULL;
  db_ctx *c = ctx_at(s, i);
  if (!c) {
    shm_corrupt(s, "a context outside of the file");
    return NULL;
  }
  uint32_t gen = atomic_load(&c->gen) + 1;
  if (!gen) gen = 1;
  atomic_store(&c->stamp, stamp);
  atomic_store(&c->tid, tid);
  atomic_store(&c->real, real);
  atomic_store(&c->waits_on, 0);
  atomic_store(&c->return_to, 0);
  atomic_store(&c->gen, gen);
  atomic_store(&c->life, my_life(s));
  return PyLong_FromUnsignedLongLong((uint64_t)gen << 32 | i);
}

static PyObject *ctx_close(Shm *s, PyObject *arg) {
  unsigned long long w = PyLong_AsUnsignedLongLong(arg);
  if (w == (unsigned long long)-1 && PyErr_Occurred()) return NULL;
  db_ctx *c = ctx_at(s, CTX_INDEX(w));
  if (c && my_life(s) && atomic_load(&c->gen) == CTX_GEN(w)) {
    atomic_fetch_add(&c->gen, 1);
    atomic_store(&c->waits_on, 0);
    atomic_store(&c->life, 0);
  }
  Py_RETURN_NONE;
}

static PyObject *ctx_waits(Shm *s, PyObject *args) { /* ctx_waits(word, handle, stamp): published while waiting; 0 after */
  unsigned long long w, h, stamp;
  if (!PyArg_ParseTuple(args, "KKK", &w, &h, &stamp)) return NULL;
  db_ctx *c = ctx_at(s, CTX_INDEX(w));
  if (c && atomic_load(&c->gen) == CTX_GEN(w)) {
    atomic_store(&c->wait_stamp, stamp);
    atomic_store(&c->waits_on, h);
  }
  Py_RETURN_NONE;
}

static PyObject *ctx_info(Shm *s, PyObject *arg) { /* (life, tid, real, stamp, waits_on, wait_stamp) | None */
  unsigned long long w = PyLong_AsUnsignedLongLong(arg);
  if (w == (unsigned long long)-1 && PyErr_Occurred()) return NULL;
  db_ctx *c = ctx_at(s, CTX_INDEX(w));
  if (!c || atomic_load(&c->gen) != CTX_GEN(w)) Py_RETURN_NONE;
  return Py_BuildValue("IIIKKK", atomic_load(&c->life), atomic_load(&c->tid), atomic_load(&c->real), atomic_load(&c->stamp),
                       atomic_load(&c->waits_on), atomic_load(&c->wait_stamp));
}

static PyObject *timeline_open(Shm *s, PyObject *args) { /* timeline_open(index, context, driver, name) -> gen */
  unsigned i;
  unsigned long long context;
  const char *driver, *name;
  Py_ssize_t nd, nn;
  if (!PyArg_ParseTuple(args, "IKy#y#", &i, &context, &driver, &nd, &name, &nn)) return NULL;
  db_timeline *t = timeline_at(s, i);
  if (!t) {
    shm_corrupt(s, "a timeline outside of the file");
    return NULL;
  }
  if (nd > 63 || nn > 63) {
    PyErr_SetString(PyExc_ValueError, "timeline_open: names are at most 63 bytes");
    return NULL;
  }
  atomic_fetch_add(&t->gen, 1);
  bytes_follow();
  memset(t->driver, 0, 128);
  memcpy(t->driver, driver, (size_t)nd);
  memcpy(t->name, name, (size_t)nn);
  for (int k = 0; k < 64; k++) atomic_store(&t->ring[k], 0);
  atomic_store(&t->context, context);
  atomic_store(&t->life, my_life(s));
  atomic_store(&t->open, 1);
  return PyLong_FromUnsignedLong(atomic_load(&t->gen));
}

static PyObject *timeline_close(Shm *s, PyObject *arg) {
  unsigned long i = PyLong_AsUnsignedLong(arg);
  if (i == (unsigned long)-1 && PyErr_Occurred()) return NULL;
  db_timeline *t = timeline_at(s, (uint32_t)i);
  if (t) atomic_store(&t->open, 0);
  Py_RETURN_NONE;
}

static PyObject *timeline_info(Shm *s, PyObject *arg) { /* (gen, open, context, life, driver, name) of one use of the slot | None */
  unsigned long i = PyLong_AsUnsignedLong(arg);
  if (i == (unsigned long)-1 && PyErr_Occurred()) return NULL;
  db_timeline *t = timeline_at(s, (uint32_t)i);
  if (!t) Py_RETURN_NONE;
  char driver[64], name[64];
  uint32_t gen, open, life;
  uint64_t context;
  for (int tries = 0;; tries++) {
    gen = atomic_load(&t->gen);
    open = atomic_load(&t->open);
    context = atomic_load(&t->context);
    life = atomic_load(&t->life);
    memcpy(driver, t->driver, sizeof driver);
    memcpy(name, t->name, sizeof name);
    bytes_read();
    if (atomic_load(&t->gen) == gen) break; /* else it was opened anew while we copied */
    if (tries < 1000) continue;
    *driver = *name = 0;
    break;
  }
  return Py_BuildValue("IIKIy#y#", gen, open, (unsigned long long)context, life, driver, (Py_ssize_t)strnlen(driver, 63), name,
                       (Py_ssize_t)strnlen(name, 63));
}

PyMethodDef pool_methods[] = {
#define M(n, flags, doc) {#n, (PyCFunction)n, flags, doc}
    M(ctx_open, METH_VARARGS, "Open a context (index, tid, real, stamp) -> word."),
    M(ctx_close, METH_O, "Close a context."),
    M(ctx_waits, METH_VARARGS, "Publish (word, handle, stamp)."),
    M(ctx_info, METH_O, "What a context says."),
    M(timeline_open, METH_VARARGS, "Open (index, context, driver, name) -> generation."),
    M(timeline_close, METH_O, "Close a timeline."),
    M(timeline_info, METH_O, "What a timeline says."),
    {0}};
