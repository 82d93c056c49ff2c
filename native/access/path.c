/* path.c - AccessPath, the object. */
#include "access/path.h"

PyTypeObject *Path_Type;

static PyObject *path_aim(Path *p, PyObject *args) {
  Shm *s;
  unsigned rec, target, timeline, life;
  PyObject *thread, *backing;
  int kernel;
  if (!PyArg_ParseTuple(args, "O!IIIIOOp", Shm_Type, &s, &life, &rec, &target, &timeline, &thread, &backing, &kernel)) return NULL;
  Py_XSETREF(p->shm, (Shm *)Py_NewRef(s));
  Py_XSETREF(p->thread, Py_NewRef(thread));
  Py_XSETREF(p->backing, backing == Py_None ? NULL : Py_NewRef(backing));
  p->rec = rec;
  p->target = target;
  p->timeline = timeline;
  p->kernel = kernel != 0;
  p->life = life;
  Py_RETURN_NONE;
}

static PyObject *path_close(Path *p, PyObject *unused) {
  p->life = 0;
  Py_CLEAR(p->mapping);
  Py_RETURN_NONE;
}

static PyObject *get_mapping(Path *p, void *unused) { return Py_NewRef(p->mapping ? (PyObject *)p->mapping : Py_None); }

static int set_mapping(Path *p, PyObject *value, void *unused) {
  Mapping *mapping = NULL;
  if (value && value != Py_None && !(mapping = mapping_of(value))) return -1;
  Py_XSETREF(p->mapping, (Mapping *)Py_XNewRef((PyObject *)mapping));
  return 0;
}

static int path_traverse(Path *p, visitproc visit, void *arg) {
  Py_VISIT(Py_TYPE(p));
  Py_VISIT(p->shm);
  Py_VISIT(p->thread);
  Py_VISIT(p->backing);
  Py_VISIT(p->mapping);
  return 0;
}

static int path_clear(Path *p) {
  Py_CLEAR(p->thread);
  Py_CLEAR(p->backing);
  p->life = 0;
  return 0;
}

static void path_dealloc(Path *p) {
  PyTypeObject *type = Py_TYPE(p);
  PyObject_GC_UnTrack(p);
  path_clear(p);
  Py_CLEAR(p->mapping);
  Py_CLEAR(p->shm);
  type->tp_free(p);
  Py_DECREF(type);
}

static PyMethodDef methods[] = {
    {"aim", (PyCFunction)path_aim, METH_VARARGS,
     "aim($self, shm, life, rec, target, timeline, thread, backing, kernel, /)\n--\n\n"
     "Say what the accesses of the handle are for.\n\n"
     "Args:\n"
     "    life: The membership for which all of this is true.\n"
     "    rec: The record of the buffer.\n"
     "    target: The record whose reservation object counts for it.\n"
     "    timeline: The slot + 1 of this process's timeline for accesses.\n"
     "    thread: An object whose attribute `owner` is the Owner of the running thread.\n"
     "    backing: Whose ops each access asks; None for plain memory.\n"
     "    kernel: Whether the kernel's fences come first."},
    {"close", (PyCFunction)path_close, METH_NOARGS,
     "close($self, /)\n--\n\nForget all of it: the handle is closed. Blocks that are open keep what they have."},
    {0}};
static PyMemberDef members[] = {{"open", T_PYSSIZET, offsetof(Path, open), READONLY, "Blocks that are entered, or wait."},
                                {"life", T_UINT, offsetof(Path, life), READONLY, "The membership for which it was aimed; 0: none."},
                                {0}};
static PyGetSetDef getset[] = {
    {"mapping", (getter)get_mapping, (setter)set_mapping, "The Mapping that accesses look through, or None.", NULL}, {0}};
static PyType_Slot slots[] = {{Py_tp_doc, "AccessPath()\n--\n\nWhat the accesses of one handle need, in one place."},
                              {Py_tp_traverse, path_traverse},
                              {Py_tp_clear, path_clear},
                              {Py_tp_dealloc, path_dealloc},
                              {Py_tp_methods, methods},
                              {Py_tp_members, members},
                              {Py_tp_getset, getset},
                              {0, NULL}};
static PyType_Spec spec = {
    .name = "dmabuf._native.AccessPath",
    .basicsize = sizeof(Path),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = slots,
};

int path_register(PyObject *module) {
  if (!Path_Type && !(Path_Type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &spec, NULL))) return -1;
  return PyModule_AddType(module, Path_Type);
}
