/* ticker.h - sleeping on a word that processes share: a futex, and the thread that wakes sleepers to look again. */
#ifndef DMABUF_TICKER_H
#define DMABUF_TICKER_H
#include "domain/layout.h"
#include <time.h>

#define TICK_NS 40000000ll /* a sleeper looks again at least this often */

long futex(a32 *word, int op, uint32_t value, const struct timespec *timeout);
void word_wake(a32 *word, int n);
int ticker_prepare(void); /* once a process, before all others: 0, or -1 with errno */
uint32_t ticker_ticks(void);
int sleeper_enter(a32 *word);
void sleeper_leave(int slot);
#endif
