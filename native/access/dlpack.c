/* dlpack.c - View.__dlpack__: the bytes of a view for every library of arrays that takes DLPack (dmlc/dlpack, dlpack.h, 1.0).
 *
 * A read() view is marked read-only, which only versioned consumers are told. torch is told, and makes a tensor that can be written all the
 * same: it is refused, or given the copy that it asked for.
 */
#include "access/dlpack.h"
#include "access/holds.h"
#include <stdlib.h>

typedef struct {
  void *data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
} DLTensor;

typedef struct unversioned {
  DLTensor tensor;
  void *context;
  void (*deleter)(struct unversioned *);
} Unversioned;

typedef struct versioned {
  uint32_t major, minor;
  void *context;
  void (*deleter)(struct versioned *);
  uint64_t flags;
  DLTensor tensor;
} Versioned;

enum { CPU = 1, UNSIGNED = 1, READ_ONLY = 1, IS_COPIED = 2 };

typedef struct {
  union {
    Unversioned plain;
    Versioned with;
  };

  int64_t shape, stride;
  char *copy; /* or NULL */
} Package;

/* From any thread, with or without the interpreter's lock, perhaps after its end: then nothing is left to end. */
static void let_go(void *kept, Package *p) {
  if (kept && Py_IsInitialized()) {
    PyGILState_STATE state = PyGILState_Ensure();
    Py_DECREF((PyObject *)kept);
    PyGILState_Release(state);
  }
  free(p->copy);
  free(p);
}

static void delete_plain(Unversioned *m) { let_go(m->context, (Package *)m); }

static void delete_versioned(Versioned *m) { let_go(m->context, (Package *)m); }

static void capsule_gone(PyObject *capsule) { /* whoever takes the tensor renames the capsule, and calls the deleter itself */
  PyObject *kind, *value, *trace;
  PyErr_Fetch(&kind, &value, &trace);
  if (PyCapsule_IsValid(capsule, "dltensor"))
    delete_plain(PyCapsule_GetPointer(capsule, "dltensor"));
  else if (PyCapsule_IsValid(capsule, "dltensor_versioned"))
    delete_versioned(PyCapsule_GetPointer(capsule, "dltensor_versioned"));
  PyErr_Restore(kind, value, trace);
}

static bool torch_asks(void) { /* torch.from_dlpack calls from its own Python code */
  PyObject *globals = PyEval_GetGlobals(), *name = globals ? PyDict_GetItemString(globals, "__name__") : NULL;
  const char *text = name && PyUnicode_Check(name) ? PyUnicode_AsUTF8(name) : NULL;
  if (!text) PyErr_Clear();
  return text && (!strcmp(text, "torch") || !strncmp(text, "torch.", 6));
}

static PyObject *refuse(const char *text) {
  PyErr_SetString(PyExc_BufferError, text);
  return NULL;
}

PyObject *view_dlpack(View *v, PyObject *args, PyObject *kwargs) {
  static char *names[] = {"stream", "max_version", "dl_device", "copy", NULL};
  PyObject *stream = Py_None, *newest = Py_None, *device = Py_None, *copy = Py_None;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|$OOOO:__dlpack__", names, &stream, &newest, &device, &copy)) return NULL;
  long major = 0;
  if (newest != Py_None) {
    PyObject *first = PySequence_GetItem(newest, 0);
    major = first ? PyLong_AsLong(first) : -1;
    Py_XDECREF(first);
    if (major == -1 && PyErr_Occurred()) return NULL;
  }
  if (stream != Py_None) return refuse("__dlpack__: memory of the CPU has no stream: pass stream=None");
  if (device != Py_None) {
    PyObject *wanted = PySequence_GetItem(device, 0);
    long type = wanted ? PyLong_AsLong(wanted) : -1;
    Py_XDECREF(wanted);
    if (type == -1 && PyErr_Occurred()) return NULL;
    if (type != CPU) return refuse("__dlpack__: the memory is the CPU's: move the array to the device after it is made");
  }
  bool copied = copy == Py_True;
  if (v->readonly && !copied) {
    if (major < 1)
      return refuse("__dlpack__: the view is read-only, and the consumer's DLPack, older than 1.0, can't be told: pass copy=True, or use a "
                    "write() block");
    if (torch_asks())
      return refuse("__dlpack__: the view is read-only, and torch would write it all the same: use view.tensor(copy=True), or a write() "
                    "block");
  }
  if (!view_is_open(v)) return NULL;
  Package *p = calloc(1, sizeof *p);
  if (!p) return PyErr_NoMemory();
  hold *h = NULL;
  if (copied) {
    if ((p->copy = malloc(v->n ? (size_t)v->n : 1)))
      for (Py_ssize_t i = 0; i < v->n; i++) p->copy[i] = v->base[i * v->stride];
    else
      PyErr_NoMemory();
  } else {
    h = hold_new(v->block, v->base, v->n, v->stride, v->readonly);
  }
  if (!h && !p->copy) {
    free(p);
    return NULL;
  }
  p->shape = v->n;
  p->stride = copied ? 1 : v->stride;
  DLTensor tensor = {.data = copied ? p->copy : v->base,
                     .device_type = CPU,
                     .ndim = 1,
                     .code = UNSIGNED,
                     .bits = 8,
                     .lanes = 1,
                     .shape = &p->shape,
                     .strides = &p->stride};
  PyObject *capsule;
  if (major >= 1) {
    p->with = (Versioned){.major = 1, .context = h, .deleter = delete_versioned, .tensor = tensor};
    p->with.flags = copied ? IS_COPIED : v->readonly ? READ_ONLY : 0;
    capsule = PyCapsule_New(&p->with, "dltensor_versioned", capsule_gone);
  } else {
    p->plain = (Unversioned){.tensor = tensor, .context = h, .deleter = delete_plain};
    capsule = PyCapsule_New(&p->plain, "dltensor", capsule_gone);
  }
  if (!capsule) let_go(h, p);
  return capsule;
}

PyObject *view_dlpack_device(View *v, PyObject *unused) { return Py_BuildValue("(ii)", CPU, 0); }
