/* module.c - dmabuf._native: the only place with raw memory. */
#include "domain/access.h"
#include "domain/fence_methods.h"
#include "domain/fence_type.h"
#include "domain/lend.h"
#include "domain/reap.h"
#include "domain/resv.h"
#include "domain/resv_lock.h"
#include "domain/shm.h"
#include "domain/sleep.h"
#include "domain/step.h"
#include "domain/table.h"
#include "domain/ticker.h"
#include "domain/words.h"
#include "fds/fds.h"
#include "memory/mapping.h"
#include "memory/window.h"

/* Python code can't call sys.unraisablehook: the default hook takes nothing but a structure that only the interpreter makes. */
static PyObject *unraisable(PyObject *self, PyObject *args) {
  PyObject *error, *where;
  (void)self;
  if (!PyArg_ParseTuple(args, "OO", &error, &where)) return NULL;
  if (!PyExceptionInstance_Check(error)) return PyErr_Format(PyExc_TypeError, "unraisable: an exception is expected");
  PyErr_SetObject((PyObject *)Py_TYPE(error), error);
  PyErr_WriteUnraisable(where);
  Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"unraisable", unraisable, METH_VARARGS, "Tell sys.unraisablehook of an exception, and where it was raised."}, {0}};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                                        "dmabuf._native",
                                        "Mapping, atomics, futex and the shared lock of a domain.",
                                        -1,
                                        methods,
                                        NULL,
                                        NULL,
                                        NULL,
                                        NULL};

static int constants(PyObject *m) {
  static const struct {
    const char *name;
    long long value;
  } table[] = {{"VERSION", DB_VERSION},
               {"HEADER_BYTES", DB_HEADER_BYTES},
               {"CHUNK_BYTES", DB_CHUNK},
               {"MAX_CHUNKS", DB_MAX_CHUNKS},
               {"LIVES", DB_LIVES},
               {"BUCKETS", DB_BUCKETS},
               {"OFF_LIVES", OFF_LIVES},
               {"OFF_CHUNKTAB", OFF_CHUNKTAB},
               {"OFF_NCHUNKS", offsetof(db_header, nchunks)},
               {"OFF_TABLE_LOCK", offsetof(db_header, table_lock)},
               {"OFF_CONTEXT", offsetof(db_header, next_context)},
               {"OFF_STAMP", offsetof(db_header, next_stamp)},
               {"OFF_SWEEP", offsetof(db_header, sweep_ns)},
               {"OFF_LIFE_HIGH", offsetof(db_header, life_high)},
               {"OFF_ID", offsetof(db_header, id)},
               {"OFF_GEOMETRY", offsetof(db_header, chunk_bytes)},
               {"LIFE_STATE", offsetof(db_life, state)},
               {"LIFE_GEN", offsetof(db_life, gen)},
               {"LIFE_PID", offsetof(db_life, pid)},
               {"LIFE_CHUNK", offsetof(db_life, chunk)},
               {"LIFE_START", offsetof(db_life, start)},
               {"LIFE_BELL", offsetof(db_life, doorbell)},
               {"LIFE_SERVED", offsetof(db_life, served)},
               {"LIFE_UID", offsetof(db_life, uid)},
               {"LIFE_JOINED", offsetof(db_life, joined)},
               {"LIFE_COMM", offsetof(db_life, comm)},
               {"LIFE_BYTES", sizeof(db_life)},
               {"LIFE_CLEAN", LIFE_CLEAN},
               {"LIFE_ALIVE", LIFE_ALIVE},
               {"CH_LIFE", CH_LIFE},
               {"CH_FENCE", CH_FENCE},
               {"CH_REC", CH_REC},
               {"CH_BLOCK", CH_BLOCK},
               {"CH_TIMELINE", CH_TIMELINE},
               {"CH_CTX", CH_CTX},
               {"CTX_PER", CTX_PER},
               {"CTX_FIRST_IN_LIFE", CTX_FIRST_IN_LIFE},
               {"TIMELINES_PER", TIMELINES_PER},
               {"FENCES_PER", FENCES_PER},
               {"RECS_PER", RECS_PER},
               {"SLOT_MASK", SLOT_MASK},
               {"FF_ACCESS", FF_ACCESS},
               {"FF_WRITE", FF_WRITE},
               {"FF_GRANTED", FF_GRANTED},
               {"FF_SEQNO64", FF_SEQNO64},
               {"FF_CONTAINER", FF_CONTAINER},
               {"FF_HASTY", FF_WATCH_DEADLINE},
               {"FF_ANYBODY", FF_ANYBODY},
               {"TICK_FENCE", TICK_FENCE},
               {"TICK_RESV", TICK_RESV},
               {"TICK_TABLE", TICK_TABLE},
               {"TICK_BELL", TICK_BELL},
               {"TICK_POLL", TICK_POLL},
               {"TICK_CHECK", TICK_CHECK}};

  for (size_t i = 0; i < sizeof table / sizeof *table; i++)
    if (PyModule_AddIntConstant(m, table[i].name, (long)table[i].value)) return -1;
  return PyModule_AddStringConstant(m, "MAGIC", DB_MAGIC);
}

static PyMethodDef *const shm_methods[] = {word_methods, table_methods,  record_methods, pool_methods, fence_methods, resv_lock_methods,
                                           resv_methods, access_methods, lend_methods,   reap_methods, NULL};

PyMODINIT_FUNC PyInit__native(void) {
  if (ticker_prepare()) return PyErr_SetFromErrno(PyExc_OSError);
  PyObject *m = PyModule_Create(&definition);
  if (!m) return NULL;
  if (constants(m) || shm_register(m, shm_methods) || fence_register(m) || step_register(m) || mapping_register(m) || window_register(m) ||
      probe_register(m) || passing_register(m) || descriptor_register(m) || file_register(m)) {
    Py_DECREF(m);
    return NULL;
  }
  return m;
}
