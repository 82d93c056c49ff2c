/* words.c - methods of Shm on the words of a domain: bounded loads, stores and atomics by offset, and sleeping on one. */
#include "domain/words.h"
#include "domain/sleep.h"
#include "domain/ticker.h"

#define WORD_METHODS(bits, type)                                                           \
  static type *word##bits(Shm *s, unsigned long long off) {                                \
    if (off % sizeof(type)) {                                                              \
      shm_corrupt(s, "an offset is not aligned");                                          \
      return NULL;                                                                         \
    }                                                                                      \
    return (type *)shm_bytes(s, off, sizeof(type));                                        \
  }                                                                                        \
  static PyObject *shm_load##bits(Shm *s, PyObject *arg) {                                 \
    unsigned long long off = PyLong_AsUnsignedLongLong(arg);                               \
    if (off == (unsigned long long)-1 && PyErr_Occurred()) return NULL;                    \
    type *w = word##bits(s, off);                                                          \
    return w ? PyLong_FromUnsignedLongLong(atomic_load(w)) : NULL;                         \
  }                                                                                        \
  static PyObject *shm_store##bits(Shm *s, PyObject *args) {                               \
    unsigned long long off, v;                                                             \
    if (!PyArg_ParseTuple(args, "KK", &off, &v)) return NULL;                              \
    type *w = word##bits(s, off);                                                          \
    if (!w) return NULL;                                                                   \
    atomic_store(w, (uint##bits##_t)v);                                                    \
    Py_RETURN_NONE;                                                                        \
  }                                                                                        \
  static PyObject *shm_cas##bits(Shm *s, PyObject *args) {                                 \
    unsigned long long off, old, v;                                                        \
    if (!PyArg_ParseTuple(args, "KKK", &off, &old, &v)) return NULL;                       \
    type *w = word##bits(s, off);                                                          \
    if (!w) return NULL;                                                                   \
    uint##bits##_t want = (uint##bits##_t)old;                                             \
    return PyBool_FromLong(atomic_compare_exchange_strong(w, &want, (uint##bits##_t)v));   \
  }                                                                                        \
  static PyObject *shm_add##bits(Shm *s, PyObject *args) {                                 \
    unsigned long long off, v;                                                             \
    if (!PyArg_ParseTuple(args, "KK", &off, &v)) return NULL;                              \
    type *w = word##bits(s, off);                                                          \
    return w ? PyLong_FromUnsignedLongLong(atomic_fetch_add(w, (uint##bits##_t)v)) : NULL; \
  }
WORD_METHODS(32, a32)
WORD_METHODS(64, a64)

static PyObject *shm_read(Shm *s, PyObject *args) {
  unsigned long long off, n;
  if (!PyArg_ParseTuple(args, "KK", &off, &n)) return NULL;
  char *p = shm_bytes(s, off, n);
  return p ? PyBytes_FromStringAndSize(p, (Py_ssize_t)n) : NULL;
}

static PyObject *shm_wake(Shm *s, PyObject *arg) {
  unsigned long long off = PyLong_AsUnsignedLongLong(arg);
  if (off == (unsigned long long)-1 && PyErr_Occurred()) return NULL;
  a32 *w = word32(s, off);
  if (!w) return NULL;
  word_wake(w, INT32_MAX);
  Py_RETURN_NONE;
}

static PyObject *shm_wait(Shm *s, PyObject *args) {
  unsigned long long off, expected;
  PyObject *timeout;
  int64_t until;
  if (!PyArg_ParseTuple(args, "KKO", &off, &expected, &timeout)) return NULL;
  a32 *w = word32(s, off);
  if (!w || parse_timeout(s, timeout, &until, "wait")) return NULL;
  int r = shm_sleep(s, w, (uint32_t)expected, until, TICK_DOORBELL, off);
  return r == SLEEP_RAISED ? NULL : PyLong_FromLong(r);
}

static PyObject *shm_idle(Shm *s, PyObject *args) {
  unsigned long long off, expected;
  if (!PyArg_ParseTuple(args, "KK", &off, &expected)) return NULL;
  a32 *w = word32(s, off);
  if (!w) return NULL;
  Py_BEGIN_ALLOW_THREADS
  futex(w, FUTEX_WAIT, (uint32_t)expected, NULL);
  Py_END_ALLOW_THREADS
  if (PyErr_CheckSignals()) return NULL;
  Py_RETURN_NONE;
}

/* The C library has read(), wait() and the like, so these functions have a prefix. */
#define WORD_METHOD(name, flags, signature, doc) {#name, (PyCFunction)shm_##name, flags, #name signature "\n--\n\n" doc}
PyMethodDef word_methods[] = {
    WORD_METHOD(load32, METH_O, "($self, offset, /)", "Load a word of 32 bits."),
    WORD_METHOD(store32, METH_VARARGS, "($self, offset, value, /)", "Store a word of 32 bits."),
    WORD_METHOD(cas32, METH_VARARGS, "($self, offset, old, new, /)", "Store new if the word of 32 bits is old. Return whether it was."),
    WORD_METHOD(add32, METH_VARARGS, "($self, offset, n, /)", "Add n to a word of 32 bits. Return what it was before."),
    WORD_METHOD(load64, METH_O, "($self, offset, /)", "Load a word of 64 bits."),
    WORD_METHOD(store64, METH_VARARGS, "($self, offset, value, /)", "Store a word of 64 bits."),
    WORD_METHOD(cas64, METH_VARARGS, "($self, offset, old, new, /)", "Store new if the word of 64 bits is old. Return whether it was."),
    WORD_METHOD(add64, METH_VARARGS, "($self, offset, n, /)", "Add n to a word of 64 bits. Return what it was before."),
    WORD_METHOD(read, METH_VARARGS, "($self, offset, n, /)", "Return n bytes."),
    WORD_METHOD(wake, METH_O, "($self, offset, /)", "Wake every sleeper on a word of 32 bits."),
    WORD_METHOD(wait, METH_VARARGS, "($self, offset, expected, timeout, /)",
                "Sleep once if the word of 32 bits has the expected value.\n\n"
                "Return 0 or 1 (a tick passed): look again; -2: a signal arrived."),
    WORD_METHOD(idle, METH_VARARGS, "($self, offset, expected, /)",
                "Sleep once if the word has the expected value, without limit or ticks."),
    {0}};
