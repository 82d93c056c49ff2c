/* timeline_slot.c - a timeline's slot of this life, as an object that closes it.
 *
 * A slot is taken from the pool, opened and noted in one call, and closed with the last reference. So a signal handler that raises can't
 * lose one.
 */
#include "domain/timeline_slot.h"
#include "domain/pools.h"
#include "domain/table.h"

typedef struct {
  PyObject_HEAD
  Shm *shm;
  PyObject *pool;   /* the indices of the life's free slots, of which the last one is used next */
  PyObject *closed; /* those that were closed since; the one that was closed last is used last */
  unsigned long long context;
  unsigned index, life;
  char open;
} Slot;

static PyTypeObject *slot_type;

static int slot_shut(Slot *x) {
  if (!x->open) return 0;
  x->open = 0;
  if (!x->life || my_life(x->shm) != x->life) return 0; /* a forked child's copy, or of an earlier life */
  db_timeline *t = timeline_at(x->shm, x->index);
  if (t) atomic_store(&t->open, 0);
  PyObject *index = PyLong_FromUnsignedLong(x->index);
  return list_add(x->closed, index);
}

/* Have a free slot in the pool. 0, or -1 with an exception set. */
static int pool_ready(Shm *s, PyObject *pool, PyObject *closed) {
  if (!PyList_GET_SIZE(pool) && PyList_GET_SIZE(closed)) {
    if (PyList_SetSlice(pool, 0, 0, closed) || PyList_Reverse(pool)) return -1;
    return PyList_SetSlice(closed, 0, PyList_GET_SIZE(closed), NULL);
  }
  while (!PyList_GET_SIZE(pool)) {
    int64_t chunk = chunk_claim(s, CH_TIMELINE, my_life(s));
    if (chunk < 0) return -1;
    for (uint32_t i = TIMELINES_PER; i--;)
      if (list_add(pool, PyLong_FromLongLong(chunk * TIMELINES_PER + i))) return -1;
  }
  return 0;
}

static PyObject *slot_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
  Shm *s;
  PyObject *pool, *closed;
  unsigned long long context;
  const char *driver, *name;
  Py_ssize_t ndriver, nname;
  if (!PyArg_ParseTuple(args, "O!O!O!Ky#y#", Shm_Type, &s, &PyList_Type, &pool, &PyList_Type, &closed, &context, &driver, &ndriver, &name,
                        &nname))
    return NULL;
  if (shm_need_life(s, "timeline") || pool_ready(s, pool, closed)) return NULL;
  Slot *x = (Slot *)type->tp_alloc(type, 0);
  if (!x) return NULL;
  x->shm = (Shm *)Py_NewRef(s);
  x->pool = Py_NewRef(pool);
  x->closed = Py_NewRef(closed);
  x->life = my_life(s);
  x->context = context ? context : atomic_fetch_add(&hdr(s)->next_context, 1);
  Py_ssize_t last = PyList_GET_SIZE(pool) - 1;
  x->index = (unsigned)PyLong_AsUnsignedLong(PyList_GET_ITEM(pool, last));
  if (!PyErr_Occurred() && !PyList_SetSlice(pool, last, last + 1, NULL)) {
    x->open = 1;
    if (!pool_timeline_open(s, x->index, x->context, driver, (size_t)ndriver, name, (size_t)nname)) return (PyObject *)x;
  }
  Py_DECREF(x);
  return NULL;
}

static void slot_dealloc(Slot *x) {
  PyTypeObject *type = Py_TYPE(x);
  PyObject *kind, *value, *trace;
  PyErr_Fetch(&kind, &value, &trace);
  if (slot_shut(x)) PyErr_Clear(); /* no memory for a number: the slot is free when the life ends */
  PyErr_Restore(kind, value, trace);
  Py_CLEAR(x->shm);
  Py_CLEAR(x->pool);
  Py_CLEAR(x->closed);
  type->tp_free(x);
  Py_DECREF(type);
}

static PyObject *slot_close(Slot *x, PyObject *unused) {
  if (slot_shut(x)) return NULL;
  Py_RETURN_NONE;
}

static PyObject *slot_iter(Slot *x) {
  PyObject *pair = Py_BuildValue("IK", x->index, x->context), *iter = pair ? PyObject_GetIter(pair) : NULL;
  Py_XDECREF(pair);
  return iter;
}

static PyMethodDef methods[] = {{"close", (PyCFunction)slot_close, METH_NOARGS,
                                 "close($self, /)\n--\n\nClose the timeline: its slot can be used again. Closing twice has no effect."},
                                {0}};
static PyMemberDef members[] = {{"index", T_UINT, offsetof(Slot, index), READONLY, "The number of the slot in the domain file."},
                                {"context", T_ULONGLONG, offsetof(Slot, context), READONLY, "The context number of its fences."},
                                {"open", T_BOOL, offsetof(Slot, open), READONLY, "Whether it is open."},
                                {0}};
static PyType_Slot slots[] = {
    {Py_tp_doc,
     "TimelineSlot(shm, pool, closed, context, driver, name, /)\n--\n\nA timeline of this life in a slot of the pool, which gets the "
     "closed ones, or new ones, if it is empty. context: 0 for a number of its own. It is closed with the last reference to the object. "
     "Iterating gives its index and its context."},
    {Py_tp_new, slot_new},
    {Py_tp_dealloc, slot_dealloc},
    {Py_tp_iter, slot_iter},
    {Py_tp_methods, methods},
    {Py_tp_members, members},
    {0, NULL}};
static PyType_Spec spec = {
    .name = "dmabuf._native.TimelineSlot",
    .basicsize = sizeof(Slot),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = slots,
};

int timeline_slot_register(PyObject *module) {
  if (!slot_type && !(slot_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &spec, NULL))) return -1;
  return PyModule_AddType(module, slot_type);
}
