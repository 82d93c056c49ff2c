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

int shm_sleep(Shm *s, a32 *word, uint32_t expected, int64_t until, int kind, uint64_t value) {
  int64_t limit = -1;
  if (until >= 0) {
    limit = until - now_ns();
    if (limit <= 0) return SLEEP_AGAIN;
  }
  uint32_t before = ticker_ticks();
  int slot = sleeper_enter(word), alone = 0;
  if (slot < 0 && (limit < 0 || limit > TICK_NS)) { /* the ticker does not know of this sleep: it ticks by itself */
    limit = TICK_NS;
    alone = 1;
  }
  struct timespec t = {limit / 1000000000, limit % 1000000000};
  long r;
  int err, tick, signaled;
  sigset_t all, old;
  Py_BEGIN_ALLOW_THREADS
  r = futex(word, FUTEX_WAIT, expected, limit < 0 ? NULL : &t);
  err = errno;
  signaled = r < 0 && err == EINTR;
  tick = ticker_ticks() != before || (alone && r < 0 && err == ETIMEDOUT);
  if (tick && !signaled) { /* The GIL may take long to come: a signal in that time must end the sleep like one before it. */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
  }
  Py_END_ALLOW_THREADS
  if (slot >= 0) sleeper_leave(slot);
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
