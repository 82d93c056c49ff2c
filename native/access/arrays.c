/* arrays.c - View.array(): an array of NumPy, made anew at each use, so that no name of it outlives the block by accident.
 *
 * Most of the price of `numpy.ndarray(…)` is the reading of its arguments. NumPy has a table of C functions, in a capsule, whose places are
 * part of its ABI: it is looked up at run time, so that neither the build nor this package needs NumPy. Without it the class is called.
 */
#include "access/arrays.h"
#include "access/holds.h"
#include <stdlib.h>

#define MOST_DIMENSIONS 32 /* the least of what NumPy's versions take */
#define WRITEABLE       0x0400

enum { PLACE_ARRAY_TYPE = 2, PLACE_NEW_FROM_DESCR = 94, PLACE_SET_BASE = 282 };

typedef PyObject *(*new_from_descr)(PyTypeObject *, PyObject *, int, Py_ssize_t *, Py_ssize_t *, void *, int, PyObject *);
typedef int (*set_base)(PyObject *, PyObject *);

static PyObject *np_dtype, *np_ndarray, *bytes_dtype; /* numpy.dtype, numpy.ndarray, numpy.dtype("u1") */
static void **np_table;                               /* NULL: there is none */

static int need_numpy(void) {
  if (bytes_dtype) return 0;
  PyObject *np = PyImport_ImportModule("numpy");
  if (!np) return -1;
  static const char *const places[] = {"numpy._core._multiarray_umath", "numpy.core._multiarray_umath"};
  for (size_t i = 0; !np_table && i < 2; i++) {
    PyObject *module = PyImport_ImportModule(places[i]), *capsule = module ? PyObject_GetAttrString(module, "_ARRAY_API") : NULL;
    if (capsule) np_table = PyCapsule_GetPointer(capsule, NULL);
    Py_XDECREF(capsule);
    Py_XDECREF(module);
    PyErr_Clear();
  }
  if (!np_dtype) np_dtype = PyObject_GetAttrString(np, "dtype");
  if (!np_ndarray) np_ndarray = PyObject_GetAttrString(np, "ndarray");
  Py_DECREF(np);
  if (np_table && (PyObject *)np_table[PLACE_ARRAY_TYPE] != np_ndarray) np_table = NULL;
  PyObject *made = np_dtype && np_ndarray ? PyObject_CallFunction(np_dtype, "s", "u1") : NULL;
  if (!made) return -1;
  Py_XSETREF(bytes_dtype, made);
  return 0;
}

/* Numbers of a tuple, a list or one number. The count, or -1. */
static int numbers(PyObject *given, const char *name, Py_ssize_t *out) {
  if (PyIndex_Check(given)) {
    out[0] = PyNumber_AsSsize_t(given, PyExc_OverflowError);
    return out[0] == -1 && PyErr_Occurred() ? -1 : 1;
  }
  PyObject *all = PySequence_Tuple(given);
  if (!all) return -1;
  Py_ssize_t n = PyTuple_GET_SIZE(all);
  if (n > MOST_DIMENSIONS) PyErr_Format(PyExc_ValueError, "array: %s: %zd dimensions; at most %d", name, n, MOST_DIMENSIONS);
  for (Py_ssize_t i = 0; i < n && !PyErr_Occurred(); i++) out[i] = PyNumber_AsSsize_t(PyTuple_GET_ITEM(all, i), PyExc_OverflowError);
  Py_DECREF(all);
  return PyErr_Occurred() ? -1 : (int)n;
}

/* The first and the last byte of what a shape with strides shows, from the offset on. 0, or -1: numbers that are too large. */
static int extent(int n, const Py_ssize_t *shape, const Py_ssize_t *strides, Py_ssize_t item, Py_ssize_t *low, Py_ssize_t *high) {
  *low = 0;
  *high = item;
  for (int i = 0; i < n; i++) {
    Py_ssize_t way;
    if (!shape[i]) {
      *low = *high = 0;
      return 0;
    }
    if (__builtin_mul_overflow(shape[i] - 1, strides[i], &way)) return -1;
    if (__builtin_add_overflow(way < 0 ? *low : *high, way, way < 0 ? low : high)) return -1;
  }
  return 0;
}

/* Fill in one dimension that is -1, and the strides of an array without gaps. 0, or -1 with an exception set. */
static int complete(int n, Py_ssize_t *shape, Py_ssize_t *strides, bool given, Py_ssize_t item, Py_ssize_t room) {
  Py_ssize_t known = item;
  int open = -1;
  for (int i = 0; i < n; i++) {
    if (shape[i] == -1 && open < 0) {
      open = i;
    } else if (shape[i] < 0 || __builtin_mul_overflow(known, shape[i], &known)) {
      PyErr_Format(PyExc_ValueError, "array: the shape has a dimension of %zd: give the whole shape", shape[i]);
      return -1;
    }
  }
  if (open >= 0) {
    if (given || known <= 0 || room % known) {
      PyErr_Format(PyExc_ValueError, "array: %zd bytes are no whole number of %zd: give the whole shape", room, known);
      return -1;
    }
    shape[open] = room / known;
  }
  for (int i = n; !given && i-- > 0;) {
    strides[i] = item;
    if (i < n - 1 && __builtin_mul_overflow(strides[i + 1], shape[i + 1] ? shape[i + 1] : 1, &strides[i])) {
      PyErr_SetString(PyExc_ValueError, "array: the shape is too large: give a smaller one"); /* with a dimension of 0 before */
      return -1;
    }
  }
  return 0;
}

/* low, high: what the array shows, from the offset on. */
static PyObject *make(View *v, PyObject *dtype, int n, Py_ssize_t *shape, Py_ssize_t *strides, Py_ssize_t offset, Py_ssize_t low,
                      Py_ssize_t high) {
  hold *h = hold_new(v->block, v->base + offset + low, high - low, 1, v->readonly);
  if (!h) return NULL;
  PyObject *array = NULL;
  if (np_table) {
    new_from_descr make_array = (new_from_descr)np_table[PLACE_NEW_FROM_DESCR];
    set_base keep = (set_base)np_table[PLACE_SET_BASE];
    array =
        make_array((PyTypeObject *)np_ndarray, Py_NewRef(dtype), n, shape, strides, v->base + offset, v->readonly ? 0 : WRITEABLE, NULL);
    if (!array) {
      Py_DECREF(h);
    } else if (keep(array, (PyObject *)h)) { /* it takes the reference over */
      Py_CLEAR(array);
    }
    return array;
  }
  PyObject *sizes = PyTuple_New(n), *ways = PyTuple_New(n);
  for (int i = 0; sizes && ways && i < n; i++) {
    PyTuple_SET_ITEM(sizes, i, PyLong_FromSsize_t(shape[i]));
    PyTuple_SET_ITEM(ways, i, PyLong_FromSsize_t(strides[i]));
  }
  PyObject *from = PyLong_FromSsize_t(-low);
  if (sizes && ways && from && !PyErr_Occurred())
    array = PyObject_CallFunctionObjArgs(np_ndarray, sizes, dtype, (PyObject *)h, from, ways, NULL);
  Py_XDECREF(from);
  Py_XDECREF(sizes);
  Py_XDECREF(ways);
  Py_DECREF(h);
  return array;
}

PyObject *view_array(View *v, PyObject *args, PyObject *kwargs) {
  static char *names[] = {"dtype", "shape", "offset", "strides", NULL};
  PyObject *dtype = Py_None, *shape = Py_None, *strides = Py_None, *type = NULL, *array = NULL;
  Py_ssize_t offset = 0, sizes[MOST_DIMENSIONS], ways[MOST_DIMENSIONS], item = 1;
  int n = 1;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|OOnO:array", names, &dtype, &shape, &offset, &strides)) return NULL;
  if (!view_is_open(v)) return NULL;
  Mapping *m = v->block->mapping;
  if (dtype == Py_None && shape == Py_None && strides == Py_None && !offset && v->base == m->base && v->n == m->length && v->stride == 1 &&
      block_is_described(v->block)) {
    PyObject *rule = rule_method("array");
    PyObject *described = rule ? PyObject_CallOneArg(rule, (PyObject *)v) : NULL;
    Py_XDECREF(rule);
    return described;
  }
  if (need_numpy()) return NULL;
  if (v->stride != 1 && v->n > 1) {
    PyErr_SetString(PyExc_ValueError, "array: the slice has a step: take the array of the view, and slice the array");
    return NULL;
  }
  if (dtype == Py_None) {
    type = Py_NewRef(bytes_dtype);
  } else {
    type = Py_IS_TYPE(dtype, (PyTypeObject *)np_dtype) ? Py_NewRef(dtype) : PyObject_CallOneArg(np_dtype, dtype);
    PyObject *size = type ? PyObject_GetAttrString(type, "itemsize") : NULL,
             *objects = size ? PyObject_GetAttrString(type, "hasobject") : NULL;
    if (objects) item = PyLong_AsSsize_t(size);
    if (objects == Py_True) PyErr_SetString(PyExc_TypeError, "array: objects can't lie in shared memory: choose a dtype of numbers");
    if (objects && objects != Py_True && item <= 0) PyErr_SetString(PyExc_TypeError, "array: the dtype has items of no size");
    Py_XDECREF(size);
    Py_XDECREF(objects);
    if (!type || PyErr_Occurred()) goto out;
  }
  sizes[0] = -1;
  if (shape != Py_None && (n = numbers(shape, "shape", sizes)) < 0) goto out;
  if (strides != Py_None) {
    int m = numbers(strides, "strides", ways);
    if (m >= 0 && m != n) PyErr_Format(PyExc_ValueError, "array: %d strides for %d dimensions: give one for each", m, n);
    if (m != n) goto out;
  }
  if (!view_is_open(v)) goto out; /* numbers may be objects whose methods leave the block */
  if (offset < 0 || offset > v->n) {
    PyErr_Format(PyExc_ValueError, "array: the offset %zd is not within the %zd bytes of the view: give one that is", offset, v->n);
    goto out;
  }
  if (complete(n, sizes, ways, strides != Py_None, item, v->n - offset)) goto out;
  Py_ssize_t low, high;
  if (extent(n, sizes, ways, item, &low, &high) || low < -offset || high > v->n - offset) {
    PyErr_Format(PyExc_ValueError, "array: this shape, with its strides, reaches beyond the %zd bytes of the view: give a smaller one",
                 v->n);
    goto out;
  }
  array = make(v, type, n, sizes, ways, offset, low, high);
out:
  Py_XDECREF(type);
  return array;
}

PyObject *view_as_array(View *v, PyObject *args, PyObject *kwargs) {
  static char *names[] = {"dtype", "copy", NULL};
  PyObject *dtype = Py_None, *copy = Py_None, *bytes = Py_BuildValue("(s)", "u1");
  if (!bytes) return NULL;
  PyObject *array = PyArg_ParseTupleAndKeywords(args, kwargs, "|OO:__array__", names, &dtype, &copy) ? view_array(v, bytes, NULL) : NULL;
  Py_DECREF(bytes);
  if (!array || (dtype == Py_None && copy != Py_True)) return array;
  PyObject *other = dtype == Py_None ? PyObject_CallMethod(array, "copy", NULL) : PyObject_CallMethod(array, "astype", "O", dtype);
  Py_DECREF(array);
  return other;
}
