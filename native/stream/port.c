/* port.c - what all parts of a port use: its rules in Python, and one thread at a time. */
#include "stream/port.h"

static PyObject *port_rules;

/* ---- rules ---- */

PyObject *port_rule(const char *name, PyObject *port, PyObject *arguments) {
  PyObject *method = arguments && port_rules ? PyObject_GetAttrString(port_rules, name) : NULL, *result = NULL;
  Py_ssize_t n = method ? PyTuple_GET_SIZE(arguments) : 0;
  PyObject *all = method ? PyTuple_New(n + 1) : NULL;
  if (all) {
    PyTuple_SET_ITEM(all, 0, Py_NewRef(port));
    for (Py_ssize_t i = 0; i < n; i++) PyTuple_SET_ITEM(all, i + 1, Py_NewRef(PyTuple_GET_ITEM(arguments, i)));
    result = PyObject_Call(method, all, NULL);
  }
  if (!port_rules && !PyErr_Occurred()) PyErr_SetString(PyExc_RuntimeError, "the rules of streams are not set: import dmabuf");
  Py_XDECREF(all);
  Py_XDECREF(method);
  Py_XDECREF(arguments);
  return result;
}

int port_failed(Port *p, const char *operation, int error) {
  PyObject *result = port_rule("failed", (PyObject *)p, Py_BuildValue("si", operation, error));
  if (result) PyErr_SetString(PyExc_SystemError, "an operation of a stream that failed must raise");
  Py_XDECREF(result);
  return -1;
}

/* A result of the functions of port.h: 0 if it is positive; -1 with an exception set. */
int port_checked(Port *p, const char *operation, int got) {
  if (got > 0) return 0;
  return got == RAISED ? -1 : port_failed(p, operation, -got);
}

int port_need(Port *p, const char *operation) { return p->shm ? 0 : port_failed(p, operation, EBADF); }

/* One thread at a time is inside. */
int port_go_in(Port *p, const char *operation) {
  if (port_need(p, operation)) return -1;
  if (p->busy) return port_failed(p, operation, EALREADY);
  p->busy = true;
  return 0;
}

/* One argument, timeout, by place or by name. NULL: an exception is set. */
PyObject *timeout_of(PyObject *const *a, Py_ssize_t n, PyObject *names, const char *operation) {
  Py_ssize_t named = names ? PyTuple_GET_SIZE(names) : 0;
  if (n + named == 0) return Py_None;
  if (n + named == 1 && (n || PyUnicode_CompareWithASCIIString(PyTuple_GET_ITEM(names, 0), "timeout") == 0)) return a[0];
  PyErr_Format(PyExc_TypeError, "%s() takes one argument, timeout", operation);
  return NULL;
}

static PyObject *set_stream_rules(PyObject *module, PyObject *rules) {
  Py_XSETREF(port_rules, Py_NewRef(rules));
  Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    METHOD(set_stream_rules, METH_O, "($module, rules, /)", "Set the object whose methods are the rules of streams that are Python code."),
    {0}};

int port_register(PyObject *module) {
  streams_prepare();
  return PyModule_AddFunctions(module, functions) ? -1 : 0;
}
