/* reap.c - what a dead life left in the domain is ended: fences, contexts, held buffers, the table lock; then its chunks are ownerless. */
#include "domain/reap.h"
#include "domain/fence.h"
#include "domain/lend.h"
#include "domain/step.h"
#include "domain/table.h"

static PyObject *chunks_of(Shm *s, PyObject *arg) { /* chunks_of(life) -> [(chunk, type)] */
  unsigned long life = PyLong_AsUnsignedLong(arg);
  if (life == (unsigned long)-1 && PyErr_Occurred()) return NULL;
  PyObject *out = PyList_New(0);
  uint32_t n = atomic_load(&hdr(s)->nchunks);
  for (uint32_t c = 0; out && c < n && c < DB_MAX_CHUNKS; c++) {
    uint64_t e = atomic_load(chunk_entry(s, c));
    if (CT_LIFE(e) != life) continue;
    PyObject *x = Py_BuildValue("II", c, CT_TYPE(e));
    if (!x || PyList_Append(out, x)) Py_CLEAR(out);
    Py_XDECREF(x);
  }
  return out;
}

static PyObject *chunk_return(Shm *s, PyObject *args) { /* chunk_return(chunk, life): ownerless again */
  unsigned c, life;
  if (!PyArg_ParseTuple(args, "II", &c, &life)) return NULL;
  if (c >= DB_MAX_CHUNKS) {
    shm_corrupt(s, "a chunk outside of the table");
    return NULL;
  }
  uint64_t e = atomic_load(chunk_entry(s, c));
  if (CT_LIFE(e) == life) atomic_compare_exchange_strong(chunk_entry(s, c), &e, CT_MAKE(CT_TYPE(e), CT_ORD(e), 0));
  STEP(reap_chunk);
  Py_RETURN_NONE;
}

static PyObject *reap_fences(Shm *s, PyObject *args) { /* (chunk, error): end what is pending in a dead life's chunk -> count */
  unsigned c;
  int error;
  if (!PyArg_ParseTuple(args, "Ii", &c, &error)) return NULL;
  unsigned n = 0;
  for (uint32_t i = 0; i < FENCES_PER; i++) {
    uint32_t slot = c * FENCES_PER + i;
    db_fence *f = fence_at(s, slot);
    if (!f) {
      shm_corrupt(s, "a chunk outside of the file");
      return NULL;
    }
    uint32_t word = atomic_load(&f->word);
    if (word & FW_SIGNALED) {
      if (word & FW_SYNC) ring_syncs(s, H_MAKE(slot, END_GEN(atomic_load(&f->end))), f); /* the owner died between ending and ringing */
      continue;
    }
    uint32_t flags = atomic_load(&f->flags), rec = atomic_load(&f->rec);
    if ((flags & (FF_ACCESS | FF_WRITE | FF_GRANTED)) == (FF_ACCESS | FF_WRITE | FF_GRANTED)) {
      db_rec *r = rec ? rec_at(s, rec - 1) : NULL;
      if (r && atomic_load(&r->gen) == atomic_load(&f->rec_gen)) {
        db_life *l = life_slot(s, CT_LIFE(atomic_load(chunk_entry(s, c))));
        r->torn_pid = atomic_load(&l->pid);
        atomic_store(&r->torn, EOWNERDEAD);
      }
      STEP(reap_torn); /* the mark is there before the fence ends */
    }
    fence_finish(s, H_MAKE(slot, END_GEN(atomic_load(&f->end))), f, error, 0, for_anybody(f));
    STEP(reap_fence);
    n++;
  }
  return PyLong_FromUnsignedLong(n);
}

static PyObject *reap_life_chunk(Shm *s, PyObject *args) { /* (chunk, type): contexts get a new generation, bits go */
  unsigned c, type;
  if (!PyArg_ParseTuple(args, "II", &c, &type)) return NULL;
  char *p = type == CH_LIFE || type == CH_CTX ? chunk_at(s, c, type) : NULL;
  if (!p) {
    shm_corrupt(s, "a chunk outside of the file");
    return NULL;
  }
  for (uint32_t i = type == CH_LIFE ? CTX_FIRST_IN_LIFE : 0; i < CTX_PER; i++) {
    db_ctx *x = (db_ctx *)p + i;
    if (!atomic_load(&x->life)) continue;
    resv_bequeath(s, x, (uint64_t)atomic_load(&x->gen) << 32 | (c * CTX_PER + i)); /* before anybody may take it */
    atomic_fetch_add(&x->gen, 1);                                                  /* every lock it named can be taken from now on */
    atomic_store(&x->waits_on, 0);
    atomic_store(&x->life, 0);
    STEP(reap_ctx);
  }
  if (type == CH_LIFE)
    for (uint32_t i = 0; i < REC_CHUNKS; i++) atomic_store((a64 *)p + i, 0);
  Py_RETURN_NONE;
}

static PyObject *reap_table_lock(Shm *s, PyObject *arg) { /* the dead life's hold on the table lock ends here */
  unsigned long life = PyLong_AsUnsignedLong(arg);
  if (life == (unsigned long)-1 && PyErr_Occurred()) return NULL;
  if (!my_life(s)) Py_RETURN_FALSE; /* its waiters take it themselves once the life is no longer current */
  a32 *w = &hdr(s)->table_lock;
  uint32_t v = atomic_load(w);
  if ((v & ~TL_WAITERS) != life || !atomic_compare_exchange_strong(w, &v, my_life(s) | TL_WAITERS)) Py_RETURN_FALSE;
  STEP(table_stolen);
  table_rebuild(s);
  STEP(table_rebuilt);
  table_unlock(s);
  Py_RETURN_TRUE;
}

PyMethodDef reap_methods[] = {METHOD(chunks_of, METH_O, "Chunks of a life: [(chunk, type)]."),
                              METHOD(chunk_return, METH_VARARGS, "Give (chunk, life) back."),
                              METHOD(reap_life_chunk, METH_VARARGS, "End the contexts and holds in (chunk, type)."),
                              METHOD(reap_table_lock, METH_O, "Take the table lock from a dead life and repair."),
                              METHOD(reap_fences, METH_VARARGS, "End a dead life's fences."),
                              {0}};
