/* ticker.c - one plain thread a process, and only while something sleeps.
 *
 * A wake-up can be lost with the process that died before sending it. The ticker wakes every sleeper each TICK_NS, so that a sleeping call
 * needs no timeout of its own: an armed timer costs 0.3 us a sleep. Without sleepers the thread parks after 25 ticks.
 */
#include "domain/ticker.h"
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>

#define SLEEPERS   256
#define IDLE_TICKS 25

/* In a page that fork wipes: the child has no ticker, whatever the parent has. */
static struct {
  a32 running;
} *state;

static _Atomic(a32 *) sleepers[SLEEPERS];
static a32 ticks, parked;

static void *ticker(void *unused) {
  (void)unused;
  prctl(PR_SET_NAME, "dmabuf-tick");
  for (int idle = 0;;) {
    struct timespec t = {0, TICK_NS};
    nanosleep(&t, NULL);
    atomic_fetch_add(&ticks, 1);
    int busy = 0;
    for (int i = 0; i < SLEEPERS; i++) {
      a32 *word = atomic_load(&sleepers[i]);
      if (!word) continue;
      busy = 1;
      word_wake(word, INT32_MAX);
    }
    idle = busy ? 0 : idle + 1;
    if (idle < IDLE_TICKS) continue;
    /* Say so first and look after that: a sleeper that comes now either sees `parked` or is seen. */
    atomic_store(&parked, 1);
    for (int i = 0; i < SLEEPERS; i++) busy |= atomic_load(&sleepers[i]) != NULL;
    while (!busy && atomic_load(&parked)) futex(&parked, FUTEX_WAIT_PRIVATE, 1, NULL);
    atomic_store(&parked, 0);
    idle = 0;
  }
  return NULL;
}

static int ticker_start(void) {                                        /* The caller holds the GIL. */
  for (int i = 0; i < SLEEPERS; i++) atomic_store(&sleepers[i], NULL); /* after a fork these are the parent's */
  atomic_store(&parked, 0);
  pthread_t thread;
  pthread_attr_t attr;
  sigset_t all, old;
  sigfillset(&all);
  pthread_attr_init(&attr);
  pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
  pthread_attr_setstacksize(&attr, 65536);
  pthread_sigmask(SIG_SETMASK, &all, &old); /* signals are for Python's threads */
  int r = pthread_create(&thread, &attr, ticker, NULL);
  pthread_sigmask(SIG_SETMASK, &old, NULL);
  pthread_attr_destroy(&attr);
  if (!r) atomic_store(&state->running, 1);
  return r;
}

int ticker_prepare(void) {
  void *page = mmap(NULL, DB_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (page == MAP_FAILED || madvise(page, DB_PAGE, MADV_WIPEONFORK)) return -1;
  state = page;
  return 0;
}

uint32_t ticker_ticks(void) { return atomic_load(&ticks); }

int sleeper_enter(a32 *word) {
  if (!atomic_load(&state->running) && ticker_start()) return -1;
  for (int i = 0; i < SLEEPERS; i++) {
    a32 *none = NULL;
    if (atomic_load(&sleepers[i]) || !atomic_compare_exchange_strong(&sleepers[i], &none, word)) continue;
    if (atomic_load(&parked)) {
      atomic_store(&parked, 0);
      futex(&parked, FUTEX_WAKE_PRIVATE, 1, NULL);
    }
    return i;
  }
  return -1;
}

void sleeper_leave(int slot) { atomic_store(&sleepers[slot], NULL); }

void sleepers_wake(char *at, size_t n, char *where) {
  for (int i = 0; i < SLEEPERS; i++) {
    char *word = (char *)atomic_load(&sleepers[i]);
    if (word >= at && word < at + n) word_wake((a32 *)(where + (word - at)), INT32_MAX);
  }
}
