/* points.c - Points: the point that a semaphore has reached, while nothing of it is pending, in the first page of its file.
 *
 * Then signaling a higher point is one compare-and-swap, and waiting is one sleep. While the word is 0, the state is in the file's record,
 * and changes under the file's lock (core/sync/semaphore.py). A death after the compare-and-swap leaves sleepers that look again at their
 * next tick.
 */
#include "domain/points.h"
#include "domain/sleep.h"
#include "domain/step.h"
#include "domain/ticker.h"
#include "fds/fds.h"
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define POINTS_AT  64u          /* bytes of the file in front of the words */
#define IN_WORD    (1ull << 63) /* the word holds the point, and the record doesn't count */
#define MOST_POINT (IN_WORD - 1)

typedef struct {
  a64 point;   /* IN_WORD and the point, or 0; its low half is the futex */
  a32 waiters; /* 1: a thread sleeps on it */
} point_words;

typedef struct {
  PyObject_HEAD
  char *page;
} Points;

static point_words *words(Points *x) { return (point_words *)(x->page + POINTS_AT); }

static void wake_all(point_words *w) {
  if (atomic_load(&w->waiters) && atomic_exchange(&w->waiters, 0)) word_wake((a32 *)&w->point, INT32_MAX);
}

/* The point of an argument. 0; -1: the word can't hold it, UINT64_MAX if it is no point at all. No exception is set. */
static int point_of(PyObject *arg, uint64_t *point) {
  *point = PyLong_Check(arg) ? PyLong_AsUnsignedLongLong(arg) : UINT64_MAX;
  if (*point != UINT64_MAX) return *point <= MOST_POINT ? 0 : -1;
  PyErr_Clear();
  return -1;
}

static PyObject *points_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
  PyObject *file;
  struct stat st;
  if (!PyArg_ParseTuple(args, "O:Points", &file)) return NULL;
  int fd = owned_checked(file, "map");
  if (fd < 0) return NULL;
  int seals = fcntl(fd, F_GET_SEALS);
  if (seals < 0 || !(seals & F_SEAL_SHRINK) || fstat(fd, &st) || st.st_size < DB_PAGE) {
    PyErr_SetString(PyExc_ValueError, "Points: the file may become shorter than a page");
    return NULL;
  }
  Points *x = (Points *)type->tp_alloc(type, 0);
  if (!x) return NULL;
  void *page = mmap(NULL, DB_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (page != MAP_FAILED) {
    x->page = page;
    return (PyObject *)x;
  }
  PyErr_SetFromErrno(PyExc_OSError);
  Py_DECREF(x);
  return NULL;
}

static void points_dealloc(Points *x) {
  PyTypeObject *type = Py_TYPE(x);
  if (x->page) munmap(x->page, DB_PAGE); /* nobody waits: a call has a reference */
  type->tp_free(x);
  Py_DECREF(type);
}

static PyObject *points_value(Points *x, PyObject *unused) {
  uint64_t v = atomic_load(&words(x)->point);
  return v & IN_WORD ? PyLong_FromUnsignedLongLong(v & MOST_POINT) : PyLong_FromLong(-1);
}

static PyObject *points_signal(Points *x, PyObject *arg) {
  uint64_t point, v = atomic_load(&words(x)->point);
  if (point_of(arg, &point)) Py_RETURN_FALSE;
  do {
    if (!(v & IN_WORD) || point <= (v & MOST_POINT)) Py_RETURN_FALSE;
  } while (!atomic_compare_exchange_weak(&words(x)->point, &v, IN_WORD | point));
  STEP(sem_pointed); /* reached: sleepers look again at their next tick */
  wake_all(words(x));
  Py_RETURN_TRUE;
}

static PyObject *points_enter(Points *x, PyObject *arg) {
  uint64_t point, none = 0;
  if (point_of(arg, &point)) Py_RETURN_FALSE;
  return PyBool_FromLong(atomic_compare_exchange_strong(&words(x)->point, &none, IN_WORD | point));
}

static PyObject *points_leave(Points *x, PyObject *arg) {
  uint64_t point;
  if (point_of(arg, &point)) Py_RETURN_FALSE;
  uint64_t v = IN_WORD | point;
  if (!atomic_compare_exchange_strong(&words(x)->point, &v, 0)) Py_RETURN_FALSE;
  STEP(sem_left);
  wake_all(words(x)); /* they look into the record now */
  Py_RETURN_TRUE;
}

/* None: look into the record, or a tick is over. False: it has no such point yet. A number: the time that is left, 0.0: it is over. */
static PyObject *points_wait(Points *x, PyObject *const *args, Py_ssize_t n) {
  uint64_t point;
  if (n != 5 || !PyObject_TypeCheck(args[0], Shm_Type)) {
    PyErr_SetString(PyExc_TypeError, "wait(shm, point, until, for_submit, interruptible)");
    return NULL;
  }
  Shm *s = (Shm *)args[0];
  int64_t until = PyLong_AsLongLong(args[2]);
  if (until == -1 && PyErr_Occurred()) return NULL;
  if (point_of(args[1], &point) && point == UINT64_MAX) Py_RETURN_FALSE; /* no point at all, or one that the word never reaches */
  int for_submit = PyObject_IsTrue(args[3]), interruptible = PyObject_IsTrue(args[4]);
  point_words *w = words(x);
  for (;;) {
    uint64_t v = atomic_load(&w->point);
    if (!(v & IN_WORD)) Py_RETURN_NONE;
    if (point <= (v & MOST_POINT)) return PyFloat_FromDouble(remaining_s(until));
    if (!for_submit) Py_RETURN_FALSE;
    if (until >= 0 && now_ns() >= until) return PyFloat_FromDouble(0.0);
    atomic_store(&w->waiters, 1);
    if (atomic_load(&w->point) != v) continue; /* after the mark: the signaler sees it, or this thread sees the point */
    int r = shm_sleep(s, (a32 *)&w->point, (uint32_t)v, until, TICK_DOORBELL, 0);
    if (r == SLEEP_RAISED) return NULL;
    if (r == SLEEP_TICK) Py_RETURN_NONE;
    if (r == SLEEP_SIGNAL && interruptible && atomic_load(&w->point) == v) {
      shm_fail(s, EINTR, "wait", "semaphore", "interrupted by a signal", "wait again");
      return NULL;
    }
  }
}

static PyMethodDef methods[] = {
    {"value", (PyCFunction)points_value, METH_NOARGS,
     "value($self, /)\n--\n\nReturn the point that is reached and the last that was submitted; -1: the record says which."},
    {"signal", (PyCFunction)points_signal, METH_O,
     "signal($self, point, /)\n--\n\nReach a higher point. Return False if that must be done in the record."},
    {"enter", (PyCFunction)points_enter, METH_O,
     "enter($self, point, /)\n--\n\nWith the lock: let the word hold the point, as the record does. Return whether it does."},
    {"leave", (PyCFunction)points_leave, METH_O,
     "leave($self, point, /)\n--\n\nWith the lock: let the record hold the point. Return False if the word holds another one by now."},
    {"wait", (PyCFunction)(void *)points_wait, METH_FASTCALL,
     "wait($self, shm, point, until, for_submit, interruptible, /)\n--\n\n"
     "Wait until a point is reached. Return the seconds left, 0.0: the time is over; False: it is not submitted, or no point;\n"
     "None: look into the record and come back, after a tick too."},
    {0}};
static PyType_Slot slots[] = {
    {Py_tp_doc, "Points(file, /)\n--\n\nThe point of a semaphore in the first page of its file, an OwnedFd. The file must not shrink."},
    {Py_tp_new, points_new},
    {Py_tp_dealloc, points_dealloc},
    {Py_tp_methods, methods},
    {0, NULL}};
static PyType_Spec spec = {
    .name = "dmabuf._native.Points", .basicsize = sizeof(Points), .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE, .slots = slots};

int points_register(PyObject *module) {
  PyTypeObject *type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &spec, NULL);
  if (!type) return -1;
  int r = PyModule_AddType(module, type);
  Py_DECREF(type);
  return r;
}
