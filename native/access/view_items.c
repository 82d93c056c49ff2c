/* view_items.c - the bytes of a View by index and by slice, and comparison: as of a memoryview of bytes.
 *
 * An index, a value or a foreign buffer may run any Python code, which may leave the block. After each call into Python the view is checked
 * again before its memory is touched.
 */
#include "access/view.h"

Py_ssize_t view_length(PyObject *op) { return view_is_open((View *)op) ? ((View *)op)->n : -1; }

PyObject *view_item(PyObject *op, Py_ssize_t i) {
  View *v = (View *)op;
  if (!view_is_open(v)) return NULL;
  if (i < 0 || i >= v->n) {
    PyErr_SetString(PyExc_IndexError, "index out of bounds on dimension 1");
    return NULL;
  }
  return PyLong_FromLong((unsigned char)v->base[i * v->stride]);
}

static PyObject *wrong_key(PyObject *key) {
  return PyErr_Format(PyExc_TypeError, "view indices must be integers or slices, not %s", Py_TYPE(key)->tp_name);
}

/* An index; -1 with an exception set, or -1. The common case runs no code and calls little. */
static Py_ssize_t index_of(PyObject *key) {
  if (PyLong_CheckExact(key)) {
    Py_ssize_t i = PyLong_AsSsize_t(key);
    if (i != -1 || !PyErr_Occurred()) return i;
    PyErr_Clear();
  }
  return PyNumber_AsSsize_t(key, PyExc_IndexError);
}

PyObject *view_subscript(PyObject *op, PyObject *key) {
  View *v = (View *)op;
  if (PySlice_Check(key)) {
    Py_ssize_t start, stop, step;
    if (PySlice_Unpack(key, &start, &stop, &step) < 0 || !view_is_open(v)) return NULL;
    Py_ssize_t n = PySlice_AdjustIndices(v->n, &start, &stop, step);
    return view_new(v->block, n ? v->base + start * v->stride : v->base, n, n > 1 ? v->stride * step : v->stride, v->readonly);
  }
  if (!PyIndex_Check(key)) return wrong_key(key);
  Py_ssize_t i = index_of(key);
  if (i == -1 && PyErr_Occurred()) return NULL;
  return view_item(op, i < 0 ? i + v->n : i);
}

static int store_item(View *v, PyObject *key, PyObject *value) {
  Py_ssize_t i = index_of(key);
  if (i == -1 && PyErr_Occurred()) return -1;
  int overflow;
  PyObject *number = PyNumber_Index(value);
  if (!number) return -1;
  long byte = PyLong_AsLongAndOverflow(number, &overflow);
  Py_DECREF(number);
  if (!view_is_open(v)) return -1;
  if (i < 0) i += v->n;
  if (i < 0 || i >= v->n) {
    PyErr_SetString(PyExc_IndexError, "index out of bounds on dimension 1");
    return -1;
  }
  if (overflow || byte < 0 || byte > 255) {
    PyErr_SetString(PyExc_ValueError, "a byte must be 0 to 255");
    return -1;
  }
  v->base[i * v->stride] = (char)byte;
  return 0;
}

static int store_slice(View *v, PyObject *key, PyObject *value) {
  Py_ssize_t start, stop, step;
  if (PySlice_Unpack(key, &start, &stop, &step) < 0) return -1;
  Py_buffer from;
  if (PyObject_GetBuffer(value, &from, PyBUF_FULL_RO) < 0) return -1;
  int result = -1;
  char *copy = NULL;
  if (!view_is_open(v)) goto out;
  Py_ssize_t n = PySlice_AdjustIndices(v->n, &start, &stop, step);
  if (from.len != n) {
    PyErr_Format(PyExc_ValueError, "%zd bytes don't fit a slice of %zd: the size of a view never changes", from.len, n);
    goto out;
  }
  char *to = v->base + start * v->stride;
  Py_ssize_t by = v->stride * step;
  if (by == 1 && PyBuffer_IsContiguous(&from, 'C')) {
    memmove(to, from.buf, (size_t)n);
  } else {
    if (!(copy = PyMem_Malloc(n ? (size_t)n : 1))) {
      PyErr_NoMemory();
      goto out;
    }
    if (PyBuffer_ToContiguous(copy, &from, n, 'C') < 0) goto out;
    for (Py_ssize_t i = 0; i < n; i++) to[i * by] = copy[i];
  }
  result = 0;
out:
  PyMem_Free(copy);
  PyBuffer_Release(&from);
  return result;
}

int view_ass_subscript(PyObject *op, PyObject *key, PyObject *value) {
  View *v = (View *)op;
  if (!value) {
    PyErr_SetString(PyExc_TypeError, "bytes can't be deleted: the size of a view never changes");
    return -1;
  }
  if (!view_is_open(v)) return -1;
  if (v->readonly) {
    PyErr_SetString(PyExc_TypeError, "a read() view is read-only: use a write() block");
    return -1;
  }
  if (PySlice_Check(key)) return store_slice(v, key, value);
  if (PyIndex_Check(key)) return store_item(v, key, value);
  wrong_key(key);
  return -1;
}

PyObject *view_compare(PyObject *a, PyObject *b, int op) {
  if (op != Py_EQ && op != Py_NE) Py_RETURN_NOTIMPLEMENTED;
  if (a == b) return PyBool_FromLong(op == Py_EQ);
  if (!PyObject_CheckBuffer(b)) Py_RETURN_NOTIMPLEMENTED;
  View *v = (View *)a;
  if (!view_is_open(v)) { /* as a memoryview that was released: equal to itself alone */
    PyErr_Clear();
    return PyBool_FromLong(op != Py_EQ);
  }
  PyObject *mine = PyMemoryView_FromObject(a), *its = mine ? PyMemoryView_FromObject(b) : NULL, *result = NULL;
  if (its)
    result = PyObject_RichCompare(mine, its, op);
  else if (mine && (PyErr_ExceptionMatches(PyExc_BufferError) || PyErr_ExceptionMatches(PyExc_ValueError))) {
    PyErr_Clear();
    result = PyBool_FromLong(op != Py_EQ);
  }
  Py_XDECREF(mine);
  Py_XDECREF(its);
  return result;
}
