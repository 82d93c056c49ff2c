/* ticker.h - the futex, and a thread that wakes the sleepers of this process at every tick so that they look again. No Python. */
#ifndef DMABUF_TICKER_H
#define DMABUF_TICKER_H
#include "domain/layout.h"
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define TICK_NS 40000000ll /* a sleeper looks again at least this often */

static inline long futex(a32 *word, int op, uint32_t value, const struct timespec *timeout) { /* futex(2) */
  return syscall(SYS_futex, word, op, value, timeout, NULL, 0);
}

static inline void word_wake(a32 *word, int n) { futex(word, FUTEX_WAKE, (uint32_t)n, NULL); } /* wake up to n sleepers of any process */

int ticker_prepare(void);     /* before anything else here, once a process: 0, or -1 with errno */
uint32_t ticker_ticks(void);  /* ticks so far */
int sleeper_enter(a32 *word); /* wake the word at every tick. A slot, or -1: no room or no thread. The caller holds the GIL */
void sleeper_leave(int slot);

/* Wake all that sleep on words in n bytes at `at`, which are mapped at `where` now. */
void sleepers_wake(char *at, size_t n, char *where);
#endif
