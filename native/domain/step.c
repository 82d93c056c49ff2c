/* step.c - the step harness: every change of shared state that takes several stores passes named steps, at which a test
 * can kill the process or hold it. Without a test `step_armed` is 0 and a step is one untaken branch.
 *
 *   step_arm("kill", name, count)        SIGKILL ourselves at the count-th time the step is passed
 *   step_arm("hold", name or "*", fd)    at each matching step write its name and a newline to fd, then wait for one byte
 *                                        from it; about to sleep in a wait, write "~name" and go on at once
 *   step_disarm()
 */
#include "domain/step.h"
#include <signal.h>
#include <unistd.h>

int step_armed;
static char wanted[64];
static long countdown;
static int hold_fd = -1;
static const char *const names[] = {
#define X(n) #n,
    DB_STEPS(X)
#undef X
};

static void say(const char *prefix, const char *name) {
  char line[80];
  int n = snprintf(line, sizeof line, "%s%s\n", prefix, name);
  if (write(hold_fd, line, (size_t)n) != n) raise(SIGKILL); /* the test that held us is gone */
}

static void pass(const char *name) {
  if (wanted[0] != '*' && strcmp(wanted, name)) return;
  if (step_armed == 1) {
    if (--countdown <= 0) raise(SIGKILL);
    return;
  }
  say("", name);
  char byte;
  ssize_t n;
  do n = read(hold_fd, &byte, 1);
  while (n < 0 && errno == EINTR);
  if (n != 1) raise(SIGKILL);
}

void step_hit(int id) { pass(names[id]); }

void step_sleeping(int id) {
  if (step_armed == 2 && (wanted[0] == '*' || !strcmp(wanted, names[id]))) say("~", names[id]);
}

static PyObject *py_arm(PyObject *m, PyObject *args) {
  const char *action, *name;
  long number;
  if (!PyArg_ParseTuple(args, "ssl:step_arm", &action, &name, &number)) return NULL;
  int kind = !strcmp(action, "kill") ? 1 : !strcmp(action, "hold") ? 2 : 0;
  if (!kind || strlen(name) >= sizeof wanted) {
    PyErr_SetString(PyExc_ValueError, "step_arm: action is 'kill' or 'hold', name at most 63 bytes");
    return NULL;
  }
  strcpy(wanted, name);
  if (kind == 1)
    countdown = number;
  else
    hold_fd = (int)number;
  step_armed = kind;
  Py_RETURN_NONE;
}

static PyObject *py_disarm(PyObject *m, PyObject *unused) {
  step_armed = 0;
  Py_RETURN_NONE;
}

static PyObject *py_step(PyObject *m, PyObject *arg) { /* a step of a change that Python makes; "~name": about to sleep */
  if (__builtin_expect(step_armed, 0)) {
    const char *name = PyUnicode_AsUTF8(arg);
    if (!name) return NULL;
    if (*name != '~')
      pass(name);
    else if (step_armed == 2 && (wanted[0] == '*' || !strcmp(wanted, name + 1)))
      say("", name);
  }
  Py_RETURN_NONE;
}

static PyMethodDef methods[] = {{"step_arm", py_arm, METH_VARARGS, "Arm the step harness (tests only)."},
                                {"step_disarm", py_disarm, METH_NOARGS, "Disarm the step harness."},
                                {"step", py_step, METH_O, "Pass the named step."},
                                {0}};

int step_register(PyObject *module) {
  if (PyModule_AddFunctions(module, methods)) return -1;
  PyObject *t = PyTuple_New(STEP_COUNT);
  if (!t) return -1;
  for (int i = 0; i < STEP_COUNT; i++) {
    PyObject *n = PyUnicode_FromString(names[i]);
    if (!n) {
      Py_DECREF(t);
      return -1;
    }
    PyTuple_SET_ITEM(t, i, n);
  }
  int r = PyModule_AddObjectRef(module, "STEPS", t);
  Py_DECREF(t);
  return r;
}
