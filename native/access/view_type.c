/* view_type.c - the methods of View.
 *
 * Two consumers are refused, whom only the flags of their requests tell. Each asks for a writable buffer first, then for a readable one.
 * `np.ndarray(buffer=view)` keeps neither the buffer nor its object, only the view, and would show memory that is gone. Nobody else asks
 * for these two buffers without gaps in this order. `torch.frombuffer` of a read() view would make a tensor that can be written.
 */
#include "access/view_type.h"
#include "access/arrays.h"
#include "access/callers.h"
#include "access/dlpack.h"
#include "access/holds.h"
#include "access/view.h"

static void view_dealloc(View *v) {
  Block *b = v->block;
  view_put(v); /* before the block goes, which may run code that makes a view */
  Py_DECREF(b);
}

static int refuse_torch(void) {
  static const char text[] = "the view is read-only, and torch would write it all the same: use view.tensor(copy=True), or a write() block";
  /* torch raises an error of its own instead of this one, so that the remedy must come as a warning. */
  PyErr_Clear(); /* of its first request, which it leaves */
  if (!PyErr_WarnEx(PyExc_RuntimeWarning, text, 1)) PyErr_SetString(PyExc_BufferError, text);
  return -1;
}

static int view_getbuffer(View *v, Py_buffer *buffer, int flags) {
  buffer->obj = NULL;
  if (!view_is_open(v)) return -1;
  if ((flags & ~PyBUF_WRITABLE) == PyBUF_ANY_CONTIGUOUS) {
    unsigned long me = PyThread_get_thread_ident();
    bool first = flags & PyBUF_WRITABLE, second = !first && v->asked == me;
    v->asked = first ? me : 0;
    if (first || second) {
      PyErr_SetString(PyExc_BufferError,
                      "np.ndarray(buffer=view) would not keep the access: use view.array(dtype=, shape=, offset=, strides=)");
      return -1;
    }
  } else {
    bool second = flags == PyBUF_SIMPLE && v->wanted && v->wanted == PyThread_get_thread_ident();
    v->asked = 0;
    v->wanted = flags == PyBUF_WRITABLE && v->readonly ? PyThread_get_thread_ident() : 0;
    if (second && called_by_torch()) return refuse_torch();
  }
  hold *h = hold_new(v->block, v->base, v->n, v->stride, v->readonly);
  if (!h) return -1;
  int result = hold_fill(h, buffer, flags);
  Py_DECREF(h);
  return result;
}

/* Never called, since the buffer's object is a Hold. But NumPy takes a memoryview of what has this slot, and else keeps the view alone. */
static void view_releasebuffer(View *v, Py_buffer *buffer) {}

static PyObject *by_memoryview(PyObject *view, const char *name, PyObject *args, PyObject *kwargs) {
  PyObject *memory = view_is_open((View *)view) ? PyMemoryView_FromObject(view) : NULL;
  PyObject *method = memory ? PyObject_GetAttrString(memory, name) : NULL;
  PyObject *result = method ? PyObject_Call(method, args, kwargs) : NULL;
  Py_XDECREF(method);
  Py_XDECREF(memory);
  return result;
}

#define BY_MEMORYVIEW(name) \
  static PyObject *view_##name(PyObject *v, PyObject *args, PyObject *kwargs) { return by_memoryview(v, #name, args, kwargs); }
BY_MEMORYVIEW(cast)
BY_MEMORYVIEW(hex)
BY_MEMORYVIEW(tobytes)
BY_MEMORYVIEW(tolist)

/* A rule that has the view's name for it, with the view and all arguments. */
static PyObject *by_rule(View *v, const char *name, PyObject *args, PyObject *kwargs) {
  if (!view_is_open(v)) return NULL;
  PyObject *method = rule_method(name), *all = method ? PyTuple_New(PyTuple_GET_SIZE(args) + 1) : NULL, *result = NULL;
  if (all) {
    PyTuple_SET_ITEM(all, 0, Py_NewRef((PyObject *)v));
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(args); i++) PyTuple_SET_ITEM(all, i + 1, Py_NewRef(PyTuple_GET_ITEM(args, i)));
    result = PyObject_Call(method, all, kwargs);
  }
  Py_XDECREF(all);
  Py_XDECREF(method);
  return result;
}

static PyObject *view_planes(View *v, PyObject *args, PyObject *kwargs) { return by_rule(v, "planes", args, kwargs); }

static PyObject *view_tensor(View *v, PyObject *args, PyObject *kwargs) { return by_rule(v, "tensor", args, kwargs); }

static PyObject *view_toreadonly(View *v, PyObject *unused) {
  return view_is_open(v) ? view_new(v->block, v->base, v->n, v->stride, true) : NULL;
}

static PyObject *view_release(View *v, PyObject *unused) {
  v->released = true;
  Py_RETURN_NONE;
}

static PyObject *view_enter(View *v, PyObject *unused) { return view_is_open(v) ? Py_NewRef((PyObject *)v) : NULL; }

static PyObject *view_exit(View *v, PyObject *const *args, Py_ssize_t n) { return view_release(v, NULL); }

static PyObject *view_repr(View *v) {
  bool open = v->block->state == OPEN && v->use == v->block->use && !v->released;
  return PyUnicode_FromFormat("<dmabuf.View of %zd bytes, %s, %s>", v->n, v->readonly ? "read-only" : "writable",
                              open          ? "open"
                              : v->released ? "released"
                                            : "its block is over");
}

#define GET(name, value) \
  static PyObject *get_##name(View *v, void *unused) { return view_is_open(v) ? (value) : NULL; }
GET(nbytes, PyLong_FromSsize_t(v->n))
GET(readonly, PyBool_FromLong(v->readonly))
GET(format, PyUnicode_FromString("B"))
GET(one, PyLong_FromLong(1))
GET(shape, Py_BuildValue("(n)", v->n))
GET(strides, Py_BuildValue("(n)", v->stride))
GET(suboffsets, PyTuple_New(0))
GET(contiguous, PyBool_FromLong(v->stride == 1 || v->n <= 1))
GET(obj, Py_NewRef(v->block->buf))

#define KEYWORDS(f) (PyCFunction)(void *) f, METH_VARARGS | METH_KEYWORDS
static PyMethodDef methods[] = {
    {"cast", KEYWORDS(view_cast), "cast($self, /, format, shape=...)\n--\n\nReturn a memoryview of the bytes as another type or shape."},
    {"hex", KEYWORDS(view_hex), "hex($self, /, sep=..., bytes_per_sep=1)\n--\n\nReturn the bytes as hexadecimal text."},
    {"tobytes", KEYWORDS(view_tobytes), "tobytes($self, /, order='C')\n--\n\nReturn a copy of the bytes."},
    {"tolist", KEYWORDS(view_tolist), "tolist($self, /)\n--\n\nReturn the bytes as a list of numbers."},
    {"array", KEYWORDS(view_array),
     "array($self, /, dtype=None, shape=None, offset=0, strides=None)\n--\n\n"
     "Return a NumPy array of the bytes, which keeps the access as long as it lives. Use it without a name.\n\n"
     "Without arguments it is what the buffer's layout says, or bytes.\n\n"
     "Args:\n"
     "    dtype: What numpy.dtype() takes; None for bytes.\n"
     "    shape: The dimensions, of which one may be -1; None for one dimension to the end.\n"
     "    offset: The byte at which it begins.\n"
     "    strides: Bytes from one item to the next in each dimension; None without gaps.\n\n"
     "Raises:\n"
     "    ValueError: The block is over, or the array would reach beyond the view.\n"
     "    TypeError: The dtype has objects.\n"
     "    ImportError: NumPy is not installed."},
    {"__array__", KEYWORDS(view_as_array), "__array__($self, /, dtype=None, copy=None)\n--\n\nReturn a NumPy array of the bytes."},
    {"tensor", KEYWORDS(view_tensor),
     "tensor($self, /, dtype=None, shape=None, offset=0, strides=None, *, copy=False)\n--\n\n"
     "Return a tensor of torch of the bytes, which keeps the access as long as it lives. Use it without a name.\n\n"
     "Args:\n"
     "    dtype: A torch.dtype; None for bytes.\n"
     "    shape, offset, strides: As of array(). strides are bytes.\n"
     "    copy: Return a tensor of its own memory. A read() view needs it, since torch has no read-only tensors.\n\n"
     "Raises:\n"
     "    ValueError: The block is over, or the tensor would reach beyond the view.\n"
     "    BufferError: The view is read-only, and copy is False.\n"
     "    ImportError: torch is not installed."},
    {"planes", KEYWORDS(view_planes),
     "planes($self, /)\n--\n\n"
     "Return a NumPy array for each plane of the picture that is in this buffer, as its layout says.\n\n"
     "Raises:\n"
     "    ValueError: The block is over, or the view is a part of another.\n"
     "    DmaBufError: The buffer has no layout of a picture (ENODATA).\n"
     "    ImportError: NumPy is not installed."},
    {"__dlpack__", KEYWORDS(view_dlpack),
     "__dlpack__($self, /, *, stream=None, max_version=None, dl_device=None, copy=None)\n--\n\n"
     "Return a DLPack capsule of the bytes, for `from_dlpack` of any library.\n\n"
     "Raises:\n"
     "    BufferError: The view is read-only, and the consumer can't be told, or doesn't heed it."},
    {"__dlpack_device__", (PyCFunction)view_dlpack_device, METH_NOARGS, "__dlpack_device__($self, /)\n--\n\nReturn (1, 0): the CPU."},
    {"toreadonly", (PyCFunction)view_toreadonly, METH_NOARGS, "toreadonly($self, /)\n--\n\nReturn a read-only view of the same bytes."},
    {"release", (PyCFunction)view_release, METH_NOARGS,
     "release($self, /)\n--\n\nEnd this view: each use of it is ValueError from now on. The block goes on."},
    {"__enter__", (PyCFunction)view_enter, METH_NOARGS, NULL},
    {"__exit__", (PyCFunction)(void *)view_exit, METH_FASTCALL, NULL},
    {0}};
static PyGetSetDef getset[] = {{"nbytes", (getter)get_nbytes, NULL, "The number of bytes.", NULL},
                               {"readonly", (getter)get_readonly, NULL, "Whether the bytes may only be read.", NULL},
                               {"format", (getter)get_format, NULL, "'B': bytes.", NULL},
                               {"itemsize", (getter)get_one, NULL, "1.", NULL},
                               {"ndim", (getter)get_one, NULL, "1.", NULL},
                               {"shape", (getter)get_shape, NULL, "(nbytes,).", NULL},
                               {"strides", (getter)get_strides, NULL, "How far it is from one byte to the next.", NULL},
                               {"suboffsets", (getter)get_suboffsets, NULL, "().", NULL},
                               {"contiguous", (getter)get_contiguous, NULL, "Whether the bytes lie side by side.", NULL},
                               {"c_contiguous", (getter)get_contiguous, NULL, "The same.", NULL},
                               {"f_contiguous", (getter)get_contiguous, NULL, "The same.", NULL},
                               {"obj", (getter)get_obj, NULL, "The buffer.", NULL},
                               {0}};
static PyType_Slot slots[] = {
    {Py_tp_doc,
     "The bytes of a buffer during a read() or write() block.\n\n"
     "A view can be used like a memoryview of bytes: by index and slice, by len(), ==, cast(), tobytes(), and by whatever takes a\n"
     "buffer. After the block each use is ValueError. Where a memoryview itself is asked for, memoryview(view) gives one."},
    {Py_tp_dealloc, view_dealloc},
    {Py_tp_repr, view_repr},
    {Py_tp_richcompare, view_compare},
    {Py_tp_hash, PyObject_HashNotImplemented},
    {Py_bf_getbuffer, view_getbuffer},
    {Py_bf_releasebuffer, view_releasebuffer},
    {Py_sq_length, view_length},
    {Py_sq_item, view_item},
    {Py_mp_length, view_length},
    {Py_mp_subscript, view_subscript},
    {Py_mp_ass_subscript, view_ass_subscript},
    {Py_tp_methods, methods},
    {Py_tp_getset, getset},
    {0, NULL}};
static PyType_Spec spec = {
    .name = "dmabuf.View",
    .basicsize = sizeof(View),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_SEQUENCE,
    .slots = slots,
};

int view_type_register(PyObject *module) {
  if (!View_Type && !(View_Type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &spec, NULL))) return -1;
  return PyModule_AddType(module, View_Type);
}
