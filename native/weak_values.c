/* weak_values.c - a dictionary that doesn't keep its values: what a process has of fences, records and the like.
 *
 * As weakref.WeakValueDictionary, but no operation runs a line of Python, if the keys' types are built in. So each is one step for other
 * threads, and no signal handler raises in the middle, in particular when a value goes.
 */
#include "weak_values.h"

typedef struct {
  PyObject_HEAD
  PyObject *refs; /* key -> Ref */
  vectorcallfunc call;
} Table;

typedef struct {
  PyWeakReference ref; /* its callback is the table */
  PyObject *key;
} Ref;

static PyTypeObject *table_type, *ref_type;

static PyObject *value_of(PyObject *ref) { /* a new reference; NULL: the value is gone */
#if PY_VERSION_HEX >= 0x030d0000
  PyObject *value;
  return PyWeakref_GetRef(ref, &value) > 0 ? value : NULL;
#else
  PyObject *value = PyWeakref_GetObject(ref);
  return value == Py_None ? NULL : Py_NewRef(value);
#endif
}

/* ---- one entry ---- */

static int ref_traverse(Ref *r, visitproc visit, void *arg) {
  Py_VISIT(Py_TYPE(r));
  Py_VISIT(r->key);
  return _PyWeakref_RefType.tp_traverse((PyObject *)r, visit, arg);
}

static void ref_dealloc(Ref *r) {
  PyTypeObject *type = Py_TYPE(r);
  PyObject_GC_UnTrack(r);
  Py_CLEAR(r->key);
  _PyWeakref_RefType.tp_dealloc((PyObject *)r);
  Py_DECREF(type);
}

static PyType_Slot ref_slots[] = {{Py_tp_traverse, ref_traverse}, {Py_tp_dealloc, ref_dealloc}, {0, NULL}};
static PyType_Spec ref_spec = {
    .name = "dmabuf._native.WeakValue",
    .basicsize = sizeof(Ref),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_HAVE_GC,
    .slots = ref_slots,
};

/* ---- the table ---- */

static int table_set(Table *t, PyObject *key, PyObject *value) {
  if (!value) return PyDict_DelItem(t->refs, key);
  PyObject *args = PyTuple_Pack(2, value, t);
  Ref *r = args ? (Ref *)_PyWeakref_RefType.tp_new(ref_type, args, NULL) : NULL;
  Py_XDECREF(args);
  if (!r) return -1;
  r->key = Py_NewRef(key);
  int bad = PyDict_SetItem(t->refs, key, (PyObject *)r);
  Py_DECREF(r);
  return bad;
}

/* The callback of each entry, whose value is gone. Another one may stand for the key by now. */
static PyObject *table_forget(PyObject *table, PyObject *const *args, size_t nargsf, PyObject *names) {
  Table *t = (Table *)table;
  if (PyVectorcall_NARGS(nargsf) != 1 || names || !Py_IS_TYPE(args[0], ref_type))
    return PyErr_Format(PyExc_TypeError, "WeakValues is called by its values only");
  Ref *r = (Ref *)Py_NewRef(args[0]);
  PyObject *now = PyDict_GetItemWithError(t->refs, r->key);
  int bad = now == (PyObject *)r ? PyDict_DelItem(t->refs, r->key) : PyErr_Occurred() ? -1 : 0;
  Py_DECREF(r);
  if (bad) return NULL;
  Py_RETURN_NONE;
}

static PyObject *table_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
  if (PyTuple_GET_SIZE(args) || (kwargs && PyDict_GET_SIZE(kwargs)))
    return PyErr_Format(PyExc_TypeError, "WeakValues() takes no arguments");
  Table *t = (Table *)type->tp_alloc(type, 0);
  if (t) t->call = table_forget;
  if (t && !(t->refs = PyDict_New())) Py_CLEAR(t);
  return (PyObject *)t;
}

static PyObject *table_get(Table *t, PyObject *key) {
  PyObject *ref = PyDict_GetItemWithError(t->refs, key), *value = ref ? value_of(ref) : NULL;
  if (value || PyErr_Occurred()) return value;
  Py_RETURN_NONE;
}

static PyObject *table_values(Table *t, PyObject *unused) {
  PyObject *refs = PyDict_Values(t->refs), *found = refs ? PyList_New(0) : NULL; /* a copy: values may go while the list grows */
  for (Py_ssize_t i = 0; found && i < PyList_GET_SIZE(refs); i++) {
    PyObject *value = value_of(PyList_GET_ITEM(refs, i));
    if (value && list_add(found, value)) Py_CLEAR(found);
  }
  Py_XDECREF(refs);
  return found;
}

static PyObject *table_items(Table *t, PyObject *unused) {
  PyObject *refs = PyDict_Values(t->refs), *found = refs ? PyList_New(0) : NULL;
  for (Py_ssize_t i = 0; found && i < PyList_GET_SIZE(refs); i++) {
    Ref *r = (Ref *)PyList_GET_ITEM(refs, i);
    PyObject *value = value_of((PyObject *)r);
    if (value && list_add(found, Py_BuildValue("ON", r->key, value))) Py_CLEAR(found);
  }
  Py_XDECREF(refs);
  return found;
}

static PyObject *table_empty(Table *t, PyObject *unused) {
  PyDict_Clear(t->refs);
  Py_RETURN_NONE;
}

static Py_ssize_t table_length(Table *t) { return PyDict_GET_SIZE(t->refs); }

static int table_traverse(Table *t, visitproc visit, void *arg) {
  Py_VISIT(Py_TYPE(t));
  Py_VISIT(t->refs);
  return 0;
}

static int table_clear(Table *t) {
  if (t->refs) PyDict_Clear(t->refs); /* the dictionary stays, for a finalizer that asks */
  return 0;
}

static void table_dealloc(Table *t) {
  PyTypeObject *type = Py_TYPE(t);
  PyObject_GC_UnTrack(t);
  Py_CLEAR(t->refs);
  type->tp_free(t);
  Py_DECREF(type);
}

static PyMethodDef table_methods[] = {
    {"get", (PyCFunction)table_get, METH_O, "get($self, key, /)\n--\n\nReturn the value, or None if there is none."},
    {"values", (PyCFunction)table_values, METH_NOARGS, "values($self, /)\n--\n\nReturn a list of the values that are there now."},
    {"items", (PyCFunction)table_items, METH_NOARGS, "items($self, /)\n--\n\nReturn a list of the pairs that are there now."},
    {"clear", (PyCFunction)table_empty, METH_NOARGS, "clear($self, /)\n--\n\nForget every value."},
    {"__class_getitem__", Py_GenericAlias, METH_O | METH_CLASS, NULL},
    {0}};
static PyMemberDef table_members[] = {{"__vectorcalloffset__", T_PYSSIZET, offsetof(Table, call), READONLY, NULL}, {0}};
static PyType_Slot table_slots[] = {
    {Py_tp_doc, "WeakValues()\n--\n\nA dictionary that doesn't keep its values. Every operation is one step. Keys are of built-in types."},
    {Py_tp_new, table_new},
    {Py_tp_call, PyVectorcall_Call},
    {Py_mp_length, table_length},
    {Py_mp_ass_subscript, table_set},
    {Py_tp_traverse, table_traverse},
    {Py_tp_clear, table_clear},
    {Py_tp_dealloc, table_dealloc},
    {Py_tp_methods, table_methods},
    {Py_tp_members, table_members},
    {0, NULL}};
static PyType_Spec table_spec = {
    .name = "dmabuf._native.WeakValues",
    .basicsize = sizeof(Table),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL,
    .slots = table_slots,
};

int weak_values_register(PyObject *module) {
  if (!ref_type && !(ref_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &ref_spec, (PyObject *)&_PyWeakref_RefType))) return -1;
  if (!table_type && !(table_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &table_spec, NULL))) return -1;
  return PyModule_AddType(module, table_type);
}
