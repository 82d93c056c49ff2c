/* module.c - dmabuf._native: the only place with raw memory. It puts the parts together, and is the only file that knows all of them. */
#include "access/arrive.h"
#include "access/detach.h"
#include "access/entering.h"
#include "access/handle.h"
#include "access/holds.h"
#include "access/objects.h"
#include "access/path.h"
#include "access/view_type.h"
#include "domain/access.h"
#include "domain/ending.h"
#include "domain/fence_methods.h"
#include "domain/fence_type.h"
#include "domain/file.h"
#include "domain/guard.h"
#include "domain/held.h"
#include "domain/lend.h"
#include "domain/life.h"
#include "domain/points.h"
#include "domain/pools.h"
#include "domain/records.h"
#include "domain/reset.h"
#include "domain/resv.h"
#include "domain/resv_lock.h"
#include "domain/sleep.h"
#include "domain/step.h"
#include "domain/stream_methods.h"
#include "domain/sync.h"
#include "domain/table.h"
#include "domain/ticker.h"
#include "domain/timeline_slot.h"
#include "domain/words.h"
#include "errors.h"
#include "fds/fds.h"
#include "fds/pollable.h"
#include "fds/same.h"
#include "fork_lock.h"
#include "later.h"
#include "memory/mapping.h"
#include "stream/making.h"
#include "stream/port.h"
#include "stream/port_type.h"
#include "weak_values.h"

/* Python code can't call sys.unraisablehook itself: the default hook takes only a structure that the interpreter makes. */
static PyObject *unraisable(PyObject *module, PyObject *args) {
  PyObject *error, *where;
  if (!PyArg_ParseTuple(args, "OO", &error, &where)) return NULL;
  if (!PyExceptionInstance_Check(error)) return PyErr_Format(PyExc_TypeError, "unraisable() takes an exception");
  PyErr_SetObject((PyObject *)Py_TYPE(error), error);
  PyErr_WriteUnraisable(where);
  Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    METHOD(unraisable, METH_VARARGS, "($module, error, where, /)", "Report an exception, and where it was raised, to sys.unraisablehook."),
    {0}};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                                        "dmabuf._native",
                                        "Mappings, atomics, the futex, and the fences and locks of a domain.",
                                        -1,
                                        functions,
                                        NULL,
                                        NULL,
                                        NULL,
                                        NULL};
static PyMethodDef *const shm_methods[] = {word_methods,      file_methods, table_methods,  record_methods, pool_methods, fence_methods,
                                           resv_lock_methods, resv_methods, stream_methods, access_methods, lend_methods, held_methods,
                                           life_methods,      sync_methods, reset_methods,  ending_methods, NULL};

static int add_constants(PyObject *module) {
  static const struct {
    const char *name;
    long long value;
  } table[] = {

#define VALUE(name)         {#name, name}
#define NAMED(name, value)  {#name, value}
#define HEADER(name, field) {#name, offsetof(db_header, field)}
#define LIFE(name, field)   {#name, offsetof(db_life, field)}
      NAMED(VERSION, DB_VERSION),
      NAMED(HEADER_BYTES, DB_HEADER_BYTES),
      NAMED(CHUNK_BYTES, DB_CHUNK),
      NAMED(MAX_CHUNKS, DB_MAX_CHUNKS),
      NAMED(LIVES, DB_LIVES),
      NAMED(BUCKETS, DB_BUCKETS),
      VALUE(OFF_LIVES),
      VALUE(OFF_CHUNKTAB),
      HEADER(OFF_NCHUNKS, nchunks),
      HEADER(OFF_TABLE_LOCK, table_lock),
      HEADER(OFF_CONTEXT, next_context),
      HEADER(OFF_STAMP, next_stamp),
      HEADER(OFF_SWEEP, sweep_ns),
      HEADER(OFF_LIFE_HIGH, life_high),
      HEADER(OFF_ID, id),
      HEADER(OFF_DEV, dev),
      HEADER(OFF_GEOMETRY, chunk_bytes),
      LIFE(LIFE_STATE, state),
      LIFE(LIFE_GEN, gen),
      LIFE(LIFE_PID, pid),
      LIFE(LIFE_CHUNK, chunk),
      LIFE(LIFE_START, start),
      LIFE(LIFE_DOORBELL, doorbell),
      LIFE(LIFE_SERVED, served),
      LIFE(LIFE_UID, uid),
      LIFE(LIFE_COMM, comm),
      NAMED(LIFE_BYTES, sizeof(db_life)),
      VALUE(LIFE_BYTE),
      VALUE(LIFECYCLE_BYTE),
      VALUE(PRESENCE_BYTE),
      VALUE(LIFE_CLEAN),
      VALUE(LIFE_ALIVE),
      HEADER(OFF_FLOOR, floor),
      HEADER(OFF_BOOT, boot),
      VALUE(CH_NONE),
      VALUE(CH_LIFE),
      VALUE(CH_FENCE),
      VALUE(CH_REC),
      VALUE(CH_BLOCK),
      VALUE(CH_TIMELINE),
      VALUE(CH_CTX),
      VALUE(CH_SYNC),
      VALUE(CH_LEAF),
      VALUE(CH_LAYOUT),
      VALUE(CH_STREAM),
      VALUE(CTX_PER),
      VALUE(CTX_FIRST_IN_LIFE),
      VALUE(TIMELINES_PER),
      VALUE(FENCES_PER),
      VALUE(RECS_PER),
      VALUE(SYNC_PER),
      VALUE(SLOT_MASK),
      VALUE(FF_ACCESS),
      VALUE(FF_WRITE),
      VALUE(FF_GRANTED),
      VALUE(FF_SEQNO64),
      VALUE(FF_CONTAINER),
      VALUE(FF_WATCH_DEADLINE),
      VALUE(FF_ANYBODY),
      VALUE(FF_ASKED),
      VALUE(TICK_FENCE),
      VALUE(TICK_RESV),
      VALUE(TICK_TABLE),
      VALUE(TICK_POLL),
      VALUE(TICK_CHECK),
      VALUE(TICK_STREAM),
      VALUE(SP_WAIT),
      VALUE(SP_DROP),
      VALUE(SD_NEVER),
      VALUE(SD_ALIVE),
      VALUE(SD_CLOSED),
      VALUE(SD_DIED),
      VALUE(SR_QUEUE),
      VALUE(SR_LATEST),
      VALUE(SR_MEMBER),
      VALUE(SR_REDELIVER),
      VALUE(SR_LEFT),
      VALUE(SW_NEWS),
      VALUE(SW_SPACE),
      VALUE(SW_ASK),
      VALUE(STREAM_SLOTS),
      VALUE(STREAM_READERS),
      VALUE(STREAM_GROUPS),
  };
  for (size_t i = 0; i < sizeof table / sizeof *table; i++)
    if (PyModule_AddIntConstant(module, table[i].name, (long)table[i].value)) return -1;
  return PyModule_AddStringConstant(module, "MAGIC", DB_MAGIC);
}

/* In an order in which each finds the types that it needs. */
static int (*const parts[])(PyObject *) = {
    fence_register,         step_register,       mapping_register,     detach_register,    path_register,      arrive_register,
    block_register,         objects_register,    entering_register,    holds_register,     view_type_register, passing_register,
    messages_register,      descriptor_register, probe_register,       file_register,      ending_register,    hold_register,
    same_register,          errors_register,     held_register,        pollable_register,  points_register,    guard_register,
    timeline_slot_register, later_register,      weak_values_register, fork_lock_register, handle_register,    sleep_register,
    frame_register,         port_register,       making_register,      port_type_register,
};

PyMODINIT_FUNC PyInit__native(void) {
  if (ticker_prepare()) return PyErr_SetFromErrno(PyExc_OSError);
  PyObject *module = PyModule_Create(&definition);
  if (!module) return NULL;
  if (add_constants(module) || shm_register(module, shm_methods)) goto failed;
  for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
    if (parts[i](module)) goto failed;
  return module;
failed:
  Py_DECREF(module);
  return NULL;
}
