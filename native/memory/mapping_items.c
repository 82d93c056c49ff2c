/* mapping_items.c - the bytes of a Mapping by index and by slice: as of a bytearray, but the size never changes.
 *
 * An index or a value may be any Python object, and its methods may close the mapping. After each call into Python the mapping is checked
 * again before it is touched.
 */
#include "memory/mapping.h"

/* The byte that an index names; false with an exception set. */
static bool byte_index(Mapping *self, PyObject *key, Py_ssize_t *index) {
  Py_ssize_t i = PyNumber_AsSsize_t(key, PyExc_IndexError);
  if (i == -1 && PyErr_Occurred()) return false;
  if (i < 0) i += self->length;
  if (i < 0 || i >= self->length) {
    PyErr_SetString(PyExc_IndexError, "mapping index out of range");
    return false;
  }
  *index = i;
  return mapping_is_open(self);
}

static bool byte_range(Mapping *self, PyObject *key, Py_ssize_t *start, Py_ssize_t *step, Py_ssize_t *count) {
  Py_ssize_t stop;
  if (PySlice_Unpack(key, start, &stop, step) < 0) return false;
  *count = PySlice_AdjustIndices(self->length, start, &stop, *step);
  return mapping_is_open(self);
}

PyObject *mapping_subscript(PyObject *op, PyObject *key) {
  Mapping *self = (Mapping *)op;
  Py_ssize_t start, step, count;
  if (!mapping_is_open(self)) return NULL;
  if (PyIndex_Check(key)) {
    if (!byte_index(self, key, &start)) return NULL;
    return PyLong_FromLong((unsigned char)self->base[start]);
  }
  if (!PySlice_Check(key))
    return PyErr_Format(PyExc_TypeError, "mapping indices must be integers or slices, not %s", Py_TYPE(key)->tp_name);
  if (!byte_range(self, key, &start, &step, &count)) return NULL;
  PyObject *bytes = PyBytes_FromStringAndSize(NULL, count);
  if (!bytes) return NULL;
  char *out = PyBytes_AS_STRING(bytes);
  if (step == 1)
    memcpy(out, self->base + start, (size_t)count);
  else
    for (Py_ssize_t i = 0; i < count; i++) out[i] = self->base[start + i * step];
  return bytes;
}

static int mapping_store(Mapping *self, PyObject *key, PyObject *value) {
  Py_ssize_t start, step, count;
  if (PyIndex_Check(key)) {
    int overflow;
    long byte = PyLong_AsLongAndOverflow(value, &overflow);
    if (byte == -1 && PyErr_Occurred()) return -1;
    if (overflow || byte < 0 || byte > 255) {
      PyErr_SetString(PyExc_ValueError, "a byte must be 0 to 255");
      return -1;
    }
    if (!byte_index(self, key, &start)) return -1;
    self->base[start] = (char)byte;
    return 0;
  }
  if (!PySlice_Check(key)) {
    PyErr_Format(PyExc_TypeError, "mapping indices must be integers or slices, not %s", Py_TYPE(key)->tp_name);
    return -1;
  }
  Py_buffer source;
  if (PyObject_GetBuffer(value, &source, PyBUF_SIMPLE) < 0) return -1;
  int result = -1;
  if (!byte_range(self, key, &start, &step, &count)) goto out;
  if (count != source.len) {
    PyErr_Format(PyExc_ValueError, "%zd bytes don't fit a slice of %zd: the size of a mapping never changes", source.len, count);
    goto out;
  }
  if (step == 1)
    memmove(self->base + start, source.buf, (size_t)count);
  else
    for (Py_ssize_t i = 0; i < count; i++) self->base[start + i * step] = ((const char *)source.buf)[i];
  result = 0;
out:
  PyBuffer_Release(&source);
  return result;
}

int mapping_ass_subscript(PyObject *op, PyObject *key, PyObject *value) {
  Mapping *self = (Mapping *)op;
  if (!mapping_is_open(self)) return -1;
  if (!value) {
    PyErr_SetString(PyExc_TypeError, "bytes can't be deleted: the size of a mapping never changes");
    return -1;
  }
  if (!self->writable) {
    PyErr_SetString(PyExc_TypeError, "the mapping is read-only");
    return -1;
  }
  return mapping_store(self, key, value);
}
