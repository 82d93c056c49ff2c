/* fork_lock.c - re-entrant locks that are free in a forked child, unless the thread that forked holds them.
 *
 * They lock as threading.RLock does. Its `with` block takes 150 ns, and each handle of a buffer enters two; this one's takes a third.
 */
#include "fork_lock.h"

typedef struct ForkLock ForkLock;

struct ForkLock {
  PyObject_HEAD
  PyThread_type_lock gate; /* held while `depth` isn't 0 */
  unsigned long owner;
  Py_ssize_t depth;
  ForkLock *next, **link; /* of all that there are */
};

static PyTypeObject *lock_type;
static ForkLock *all; /* guarded by the GIL, as the locks' fields are */

static int is_mine(ForkLock *x) { return x->depth && x->owner == PyThread_get_thread_ident(); }

static PyObject *lock_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
  if (PyTuple_GET_SIZE(args) || (kwargs && PyDict_GET_SIZE(kwargs))) return PyErr_Format(PyExc_TypeError, "ForkLock() takes no arguments");
  ForkLock *x = (ForkLock *)type->tp_alloc(type, 0);
  if (!x) return NULL;
  if (!(x->gate = PyThread_allocate_lock())) {
    Py_DECREF(x);
    return PyErr_NoMemory();
  }
  x->next = all;
  x->link = &all;
  if (all) all->link = &x->next;
  all = x;
  return (PyObject *)x;
}

static void lock_dealloc(ForkLock *x) {
  PyTypeObject *type = Py_TYPE(x);
  if (x->link) {
    *x->link = x->next;
    if (x->next) x->next->link = x->link;
  }
  if (x->depth) PyThread_release_lock(x->gate);
  if (x->gate) PyThread_free_lock(x->gate);
  type->tp_free(x);
  Py_DECREF(type);
}

static PyObject *lock_enter(ForkLock *x, PyObject *unused) {
  if (is_mine(x)) {
    x->depth++;
    Py_RETURN_TRUE;
  }
  PyLockStatus status = PyThread_acquire_lock_timed(x->gate, 0, 0);
  while (status != PY_LOCK_ACQUIRED) {
    Py_BEGIN_ALLOW_THREADS
    status = PyThread_acquire_lock_timed(x->gate, -1, 1);
    Py_END_ALLOW_THREADS
    if (status == PY_LOCK_INTR && Py_MakePendingCalls() < 0) return NULL; /* a signal handler raised */
  }
  x->owner = PyThread_get_thread_ident();
  x->depth = 1;
  Py_RETURN_TRUE;
}

static PyObject *lock_exit(ForkLock *x, PyObject *const *args, Py_ssize_t n) {
  if (!is_mine(x)) {
    PyErr_SetString(PyExc_RuntimeError, "a lock is released that this thread doesn't hold");
    return NULL;
  }
  if (!--x->depth) PyThread_release_lock(x->gate);
  Py_RETURN_NONE;
}

static PyObject *lock_is_owned(ForkLock *x, PyObject *unused) { return PyBool_FromLong(is_mine(x)); }

static PyObject *free_fork_locks(PyObject *module, PyObject *unused) {
  for (ForkLock *x = all; x; x = x->next) {
    if (is_mine(x)) continue;
    PyThread_type_lock made = PyThread_allocate_lock();
    if (!made) return PyErr_NoMemory();
    x->gate = made; /* the old one is left: a thread that the child doesn't have may hold it, or wait for it */
    x->depth = 0;
  }
  Py_RETURN_NONE;
}

static PyMethodDef methods[] = {{"__enter__", (PyCFunction)lock_enter, METH_NOARGS, NULL},
                                {"__exit__", (PyCFunction)(void *)lock_exit, METH_FASTCALL, NULL},
                                {"_is_owned", (PyCFunction)lock_is_owned, METH_NOARGS,
                                 "_is_owned($self, /)\n--\n\nReturn True if the running thread holds the lock, as threading.RLock does."},
                                {0}};
static PyType_Slot slots[] = {
    {Py_tp_doc,
     "ForkLock()\n--\n\nA re-entrant lock for `with` blocks, which is free in a forked child unless the thread that forked holds it."},
    {Py_tp_new, lock_new},
    {Py_tp_dealloc, lock_dealloc},
    {Py_tp_methods, methods},
    {0, NULL}};
static PyType_Spec spec = {
    .name = "dmabuf._native.ForkLock",
    .basicsize = sizeof(ForkLock),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = slots,
};

static PyMethodDef functions[] = {
    METHOD(free_fork_locks, METH_NOARGS, "($module, /)", "Free the locks of the parent's other threads, in a forked child."), {0}};

int fork_lock_register(PyObject *module) {
  if (!lock_type && !(lock_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &spec, NULL))) return -1;
  return PyModule_AddType(module, lock_type) || PyModule_AddFunctions(module, functions) ? -1 : 0;
}
