/* held.c - contexts as Python objects, and what this process knows of a reservation lock that it holds.
 *
 * A signal handler may raise between any two bytecodes. So what takes a lock, notes it and counts it is one call, and so is what releases
 * it; and a context is closed with the last reference to its object, in C. The call that takes a lock also appends it to the list `taken`
 * of the operation or block that wanted it: taken_undo() releases what is on it. A lock belongs to its HeldLock, and not to the thread
 * that happens to run.
 */
#include "domain/held.h"
#include "domain/pools.h"
#include "domain/resv_lock.h"
#include "domain/table.h"

PyTypeObject *Context_Type;
static PyTypeObject *held_type;
static PyObject *held_name; /* "_held", the attribute of a lock that has its HeldLock, or None */

/* ---- contexts ---- */

/* In a forked child, and in a later life of this process, the context isn't ours, and nothing is closed. */
static int context_shut(Context *c) {
  Shm *s = c->shm;
  uint64_t word = c->word;
  c->word = 0;
  Py_XSETREF(c->word_seen, PyLong_FromLong(0));
  if (!word || !c->life || my_life(s) != c->life) return 0;
  pool_ctx_close(s, word);
  PyObject *index = PyLong_FromUnsignedLong(CTX_INDEX(word));
  return list_add(c->pool, index);
}

static PyObject *context_open(Context *c, PyObject *args) {
  Shm *s;
  PyObject *pool;
  unsigned tid;
  int real;
  unsigned long long stamp;
  if (!PyArg_ParseTuple(args, "O!O!IpK", Shm_Type, &s, &PyList_Type, &pool, &tid, &real, &stamp)) return NULL;
  if (c->word) {
    PyErr_SetString(PyExc_ValueError, "open: the context is open");
    return NULL;
  }
  if (shm_need_life(s, "lock")) return NULL;
  while (!PyList_GET_SIZE(pool)) {
    int64_t chunk = chunk_claim(s, CH_CTX, my_life(s));
    if (chunk < 0) return NULL;
    for (uint32_t i = CTX_PER; i--;)
      if (list_add(pool, PyLong_FromLongLong(chunk * CTX_PER + i))) return NULL;
  }
  Py_ssize_t last = PyList_GET_SIZE(pool) - 1;
  uint32_t index = (uint32_t)PyLong_AsUnsignedLong(PyList_GET_ITEM(pool, last));
  if (PyErr_Occurred() || PyList_SetSlice(pool, last, last + 1, NULL)) return NULL;
  uint64_t word = pool_ctx_open(s, index, tid, real, stamp ? stamp : atomic_fetch_add(&hdr(s)->next_stamp, 1));
  if (!word) return NULL;
  Py_XSETREF(c->shm, (Shm *)Py_NewRef(s));
  Py_XSETREF(c->pool, Py_NewRef(pool));
  c->life = my_life(s);
  c->word = word; /* from here on the object closes it */
  Py_XSETREF(c->word_seen, PyLong_FromUnsignedLongLong(word));
  Py_XSETREF(c->life_seen, PyLong_FromUnsignedLong(c->life));
  if (!c->word_seen || !c->life_seen) return NULL;
  Py_RETURN_NONE;
}

static PyObject *context_close(Context *c, PyObject *unused) {
  if (c->word && context_shut(c)) return NULL;
  Py_RETURN_NONE;
}

static int context_traverse(Context *c, visitproc visit, void *arg) {
  Py_VISIT(Py_TYPE(c));
  Py_VISIT(c->shm);
  return 0;
}

static void context_dealloc(Context *c) {
  PyTypeObject *type = Py_TYPE(c);
  PyObject *kind, *value, *trace;
  PyObject_GC_UnTrack(c);
  PyErr_Fetch(&kind, &value, &trace);
  if (c->word && context_shut(c)) PyErr_Clear(); /* no memory for a number: the slot is free when the life ends */
  PyErr_Restore(kind, value, trace);
  Py_CLEAR(c->shm);
  Py_CLEAR(c->pool);
  Py_CLEAR(c->word_seen);
  Py_CLEAR(c->life_seen);
  type->tp_free(c);
  Py_DECREF(type);
}

static PyObject *context_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
  Context *c = (Context *)type->tp_alloc(type, 0);
  if (c && (c->word_seen = PyLong_FromLong(0)) && (c->life_seen = PyLong_FromLong(0))) return (PyObject *)c;
  Py_XDECREF(c);
  return NULL;
}

static PyMethodDef context_methods[] = {
    {"open", (PyCFunction)context_open, METH_VARARGS,
     "open($self, shm, pool, tid, real, stamp, /)\n--\n\nOpen a context of this life in a slot of the pool, which gets more if it is "
     "empty. "
     "stamp: its age, 0 for the next one."},
    {"close", (PyCFunction)context_close, METH_NOARGS,
     "close($self, /)\n--\n\nClose the context: every lock that it holds can be taken from then on. Closing twice has no effect."},
    {0}};
static PyMemberDef context_members[] = {
    {"word", T_OBJECT_EX, offsetof(Context, word_seen), READONLY, "What names the context in the domain, 0 once it is closed."},
    {"life", T_OBJECT_EX, offsetof(Context, life_seen), READONLY, "The life whose context it is."},
    {"locks", T_UINT, offsetof(Context, locks), 0, "How many reservation locks it holds."},
    {0}};
static PyType_Slot context_slots[] = {
    {Py_tp_doc, "Context()\n--\n\nA context of this process in a domain. It is closed with the last reference to the object."},
    {Py_tp_new, context_new},
    {Py_tp_traverse, context_traverse},
    {Py_tp_dealloc, context_dealloc},
    {Py_tp_methods, context_methods},
    {Py_tp_members, context_members},
    {0, NULL}};
static PyType_Spec context_spec = {
    .name = "dmabuf._native.Context",
    .basicsize = sizeof(Context),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = context_slots,
};

/* ---- held locks ---- */

typedef struct {
  PyObject_HEAD
  PyObject *resv;       /* the lock, whose attribute `_held` is this object as long as it is held; NULL for a lock on loan */
  Context *owner, *ctx; /* ctx: NULL without a WwAcquireContext */
  Shm *shm;
  unsigned rec;
  unsigned long long word;
  long room;
  char lent;
} Held;

static Held *held_make(Context *owner, Context *ctx, uint64_t word) {
  Held *h = (Held *)held_type->tp_alloc(held_type, 0);
  if (!h) return NULL;
  h->owner = (Context *)Py_NewRef(owner);
  h->ctx = (Context *)Py_XNewRef(ctx);
  h->word = word;
  return h;
}

static PyObject *held_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
  Context *owner;
  unsigned long long word;
  if (!PyArg_ParseTuple(args, "O!K", Context_Type, &owner, &word)) return NULL;
  Held *h = held_make(owner, NULL, word);
  if (h) h->lent = 1;
  return (PyObject *)h;
}

/* 1: released; 0: it isn't held, or by the parent of this process; -1 */
static int held_release(Held *h) {
  if (!h->resv || my_life(h->shm) != h->owner->life) return 0;
  PyObject *now = PyObject_GetAttr(h->resv, held_name);
  if (!now) return -1;
  Py_DECREF(now); /* the lock refers to it */
  if (now != (PyObject *)h) return 0;
  Py_INCREF(h);
  int failed = PyObject_SetAttr(h->resv, held_name, Py_None);
  if (!failed) {
    h->owner->locks--;
    if (h->ctx) h->ctx->locks--;
    db_resv *r = resv_of(h->shm, h->rec);
    failed = r ? 0 : -1;
    if (r) resv_release(r, h->word);
  }
  Py_DECREF(h);
  return failed ? -1 : 1;
}

static PyObject *held_release_call(Held *h, PyObject *unused) {
  int released = held_release(h);
  return released < 0 ? NULL : PyBool_FromLong(released);
}

static int held_traverse(Held *h, visitproc visit, void *arg) {
  Py_VISIT(Py_TYPE(h));
  Py_VISIT(h->resv);
  Py_VISIT(h->owner);
  Py_VISIT(h->ctx);
  Py_VISIT(h->shm);
  return 0;
}

static int held_clear(Held *h) {
  Py_CLEAR(h->resv);
  return 0;
}

static void held_dealloc(Held *h) {
  PyTypeObject *type = Py_TYPE(h);
  PyObject_GC_UnTrack(h);
  Py_CLEAR(h->resv);
  Py_CLEAR(h->owner);
  Py_CLEAR(h->ctx);
  Py_CLEAR(h->shm);
  type->tp_free(h);
  Py_DECREF(type);
}

static PyObject *resv_hold(Shm *s, PyObject *const *a, Py_ssize_t n) {
  if (n != 9 || !PyList_Check(a[0]) || !PyObject_TypeCheck(a[3], Context_Type) ||
      (a[4] != Py_None && !PyObject_TypeCheck(a[4], Context_Type))) {
    PyErr_SetString(PyExc_TypeError, "resv_hold(taken, resv, rec, owner, ctx, slow, interruptible, trylock, until)");
    return NULL;
  }
  Context *owner = (Context *)a[3], *ctx = a[4] == Py_None ? NULL : (Context *)a[4];
  uint32_t rec;
  int slow = PyObject_IsTrue(a[5]), interruptible = PyObject_IsTrue(a[6]), try = PyObject_IsTrue(a[7]);
  int64_t until = PyLong_AsLongLong(a[8]);
  if (arg_u32(a[2], &rec) || PyErr_Occurred() || shm_need_life(s, "lock")) return NULL;
  db_resv *r = resv_of(s, rec);
  if (!r) return NULL;
  uint64_t word = ctx ? ctx->word : owner->word;
  Held *h = held_make(owner, ctx, word); /* before the lock: what may fail must not fail after it */
  if (!h || PyList_Append(a[0], (PyObject *)h)) {
    Py_XDECREF(h);
    return NULL;
  }
  h->shm = (Shm *)Py_NewRef(s);
  h->rec = rec;
  int result = resv_take(s, r, word, ctx && !slow ? (int)ctx->locks : 0, interruptible, try, until);
  if (result >= 0) {
    h->resv = Py_NewRef(a[1]);
    if (PyObject_SetAttr(a[1], held_name, (PyObject *)h)) {
      resv_release(r, word);
      result = RAISED;
    } else {
      owner->locks++;
      if (ctx) ctx->locks++;
    }
  }
  Py_DECREF(h);
  return result == RAISED ? NULL : PyLong_FromLong(result);
}

int taken_undo(PyObject *taken, Py_ssize_t first) {
  int failed = 0;
  PyObject *kind, *value, *trace;
  for (Py_ssize_t i; (i = PyList_GET_SIZE(taken)) > first;) {
    PyObject *item = Py_NewRef(PyList_GET_ITEM(taken, i - 1));
    int bad = 0;
    PyErr_Fetch(&kind, &value, &trace);
    if (Py_IS_TYPE(item, held_type)) {
      bad = held_release((Held *)item) < 0;
    } else if (PyObject_TypeCheck(item, Context_Type)) {
      Context *c = (Context *)item;
      if (c->locks && my_life(c->shm) == c->life) { /* locks that this list doesn't know of: what closes it says so */
        PyObject *r = PyObject_CallMethod(item, "fini", NULL);
        bad = !r;
        Py_XDECREF(r);
      } else {
        bad = context_shut(c);
      }
    }
    if (bad && kind) { /* the first exception counts */
      PyErr_Clear();
      bad = 0;
    }
    if (!bad) PyErr_Restore(kind, value, trace);
    failed |= bad;
    Py_DECREF(item);
    PyErr_Fetch(&kind, &value, &trace);
    if (PyList_GET_SIZE(taken) == i) failed |= PyList_SetSlice(taken, i - 1, i, NULL);
    PyErr_Restore(kind, value, trace);
    if (PyList_GET_SIZE(taken) >= i) break; /* no memory to make a list shorter: it can't be, but nothing must loop */
  }
  return failed ? -1 : 0;
}

static PyMethodDef methods[] = {
    {"release", (PyCFunction)held_release_call, METH_NOARGS,
     "release($self, /)\n--\n\nRelease the lock. Return False if it isn't held, or if a forked child inherited it."},
    {0}};
static PyMemberDef held_members[] = {
    {"owner", T_OBJECT, offsetof(Held, owner), READONLY, "The thread or task that holds the lock."},
    {"ctx", T_OBJECT, offsetof(Held, ctx), READONLY, "The WwAcquireContext, or None."},
    {"word", T_ULONGLONG, offsetof(Held, word), READONLY, "The context that has the lock."},
    {"room", T_LONG, offsetof(Held, room), 0, "How many fences can still be added."},
    {"lent", T_BOOL, offsetof(Held, lent), READONLY, "Whether a remote call has the lock; word is its context."},
    {0}};
static PyType_Slot held_slots[] = {
    {Py_tp_doc, "HeldLock(owner, word, /)\n--\n\nWhat this process knows of a reservation lock that one of its owners holds. Made by "
                "Shm.resv_hold(), or for a lock on loan that the context `word` has."},
    {Py_tp_new, held_new},
    {Py_tp_traverse, held_traverse},
    {Py_tp_clear, held_clear},
    {Py_tp_dealloc, held_dealloc},
    {Py_tp_methods, methods},
    {Py_tp_members, held_members},
    {0, NULL}};
static PyType_Spec held_spec = {
    .name = "dmabuf._native.HeldLock",
    .basicsize = sizeof(Held),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = held_slots,
};

PyMethodDef held_methods[] = {
    METHOD(resv_hold, METH_FASTCALL, "($self, taken, resv, rec, owner, ctx, slow, interruptible, trylock, until, /)",
           "Lock a reservation object as resv_lock() does, and note it: in resv._held, in the counts of owner and ctx, and in a list.\n\n"
           "Args:\n"
           "    taken: The list of what is undone if the operation fails.\n"
           "    owner: The Context of the thread or task.\n"
           "    ctx: The Context of several locks, or None.\n"
           "    slow: Count ctx as one that holds no lock."),
    {0}};

int held_register(PyObject *module) {
  if (!held_name && !(held_name = PyUnicode_InternFromString("_held"))) return -1;
  if (!Context_Type && !(Context_Type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &context_spec, NULL))) return -1;
  if (!held_type && !(held_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &held_spec, NULL))) return -1;
  return PyModule_AddType(module, Context_Type) || PyModule_AddType(module, held_type) ? -1 : 0;
}
