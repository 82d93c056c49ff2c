/* ticker.c - the ticker: one thread a process, only while somebody sleeps. */
#include "domain/ticker.h"
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

long futex(a32 *word, int op, uint32_t value, const struct timespec *timeout) {
  return syscall(SYS_futex, word, op, value, timeout, NULL, 0);
}

void word_wake(a32 *word, int n) { futex(word, FUTEX_WAKE, (uint32_t)n, NULL); }

#define SLEEPERS 256

typedef struct {
  a32 running;
} proc_page; /* wiped by fork: the child has no such thread */

static proc_page *proc;
static _Atomic(a32 *) sleepers[SLEEPERS];
static a32 ticks, parked;

static void *ticker(void *unused) {
  (void)unused;
  for (int idle = 0;;) {
    struct timespec t = {0, TICK_NS};
    nanosleep(&t, NULL);
    atomic_fetch_add(&ticks, 1);
    int busy = 0;
    for (int i = 0; i < SLEEPERS; i++) {
      a32 *w = atomic_load(&sleepers[i]);
      if (w) {
        busy = 1;
        word_wake(w, INT32_MAX);
      }
    }
    if (busy) {
      idle = 0;
      continue;
    }
    if (++idle < 25) continue;
    atomic_store(&parked, 1); /* a sleeper that comes now either sees this or is seen by the look below */
    for (int i = 0; i < SLEEPERS; i++) busy |= atomic_load(&sleepers[i]) != NULL;
    while (!busy && atomic_load(&parked)) futex(&parked, FUTEX_WAIT_PRIVATE, 1, NULL);
    atomic_store(&parked, 0);
    idle = 0;
  }
  return NULL;
}

static int ticker_start(void) {                                        /* GIL held */
  for (int i = 0; i < SLEEPERS; i++) atomic_store(&sleepers[i], NULL); /* after a fork these are the parent's */
  atomic_store(&parked, 0);
  pthread_t thread;
  pthread_attr_t attr;
  sigset_t all, old;
  sigfillset(&all);
  pthread_attr_init(&attr);
  pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
  pthread_attr_setstacksize(&attr, 65536);
  pthread_sigmask(SIG_SETMASK, &all, &old); /* Python's signals belong to Python's threads */
  int r = pthread_create(&thread, &attr, ticker, NULL);
  pthread_sigmask(SIG_SETMASK, &old, NULL);
  pthread_attr_destroy(&attr);
  if (!r) atomic_store(&proc->running, 1);
  return r;
}

int sleeper_enter(a32 *word) { /* GIL held; -1: no room or no thread, the caller sleeps with a timeout */
  if (!atomic_load(&proc->running) && ticker_start()) return -1;
  for (int i = 0; i < SLEEPERS; i++) {
    a32 *none = NULL;
    if (!atomic_load(&sleepers[i]) && atomic_compare_exchange_strong(&sleepers[i], &none, word)) {
      if (atomic_load(&parked)) {
        atomic_store(&parked, 0);
        futex(&parked, FUTEX_WAKE_PRIVATE, 1, NULL);
      }
      return i;
    }
  }
  return -1;
}

void sleeper_leave(int slot) { atomic_store(&sleepers[slot], NULL); }

uint32_t ticker_ticks(void) { return atomic_load(&ticks); }

int ticker_prepare(void) {
  proc = mmap(NULL, DB_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return proc == MAP_FAILED || madvise(proc, DB_PAGE, MADV_WIPEONFORK) ? -1 : 0;
}
