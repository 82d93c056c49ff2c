/* sleep.h - the one sleep of which every wait in a domain is built, and times. */
#ifndef DMABUF_SLEEP_H
#define DMABUF_SLEEP_H
#include "domain/shm.h"

/* What a wait is for, as tick() is told. */
enum { TICK_FENCE, TICK_RESV, TICK_TABLE, TICK_DOORBELL, TICK_POLL, TICK_CHECK, TICK_STREAM };

enum {
  SLEEP_SIGNAL = -2, /* a signal arrived, and no handler raised */
  SLEEP_RAISED = -1, /* an exception is set: a signal handler's, or tick's */
  SLEEP_AGAIN = 0,   /* woken, out of time, or the word was not `expected`: look again */
  SLEEP_TICK = 1,    /* a tick passed and tick(kind, value) was called: look again */
};

/* Sleep once on a word, with the GIL released: until another thread or process wakes it, a tick passes, a signal arrives, or `until`
 * (CLOCK_MONOTONIC ns, -1: no limit). The caller looks at everything again after each sleep. */
int shm_sleep(Shm *s, a32 *word, uint32_t expected, int64_t until, int kind, uint64_t value);

/* To be called at each tick of a wait whose `since` was 0 at its beginning: calls slow(kind, value) once the wait has lasted slow_ns. */
int shm_lasts(Shm *s, int64_t *since, int kind, uint64_t value);

/* Call tick(kind, value). */
int shm_tick(Shm *s, int kind, uint64_t value);

/* For a caller that has found something pending and does not sleep: notice the deaths of processes too, once a tick is over since the last
 * time. 1: look again; 0: too early; -1: an exception is set. */
int shm_notice_deaths(Shm *s);

/* The time limit of a Python argument, None or seconds >= 0, as CLOCK_MONOTONIC ns; -1: none. */
int parse_timeout(Shm *s, PyObject *obj, int64_t *until, const char *op);

/* Seconds until then, never 0: what a successful wait returns. */
double remaining_s(int64_t until);

int sleep_register(PyObject *module);
#endif
