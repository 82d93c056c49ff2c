/* reap.c - end what a dead life left in the domain: fences, contexts with their locks, references to records, the table lock, chunks.
 *
 * The caller holds the write lock on the life's byte, which proves the death and keeps other reapers out. Each function can be called again
 * after a reaper died in the middle of it.
 */
#include "domain/reap.h"
#include "domain/fence.h"
#include "domain/lend.h"
#include "domain/step.h"

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

static PyObject *chunk_return(Shm *s, PyObject *args) {
  unsigned c, life;
  if (!PyArg_ParseTuple(args, "II", &c, &life)) return NULL;
  if (c >= DB_MAX_CHUNKS) {
    shm_corrupt(s, "a chunk lies outside of its table");
    return NULL;
  }
  uint64_t e = atomic_load(chunk_entry(s, c));
  if (CT_LIFE(e) == life) atomic_compare_exchange_strong(chunk_entry(s, c), &e, CT_MAKE(CT_TYPE(e), CT_ORD(e), 0));
  STEP(reap_chunk); /* ownerless: the next life that needs one takes it */
  Py_RETURN_NONE;
}

/* The content is torn if the fence is a granted write() of the record's present use. */
static void mark_torn(Shm *s, db_fence *f, uint32_t life) {
  const uint32_t granted_write = FF_ACCESS | FF_WRITE | FF_GRANTED;
  if ((atomic_load(&f->flags) & granted_write) != granted_write) return;
  uint32_t rec = atomic_load(&f->rec);
  db_rec *r = rec ? rec_at(s, rec - 1) : NULL;
  if (r && atomic_load(&r->gen) == atomic_load(&f->rec_gen)) {
    r->torn_pid = atomic_load(&life_slot(s, life)->pid);
    atomic_store(&r->torn, EOWNERDEAD);
  }
  STEP(reap_torn); /* torn and pending: the next reaper marks it again. A reader that comes in after the fence finds the mark */
}

static PyObject *reap_fences(Shm *s, PyObject *args) {
  unsigned c, n = 0;
  int error;
  if (!PyArg_ParseTuple(args, "Ii", &c, &error)) return NULL;
  for (uint32_t i = 0; i < FENCES_PER; i++) {
    uint32_t slot = c * FENCES_PER + i;
    db_fence *f = fence_at(s, slot);
    if (!f) {
      shm_corrupt(s, "a chunk lies outside of it");
      return NULL;
    }
    uint32_t word = atomic_load(&f->word);
    uint64_t handle = H_MAKE(slot, END_GEN(atomic_load(&f->end)));
    if (word & FW_SIGNALED) {
      if (word & FW_SYNC) fence_wake_sync_files(s, handle, f); /* the owner died after signaling it and before waking them */
      continue;
    }
    mark_torn(s, f, fence_owner(s, handle));
    fence_finish(s, handle, f, error, 0, fence_for_all(f));
    STEP(reap_fence); /* signaled: the next reaper goes on with the others */
    n++;
  }
  return PyLong_FromUnsignedLong(n);
}

static PyObject *reap_life_chunk(Shm *s, PyObject *args) {
  unsigned c, type;
  if (!PyArg_ParseTuple(args, "II", &c, &type)) return NULL;
  char *p = type == CH_LIFE || type == CH_CTX ? chunk_at(s, c, type) : NULL;
  if (!p) {
    shm_corrupt(s, "a chunk lies outside of it");
    return NULL;
  }
  for (uint32_t i = type == CH_LIFE ? CTX_FIRST_IN_LIFE : 0; i < CTX_PER; i++) {
    db_ctx *x = (db_ctx *)p + i;
    if (!atomic_load(&x->life)) continue;
    resv_return_dead(s, x, (uint64_t)atomic_load(&x->gen) << 32 | (c * CTX_PER + i)); /* before another process may take the lock */
    atomic_fetch_add(&x->gen, 1); /* from here on every lock that it named can be taken */
    atomic_store(&x->waits_on, 0);
    atomic_store(&x->life, 0);
    STEP(reap_ctx); /* closed: the next reaper goes on with the others */
  }
  if (type == CH_LIFE)
    for (uint32_t i = 0; i < REC_CHUNKS; i++) atomic_store((a64 *)p + i, 0);
  Py_RETURN_NONE;
}

static PyObject *reap_table_lock(Shm *s, PyObject *arg) {
  uint32_t life;
  if (arg_u32(arg, &life)) return NULL;
  if (!my_life(s)) Py_RETURN_FALSE; /* its waiters take the lock themselves once the life is no longer current */
  a32 *w = &hdr(s)->table_lock;
  uint32_t v = atomic_load(w);
  if ((v & ~TL_WAITERS) != life || !atomic_compare_exchange_strong(w, &v, my_life(s) | TL_WAITERS)) Py_RETURN_FALSE;
  STEP(table_stolen); /* derived parts are wrong, and the lock names this process: the next one that takes it rebuilds them */
  table_rebuild(s);
  STEP(table_rebuilt); /* whole, and the lock names this process */
  table_unlock(s);
  Py_RETURN_TRUE;
}

PyMethodDef reap_methods[] = {
    METHOD(chunks_of, METH_O, "($self, life, /)", "Return [(chunk, type)] of the chunks that a life owns."),
    METHOD(chunk_return, METH_VARARGS, "($self, chunk, life, /)", "Let a chunk of the life have no owner."),
    METHOD(reap_life_chunk, METH_VARARGS, "($self, chunk, type, /)",
           "Close the contexts and drop the references in a chunk of a dead life."),
    METHOD(reap_table_lock, METH_O, "($self, life, /)",
           "Take the table lock from a dead life and repair the table. Return whether it held it."),
    METHOD(reap_fences, METH_VARARGS, "($self, chunk, error, /)", "Signal the pending fences in a chunk of a dead life. Return how many."),
    {0}};
