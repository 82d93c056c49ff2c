/* step.c - the harness of the crash points, for tests only. See step.h.
 *
 *   step_arm("kill", name, count)       SIGKILL this process when it passes the crash point for the count-th time
 *   step_arm("hold", name or "*", fd)   at each matching crash point write its name and a newline to fd, then wait for one byte from it;
 *                                       where the process is about to sleep in a wait, write "~name" and go on at once
 *   step_arm("fork", name or "*", fd)   at each matching crash point make a child by a raw system call, which Python doesn't see; it ends
 *                                       once it has read a byte from fd
 *   step_disarm()
 *   step_log(fd)                        append each crash point, and each note, to a log that processes share: see below; -1: no longer
 *
 * Several names are separated by commas. "~" among them stands for every wait.
 */
#include "domain/step.h"
#include <signal.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { DISARMED, KILL, HOLD, FORK, LOG = 4 }; /* LOG, with or without one of the others */

int step_armed;
static char wanted[512];
static long countdown;
static int hold_fd = -1;
static const char *const names[] = {
#define X(name) #name,
    DB_STEPS(X)
#undef X
};

/* ---- the log
 *
 * A file of entries, mapped by every process that logs. The first counts those after it. An entry counts once it is ready: a process may
 * be killed while it writes one. A log that is full takes no more.
 */
typedef struct {
  _Atomic uint32_t ready;
  uint32_t pid, process, thread; /* processes and threads are numbered in the log: the kernel uses its own numbers again */
  uint64_t object, number;
  uint32_t domain;
  char name[28];
} log_entry;

_Static_assert(sizeof(log_entry) == 64, "an entry of the log has 64 bytes");

static log_entry *log_entries; /* the first: the count of entries, then the count of processes and threads, both 64 bits */
static uint64_t log_capacity;
static uint32_t log_number; /* one more with each log of this process */

enum { MAPPINGS = 64 };

static struct {
  const char *_Atomic base; /* NULL: free. Last, so that it needs no lock */
  size_t length;
  uint32_t domain;
} mappings[MAPPINGS];

void step_mapped(const void *base, size_t length, uint32_t domain) {
  for (int i = 0; i < MAPPINGS; i++) {
    const char *was = NULL, *taken = (const char *)mappings;
    if (!length) {
      was = base;
      atomic_compare_exchange_strong(&mappings[i].base, &was, NULL);
    } else if (atomic_compare_exchange_strong(&mappings[i].base, &was, taken)) {
      mappings[i].length = length;
      mappings[i].domain = domain;
      atomic_store(&mappings[i].base, (const char *)base);
      return;
    }
  }
}

void step_note(const char *name, const void *object, uint64_t number) {
  if (!(step_armed & LOG)) return;
  static uint32_t process;
  static uint64_t process_is; /* which process has that number, in which log */
  static _Thread_local uint32_t thread;
  static _Thread_local uint64_t thread_is;
  _Atomic uint64_t *counts = (_Atomic uint64_t *)log_entries;
  uint32_t pid = (uint32_t)getpid();
  uint64_t is = (uint64_t)log_number << 32 | pid;
  if (process_is != is) {
    process_is = is;
    process = (uint32_t)atomic_fetch_add(&counts[1], 1) + 1;
  }
  if (thread_is != is) {
    thread_is = is;
    thread = (uint32_t)atomic_fetch_add(&counts[1], 1) + 1;
  }
  uint64_t at = atomic_fetch_add(&counts[0], 1) + 1;
  if (at >= log_capacity) return;
  log_entry *e = log_entries + at;
  e->pid = pid;
  e->process = process;
  e->thread = thread;
  e->number = number;
  e->object = (uint64_t)(uintptr_t)object;
  for (int i = 0; object && i < MAPPINGS; i++) {
    const char *base = atomic_load(&mappings[i].base);
    if (!base || (size_t)((const char *)object - base) >= mappings[i].length) continue;
    e->domain = mappings[i].domain;
    e->object = (uint64_t)((const char *)object - base);
    break;
  }
  snprintf(e->name, sizeof e->name, "%s", name);
  atomic_store(&e->ready, 1);
}

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
  if (!(step_armed & ~LOG) || !is_wanted(name)) return;
  int action = step_armed & ~LOG;
  if (action == KILL) {
    if (--countdown <= 0) raise(SIGKILL);
    return;
  }
  char byte;
  if (action == FORK) {
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
  if ((step_armed & ~LOG) == HOLD && (is_wanted(name) || is_wanted("~"))) report("~", name);
}

void step_hit(int id, const void *object, uint64_t number) {
  step_note(names[id], object, number);
  pass(names[id]);
}

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
  step_armed = kind | (step_armed & LOG);
  Py_RETURN_NONE;
}

static PyObject *step_disarm(PyObject *module, PyObject *unused) {
  step_armed &= LOG;
  Py_RETURN_NONE;
}

static PyObject *step_log(PyObject *module, PyObject *arg) {
  long fd = PyLong_AsLong(arg);
  if (fd == -1 && PyErr_Occurred()) return NULL;
  struct stat st;
  void *p = MAP_FAILED;
  if (fd >= 0 && !fstat((int)fd, &st)) p = mmap(NULL, (size_t)st.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, (int)fd, 0);
  if (fd >= 0 && p == MAP_FAILED) return PyErr_SetFromErrno(PyExc_OSError);
  step_armed &= ~LOG;
  if (log_entries) munmap(log_entries, log_capacity * sizeof(log_entry));
  log_entries = fd < 0 ? NULL : p;
  log_number++;
  log_capacity = fd < 0 ? 0 : (uint64_t)st.st_size / sizeof(log_entry);
  if (log_capacity > 1) step_armed |= LOG;
  Py_RETURN_NONE;
}

static PyObject *step(PyObject *module, PyObject *const *args, Py_ssize_t count) {
  if (__builtin_expect(step_armed, 0)) {
    const char *name = count >= 1 && count <= 2 ? PyUnicode_AsUTF8(args[0]) : NULL;
    if (!name) return PyErr_Occurred() ? NULL : PyErr_Format(PyExc_TypeError, "step: pass a name, and a number for the log");
    uint64_t number = count == 2 ? PyLong_AsUnsignedLongLong(args[1]) : 0;
    if (PyErr_Occurred()) return NULL;
    if (*name == '~') {
      sleeping(name + 1);
    } else {
      step_note(name, NULL, number);
      pass(name);
    }
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
    METHOD(step_log, METH_O, "($module, fd, /)", "Log the crash points in this file, which is mapped as long as it is now; -1: no longer."),
    METHOD(step, METH_FASTCALL, "($module, name, number=0, /)",
           "Pass a crash point of a change that Python makes; \"~name\": about to sleep there. The number is for the log."),
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
