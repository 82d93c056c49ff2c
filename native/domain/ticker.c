/* ticker.c - one plain thread a process, and only while something sleeps.
 *
 * A wake-up can be lost with the process that died before sending it, and nobody sends one for a lock whose owner died. The ticker wakes
 * the sleepers so that they look again, and a sleeping call needs no timeout of its own: an armed timer costs 0.3 us a sleep. Without
 * sleepers the thread parks after 25 ticks.
 *
 * A sleep is light at first: the ticker ends it after TICK_NS. After several such sleeps in a row a thread sleeps deeply, until there is
 * news, or until the safety net after DEEP_NS, and after DEEPEST_NS once it has lasted. The news is that a descriptor of the domain's file
 * was closed for the last time (inotify, IN_CLOSE_WRITE). A life's lock belongs to such a descriptor, or to its mapping. So the kernel
 * tells of the end of every life, however it ended and in whichever PID namespace, also if it began while the others slept. Others close
 * the file too, those that join. So the ticker looks which lives have ended, and wakes the sleepers if one has. It looks again a moment
 * later, because the kernel tells it just before it drops the lock.
 *
 * The inotify descriptor is in a table that only this thread has: nobody else can close it, and no fork and no other program inherits it.
 * Where there is none (a filter of system calls, fs.inotify.max_user_instances, an old kernel), every sleep stays light.
 */
#include "domain/ticker.h"
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <sys/inotify.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/stat.h>

#ifndef SYS_close_range
#define SYS_close_range 436 /* the same on every architecture; older C libraries don't name it */
#endif
#ifndef IN_MASK_CREATE
#define IN_MASK_CREATE 0x10000000
#endif
#define UNSHARE 2u /* CLOSE_RANGE_UNSHARE: give the thread a table of its own first */

#define SLEEPERS   256
#define FILES      8 /* domains of one process in which threads sleep deeply at once */
#define IDLE_TICKS 25
#define DEEP_NS    500000000ll
#define DEEP_TICKS 4 /* so many; after that a sleep has lasted, and the net comes more seldom */
#define DEEPEST_NS 2500000000ll

typedef struct {
  _Atomic(a32 *) word; /* NULL: a free slot; being_filled: not yet to be looked at */
  a32 expected, ticked;
  ai32 fd;
  a64 dev, ino;
} sleeper;

typedef struct {
  a64 dev, ino;
  int fd;
  uint32_t seen[DB_LIVES]; /* of each life's slot its generation, and in bit 0 whether it was ALIVE */
} file;

/* In a page that fork wipes: the child has no ticker, whatever the parent has. */
static struct {
  a32 running;
  unsigned number; /* another one in most processes */
} *state;

static sleeper sleepers[SLEEPERS];
static a32 being_filled;
static file files[FILES]; /* those that the ticker listens to */
static a32 closes, parked;
static a32 ends; /* the thread is to end */
static pthread_t thread;
static ai32 thread_id;
static a32 deep;  /* the ticker is in a deep sleep, or about to be */
static a32 light; /* a sleep is light, and the ticker has not seen that yet */

static int64_t clock_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* ---- listening ---- */

/* An inotify descriptor in a table of this thread's own; -1: errno. */
static int listen_alone(void) {
  static _Thread_local int own_table;
  if (!own_table && syscall(SYS_close_range, 0u, ~0u, UNSHARE)) return -1;
  own_table = 1;
  return inotify_init1(IN_CLOEXEC | IN_NONBLOCK);
}

/* The descriptor is in the table that the other threads have. 0; -1: it is of another file by now, or errno. */
static int listen_to(int inotify, int fd, uint64_t dev, uint64_t ino) {
  char path[40];
  struct stat st;
  snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
  int wd = inotify_add_watch(inotify, path, IN_CLOSE_WRITE | IN_MASK_CREATE);
  if (wd < 0) return -1;
  if (!stat(path, &st) && st.st_dev == dev && st.st_ino == ino) return 0;
  inotify_rm_watch(inotify, wd);
  errno = ESTALE;
  return -1;
}

static int listens_to(uint64_t dev, uint64_t ino) {
  for (int i = 0; i < FILES; i++)
    if (atomic_load(&files[i].ino) == ino && atomic_load(&files[i].dev) == dev) return 1;
  return 0;
}

static void forget_files(void) {
  for (int i = 0; i < FILES; i++) atomic_store(&files[i].ino, 0);
}

static int is_locked(int fd, off_t byte) {
  struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = byte, .l_len = 1};
  return fcntl(fd, F_OFD_GETLK, &lock) || lock.l_type != F_UNLCK;
}

/* Has a life of a slot ended between two looks? One that began meanwhile has not. */
static int has_ended(uint32_t before, uint32_t now) { return now != before && ((before & 1) || (now != before + 1 && now != before + 3)); }

/* Has a life ended since the last call, or is one dead now? 1 also if nobody knows. The file is read and not looked at through a mapping,
 * which another thread may end. It is open for reading only, so nobody hears of its close. */
static int lives_ended(file *f) {
  static uint32_t slots[64][sizeof(db_life) / 4];
  char path[40];
  struct stat st;
  uint32_t high = 0;
  snprintf(path, sizeof path, "/proc/self/fd/%d", f->fd);
  int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK), ended = 0;
  if (fd < 0) return 1;
  if (fstat(fd, &st) || st.st_dev != atomic_load(&f->dev) || st.st_ino != atomic_load(&f->ino) ||
      pread(fd, &high, sizeof high, offsetof(db_header, life_high)) != sizeof high || high > DB_LIVES)
    ended = 1;
  for (uint32_t i = 0; i < high && high <= DB_LIVES; i++) {
    if (i % 64 == 0 && pread(fd, slots, sizeof slots, OFF_LIVES + i * sizeof(db_life)) != sizeof slots) {
      ended = 1;
      break;
    }
    uint32_t *slot = slots[i % 64], now = slot[offsetof(db_life, gen) / 4] << 1 | (slot[offsetof(db_life, state) / 4] == LIFE_ALIVE);
    if (has_ended(f->seen[i], now) || ((now & 1) && !is_locked(fd, LIFE_BYTE + i))) ended = 1;
    f->seen[i] = now;
  }
  close(fd);
  return ended;
}

static int any_lives_ended(void) {
  int ended = 0;
  for (int i = 0; i < FILES; i++)
    if (atomic_load(&files[i].ino)) ended |= lives_ended(&files[i]);
  return ended;
}

/* Listen to the files of all sleepers. 1: to all; 0: not to all; -1: nobody sleeps. added: to one that it didn't listen to before. */
static int listen_for_sleepers(int inotify, int *added) {
  int all = -1;
  *added = 0;
  for (int i = 0; i < SLEEPERS; i++) {
    a32 *word = atomic_load(&sleepers[i].word);
    if (!word) continue;
    if (all < 0) all = 1;
    uint64_t dev = atomic_load(&sleepers[i].dev), ino = atomic_load(&sleepers[i].ino);
    if (word == &being_filled)
      all = 0;
    else if (!listens_to(dev, ino)) {
      int k = 0;
      while (k < FILES && atomic_load(&files[k].ino)) k++;
      if (k < FILES && inotify >= 0 && !listen_to(inotify, atomic_load(&sleepers[i].fd), dev, ino)) {
        files[k].fd = atomic_load(&sleepers[i].fd);
        atomic_store(&files[k].dev, dev);
        atomic_store(&files[k].ino, ino);
        lives_ended(&files[k]);
        *added = 1;
      } else {
        all = 0;
      }
    }
  }
  return all;
}

/* Take all events. 1: a file was closed; -1: one of them is gone, or nobody knows. */
static int heard(int inotify) {
  char events[4096] __attribute__((aligned(__alignof__(struct inotify_event))));
  int found = 0;
  for (ssize_t n; (n = read(inotify, events, sizeof events)) > 0;)
    for (char *at = events; at < events + n; at += sizeof(struct inotify_event) + ((struct inotify_event *)at)->len)
      if (found >= 0) found = ((struct inotify_event *)at)->mask & IN_CLOSE_WRITE ? 1 : -1;
  return found;
}

/* ---- waking ---- */

/* Many threads of many processes may sleep on one word, and a tick is for one of them: it wakes a 32nd part of the others. */
uint32_t sleeper_bits(int slot) { return slot < 0 ? FUTEX_BITSET_MATCH_ANY : 1u << ((unsigned)slot + state->number) % 32; }

static void wake(int slot, a32 *word) {
  atomic_store(&sleepers[slot].ticked, 1);
  syscall(SYS_futex, word, FUTEX_WAKE_BITSET, INT32_MAX, NULL, NULL, sleeper_bits(slot));
}

static void wake_all(void) {
  for (int i = 0; i < SLEEPERS; i++) {
    a32 *word = atomic_load(&sleepers[i].word);
    if (word && word != &being_filled) wake(i, word);
  }
}

/* Wake each whose word has changed, and one of the others: what a tick must do for the process, one can do for all. */
static void wake_in_turn(void) {
  static int turn;
  int next = -1;
  for (int k = 0; k < SLEEPERS; k++) {
    int i = (turn + k) % SLEEPERS;
    a32 *word = atomic_load(&sleepers[i].word);
    if (!word || word == &being_filled) continue;
    /* The kernel compares, because the word may be unmapped by now. It wakes none and moves none. */
    long r = syscall(SYS_futex, word, FUTEX_CMP_REQUEUE, 0, NULL, word, atomic_load(&sleepers[i].expected));
    if (r < 0 && errno == EAGAIN)
      wake(i, word);
    else if (next < 0)
      next = i;
  }
  if (next < 0) return;
  turn = (next + 1) % SLEEPERS;
  a32 *word = atomic_load(&sleepers[next].word);
  if (word && word != &being_filled) wake(next, word);
}

/* ---- the thread ---- */

/* From one look after news to the next. If one finds that a life has ended, the later ones wake the sleepers all the same: the process may
 * go on to close what it has. */
static const int64_t AGAIN_NS[] = {1000000, 2000000, 4000000, 8000000, 25000000, 40000000};
#define AGAIN (int)(sizeof AGAIN_NS / sizeof *AGAIN_NS)
/* From one look to that for the next news: at least this, and so many times what it took. */
#define PAUSE_NS 4000000ll
#define SHARE    20

static void park(void) {
  /* Say so first and look after that: a sleeper that comes now either sees `parked` or is seen. */
  int busy = 0;
  atomic_store(&parked, 1);
  for (int i = 0; i < SLEEPERS; i++) busy |= atomic_load(&sleepers[i].word) != NULL;
  while (!busy && !atomic_load(&ends) && atomic_load(&parked)) futex(&parked, FUTEX_WAIT_PRIVATE, 1, NULL);
  atomic_store(&parked, 0);
}

/* The looks after news. due: when the next is, INT64_MAX: none. */
typedef struct {
  int64_t due, earliest;
  int again, ended;
} looks;

static void news_came(looks *x, int64_t now) {
  x->again = 0;
  x->due = now > x->earliest ? now : x->earliest;
}

static void look(looks *x, int64_t now) {
  int ended = any_lives_ended();
  int64_t end = clock_ns(), share = SHARE * (end - now);
  x->ended |= ended;
  if (x->ended) {
    atomic_fetch_add(&closes, 1);
    wake_all();
  }
  x->earliest = end + (share > PAUSE_NS ? share : PAUSE_NS);
  x->due = x->again < AGAIN ? end + AGAIN_NS[x->again++] : INT64_MAX;
  if (x->due == INT64_MAX) x->ended = 0;
}

static int listen_anew(int inotify) {
  if (inotify >= 0) close(inotify);
  forget_files();
  return listen_alone();
}

/* Ends a poll: SIGURG, which this thread blocks, and which only ticker_stop() sends to it. -1: only the time ends one. */
static int listen_to_stop(int inotify) {
  sigset_t urgent;
  sigemptyset(&urgent);
  sigaddset(&urgent, SIGURG);
  return inotify < 0 ? -1 : signalfd(-1, &urgent, SFD_CLOEXEC); /* without inotify the table may be that of all */
}

static void *ticker(void *unused) {
  (void)unused;
  prctl(PR_SET_NAME, "dmabuf-tick");
  atomic_store(&thread_id, (int)syscall(SYS_gettid));
  int idle = 0, deep_ticks = 0, added, inotify = listen_anew(-1), stop = listen_to_stop(inotify);
  int64_t due = clock_ns() + TICK_NS;
  looks after = {.due = INT64_MAX};
  listen_for_sleepers(inotify, &added);
  while (!atomic_load(&ends)) {
    struct pollfd p[] = {{.fd = inotify, .events = POLLIN}, {.fd = stop, .events = POLLIN}};
    int64_t left = (due < after.due ? due : after.due) - clock_ns();
    struct timespec t = {left > 0 ? left / 1000000000 : 0, left > 0 ? left % 1000000000 : 0};
    int k = ppoll(p, 2, &t, NULL) > 0 && p[0].revents ? heard(inotify) : 0;
    int64_t now = clock_ns();
    if (k < 0) { /* nobody knows what has come: listen again, and tick */
      inotify = listen_anew(inotify);
      due = now;
    }
    if (k) news_came(&after, now);
    if (now >= after.due) look(&after, now);
    if (now < due) continue;
    atomic_store(&deep, 0);
    int lightly = (int)atomic_exchange(&light, 0), all = listen_for_sleepers(inotify, &added);
    idle = all < 0 ? idle + 1 : 0;
    if (lightly || added || all != 1)
      wake_all();
    else
      wake_in_turn();
    if (idle >= IDLE_TICKS) {
      if (inotify >= 0) close(inotify);
      park();
      inotify = listen_anew(-1);
      all = listen_for_sleepers(inotify, &added);
      lightly = 1;
      idle = 0;
    } else if (inotify < 0) {
      inotify = listen_anew(-1);
    }
    /* As above: a light sleeper that comes now either sees `deep` or is seen. */
    if (all == 1 && !lightly) {
      atomic_store(&deep, 1);
      if (atomic_load(&light) || listen_for_sleepers(inotify, &added) != 1 || added) atomic_store(&deep, 0);
    }
    deep_ticks = atomic_load(&deep) ? deep_ticks + 1 : 0;
    due = clock_ns() + (!deep_ticks ? TICK_NS : deep_ticks <= DEEP_TICKS ? DEEP_NS : DEEPEST_NS);
  }
  return NULL; /* what is in a table of its own goes with it */
}

static int thread_start(pthread_t *started, void *(*run)(void *), void *arg) {
  pthread_attr_t attr;
  sigset_t all, old;
  sigfillset(&all);
  pthread_attr_init(&attr);
  pthread_attr_setstacksize(&attr, 65536);
  pthread_sigmask(SIG_SETMASK, &all, &old); /* signals are for Python's threads */
  int r = pthread_create(started, &attr, run, arg);
  pthread_sigmask(SIG_SETMASK, &old, NULL);
  pthread_attr_destroy(&attr);
  return r;
}

static int ticker_start(void) {                                             /* The caller holds the GIL. */
  for (int i = 0; i < SLEEPERS; i++) atomic_store(&sleepers[i].word, NULL); /* after a fork these are the parent's */
  forget_files();
  atomic_store(&parked, 0);
  atomic_store(&deep, 0);
  atomic_store(&light, 0);
  state->number = (unsigned)getpid() * 2654435761u >> 16; /* a namespace's numbers may be those of another, in turn */
  atomic_store(&ends, 0);
  atomic_store(&thread_id, 0);
  int r = thread_start(&thread, ticker, NULL);
  if (!r) atomic_store(&state->running, 1);
  return r;
}

int ticker_prepare(void) {
  void *page = mmap(NULL, DB_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (page == MAP_FAILED || madvise(page, DB_PAGE, MADV_WIPEONFORK)) return -1;
  state = page;
  return 0;
}

typedef struct {
  int fd, error, heard;
  a32 listens;
} trial;

static void *try_to_hear(void *arg) {
  trial *x = arg;
  struct stat st;
  char path[40];
  snprintf(path, sizeof path, "/proc/self/fd/%d", x->fd);
  int inotify = listen_alone();
  int ready = inotify >= 0 && !stat(path, &st) && !listen_to(inotify, x->fd, st.st_dev, st.st_ino);
  if (!ready) x->error = errno;
  atomic_store(&x->listens, 1);
  futex(&x->listens, FUTEX_WAKE_PRIVATE, 1, NULL);
  struct pollfd p = {.fd = inotify, .events = POLLIN};
  if (ready && poll(&p, 1, 1000) > 0) x->heard = heard(inotify) > 0;
  return NULL;
}

int ticker_try(int fd, int *error) {
  trial x = {.fd = fd};
  char path[40];
  pthread_t trying;
  *error = thread_start(&trying, try_to_hear, &x);
  if (*error) return 0;
  while (!atomic_load(&x.listens)) futex(&x.listens, FUTEX_WAIT_PRIVATE, 0, NULL);
  snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
  int own = open(path, O_RDWR | O_CLOEXEC);
  if (own >= 0) close(own);
  pthread_join(trying, NULL);
  *error = x.error;
  return x.heard;
}

void ticker_stop(void) {
  if (!atomic_load(&state->running)) return;
  for (int i = 0; i < SLEEPERS; i++)
    if (atomic_load(&sleepers[i].word)) return;
  atomic_store(&ends, 1);
  atomic_store(&parked, 0);
  futex(&parked, FUTEX_WAKE_PRIVATE, 1, NULL);
  int id = atomic_load(&thread_id);
  if (id) syscall(SYS_tgkill, getpid(), id, SIGURG); /* before that it hasn't looked at `ends` yet */
  pthread_join(thread, NULL);
  id = atomic_load(&thread_id);
  /* The kernel counts it for a moment longer, or on a busy machine for some milliseconds. */
  for (int i = 0; i < 2000 && !syscall(SYS_tgkill, getpid(), id, 0); i++) usleep(50);
  atomic_store(&state->running, 0);
}

uint32_t ticker_closes(void) { return atomic_load(&closes); }

void ticker_hurry(void) { atomic_store(&light, 1); }

/* ---- sleepers ---- */

int sleeper_enter(a32 *word, uint32_t expected, const ticker_file *file, int lightly, int *alone) {
  *alone = 1;
  if (!atomic_load(&state->running) && ticker_start()) return -1;
  int i = 0;
  for (a32 *none = NULL; i < SLEEPERS; i++, none = NULL)
    if (!atomic_load(&sleepers[i].word) && atomic_compare_exchange_strong(&sleepers[i].word, &none, &being_filled)) break;
  if (i == SLEEPERS) return -1;
  sleeper *x = &sleepers[i];
  atomic_store_explicit(&x->expected, expected, memory_order_relaxed);
  atomic_store_explicit(&x->ticked, 0, memory_order_relaxed);
  atomic_store_explicit(&x->fd, file->fd, memory_order_relaxed);
  atomic_store_explicit(&x->dev, file->dev, memory_order_relaxed);
  atomic_store_explicit(&x->ino, file->ino, memory_order_relaxed);
  atomic_store(&x->word, word);
  if (atomic_load(&parked)) {
    atomic_store(&parked, 0);
    futex(&parked, FUTEX_WAKE_PRIVATE, 1, NULL);
  }
  if (lightly && !atomic_load(&light)) atomic_store(&light, 1);
  *alone = 0;
  if (!atomic_load(&deep)) return i;
  if (!listens_to(file->dev, file->ino)) atomic_store(&light, 1);
  *alone = atomic_load(&light) != 0; /* until the ticker sees it */
  return i;
}

int sleeper_leave(int slot) {
  int ticked = (int)atomic_load(&sleepers[slot].ticked);
  atomic_store(&sleepers[slot].word, NULL);
  return ticked;
}

void sleepers_wake(char *at, size_t n, char *where) {
  for (int i = 0; i < SLEEPERS; i++) {
    char *word = (char *)atomic_load(&sleepers[i].word);
    if (word >= at && word < at + n) word_wake((a32 *)(where + (word - at)), INT32_MAX);
  }
}
