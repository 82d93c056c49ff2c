/* later.c - an exception that the caller of this code can't be given, raised in the main thread a moment later.
 *
 * A signal handler may raise while a finalizer or a callback runs. Nobody is there to raise to, and Python would only print it.
 */
#include "later.h"
#include <pthread.h>

static pthread_t main_thread;

bool in_main_thread(void) { return pthread_equal(pthread_self(), main_thread); }

static int raise_now(void *error) {
  PyErr_SetObject((PyObject *)Py_TYPE((PyObject *)error), error);
  Py_DECREF((PyObject *)error);
  return -1;
}

bool raise_later(PyObject *error) { return in_main_thread() && !Py_AddPendingCall(raise_now, error); }

PyObject *take_exception(void) {
  PyObject *kind, *value, *trace;
  PyErr_Fetch(&kind, &value, &trace);
  PyErr_NormalizeException(&kind, &value, &trace);
  if (trace) PyException_SetTraceback(value, trace);
  Py_XDECREF(kind);
  Py_XDECREF(trace);
  return value;
}

void report_later(PyObject *where) {
  PyObject *error = take_exception();
  if (raise_later(error)) return;
  PyErr_SetObject((PyObject *)Py_TYPE(error), error);
  Py_DECREF(error);
  PyErr_WriteUnraisable(where);
}

void call_till_done(PyObject *(*call)(void *), void *with, PyObject *where) {
  PyObject *error = NULL, *x = NULL;
  for (int k = 0; k < 2 && !x; k++)
    if (!(x = call(with))) Py_XSETREF(error, take_exception());
  Py_XDECREF(x);
  if (!error) return;
  PyErr_SetObject((PyObject *)Py_TYPE(error), error);
  Py_DECREF(error);
  report_later(where);
}

typedef struct {
  PyObject *hook;
  uint64_t handle;
} hooked;

static PyObject *call_hooked(void *with) {
  const hooked *h = with;
  return PyObject_CallFunction(h->hook, "K", (unsigned long long)h->handle);
}

void call_hook(PyObject *hook, uint64_t handle) { call_till_done(call_hooked, &(hooked){hook, handle}, hook); }

static PyObject *raise_later_call(PyObject *module, PyObject *error) {
  if (!PyExceptionInstance_Check(error)) return PyErr_Format(PyExc_TypeError, "raise_later() takes an exception");
  Py_INCREF(error);
  bool done = raise_later(error);
  if (!done) Py_DECREF(error);
  return PyBool_FromLong(done);
}

static void forked(void) { main_thread = pthread_self(); } /* Python makes the thread that forked its main thread */

static PyMethodDef functions[] = {{"raise_later", raise_later_call, METH_O,
                                   "raise_later($module, error, /)\n--\n\nRaise an exception in the main thread at its next call or jump. "
                                   "Return False in other threads."},
                                  {0}};

int later_register(PyObject *module) {
  static int once;
  if (!once++) {
    PyObject *threading = PyImport_ImportModule("threading"),
             *main = threading ? PyObject_CallMethod(threading, "main_thread", NULL) : NULL;
    PyObject *ident = main ? PyObject_GetAttrString(main, "ident") : NULL;
    if (ident && ident != Py_None) main_thread = (pthread_t)PyLong_AsUnsignedLong(ident);
    Py_XDECREF(threading);
    Py_XDECREF(main);
    Py_XDECREF(ident);
    if (PyErr_Occurred()) return -1;
    pthread_atfork(NULL, NULL, forked);
  }
  return PyModule_AddFunctions(module, functions);
}
