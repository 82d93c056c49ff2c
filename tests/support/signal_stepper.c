/* signal_stepper.c - counts the places at which Python runs signal handlers, and trips a signal before the n-th.
 *
 * Python runs them after a call, at the beginning of a function, and at a jump backwards. A trace function in Python would run the
 * handler in itself, so this one is in C. tests/support/interrupts.py compiles and loads it.
 */
#include <Python.h>
#include <frameobject.h>

static long left, seen;
static int number;
static unsigned char stops[256];

static int tracer(PyObject *unused, PyFrameObject *frame, int what, PyObject *arg) {
  (void)unused, (void)arg;
#if PY_VERSION_HEX >= 0x030d0000 /* a frame without a trace function of its own is told of no instruction; it is not called */
  if (what == PyTrace_CALL && PyObject_SetAttrString((PyObject *)frame, "f_trace", Py_True)) return -1;
#endif
  if (what == PyTrace_CALL) return PyObject_SetAttrString((PyObject *)frame, "f_trace_opcodes", Py_True);
  if (what != PyTrace_OPCODE) return 0;
  PyCodeObject *code = PyFrame_GetCode(frame);
  PyObject *bytes = PyCode_GetCode(code);
  int at = PyFrame_GetLasti(frame);
  int opcode = bytes && at >= 0 && at < PyBytes_GET_SIZE(bytes) ? ((unsigned char *)PyBytes_AS_STRING(bytes))[at] : 0;
  Py_XDECREF(bytes);
  Py_DECREF(code);
  if (!stops[opcode]) return 0;
  seen++;
  if (left > 0 && !--left) PyErr_SetInterruptEx(number);
  return 0;
}

/* Trip signal `signal` before stop number n (0: never) from now on. */
void stepper_start(long n, int signal, const char *opcodes, int count) {
  memset(stops, 0, sizeof stops);
  for (int i = 0; i < count; i++) stops[(unsigned char)opcodes[i]] = 1;
  left = n;
  seen = 0;
  number = signal;
  PyEval_SetTrace(tracer, NULL);
}

long stepper_end(void) {
  PyEval_SetTrace(NULL, NULL);
  return seen;
}
