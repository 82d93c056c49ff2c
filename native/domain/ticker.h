/* ticker.h - the futex, and a thread that wakes the sleepers of this process so that they look again. No Python. */
#ifndef DMABUF_TICKER_H
#define DMABUF_TICKER_H
#include "domain/layout.h"
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define TICK_NS 40000000ll /* a sleeper looks again at least this often, as long as it sleeps lightly */

static inline long futex(a32 *word, int op, uint32_t value, const struct timespec *timeout) { /* futex(2) */
  return syscall(SYS_futex, word, op, value, timeout, NULL, 0);
}

static inline void word_wake(a32 *word, int n) { futex(word, FUTEX_WAKE, (uint32_t)n, NULL); } /* wake up to n sleepers of any process */

/* The file that a sleeper's word is in: a descriptor of it, and what fstat(2) says of it. */
typedef struct {
  int fd;
  uint64_t dev, ino;
} ticker_file;

int ticker_prepare(void);       /* before anything else here, once a process: 0, or -1 with errno */
uint32_t ticker_closes(void);   /* how often sleepers were woken because a life had ended */
void ticker_hurry(void);        /* something is in the way that no close will tell of: tick soon */
void ticker_stop(void);         /* end the thread unless something sleeps; the next sleeper starts one. The caller holds the GIL */
int ticker_try(int fd, int *e); /* Does a thread hear that a file is closed? 1; 0 with the errno of what is refused, 0: nothing came */

/* Be woken at every tick. A slot, or -1: no room or no thread. `alone` says whether the caller must wake by itself after TICK_NS.
 *
 * word, expected: what it sleeps on; light: it has not slept for several ticks yet. The caller holds the GIL. */
int sleeper_enter(a32 *word, uint32_t expected, const ticker_file *file, int light, int *alone);
uint32_t sleeper_bits(int slot); /* what the sleeper gives FUTEX_WAIT_BITSET */
int sleeper_leave(int slot);     /* Did a tick wake it? */

/* Wake all that sleep on words in n bytes at `at`, which are mapped at `where` now. */
void sleepers_wake(char *at, size_t n, char *where);
#endif
