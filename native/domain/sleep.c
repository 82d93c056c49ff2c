/* sleep.c - the one sleep of which every wait in a domain is built. */
#include "domain/sleep.h"
#include "domain/ticker.h"
#include <math.h>
#include <pthread.h>
#include <signal.h>

/* Is a signal pending only because this thread blocks more signals than these? One without a handler ends the process or has no effect. */
static int signal_pending(const sigset_t *blocked) {
  sigset_t found;
  struct sigaction act;
  sigpending(&found);
  for (int i = 1; i < NSIG; i++)
    if (sigismember(&found, i) == 1 && !sigismember(blocked, i) && !sigaction(i, NULL, &act) && act.sa_handler != SIG_DFL &&
        act.sa_handler != SIG_IGN)
      return 1;
  return 0;
}

#define LIGHT_SLEEPS 4 /* a sleep that follows so many on the same word, all ended by ticks, is deep (ticker.c) */

/* The last sleep of this thread, if nothing had changed when it ended, and how many such a tick has ended, one after another. */
static _Thread_local struct {
  a32 *word;
  int ticks;
  int64_t since; /* about when the first of these ticks came */
} last;

/* When a sleep ticks by itself, -1: never. alone: the ticker does not know of it. */
static int64_t own_tick(Shm *s, int ticks, int alone) {
  if (!alone && ticks < LIGHT_SLEEPS) return -1; /* the time costs something */
  int64_t now = now_ns();
  if (alone) return now + TICK_NS;
  /* The wait is to be logged then (shm_lasts), and among many sleepers a turn comes rarely. */
  int64_t left = s->slow_ns - (now - last.since);
  return left > -TICK_NS && left < 1ll << 60 ? now + left + TICK_NS : -1;
}

int shm_sleep(Shm *s, a32 *word, uint32_t expected, int64_t until, int kind, uint64_t value) {
  if (until >= 0 && now_ns() >= until) return SLEEP_AGAIN;
  int ticks = last.word == word ? last.ticks : 0, alone;
  ticker_file file = {s->fd, s->id.dev, s->id.ino};
  int slot = sleeper_enter(word, expected, &file, ticks < LIGHT_SLEEPS, &alone);
  int64_t own = own_tick(s, ticks, alone);
  alone = own >= 0 && (until < 0 || own < until);
  if (alone) until = own;
  struct timespec t = {until / 1000000000, until % 1000000000};
  long r;
  int err, tick, signaled;
  uint32_t moves = s->moves;
  sigset_t all, old;
  Py_BEGIN_ALLOW_THREADS
  r = syscall(SYS_futex, word, FUTEX_WAIT_BITSET, expected, until < 0 ? NULL : &t, NULL, sleeper_bits(slot));
  err = errno;
  signaled = r < 0 && err == EINTR;
  tick = (slot >= 0 && sleeper_leave(slot)) || (alone && r < 0 && err == ETIMEDOUT);
  if (tick && !signaled) { /* The GIL may take long to come: a signal in that time must end the sleep like one before it. */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
  }
  Py_END_ALLOW_THREADS
  if (tick && !ticks) last.since = now_ns();
  last.ticks = ticks + (tick && ticks < LIGHT_SLEEPS);
  last.word = s->moves == moves && atomic_load(word) == expected ? word : NULL;
  if (tick && !signaled) {
    signaled = signal_pending(&old);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
  }
  if (signaled) return PyErr_CheckSignals() ? SLEEP_RAISED : SLEEP_SIGNAL;
  if (!tick) return SLEEP_AGAIN;
  if (PyErr_CheckSignals()) return SLEEP_RAISED; /* a signal just before the sleep did not end it */
  return shm_tick(s, kind, value) ? SLEEP_RAISED : SLEEP_TICK;
}

int shm_lasts(Shm *s, int64_t *since, int kind, uint64_t value) {
  int64_t now = now_ns();
  if (!*since) *since = now;
  if (*since < 0 || now - *since < s->slow_ns || !s->slow) return 0;
  *since = -1; /* once a wait */
  PyObject *slow = Py_NewRef(s->slow);
  PyObject *x = PyObject_CallFunction(slow, "iK", kind, (unsigned long long)value);
  Py_XDECREF(x);
  Py_DECREF(slow);
  return x ? 0 : -1;
}

int shm_tick(Shm *s, int kind, uint64_t value) {
  if (!s->tick) return 0;
  PyObject *tick = Py_NewRef(s->tick); /* another thread may replace it during the call */
  PyObject *x = PyObject_CallFunction(tick, "iK", kind, (unsigned long long)value);
  Py_XDECREF(x);
  Py_DECREF(tick);
  return x ? 0 : -1;
}

int shm_notice_deaths(Shm *s) {
  int64_t last = (int64_t)atomic_load(&hdr(s)->sweep_ns), age = now_ns() - last; /* in this order: time only grows */
  if (age >= 0 && age < TICK_NS) return 0;
  return shm_tick(s, TICK_POLL, 0) ? -1 : 1;
}

int parse_timeout(Shm *s, PyObject *obj, int64_t *until, const char *op) {
  *until = -1;
  if (!obj || obj == Py_None) return 0;
  double t = PyFloat_AsDouble(obj);
  if (t == -1.0 && PyErr_Occurred()) return -1;
  if (!(t >= 0)) return shm_fail(s, EINVAL, op, "timeout", "not a number of seconds >= 0", "pass seconds, or None to wait forever");
  if (t < 4e9) *until = now_ns() + (int64_t)(t * 1e9);
  return 0;
}

double remaining_s(int64_t until) {
  if (until < 0) return HUGE_VAL;
  int64_t left = until - now_ns();
  return left > 0 ? left / 1e9 : 1e-9;
}

/* ---- functions ---- */

static PyObject *closes_heard(PyObject *module, PyObject *unused) { return PyLong_FromUnsignedLong(ticker_closes()); }

static PyObject *hurry(PyObject *module, PyObject *unused) {
  ticker_hurry();
  Py_RETURN_NONE;
}

static PyObject *rest(PyObject *module, PyObject *unused) {
  ticker_stop();
  Py_RETURN_NONE;
}

static PyObject *hears_closes(PyObject *module, PyObject *arg) {
  uint32_t fd;
  int error, r;
  if (arg_u32(arg, &fd)) return NULL;
  Py_BEGIN_ALLOW_THREADS
  r = ticker_try((int)fd, &error);
  Py_END_ALLOW_THREADS
  if (!r && error) {
    errno = error;
    return PyErr_SetFromErrno(PyExc_OSError);
  }
  return PyBool_FromLong(r);
}

static PyMethodDef functions[] = {
    METHOD(closes_heard, METH_NOARGS, "($module, /)",
           "Return a number that changes with each tick that came because the kernel told of the end of a life."),
    METHOD(hurry, METH_NOARGS, "($module, /)", "Let the threads that wait tick soon, because no close will tell what they wait for."),
    METHOD(rest, METH_NOARGS, "($module, /)", "End the thread that ticks, unless a thread waits. The next wait starts it again."),
    METHOD(hears_closes, METH_O, "($module, fd, /)",
           "Return whether a thread hears that the file is closed, as the one that ticks does. OSError: what it needs is refused."),
    {0}};

int sleep_register(PyObject *module) { return PyModule_AddFunctions(module, functions); }
