/* words.c - the words of a domain by their offset: bounded loads and stores, and sleeping on one. */
#include "domain/words.h"
#include "domain/sleep.h"
#include "domain/ticker.h"
#include <linux/futex.h>

#define WORD_METHODS(bits, type)                                                           \
  static type *word##bits(Shm *s, unsigned long long off) {                                \
    if (off % sizeof(type)) {                                                              \
      shm_corrupt(s, "an unaligned offset");                                               \
      return NULL;                                                                         \
    }                                                                                      \
    return (type *)bounded(s, off, sizeof(type));                                          \
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
  char *p = bounded(s, off, n);
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

static PyObject *shm_wait(Shm *s, PyObject *args) { /* wait32(off, expected, timeout, ticking): one sleep */
  unsigned long long off, expected;
  PyObject *timeout;
  int64_t until;
  if (!PyArg_ParseTuple(args, "KKO", &off, &expected, &timeout)) return NULL;
  a32 *w = word32(s, off);
  if (!w || parse_timeout(s, timeout, &until, "wait")) return NULL;
  int r = shm_sleep(s, w, (uint32_t)expected, until, TICK_BELL, off);
  return r == -1 ? NULL : PyLong_FromLong(r);
}

static PyObject *shm_idle(Shm *s, PyObject *args) { /* idle(off, expected): sleep without a bound and without ticks */
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

PyMethodDef word_methods[] = {
#define M(n, flags, doc) {#n, (PyCFunction)shm_##n, flags, doc}
    M(load32, METH_O, "Load the word at an offset."),
    M(store32, METH_VARARGS, "Store (offset, value)."),
    M(cas32, METH_VARARGS, "Compare and swap (offset, old, new) -> done."),
    M(add32, METH_VARARGS, "Fetch and add (offset, n)."),
    M(load64, METH_O, "Load the word at an offset."),
    M(store64, METH_VARARGS, "Store (offset, value)."),
    M(cas64, METH_VARARGS, "Compare and swap (offset, old, new) -> done."),
    M(add64, METH_VARARGS, "Fetch and add (offset, n)."),
    M(read, METH_VARARGS, "Bytes (offset, n)."),
    M(wake, METH_O, "Wake everybody who sleeps on the word."),
    M(wait, METH_VARARGS, "One sleep (offset, expected, timeout) with ticks."),
    M(idle, METH_VARARGS, "One sleep (offset, expected) without ticks."),
    {0}};
