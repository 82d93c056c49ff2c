/* wait.c - how a port waits for others of its stream. */
#include "domain/sleep.h"
#include "domain/step.h"
#include "stream/port.h"
#include <sched.h>

#define SPIN_NS     20000ll /* a wait spins at most this long before it sleeps */
#define SPIN_GIL_NS 1000ll  /* and this long of it with the GIL */

static inline void cpu_relax(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

db_stream *port_stream(Port *p, int *error) {
  db_stream *x = NULL;
  *error = EBADF;
  if (!p->shm) return NULL;
  *error = EOWNERDEAD;
  if (!p->life || my_life(p->shm) != p->life) return NULL;
  *error = ESTALE;
  x = stream_at(p->shm, p->stream);
  return x && atomic_load(&x->gen) == p->gen && atomic_load(&x->owner) ? x : NULL;
}

/* Did those who are waited for last run on another CPU? On its own CPU a spin would keep them from running. */
static int elsewhere(Port *p, db_stream *x) {
  uint32_t here = (uint32_t)sched_getcpu() + 1, cpu = atomic_load_explicit(&x->cpu, memory_order_relaxed);
  if (p->role != ROLE_PRODUCER) return cpu && cpu != here;
  for (uint64_t on = stream_places(x); on; on &= on - 1) {
    cpu = atomic_load_explicit(&x->reader[__builtin_ctzll(on)].cpu, memory_order_relaxed);
    if (cpu && cpu != here) return 1;
  }
  return 0;
}

/* Look for a moment without sleeping. With the GIL at first: to release it costs more than most of these waits last. */
static int spin(Port *p, db_stream *x, int64_t until, int (*look)(Port *)) {
  if (!elsewhere(p, x)) return 0;
  Shm *s = p->shm;
  int64_t start = now_ns(), end = start + SPIN_NS;
  if (until >= 0 && until < end) end = until;
  int r;
  do
    for (int k = 0; k < 16; k++) {
      if ((r = look(p))) return r;
      cpu_relax();
    }
  while (now_ns() < start + SPIN_GIL_NS);
  /* Without the GIL only at words: a look may need it. A change of `head`, of a cursor or of a claim is such a word. */
  uint64_t head = atomic_load(&x->head), on = stream_places(x), promised = stream_promised(x, on), claims = stream_claims(x, on);
  atomic_fetch_add(&s->spinners, 1);
  Py_BEGIN_ALLOW_THREADS
  for (bool same = true; same && now_ns() < end;)
    for (int k = 0; same && k < 16; k++) {
      cpu_relax();
      same = atomic_load(&x->head) == head;
      if (same && p->role == ROLE_PRODUCER) same = stream_promised(x, on) == promised && stream_claims(x, on) == claims;
    }
  atomic_fetch_sub(&s->spinners, 1);
  Py_END_ALLOW_THREADS
  return look(p);
}

int port_wait(Port *p, uint32_t word, int64_t until, int (*look)(Port *)) {
  int error, r = look(p), b = word == SW_NEWS ? 0 : word == SW_SPACE ? 1 : 2;
  if (r) return r;
  db_stream *x = port_stream(p, &error);
  if (!x) return -error;
  if ((until < 0 || now_ns() < until) && (r = spin(p, x, until, look))) return r;
  int64_t since = 0;
  for (;;) {
    if (!(x = port_stream(p, &error))) return -error;
    /* The count, the bit, a look, and then the sleep: stream_wake_those() says why none of it is lost. */
    uint32_t count = atomic_load(&x->count[b]);
    if (!(atomic_load(&x->want) & word)) atomic_fetch_or(&x->want, word);
    if ((r = look(p))) return r;
    if (until >= 0 && now_ns() >= until) {
      p->vain = (uint64_t)count + 1;
      return -ETIMEDOUT;
    }
    STEP_SLEEPING(stream_counted);
    int slept = shm_sleep(p->shm, &x->count[b], count, until, TICK_STREAM, stream_number(p->stream, 0));
    if (slept == SLEEP_RAISED) return RAISED;
    if ((r = look(p))) return r; /* before the bit is set again, which would cost the other side a system call for each frame */
    /* A reader may wait for ever for a camera that nobody has switched on; a producer waits for somebody who is in the way. */
    if (slept == SLEEP_TICK && word == SW_SPACE && shm_lasts(p->shm, &since, TICK_STREAM, stream_number(p->stream, 0))) return RAISED;
  }
}
