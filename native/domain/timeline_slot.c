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
  PyObject *pool; /* the indices of the life's free slots; the one that was closed last comes first, and is used last */
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
  int failed = index ? PyList_Insert(x->pool, 0, index) : -1;
  Py_XDECREF(index);
  return failed;
}

static PyObject *slot_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
  Shm *s;
  PyObject *pool;
  unsigned long long context;
  const char *driver, *name;
  Py_ssize_t ndriver, nname;
  if (!PyArg_ParseTuple(args, "O!O!Ky#y#", Shm_Type, &s, &PyList_Type, &pool, &context, &driver, &ndriver, &name, &nname)) return NULL;
  if (shm_need_life(s, "timeline")) return NULL;
  while (!PyList_GET_SIZE(pool)) {
    int64_t chunk = chunk_claim(s, CH_TIMELINE, my_life(s));
    if (chunk < 0) return NULL;
    for (uint32_t i = TIMELINES_PER; i--;)
      if (list_add(pool, PyLong_FromLongLong(chunk * TIMELINES_PER + i))) return NULL;
  }
  Slot *x = (Slot *)type->tp_alloc(type, 0);
  if (!x) return NULL;
  x->shm = (Shm *)Py_NewRef(s);
  x->pool = Py_NewRef(pool);
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
  type->tp_free(x);
  Py_DECREF(type);
}

static PyObject *slot_close(Slot *x, PyObject *unused) {
  if (slot_shut(x)) return NULL;
  Py_RETURN_NONE;
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
     "TimelineSlot(shm, pool, context, driver, name, /)\n--\n\nA timeline of this life in a slot of the pool, which gets more if "
     "it is empty. context: 0 for a number of its own. It is closed with the last reference to the object."},
    {Py_tp_new, slot_new},
    {Py_tp_dealloc, slot_dealloc},
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
