/* errors.c - the errors of the package, raised from C: dmabuf.errors makes them, so that class and words are those of Python's. */
#include "errors.h"

/* One interpreter (sub-interpreters are not supported), so one function. */
static PyObject *maker;

int raise_error_by(PyObject *fail, int err, const char *op, const char *obj, const char *what, const char *remedy) {
  Py_XINCREF(fail); /* another thread may replace it during the call */
  PyObject *args = fail ? Py_BuildValue("(isss)", err, op, obj, remedy) : NULL;
  PyObject *names = args && what ? Py_BuildValue("{ss}", "what", what) : NULL;
  PyObject *error = args && (names || !what) ? PyObject_Call(fail, args, names) : NULL;
  Py_XDECREF(args);
  Py_XDECREF(names);
  Py_XDECREF(fail);
  if (error) {
    PyErr_SetObject((PyObject *)Py_TYPE(error), error);
    Py_DECREF(error);
  } else if (!PyErr_Occurred()) {
    errno = err;
    PyErr_SetFromErrno(PyExc_OSError);
  }
  return -1;
}

int raise_error(int err, const char *op, const char *obj, const char *what, const char *remedy) {
  return raise_error_by(maker, err, op, obj, what, remedy);
}

static PyObject *errors_by(PyObject *module, PyObject *fail) {
  Py_XSETREF(maker, Py_NewRef(fail));
  Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    METHOD(errors_by, METH_O, "($module, fail, /)", "Make the errors of this module with dmabuf.errors.fail() from now on."), {0}};

int errors_register(PyObject *module) { return PyModule_AddFunctions(module, functions); }
