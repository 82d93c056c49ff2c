/* objects.c - Access and AccessGroup, the context managers of one and of several buffers. To enter or leave them is one call. */
#include "access/objects.h"
#include "access/arrive.h"
#include "access/entering.h"
#include "access/leave.h"
#include "domain/access.h"

/* ---- Access ---- */

static PyObject *block_new(PyObject *module, PyObject *const *a, Py_ssize_t n) {
  if (n != 4 && n != 6) return PyErr_Format(PyExc_TypeError, "access_block(buf, handle, write, timeout, offset=0, length=-1)");
  Py_ssize_t offset = 0, length = -1;
  if (n == 6) {
    offset = PyLong_AsSsize_t(a[4]);
    length = PyLong_AsSsize_t(a[5]);
    if (PyErr_Occurred()) return NULL;
  }
  Block *b = (Block *)Block_Type->tp_alloc(Block_Type, 0);
  if (!b) return NULL;
  b->buf = Py_NewRef(a[0]);
  b->handle = Py_NewRef(a[1]);
  b->write = a[2] == Py_True;
  b->timeout = Py_NewRef(a[3]);
  b->offset = offset;
  b->length = length;
  return (PyObject *)b;
}

static PyObject *block_enter(Block *b, PyObject *unused) { return accesses_enter(&b, 1, (PyObject *)b, b->timeout); }

static PyObject *block_exit(Block *b, PyObject *const *a, Py_ssize_t n) {
  if (block_leave(b, n > 0 && a[0] != Py_None)) return NULL;
  Py_RETURN_NONE;
}

static PyObject *block_aenter(Block *b, PyObject *unused) { return entering_new((PyObject *)b, NULL); }

static PyObject *block_aexit(Block *b, PyObject *const *a, Py_ssize_t n) {
  if (block_leave(b, n > 0 && a[0] != Py_None)) return NULL;
  return entering_new(NULL, Py_None);
}

static PyObject *block_begin(Block *b, PyObject *backing) {
  if (b->state != ENTERED || !b->fence || b->asked) return PyErr_Format(PyExc_ValueError, "the block is not being entered");
  if (block_ask(b, backing)) return NULL;
  Py_RETURN_NONE;
}

static PyObject *op_begun(Block *b, PyObject *const *a, Py_ssize_t n) {
  if (n < 1) return PyErr_Format(PyExc_TypeError, "a function is required");
  return block_begun(b, a, n);
}

static PyObject *op_told(Block *b, PyObject *const *a, Py_ssize_t n) {
  if (n < 1) return PyErr_Format(PyExc_TypeError, "a function is required");
  return block_told(b, a, n);
}

static PyObject *block_arrive(Block *b, PyObject *args) {
  PyObject *owner, *pending;
  long long until;
  if (!PyArg_ParseTuple(args, "O!L", Context_Type, &owner, &until)) return NULL;
  if (b->state != ENTERED || b->fence) return PyErr_Format(PyExc_ValueError, "the block is not being entered");
  if (accesses_arrive(&b, 1, owner, until, true, &pending)) return NULL;
  return pending ? pending : PyList_New(0);
}

static PyObject *block_blocked(Block *b, PyObject *unused) {
  if (b->state != ENTERED || !b->fence || !block_is_ours(b)) return PyList_New(0);
  handles pending;
  handles_begin(&pending);
  int failed = access_blocked(b->shm, b->target, b->write, &pending);
  PyObject *list = NULL;
  if (failed && failed != RAISED) {
    PyObject *number = PyLong_FromLong(-failed), *result = number ? rule(RULE_REFUSED, (PyObject *)b, number, NULL) : NULL;
    Py_XDECREF(number);
    Py_XDECREF(result);
  } else if (!failed) {
    list = handles_list(&pending);
  }
  handles_end(&pending);
  return list;
}

static int block_traverse(Block *b, visitproc visit, void *arg) {
  Py_VISIT(Py_TYPE(b));
  Py_VISIT(b->buf);
  Py_VISIT(b->handle);
  Py_VISIT(b->timeout);
  Py_VISIT(b->path);
  Py_VISIT(b->shm);
  Py_VISIT(b->mapping);
  Py_VISIT(b->asked);
  Py_VISIT(b->kept);
  return 0;
}

/* Entered and never left: as if the block had raised. Holds and views refer to it, so none is left. */
static void block_finalize(Block *b) {
  if (b->state == IDLE) return;
  PyObject *kind, *value, *trace;
  PyErr_Fetch(&kind, &value, &trace);
  if (b->state == ENTERED)
    block_abandon(b);
  else {
    if (b->state == OPEN && b->write) b->error = -ECANCELED;
    block_end(b);
  }
  PyErr_Restore(kind, value, trace);
}

static int block_clear(Block *b) {
  Py_CLEAR(b->buf);
  Py_CLEAR(b->handle);
  Py_CLEAR(b->timeout);
  return 0;
}

static void block_dealloc(Block *b) {
  PyTypeObject *type = Py_TYPE(b);
  if (b->state != IDLE && PyObject_CallFinalizerFromDealloc((PyObject *)b)) return;
  PyObject_GC_UnTrack(b);
  block_clear(b);
  type->tp_free(b);
  Py_DECREF(type);
}

static PyObject *block_repr(Block *b) {
  static const char *const states[] = {"not entered", "waiting", "open", "left, and something made from its view is kept"};
  return PyUnicode_FromFormat("<%s() of %R, %s>", b->write ? "write" : "read", b->buf ? b->buf : Py_None, states[(int)b->state]);
}

static PyObject *get_shm(Block *b, void *unused) { return Py_NewRef(b->shm ? (PyObject *)b->shm : Py_None); }

static PyMethodDef block_methods[] = {
    {"__enter__", (PyCFunction)block_enter, METH_NOARGS, NULL},
    {"__exit__", (PyCFunction)(void *)block_exit, METH_FASTCALL, NULL},
    {"__aenter__", (PyCFunction)block_aenter, METH_NOARGS, NULL},
    {"__aexit__", (PyCFunction)(void *)block_aexit, METH_FASTCALL, NULL},
    {"begin", (PyCFunction)block_begin, METH_O,
     "begin($self, backing, /)\n--\n\nCall the exporter's op now, in the middle of an entering."},
    {"begun", (PyCFunction)(void *)op_begun, METH_FASTCALL,
     "begun($self, function, /, *args)\n--\n\nCall the exporter's begin, and note at once that its end is to be called."},
    {"told", (PyCFunction)(void *)op_told, METH_FASTCALL,
     "told($self, function, /, *args)\n--\n\nCall the exporter's end, and note that it isn't to be called again, whatever it raises."},
    {"arrive", (PyCFunction)block_arrive, METH_VARARGS,
     "arrive($self, owner, until, /)\n--\n\nAdd the fence of the access, in the middle of an entering.\n\n"
     "Returns:\n    The handles of the fences that block it."},
    {"blocked", (PyCFunction)block_blocked, METH_NOARGS,
     "blocked($self, /)\n--\n\nReturn the handles that block the access still, after its waits, because its buffer is a stream's."},
    {0}};
static PyMemberDef block_members[] = {
    {"buf", T_OBJECT, offsetof(Block, buf), READONLY, "The buffer."},
    {"handle", T_OBJECT, offsetof(Block, handle), READONLY, "Its handle."},
    {"timeout", T_OBJECT, offsetof(Block, timeout), READONLY, "Seconds to wait, or None."},
    {"write", T_BOOL, offsetof(Block, write), READONLY, "Whether it is a write() block."},
    {"target", T_UINT, offsetof(Block, target), READONLY, "The record whose reservation object counts for the buffer."},
    {"fence", T_ULONGLONG, offsetof(Block, fence), READONLY, "The handle of its fence; 0: none."},
    {"kept", T_PYSSIZET, offsetof(Block, kept_count), READONLY, "Exports of its views that somebody keeps."},
    {0}};
static PyGetSetDef block_getset[] = {{"shm", (getter)get_shm, NULL, "The mapped domain, while the access is entered; else None.", NULL},
                                     {0}};
static PyType_Slot block_slots[] = {
    {Py_tp_doc, "One buffer's read() or write() block, sync or async: a context manager for one use at a time."},
    {Py_tp_traverse, block_traverse},
    {Py_tp_clear, block_clear},
    {Py_tp_finalize, block_finalize},
    {Py_tp_dealloc, block_dealloc},
    {Py_tp_repr, block_repr},
    {Py_tp_methods, block_methods},
    {Py_tp_members, block_members},
    {Py_tp_getset, block_getset},
    {0, NULL}};
static PyType_Spec block_spec = {
    .name = "dmabuf._native.Access",
    .basicsize = sizeof(Block),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_HAVE_GC,
    .slots = block_slots,
};

static PyMethodDef functions[] = {
    {"access_block", (PyCFunction)(void *)block_new, METH_FASTCALL,
     "access_block($module, buf, handle, write, timeout, offset=0, length=-1, /)\n--\n\nReturn a block, which isn't entered."},
    {0}};

/* ---- AccessGroup ---- */

static inline Block **parts_of(Group *g) { return (Block **)((PyTupleObject *)g->parts)->ob_item; }

static PyObject *group_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
  PyObject *parts, *timeout;
  if (!PyArg_ParseTuple(args, "O!O", &PyTuple_Type, &parts, &timeout)) return NULL;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(parts); i++)
    if (!Py_IS_TYPE(PyTuple_GET_ITEM(parts, i), Block_Type)) return PyErr_Format(PyExc_TypeError, "a group is made of blocks");
  Group *g = (Group *)type->tp_alloc(type, 0);
  if (!g) return NULL;
  g->parts = Py_NewRef(parts);
  g->timeout = Py_NewRef(timeout);
  return (PyObject *)g;
}

static PyObject *group_enter(Group *g, PyObject *unused) {
  return accesses_enter(parts_of(g), PyTuple_GET_SIZE(g->parts), (PyObject *)g, g->timeout);
}

/* All parts are left, the last one first, whatever one of them raises. The last exception counts. */
static int group_leave(Group *g, bool failed) {
  PyObject *kind = NULL, *value = NULL, *trace = NULL;
  for (Py_ssize_t i = PyTuple_GET_SIZE(g->parts); i-- > 0;) {
    if (!block_leave(parts_of(g)[i], failed)) continue;
    Py_XDECREF(kind);
    Py_XDECREF(value);
    Py_XDECREF(trace);
    PyErr_Fetch(&kind, &value, &trace);
  }
  if (!kind) return 0;
  PyErr_Restore(kind, value, trace);
  return -1;
}

static PyObject *group_exit(Group *g, PyObject *const *a, Py_ssize_t n) {
  if (group_leave(g, n > 0 && a[0] != Py_None)) return NULL;
  Py_RETURN_NONE;
}

static PyObject *group_aenter(Group *g, PyObject *unused) { return entering_new((PyObject *)g, NULL); }

static PyObject *group_aexit(Group *g, PyObject *const *a, Py_ssize_t n) {
  if (group_leave(g, n > 0 && a[0] != Py_None)) return NULL;
  return entering_new(NULL, Py_None);
}

static PyObject *group_add(Group *g, PyObject *owner) {
  if (!PyObject_TypeCheck(owner, Context_Type)) return PyErr_Format(PyExc_TypeError, "an Owner is required");
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(g->parts); i++)
    if (parts_of(g)[i]->state != ENTERED || parts_of(g)[i]->fence) return PyErr_Format(PyExc_ValueError, "the group is not being entered");
  return accesses_add(parts_of(g), PyTuple_GET_SIZE(g->parts), owner);
}

static int group_traverse(Group *g, visitproc visit, void *arg) {
  Py_VISIT(Py_TYPE(g));
  Py_VISIT(g->parts);
  Py_VISIT(g->timeout);
  return 0;
}

static void group_dealloc(Group *g) {
  PyTypeObject *type = Py_TYPE(g);
  PyObject_GC_UnTrack(g);
  Py_CLEAR(g->parts);
  Py_CLEAR(g->timeout);
  type->tp_free(g);
  Py_DECREF(type);
}

static PyMethodDef group_methods[] = {
    {"__enter__", (PyCFunction)group_enter, METH_NOARGS, NULL},
    {"__exit__", (PyCFunction)(void *)group_exit, METH_FASTCALL, NULL},
    {"__aenter__", (PyCFunction)group_aenter, METH_NOARGS, NULL},
    {"__aexit__", (PyCFunction)(void *)group_aexit, METH_FASTCALL, NULL},
    {"add", (PyCFunction)group_add, METH_O,
     "add($self, owner, /)\n--\n\nAdd the fences of the accesses, while the caller holds all reservation locks.\n\n"
     "Returns:\n    The handles of the fences that block them."},
    {0}};
static PyMemberDef group_members[] = {{"parts", T_OBJECT, offsetof(Group, parts), READONLY, "The blocks of the buffers."},
                                      {"timeout", T_OBJECT, offsetof(Group, timeout), READONLY, "Seconds to wait, or None."},
                                      {0}};
static PyType_Slot group_slots[] = {
    {Py_tp_doc, "AccessGroup(parts, timeout, /)\n--\n\nBlocks of several buffers that are granted together: a context manager, sync or "
                "async, for one use at a time."},
    {Py_tp_new, group_new},
    {Py_tp_traverse, group_traverse},
    {Py_tp_dealloc, group_dealloc},
    {Py_tp_methods, group_methods},
    {Py_tp_members, group_members},
    {0, NULL}};
static PyType_Spec group_spec = {
    .name = "dmabuf._native.AccessGroup",
    .basicsize = sizeof(Group),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = group_slots,
};

int objects_register(PyObject *module) {
  if (!Block_Type && !(Block_Type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &block_spec, NULL))) return -1;
  if (!Group_Type && !(Group_Type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &group_spec, NULL))) return -1;
  return PyModule_AddType(module, Block_Type) || PyModule_AddType(module, Group_Type) || PyModule_AddFunctions(module, functions) ? -1 : 0;
}
