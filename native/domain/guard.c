/* guard.c - what a signal handler that raises can't cut short.
 *
 * Python runs signal handlers between two bytecodes, so one may raise after a function's last act, or before the first line of an
 * __exit__ or a __del__. A caller in C is never interrupted. These are such callers of functions in Python:
 *
 *     guarded(fn)   calls fn with a list, and undoes what is on the list if fn raises: what an operation took is not left behind.
 *     finished(fn)  calls fn again until it ends, and then raises what a signal handler raised meanwhile.
 *     finalizer(fn) is finished(fn) for a __del__, whose exceptions nobody would see: the main thread raises it a moment later.
 *     numbered(fn)  returns the number of the OwnedFd that fn returns, which the caller owns from then on.
 *     HeldBlock     is the context manager of a block that holds locks: entering is guarded, and leaving is one call.
 *     Bracket       is the base class of other context managers: leaving is finished, also after an entering that failed.
 */
#include "domain/guard.h"
#include "domain/held.h"
#include "later.h"

#define MOST_CALLS 1000 /* of a function that signal handlers interrupt each time */
#define MOST_SAME  8    /* exceptions of one type in a row, from which on the function itself is what raises them */

enum { GUARDED, FINISHED, FINALIZER, NUMBERED, KINDS };

typedef struct {
  PyObject_HEAD
  PyObject *fn, *dict;
  int kind;
  vectorcallfunc call;
} Guard;

static PyTypeObject *guard_types[KINDS], *block_type, *bracket_type;
static PyObject *own_errors; /* what fn raises by itself: a tuple of exception types */

/* ---- guarded ---- */

static PyObject *guarded_call(PyObject *callable, PyObject *const *args, size_t nargsf, PyObject *names) {
  Guard *g = (Guard *)callable;
  Py_ssize_t n = PyVectorcall_NARGS(nargsf), all = n + (names ? PyTuple_GET_SIZE(names) : 0);
  PyObject *few[8], **given = all < 8 ? few : PyMem_New(PyObject *, (size_t)all + 1), *taken = PyList_New(0), *result = NULL;
  if (!n) {
    PyErr_SetString(PyExc_TypeError, "a method is called without its object");
  } else if (given && taken) { /* fn(self, taken, ...) */
    given[0] = args[0];
    given[1] = taken;
    for (Py_ssize_t i = 1; i < all; i++) given[i + 1] = args[i];
    result = PyObject_Vectorcall(g->fn, given, (size_t)n + 1, names);
    if (!result) taken_undo(taken, 0);
  } else if (!given) {
    PyErr_NoMemory();
  }
  Py_XDECREF(taken);
  if (given != few) PyMem_Free(given);
  return result;
}

/* ---- finished, finalizer ---- */

bool guard_is_own(void) { return PyErr_ExceptionMatches(own_errors); }

PyObject *guard_finish(PyObject *fn, PyObject *const *args, size_t nargsf, PyObject *names, bool later) {
  PyObject *result = PyObject_Vectorcall(fn, args, nargsf, names);
  if (result || !in_main_thread()) return result;
  PyObject *error = NULL; /* the last one that a signal handler may have raised */
  int same = 0, by_itself = 0;
  for (int calls = 1; !result; calls++) {
    by_itself = guard_is_own() || same == MOST_SAME || calls == MOST_CALLS;
    if (by_itself && !error) return NULL; /* as it is */
    if (by_itself) {
      PyErr_Clear();
      break;
    }
    PyObject *now = take_exception();
    same = error && Py_IS_TYPE(error, Py_TYPE(now)) ? same + 1 : 0;
    Py_XSETREF(error, now);
    result = PyObject_Vectorcall(fn, args, nargsf, names);
  }
  Py_XDECREF(result);
  if (later && same < MOST_SAME && raise_later(error)) Py_RETURN_NONE;
  PyErr_SetObject((PyObject *)Py_TYPE(error), error);
  Py_DECREF(error);
  return NULL;
}

static PyObject *finished_call(PyObject *callable, PyObject *const *args, size_t nargsf, PyObject *names) {
  Guard *g = (Guard *)callable;
  return guard_finish(g->fn, args, (size_t)PyVectorcall_NARGS(nargsf), names, g->kind == FINALIZER);
}

static PyObject *finish_call(PyObject *module, PyObject *const *args, Py_ssize_t n) {
  if (n < 1) return PyErr_Format(PyExc_TypeError, "finish() takes a function and its arguments");
  return guard_finish(args[0], args + 1, (size_t)n - 1, NULL, false);
}

/* ---- numbered ---- */

static PyObject *numbered_call(PyObject *callable, PyObject *const *args, size_t nargsf, PyObject *names) {
  PyObject *own = PyObject_Vectorcall(((Guard *)callable)->fn, args, (size_t)PyVectorcall_NARGS(nargsf), names);
  PyObject *number = own ? PyObject_CallMethod(own, "take", NULL) : NULL;
  Py_XDECREF(own);
  return number;
}

/* ---- the types ---- */

static PyObject *guard_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
  PyObject *fn;
  if (!PyArg_ParseTuple(args, "O", &fn)) return NULL;
  Guard *g = (Guard *)type->tp_alloc(type, 0);
  if (!g) return NULL;
  while (guard_types[g->kind] != type) g->kind++;
  g->fn = Py_NewRef(fn);
  g->call = g->kind == GUARDED ? guarded_call : g->kind == NUMBERED ? numbered_call : finished_call;
  PyObject *about = PyObject_GetAttrString(fn, "__dict__");
  g->dict = about ? PyDict_Copy(about) : NULL;
  Py_XDECREF(about);
  static const char *const names[] = {"__doc__", "__name__", "__qualname__", "__module__"};
  for (size_t i = 0; g->dict && i < sizeof names / sizeof *names; i++) {
    PyObject *value = PyObject_GetAttrString(fn, names[i]);
    if (!value || PyDict_SetItemString(g->dict, names[i], value)) Py_CLEAR(g->dict);
    Py_XDECREF(value);
  }
  if (g->dict && !PyDict_SetItemString(g->dict, "__wrapped__", fn)) return (PyObject *)g;
  Py_DECREF(g);
  return NULL;
}

static PyObject *guard_bind(PyObject *self, PyObject *object, PyObject *type) {
  return object && object != Py_None ? PyMethod_New(self, object) : Py_NewRef(self);
}

static PyObject *guard_repr(Guard *g) { return PyUnicode_FromFormat("<%s of %R>", Py_TYPE(g)->tp_name, g->fn); }

static int guard_traverse(Guard *g, visitproc visit, void *arg) {
  Py_VISIT(Py_TYPE(g));
  Py_VISIT(g->fn);
  Py_VISIT(g->dict);
  return 0;
}

static int guard_clear(Guard *g) {
  Py_CLEAR(g->dict);
  return 0; /* not fn: a finalizer may still be called */
}

static void guard_dealloc(Guard *g) {
  PyTypeObject *type = Py_TYPE(g);
  PyObject_GC_UnTrack(g);
  Py_CLEAR(g->dict);
  Py_CLEAR(g->fn);
  type->tp_free(g);
  Py_DECREF(type);
}

static PyObject *guard_doc(Guard *g, void *unused) {
  PyObject *doc = g->dict ? PyDict_GetItemString(g->dict, "__doc__") : NULL;
  return Py_NewRef(doc ? doc : Py_None);
}

static PyGetSetDef guard_getset[] = {{"__doc__", (getter)guard_doc, NULL, NULL, NULL}, {0}};
static PyMemberDef guard_members[] = {{"__dictoffset__", T_PYSSIZET, offsetof(Guard, dict), READONLY, NULL},
                                      {"__vectorcalloffset__", T_PYSSIZET, offsetof(Guard, call), READONLY, NULL},
                                      {0}};
static PyType_Slot guard_slots[] = {{Py_tp_new, guard_new},
                                    {Py_tp_call, PyVectorcall_Call},
                                    {Py_tp_descr_get, guard_bind},
                                    {Py_tp_repr, guard_repr},
                                    {Py_tp_traverse, guard_traverse},
                                    {Py_tp_clear, guard_clear},
                                    {Py_tp_dealloc, guard_dealloc},
                                    {Py_tp_getset, guard_getset},
                                    {Py_tp_members, guard_members},
                                    {Py_tp_getattro, PyObject_GenericGetAttr},
                                    {0, NULL}};
static const char *const guard_names[] = {"dmabuf._native.guarded", "dmabuf._native.finished", "dmabuf._native.finalizer",
                                          "dmabuf._native.numbered"};

/* ---- HeldBlock ---- */

typedef struct {
  PyObject_HEAD
  PyObject *enter, *taken;
} Block;

static PyObject *block_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
  PyObject *enter;
  if (!PyArg_ParseTuple(args, "O", &enter)) return NULL;
  Block *b = (Block *)type->tp_alloc(type, 0);
  if (!b) return NULL;
  b->enter = Py_NewRef(enter);
  if ((b->taken = PyList_New(0))) return (PyObject *)b;
  Py_DECREF(b);
  return NULL;
}

static PyObject *block_enter(Block *b, PyObject *unused) {
  Py_ssize_t before = PyList_GET_SIZE(b->taken); /* not 0 if the block is entered twice, which is refused */
  PyObject *result = PyObject_CallOneArg(b->enter, b->taken);
  if (!result) taken_undo(b->taken, before);
  return result;
}

static PyObject *block_exit(Block *b, PyObject *args) {
  if (taken_undo(b->taken, 0)) return NULL;
  Py_RETURN_NONE;
}

static int block_traverse(Block *b, visitproc visit, void *arg) {
  Py_VISIT(Py_TYPE(b));
  Py_VISIT(b->enter);
  Py_VISIT(b->taken);
  return 0;
}

static void block_finalize(Block *b) {
  PyObject *kind, *value, *trace;
  PyErr_Fetch(&kind, &value, &trace);
  if (b->taken && taken_undo(b->taken, 0)) PyErr_WriteUnraisable(NULL);
  PyErr_Restore(kind, value, trace);
}

static int block_clear(Block *b) {
  Py_CLEAR(b->enter);
  Py_CLEAR(b->taken);
  return 0;
}

static void block_dealloc(Block *b) {
  PyTypeObject *type = Py_TYPE(b);
  if (PyObject_CallFinalizerFromDealloc((PyObject *)b)) return;
  PyObject_GC_UnTrack(b);
  block_clear(b);
  type->tp_free(b);
  Py_DECREF(type);
}

static PyMethodDef block_methods[] = {
    {"__enter__", (PyCFunction)block_enter, METH_NOARGS, NULL}, {"__exit__", (PyCFunction)block_exit, METH_VARARGS, NULL}, {0}};
static PyType_Slot block_slots[] = {
    {Py_tp_doc,
     "HeldBlock(enter)\n--\n\nThe block of what enter(taken) takes and appends to the list. Its end undoes that, in any thread."},
    {Py_tp_new, block_new},
    {Py_tp_traverse, block_traverse},
    {Py_tp_clear, block_clear},
    {Py_tp_finalize, block_finalize},
    {Py_tp_dealloc, block_dealloc},
    {Py_tp_methods, block_methods},
    {0, NULL}};
static PyType_Spec block_spec = {
    .name = "dmabuf._native.HeldBlock",
    .basicsize = sizeof(Block),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = block_slots,
};

/* ---- Bracket ---- */

static PyObject *bracket_call(PyObject *self, const char *name, bool shielded) {
  PyObject *method = PyObject_GetAttrString(self, name);
  PyObject *result = !method ? NULL : shielded ? guard_finish(method, NULL, 0, NULL, false) : PyObject_CallNoArgs(method);
  Py_XDECREF(method);
  return result;
}

static PyObject *bracket_enter(PyObject *self, PyObject *unused) {
  PyObject *kind, *value, *trace, *result = bracket_call(self, "enter", false);
  if (result) return result;
  PyErr_Fetch(&kind, &value, &trace);
  PyObject *left = bracket_call(self, "leave", true);
  if (!left) PyErr_Clear(); /* the first exception counts */
  Py_XDECREF(left);
  PyErr_Restore(kind, value, trace);
  return NULL;
}

static PyObject *bracket_exit(PyObject *self, PyObject *args) {
  PyObject *left = bracket_call(self, "leave", true);
  Py_XDECREF(left);
  if (!left) return NULL;
  Py_RETURN_NONE;
}

static void bracket_dealloc(PyObject *self) {
  PyTypeObject *type = Py_TYPE(self);
  type->tp_free(self);
  Py_DECREF(type);
}

static PyMethodDef bracket_methods[] = {
    {"__enter__", bracket_enter, METH_NOARGS, NULL}, {"__exit__", bracket_exit, METH_VARARGS, NULL}, {0}};
static PyType_Slot bracket_slots[] = {
    {Py_tp_doc, "The block between enter() and leave(), which subclasses have. leave() undoes what enter() did, wholly or in part, and is "
                "called again until it ends."},
    {Py_tp_dealloc, bracket_dealloc},
    {Py_tp_methods, bracket_methods},
    {0, NULL}};
static PyType_Spec bracket_spec = {
    .name = "dmabuf._native.Bracket",
    .basicsize = sizeof(PyObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
    .slots = bracket_slots,
};

static PyObject *set_own_errors(PyObject *module, PyObject *types) {
  if (!PyTuple_Check(types)) return PyErr_Format(PyExc_TypeError, "set_own_errors() takes a tuple of exception types");
  Py_XSETREF(own_errors, Py_NewRef(types));
  Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"finish", (PyCFunction)(void *)finish_call, METH_FASTCALL,
     "finish($module, fn, /, *args)\n--\n\nCall fn(*args) as finished(fn) would, and return None. For a function that needs no result."},
    METHOD(set_own_errors, METH_O, "($module, types, /)",
           "Say which exceptions a finished() function raises by itself. It is not called again after one of them."),
    {0}};

int guard_register(PyObject *module) {
  if (!own_errors && !(own_errors = PyTuple_New(0))) return -1;
  for (int i = 0; i < KINDS; i++) {
    PyType_Spec spec = {.name = guard_names[i],
                        .basicsize = sizeof(Guard),
                        .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_METHOD_DESCRIPTOR,
                        .slots = guard_slots};
    if (!guard_types[i] && !(guard_types[i] = (PyTypeObject *)PyType_FromModuleAndSpec(module, &spec, NULL))) return -1;
    if (PyModule_AddType(module, guard_types[i])) return -1;
  }
  if (!block_type && !(block_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &block_spec, NULL))) return -1;
  if (!bracket_type && !(bracket_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &bracket_spec, NULL))) return -1;
  return PyModule_AddType(module, block_type) || PyModule_AddType(module, bracket_type) || PyModule_AddFunctions(module, functions) ? -1
                                                                                                                                    : 0;
}
