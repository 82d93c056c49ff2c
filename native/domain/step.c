/* step.c - the harness of the crash points, for tests only. See step.h.
 *
 *   step_arm("kill", name, count)       SIGKILL this process when it passes the crash point for the count-th time
 *   step_arm("hold", name or "*", fd)   at each matching crash point write its name and a newline to fd, then wait for one byte from it;
 *                                       where the process is about to sleep in a wait, write "~name" and go on at once
 *   step_arm("fork", name or "*", fd)   at each matching crash point make a child by a raw system call, which Python doesn't see; it ends
 *                                       once it has read a byte from fd
 *   step_disarm()
 *
 * Several names are separated by commas. "~" among them stands for every wait.
 */
#include "domain/step.h"
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { DISARMED, KILL, HOLD, FORK };

int step_armed;
static char wanted[512];
static long countdown;
static int hold_fd = -1;
static const char *const names[] = {
#define X(name) #name,
    DB_STEPS(X)
#undef X
};

static int is_wanted(const char *name) {
  if (wanted[0] == '*') return 1;
  size_t n = strlen(name);
  for (const char *p = wanted; (p = strstr(p, name)); p += n)
    if ((p == wanted || p[-1] == ',') && (p[n] == ',' || !p[n])) return 1;
  return 0;
}

static void report(const char *prefix, const char *name) {
  char line[80];
  int n = snprintf(line, sizeof line, "%s%s\n", prefix, name);
  if (write(hold_fd, line, (size_t)n) != n) raise(SIGKILL); /* the test that held this process is gone */
}

static void pass(const char *name) {
  if (!is_wanted(name)) return;
  if (step_armed == KILL) {
    if (--countdown <= 0) raise(SIGKILL);
    return;
  }
  char byte;
  if (step_armed == FORK) {
    if (syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0)) return;
    _exit(read(hold_fd, &byte, 1) < 0);
  }
  report("", name);
  ssize_t n;
  do n = read(hold_fd, &byte, 1);
  while (n < 0 && errno == EINTR);
  if (n != 1) raise(SIGKILL);
}

static void sleeping(const char *name) {
  if (step_armed == HOLD && (is_wanted(name) || is_wanted("~"))) report("~", name);
}

void step_hit(int id) { pass(names[id]); }

void step_sleeping(int id) { sleeping(names[id]); }

static PyObject *step_arm(PyObject *module, PyObject *args) {
  const char *action, *name;
  long number;
  if (!PyArg_ParseTuple(args, "ssl:step_arm", &action, &name, &number)) return NULL;
  int kind = !strcmp(action, "kill") ? KILL : !strcmp(action, "hold") ? HOLD : !strcmp(action, "fork") ? FORK : DISARMED;
  if (kind == DISARMED || strlen(name) >= sizeof wanted) {
    PyErr_SetString(PyExc_ValueError, "step_arm: the action must be 'kill', 'hold' or 'fork', and the names at most 511 bytes");
    return NULL;
  }
  strcpy(wanted, name);
  if (kind == KILL)
    countdown = number;
  else
    hold_fd = (int)number;
  step_armed = kind;
  Py_RETURN_NONE;
}

static PyObject *step_disarm(PyObject *module, PyObject *unused) {
  step_armed = DISARMED;
  Py_RETURN_NONE;
}

static PyObject *step(PyObject *module, PyObject *arg) {
  if (__builtin_expect(step_armed, 0)) {
    const char *name = PyUnicode_AsUTF8(arg);
    if (!name) return NULL;
    if (*name == '~')
      sleeping(name + 1);
    else
      pass(name);
  }
  Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    METHOD(step_arm, METH_VARARGS, "($module, action, name, number, /)",
           "Arm a crash point, for tests.\n\n"
           "Args:\n"
           "    action: \"kill\", \"hold\", or \"fork\".\n"
           "    name: The crash point, or several separated by commas; with \"hold\" also \"*\", for all, and \"~\", for every wait.\n"
           "    number: At which passage to kill; or the descriptor by which to report and wait, and for which a child waits."),
    METHOD(step_disarm, METH_NOARGS, "($module, /)", "Disarm the crash point."),
    METHOD(step, METH_O, "($module, name, /)", "Pass a crash point of a change that Python makes; \"~name\": about to sleep there."),
    {0}};

int step_register(PyObject *module) {
  if (PyModule_AddFunctions(module, functions)) return -1;
  PyObject *tuple = PyTuple_New(STEP_COUNT);
  if (!tuple) return -1;
  for (int i = 0; i < STEP_COUNT; i++) {
    PyObject *name = PyUnicode_FromString(names[i]);
    if (!name) {
      Py_DECREF(tuple);
      return -1;
    }
    PyTuple_SET_ITEM(tuple, i, name);
  }
  int r = PyModule_AddObjectRef(module, "STEPS", tuple);
  Py_DECREF(tuple);
  return r;
}
