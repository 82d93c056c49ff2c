/* _floor: the smallest native core one could ship: a futex counter in shared memory.
 *   bump(addr)                       fetch_add(1), FUTEX_WAKE all if somebody waits
 *   wait_ge(addr, target, spin_us)   block (GIL released) until the counter has reached target
 *   wait_smart(addr, target, spin_us) spin only while the last bumper ran on ANOTHER cpu, else block at once
 * Layout of one counter, 64 bytes: u32 value, u32 waiters, u32 cpu of the last bump + 1.
 * addr is a plain integer address inside a MAP_SHARED mapping (no safety: a bench floor, not a library). */
#define PY_SSIZE_T_CLEAN
#define _GNU_SOURCE
#include <Python.h>
#include <linux/futex.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#if defined(__x86_64__)
#define cpu_relax() __builtin_ia32_pause()
#else
#define cpu_relax() __asm__ volatile("yield")
#endif
typedef struct { _Atomic uint32_t v, waiters, cpu; } ctr;
static inline int64_t now(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec; }
static inline long fx(_Atomic uint32_t *a, int op, uint32_t v) { return syscall(SYS_futex, a, op, v, NULL, NULL, 0); }
static inline int reached(ctr *c, uint32_t t) { return (int32_t)(atomic_load_explicit(&c->v, memory_order_acquire) - t) >= 0; }
static void block(ctr *c, uint32_t t) {
  atomic_fetch_add(&c->waiters, 1);
  for (;;) { uint32_t v = atomic_load(&c->v); if ((int32_t)(v - t) >= 0) break; fx(&c->v, FUTEX_WAIT, v); }
  atomic_fetch_sub(&c->waiters, 1);
}
static int spin(ctr *c, uint32_t t, int64_t ns) {
  int64_t end = now() + ns;
  do { for (int k = 0; k < 32; k++) { if (reached(c, t)) return 1; cpu_relax(); } } while (now() < end);
  return 0;
}
static PyObject *py_bump(PyObject *m, PyObject *const *a, Py_ssize_t n) {
  ctr *c = (ctr *)PyLong_AsUnsignedLongLong(a[0]);
  atomic_store_explicit(&c->cpu, (uint32_t)sched_getcpu() + 1, memory_order_relaxed);
  atomic_fetch_add(&c->v, 1);
  if (atomic_load(&c->waiters)) fx(&c->v, FUTEX_WAKE, INT32_MAX);
  Py_RETURN_NONE;
}
static PyObject *wait_common(PyObject *const *a, Py_ssize_t n, int smart) {
  ctr *c = (ctr *)PyLong_AsUnsignedLongLong(a[0]);
  uint32_t t = (uint32_t)PyLong_AsUnsignedLong(a[1]);
  int64_t sp = n > 2 ? PyLong_AsLong(a[2]) * 1000 : 0;
  if (PyErr_Occurred()) return NULL;
  if (!reached(c, t)) {
    Py_BEGIN_ALLOW_THREADS
    if (smart && atomic_load_explicit(&c->cpu, memory_order_relaxed) == (uint32_t)sched_getcpu() + 1) sp = 0;
    if (!sp || !spin(c, t, sp)) block(c, t);
    Py_END_ALLOW_THREADS
  }
  Py_RETURN_NONE;
}
static PyObject *py_wait(PyObject *m, PyObject *const *a, Py_ssize_t n) { return wait_common(a, n, 0); }
static PyObject *py_smart(PyObject *m, PyObject *const *a, Py_ssize_t n) { return wait_common(a, n, 1); }
static PyObject *py_value(PyObject *m, PyObject *const *a, Py_ssize_t n) { return PyLong_FromUnsignedLong(atomic_load(&((ctr *)PyLong_AsUnsignedLongLong(a[0]))->v)); }
static PyMethodDef M[] = {{"bump", (PyCFunction)(void *)py_bump, METH_FASTCALL, 0}, {"wait_ge", (PyCFunction)(void *)py_wait, METH_FASTCALL, 0},
  {"wait_smart", (PyCFunction)(void *)py_smart, METH_FASTCALL, 0}, {"value", (PyCFunction)(void *)py_value, METH_FASTCALL, 0}, {0}};
static struct PyModuleDef D = {PyModuleDef_HEAD_INIT, "_floor", 0, -1, M};
PyMODINIT_FUNC PyInit__floor(void) { return PyModule_Create(&D); }
