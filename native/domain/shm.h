/* shm.h - the object of a mapped domain, and bounded ways to what is in it. */
#ifndef DMABUF_SHM_H
#define DMABUF_SHM_H
#include "domain/layout.h"
#include "python.h"
#include <time.h>

typedef struct {
  PyObject_HEAD
  char *base;
  size_t length;
  int fd;
  char owns_fd;       /* closed with the mapping: after every finaliser, whichever order the garbage collector takes */
  uint32_t known;     /* chunks this process has checked against the file's size */
  a64 *token;         /* a page that fork wipes: our life id, 0 in a child */
  PyObject *tick;     /* tick(kind, value): a wait lasted TICK_NS; may raise */
  PyObject *on_local; /* on_local(handle): a fence with callbacks in this process was signalled here */
  PyObject *on_sync;  /* on_sync(handle) -> done: a fence that a sync file's descriptor waits for has ended */
  PyObject *fail;     /* errors.fail */
  PyObject *weakrefs;
  uint64_t *fifo; /* free fence slots of this life, oldest first: a slot rests as long as possible */
  uint32_t fifo_cap, fifo_head, fifo_count, fifo_life;
  uint32_t claim_hint[8];
} Shm;

extern PyTypeObject *Shm_Type;

static inline int64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static inline void cpu_relax(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

static inline db_header *hdr(Shm *s) { return (db_header *)s->base; }

static inline db_life *life_slot(Shm *s, uint32_t id) { return (db_life *)(s->base + OFF_LIVES) + LIFE_INDEX(id); }

static inline a64 *chunk_entry(Shm *s, uint32_t i) { return (a64 *)(s->base + OFF_CHUNKTAB) + i; }

static inline a32 *bucket(Shm *s, uint32_t i) { return (a32 *)(s->base + OFF_BUCKETS) + (i & (DB_BUCKETS - 1)); }

static inline uint32_t my_life(Shm *s) { return (uint32_t)atomic_load(s->token); }

static inline int life_current(Shm *s, uint32_t id) { /* is this id the slot's present one (not: does the process live)? */
  db_life *l = life_slot(s, id);
  return id && atomic_load(&l->state) == LIFE_ALIVE && LIFE_ID(LIFE_INDEX(id), atomic_load(&l->gen)) == id;
}

int chunks_known(Shm *s, uint32_t n);
char *chunk_at(Shm *s, uint32_t i, uint32_t type);                                  /* NULL: no such chunk of that type */
int shm_corrupt(Shm *s, const char *what);                                          /* raises EUCLEAN, returns -1 */
int shm_fail(Shm *s, int err, const char *op, const char *obj, const char *remedy); /* raises, returns -1 */
int shm_need_life(Shm *s, const char *op);                                          /* 0, or raises EPERM in a forked child */
char *bounded(Shm *s, unsigned long long off, size_t n);
int shm_register(PyObject *module, PyMethodDef *const *sets); /* sets: the methods of the type, ended by NULL */
#endif
