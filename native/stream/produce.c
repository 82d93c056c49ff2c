/* produce.c - the producer of a stream: it takes a slot, and publishes the frame in it. */
#include "domain/fence.h"
#include "domain/resv.h"
#include "domain/step.h"
#include "stream/port.h"
#include <sched.h>
#include <unistd.h>

static Port *producers; /* of this process: a life can't tell two of its own apart */

static void unlist(Port *p) {
  if (!p->at) return;
  *p->at = p->next;
  if (p->next) p->next->at = p->at;
  p->next = NULL;
  p->at = NULL;
}

static int another_here(Port *p) {
  for (Port *o = producers; o; o = o->next)
    if (o != p && o->shm == p->shm && o->stream == p->stream && o->gen == p->gen && o->life == p->life) return 1;
  return 0;
}

int produce_begin(Port *p) {
  int error;
  db_stream *x = port_stream(p, &error);
  if (!x) return -error;
  uint64_t mine = (uint64_t)p->life << 8 | SD_ALIVE, now = atomic_load(&x->prod);
  if (another_here(p)) return -EBUSY;
  while (now != mine)
    if ((now & 255) == SD_ALIVE)
      return -EBUSY;
    else if (atomic_compare_exchange_weak(&x->prod, &now, mine))
      break;
  STEP_OF(stream_entered, x, p->life); /* the producer, with nothing marked */
  uint64_t head = atomic_load(&x->head);
  p->n = SEQ_OF(head) + 1;
  p->last = head ? SLOT_OF(head) % p->slots : p->slots - 1;
  p->role = ROLE_PRODUCER;
  p->next = producers;
  p->at = &producers;
  if (producers) producers->at = &p->next;
  producers = p;
  stream_wake(p->shm, x, SW_NEWS);
  return 0;
}

int foreign_blocks(Shm *s, db_stream *x, uint32_t k, bool writers, bool granted) {
  uint32_t rec = atomic_load(&x->slot[k].rec);
  db_rec *r = rec ? rec_at(s, rec - 1) : NULL;
  if (!r || atomic_load(&r->gen) != atomic_load(&x->slot[k].rec_gen)) return 0; /* the buffer is gone, and its users with it */
  uint64_t h = resv_foreign(s, rec - 1, writers ? 1 : 2);
  if (!h || !granted) return h != 0;
  db_fence *f = fence_at(s, H_SLOT(h));
  uint32_t flags = f ? atomic_load(&f->flags) : 0;
  return !(flags & FF_ACCESS) || (flags & FF_GRANTED);
}

/* Somebody who doesn't know the stream had a fence in the list. 1: none is pending any more, and the word says so. */
static int foreign_over(Shm *s, db_stream *x, uint32_t k, uint32_t foreign) {
  db_slot *slot = &x->slot[k];
  if (foreign_blocks(s, x, k, false, false)) return 0;
  uint32_t rec = atomic_load(&slot->rec);
  db_rec *r = rec ? rec_at(s, rec - 1) : NULL;
  uint32_t torn = r ? (uint32_t)atomic_load(&r->torn) : 0;
  if (torn) atomic_store(&slot->torn, torn); /* its writer died or raised: no frame any more */
  int done = atomic_compare_exchange_strong(&slot->foreign, &foreign, foreign & ~S_FOREIGN);
  if (done) STEP_OF(stream_cleared, x, k);
  return done;
}

/* Once it is marked: nobody has come in between. */
static bool is_free(Port *p, db_stream *x, uint32_t k, uint64_t state) {
  uint64_t on = stream_places(x), seq = SEQ_OF(state);
  if (seq && p->policy == SP_WAIT && seq >= stream_promised(x, on)) return false;
  return !(atomic_load(&x->slot[k].foreign) & S_FOREIGN) && !(stream_claims(x, on) >> k & 1);
}

static int look(Port *p) { /* 1: a slot that is free is marked; 0: there is none; -errno */
  int error;
  db_stream *x = port_stream(p, &error);
  if (!x) return -error;
  Shm *s = p->shm;
  uint64_t on = stream_places(x), promised = p->policy == SP_WAIT ? stream_promised(x, on) : STREAM_NONE;
  uint64_t claims = stream_claims(x, on); /* in this order: slot_pending() */
  for (uint32_t j = 1; j <= p->slots; j++) {
    uint32_t k = (p->last + j) % p->slots;
    db_slot *slot = &x->slot[k];
    uint64_t state = atomic_load(&slot->state);
    if (p->only >= 0 && k != (uint32_t)p->only) continue;
    if ((k == p->last && p->n > 1) || (SEQ_OF(state) && SEQ_OF(state) >= promised) || (claims >> k & 1)) continue; /* the newest stays */
    uint64_t fence = atomic_load(&slot->fence);
    if (fence && fence_pending(s, fence, NULL)) continue; /* its frame is still being made, and this end wakes streams */
    uint32_t foreign = atomic_load(&slot->foreign);
    if ((foreign & S_FOREIGN) && !foreign_over(s, x, k, foreign)) continue;
    /* Mark, and look again. Who promises itself the frame, claims the slot, or sets `foreign`, looks at the mark after that: one of the two
     * sees the other. */
    atomic_store(&slot->state, (state & ~0xfeull) | ((state + 2) & 0xfe) | S_WRITING);
    STEP_OF(stream_marked, x, k); /* of the frame that is in it: nothing was written, and the reaper takes the mark away */
    if (is_free(p, x, k, state)) {
      atomic_store(&slot->state, p->n << 8 | ((state + 2) & 0xfe) | S_WRITING);
      STEP_OF(stream_chosen, x, k); /* of a frame that isn't published: the reaper empties the slot */
      p->was = state;
      p->found = (int)k;
      return 1;
    }
    atomic_store(&slot->state, state);
    STEP_OF(stream_backed, x, k); /* as it was; sleepers look at their tick */
    stream_wake(s, x, SW_ASK);
  }
  return 0;
}

int produce_take(Port *p, int64_t until) { return port_wait(p, SW_SPACE, until, look); }

static db_rec *record(Port *p, db_slot *slot) {
  uint32_t rec = atomic_load(&slot->rec);
  db_rec *r = rec ? rec_at(p->shm, rec - 1) : NULL;
  return r && atomic_load(&r->gen) == atomic_load(&slot->rec_gen) ? r : NULL;
}

void produce_publish(Port *p, uint64_t used, uint64_t fence) {
  int error;
  db_stream *x = port_stream(p, &error);
  if (!x || p->found < 0) return;
  uint32_t k = (uint32_t)p->found;
  db_slot *slot = &x->slot[k];
  db_rec *r = record(p, slot);
  uint64_t word = p->n << 8 | k | (fence ? S_FENCED : 0) | (used < atomic_load(&x->size) ? S_SIZED : 0);
  atomic_store_explicit(&slot->used, used, memory_order_release); /* the store of `head` orders these before it */
  db_fence *f;
  if (fence && fence_pending(p->shm, fence, &f) && f) atomic_fetch_or(&f->flags, FF_STREAM); /* its end wakes streams */
  if (atomic_load(&slot->torn)) atomic_store(&slot->torn, 0);
  if (fence) {
    /* Whoever fails the fence stores that before it looks at the flag and for slots that name the fence: one of the two sees the other. */
    atomic_store(&slot->fence, fence);
    if ((error = fence_result(p->shm, fence))) atomic_store(&slot->torn, (uint32_t)-error);
  } else {
    atomic_store_explicit(&slot->fence, 0, memory_order_release);
  }
  atomic_store_explicit(&slot->stamp, (uint64_t)now_ns(), memory_order_release);
  if (r && atomic_load(&r->torn)) atomic_store(&r->torn, 0); /* marked again by the reaper, unless the next stores follow */
  atomic_store_explicit(&x->order[p->n % STREAM_SLOTS], word, memory_order_release);
  STEP_OF(stream_written, x, p->n); /* being written, and no frame: the reaper empties the slot */
  atomic_store(&x->head, word);
  STEP_OF(stream_published, x, p->n); /* a frame: the reaper takes the mark away */
  atomic_store(&slot->state, p->n << 8 | (atomic_load(&slot->state) & 0xfe));
  STEP_OF(stream_done, x, p->n); /* sleepers look at their tick */
  uint32_t cpu = (uint32_t)sched_getcpu() + 1;
  if (atomic_load_explicit(&x->cpu, memory_order_relaxed) != cpu) atomic_store_explicit(&x->cpu, cpu, memory_order_relaxed);
  p->last = k;
  p->n++;
  p->found = -1;
  stream_wake(p->shm, x, SW_NEWS | SW_ASK);
}

void produce_back(Port *p, bool written) {
  int error;
  db_stream *x = port_stream(p, &error);
  if (p->found < 0) return;
  uint32_t k = (uint32_t)p->found;
  p->found = -1;
  if (!x) return; /* this process left the domain, which has done the rest */
  db_slot *slot = &x->slot[k];
  if (written) {
    db_rec *r = record(p, slot);
    atomic_store(&slot->torn, ECANCELED);
    if (r) atomic_store(&r->torn, TORN_MAKE((uint32_t)getpid(), ECANCELED));
    STEP_OF(stream_torn, x, k); /* torn and being written: the reaper marks it again */
    atomic_store(&slot->state, atomic_load(&slot->state) & 0xfe);
  } else { /* the frame that was in it stays, unless its metadata are gone */
    atomic_store(&slot->state, p->described ? p->was & 0xfe : p->was);
  }
  STEP_OF(stream_aborted, x, k);
  stream_wake(p->shm, x, SW_ASK | SW_NEWS);
}

int produce_drained(Port *p) {
  int error;
  db_stream *x = port_stream(p, &error);
  if (!x) return -error;
  uint64_t on = stream_places(x);
  return stream_promised(x, on) >= p->n && !stream_claims(x, on);
}

void produce_end(Port *p) {
  int error;
  db_stream *x = port_stream(p, &error);
  unlist(p);
  p->role = ROLE_NONE;
  p->found = -1;
  if (!x || atomic_load(&x->prod) != ((uint64_t)p->life << 8 | SD_ALIVE)) return;
  stream_producer_end(p->shm, x, p->life, SD_CLOSED);
  stream_wake(p->shm, x, SW_NEWS | SW_SPACE | SW_ASK);
}
