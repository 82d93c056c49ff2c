/* sleep.h - the sleep that every wait of a domain is built of. */
#ifndef DMABUF_SLEEP_H
#define DMABUF_SLEEP_H
#include "domain/shm.h"

/* One sleep on a word: until woken, a tick passed, or `until` (CLOCK_MONOTONIC ns, -1 never). The GIL is released.
 * 0: look again; 1: a tick passed, tick(kind, value) was called; -1: an exception (a signal handler's, or tick's);
 * -2: a signal arrived and no handler raised. */
int shm_sleep(Shm *s, a32 *word, uint32_t expected, int64_t until, int kind, uint64_t value);

enum { TICK_FENCE, TICK_RESV, TICK_TABLE, TICK_BELL, TICK_POLL, TICK_CHECK };

int shm_tick(Shm *s, int kind, uint64_t value); /* 0, or -1 with an exception */
int shm_polled(Shm *s); /* a look found something pending: 1 when a sweep was due and done, so look again; -1 exception */
double remaining_s(int64_t until);
int parse_timeout(Shm *s, PyObject *obj, int64_t *until, const char *op); /* None or seconds >= 0 */
#endif
