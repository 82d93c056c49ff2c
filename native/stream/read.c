/* read.c - the readers of a stream: how they come, find the next frame, and give it back. */
#include "domain/fence.h"
#include "domain/step.h"
#include "domain/table.h"
#include "stream/port.h"
#include <sched.h>

static inline db_reader *mine(Port *p, db_stream *x) { return &x->reader[p->place]; }

/* Of the words of one's own place nobody else changes anything as long as one lives. */
static void claim(Port *p, db_stream *x, uint32_t k) {
  a64 *w = &mine(p, x)->claims;
  atomic_store(w, atomic_load_explicit(w, memory_order_relaxed) | 1ull << k);
  STEP_OF(stream_claimed, x, k); /* the reaper gives it back */
}

static void unclaim(Port *p, db_stream *x, uint32_t k) {
  a64 *w = &mine(p, x)->claims;
  atomic_store(w, atomic_load_explicit(w, memory_order_relaxed) & ~(1ull << k));
  STEP_OF(stream_released, x, k); /* sleepers look at their tick */
}

static void unclaim_and_wake(Port *p, db_stream *x, uint32_t k) {
  unclaim(p, x, k);
  stream_wake(p->shm, x, SW_SPACE | SW_ASK);
}

/* ---- coming ---- */

static int take_place(Port *p, db_stream *x) {
  for (uint32_t i = 0; i < STREAM_READERS; i++) {
    uint32_t none = 0;
    if (atomic_load(&x->reader[i].owner) || !atomic_compare_exchange_strong(&x->reader[i].owner, &none, p->life)) continue;
    STEP_OF(stream_placed, x, i); /* owned and not listed: the reaper frees it */
    return (int)i;
  }
  return -EUSERS;
}

/* Is frame q whole in its slot? For one who has promised it to itself, or claimed the slot, before: a producer that takes the slot after
 * that looks at both once it has marked the slot. The newest frame is never taken; its mark may be the one of its own making. */
static bool is_there(db_stream *x, uint32_t k, uint64_t q) {
  uint64_t state = atomic_load(&x->slot[k].state);
  return SEQ_OF(state) == q && (!(state & S_WRITING) || SEQ_OF(atomic_load(&x->head)) == q);
}

/* Does somebody who doesn't know the stream write into the slot, or has left it torn? 0; 1; -1: torn. The torn mark comes last: who finds
 * the fence of a dead writer gone must find the mark. granted: an access that waits doesn't count. */
static int spoiled(Port *p, db_stream *x, uint32_t k, bool granted) {
  db_slot *slot = &x->slot[k];
  if (atomic_load(&slot->foreign) & S_FOREIGN) {
    if (foreign_blocks(p->shm, x, k, true, granted)) return 1;
    uint32_t rec = atomic_load(&slot->rec);
    db_rec *r = rec ? rec_at(p->shm, rec - 1) : NULL;
    if (r && atomic_load(&r->torn)) return -1;
  }
  return atomic_load(&slot->torn) ? -1 : 0;
}

/* Where a reader of all frames begins. It promises itself all from one on, and then looks at each: what it can't have is behind it. */
static void promise(Port *p, db_stream *x, uint64_t count) {
  uint64_t head = SEQ_OF(atomic_load(&x->head)), from = head + 1 > count ? head + 1 - count : 1;
  atomic_store(&mine(p, x)->cursor, from);
  STEP_OF(stream_promised, x, from);
  for (uint64_t q = from; q <= SEQ_OF(atomic_load(&x->head)); q++) {
    uint64_t e = atomic_load(&x->order[q % STREAM_SLOTS]);
    uint32_t k = SLOT_OF(e);
    if (SEQ_OF(e) == q && k < p->slots && is_there(x, k, q) && !spoiled(p, x, k, false)) continue;
    from = q + 1;
    atomic_store(&mine(p, x)->cursor, from);
    STEP_OF(stream_promised, x, from);
    stream_wake(p->shm, x, SW_SPACE | SW_ASK);
  }
  p->n = from;
}

static bool has_members(db_stream *x, uint32_t group, uint32_t but) {
  for (uint64_t on = stream_places(x); on; on &= on - 1) {
    uint32_t i = (uint32_t)__builtin_ctzll(on);
    db_reader *r = &x->reader[i];
    if (i != but && atomic_load(&r->role) == SR_MEMBER && atomic_load(&r->group) == group) return true;
  }
  return false;
}

/* With the table lock: members come one after the other. */
static int take_group(db_stream *x, uint64_t name) {
  int free = -ENOSPC;
  for (uint32_t i = 0; i < STREAM_GROUPS; i++) {
    if (atomic_load(&x->group_name[i]) == name) return (int)i;
    if (free < 0 && !has_members(x, i, STREAM_READERS)) free = (int)i;
  }
  if (free >= 0) atomic_store(&x->group_name[free], name); /* nobody is in it, so its cursor counts for nothing */
  return free;
}

/* With the table lock, so that one of several members that come at once is the first: it says where the group begins. */
static void promise_to_group(Port *p, db_stream *x, bool newest) {
  a64 *group = &x->group_cursor[p->group];
  bool first = !has_members(x, p->group, p->place);
  uint64_t word;
  do {
    uint64_t head = SEQ_OF(word = atomic_load(&x->head));
    if (first) atomic_store(group, newest && head ? head : head + 1);
    atomic_store(&mine(p, x)->cursor, STREAM_READY);
    STEP_OF(stream_promised, x, head);
  } while (first && atomic_load(&x->head) != word);
}

int read_join(Port *p, int role, uint64_t group, bool newest, uint64_t history) {
  int error;
  db_stream *x = port_stream(p, &error);
  if (!x) return -error;
  if (role == SR_MEMBER && table_lock(p->shm)) return RAISED;
  int g = role == SR_MEMBER ? take_group(x, group) : 0, place = g < 0 ? g : take_place(p, x);
  if (place < 0) {
    if (role == SR_MEMBER) table_unlock(p->shm);
    return place;
  }
  p->place = (uint32_t)place;
  p->group = (uint32_t)g;
  p->role = role;
  p->found = -1;
  p->lost = 0;
  db_reader *r = mine(p, x);
  uint64_t head = SEQ_OF(atomic_load(&x->head));
  atomic_store(&r->cursor, STREAM_NONE);
  atomic_store(&r->claims, 0);
  atomic_store(&r->role, (uint32_t)role);
  atomic_store(&r->group, (uint32_t)g);
  atomic_store(&r->cpu, 0);
  atomic_store(&r->lost, 0);
  atomic_store(&r->seen, 0);
  atomic_store(&r->taken, 0);
  atomic_store(&r->joined, head);
  atomic_fetch_or(&x->readers, 1ull << place);
  STEP_OF(stream_listed, x, place); /* listed, and promised nothing */
  p->promised = role == SR_QUEUE && p->policy == SP_WAIT;
  uint64_t count = history > (newest ? 1 : 0) ? history : newest ? 1 : 0;
  if (count > STREAM_SLOTS) count = STREAM_SLOTS;
  p->n = head + 1 > count ? head + 1 - count : 1;
  if (p->promised) promise(p, x, count);
  if (role == SR_MEMBER) {
    promise_to_group(p, x, newest);
    table_unlock(p->shm);
  }
  stream_wake(p->shm, x, SW_SPACE | SW_ASK);
  return 0;
}

/* ---- the next frame ---- */

static int ended(Port *p, db_stream *x) { /* -errno if no frame will come; 0 */
  uint64_t why = atomic_load(&x->prod) & 255;
  if (p->takeover) return 0;
  return why == SD_CLOSED ? -ENODATA : why == SD_DIED ? -EOWNERDEAD : 0;
}

/* No frame from n on was published before the end, which is looked at in between: the last frame came before the end. */
static int none_yet(Port *p, db_stream *x, uint64_t n) {
  int why = ended(p, x);
  return why && SEQ_OF(atomic_load(&x->head)) < n ? why : 0;
}

static int found(Port *p, uint64_t word) { /* of `head` or `order` */
  p->found = (int)SLOT_OF(word);
  p->n = SEQ_OF(word);
  p->bits = (uint32_t)word & (S_FENCED | S_SIZED);
  return 1;
}

static int look_promised(Port *p) {
  int error;
  db_stream *x = port_stream(p, &error);
  if (!x) return -error;
  uint64_t head = atomic_load(&x->head), e = head;
  if (SEQ_OF(head) < p->n) return none_yet(p, x, p->n);
  if (SEQ_OF(head) != p->n) e = atomic_load(&x->order[p->n % STREAM_SLOTS]);
  if (SEQ_OF(e) != p->n || SLOT_OF(e) >= p->slots) return -EUCLEAN; /* what is promised stays */
  return found(p, e);
}

static int look_latest(Port *p) {
  int error;
  db_stream *x = port_stream(p, &error);
  if (!x) return -error;
  uint64_t head = atomic_load(&x->head), seq = SEQ_OF(head);
  uint32_t k = SLOT_OF(head);
  if (seq < p->n) return none_yet(p, x, p->n);
  if (k >= p->slots || p->slot[k].held) return -EUCLEAN; /* a slot that it holds is never used for another frame */
  claim(p, x, k);
  int bad = spoiled(p, x, k, false);
  /* The newest frame is never chosen, so a producer that could choose this slot looks after the claim. */
  if (atomic_load(&x->head) == head && !bad) {
    p->lost += seq - p->n;
    return found(p, head);
  }
  unclaim_and_wake(p, x, k);
  return bad < 0 && atomic_load(&x->head) == head ? none_yet(p, x, seq + 1) : 0;
}

static int look_in_order(Port *p) { /* of a stream that drops */
  int error;
  db_stream *x = port_stream(p, &error);
  if (!x) return -error;
  uint64_t head = SEQ_OF(atomic_load(&x->head));
  if (head < p->n) return none_yet(p, x, p->n);
  if (head - p->n >= STREAM_SLOTS) {
    p->lost += head - (STREAM_SLOTS - 1) - p->n;
    p->n = head - (STREAM_SLOTS - 1);
  }
  for (; p->n <= head; p->n++, p->lost++) {
    uint64_t e = atomic_load(&x->order[p->n % STREAM_SLOTS]);
    uint32_t k = SLOT_OF(e);
    if (SEQ_OF(e) != p->n || k >= p->slots || p->slot[k].held) continue;
    claim(p, x, k);
    if (is_there(x, k, p->n) && !spoiled(p, x, k, false)) return found(p, e);
    unclaim_and_wake(p, x, k);
  }
  return 0;
}

static int look_member(Port *p) {
  int error;
  db_stream *x = port_stream(p, &error);
  if (!x) return -error;
  a64 *group = &x->group_cursor[p->group];
  for (uint32_t tries = 0; tries < STREAM_SLOTS; tries++) {
    uint64_t q = atomic_load(group), head = SEQ_OF(atomic_load(&x->head));
    if (head < q) return none_yet(p, x, q);
    uint64_t e = atomic_load(&x->order[q % STREAM_SLOTS]);
    uint32_t k = SLOT_OF(e);
    if (SEQ_OF(e) != q || k >= p->slots) { /* gone: the stream drops, or the group had nobody */
      uint64_t to = head - q >= STREAM_SLOTS ? head - (STREAM_SLOTS - 1) : q + 1;
      if (atomic_compare_exchange_strong(group, &q, to)) p->lost += to - q;
      continue;
    }
    if (p->slot[k].held) return -EUCLEAN; /* a frame that it keeps is another one */
    claim(p, x, k);                       /* before the group's cursor moves, so that the frame always has a keeper */
    if (!atomic_compare_exchange_strong(group, &q, q + 1)) {
      unclaim_and_wake(p, x, k);
      continue;
    }
    STEP_OF(stream_moved, x, q); /* the frame is this member's: if it dies now, it has had it */
    stream_wake(p->shm, x, SW_SPACE | SW_ASK);
    if (is_there(x, k, q) && !spoiled(p, x, k, true)) return found(p, e);
    unclaim_and_wake(p, x, k);
    p->lost++;
  }
  return 0;
}

static int (*look_of(Port *p))(Port *) {
  if (p->role == SR_LATEST) return look_latest;
  if (p->role == SR_MEMBER) return look_member;
  return p->promised ? look_promised : look_in_order;
}

/* What the producer's fence of the frame ended with: 0, or a negative errno, and the frame is none. */
int fence_result(Shm *s, uint64_t fence) {
  db_fence *f = fence_at(s, H_SLOT(fence));
  uint64_t end = f ? atomic_load(&f->end) : 0;
  return f && END_GEN(end) == H_GEN(fence) ? END_ERROR(end) : fence_past_error(s, fence, 0, 0);
}

int read_take(Port *p, int64_t until) {
  for (;;) {
    /* A frame whose fence was waited for in vain is still this reader's. */
    int error, got = p->found >= 0 ? 1 : port_wait(p, SW_NEWS, until, look_of(p));
    if (got != 1) return got;
    db_stream *x = port_stream(p, &error);
    uint64_t fence = x && (p->bits & S_FENCED) ? atomic_load(&x->slot[p->found].fence) : 0; /* else the slot's line needn't be read */
    if (!fence) return 1;
    if (fence_pending(p->shm, fence, NULL) && (got = fence_wait_for(p->shm, fence, until, 0, 0)) != 1) return got ? got : -ETIMEDOUT;
    if (!fence_result(p->shm, fence) && !atomic_load(&x->slot[p->found].torn)) return 1;
    uint32_t k = (uint32_t)p->found; /* whoever was to fill it failed, or died */
    p->found = -1;
    p->lost++;
    read_give(p, k, p->n);
  }
}

/* ---- giving back ---- */

void read_give(Port *p, uint32_t k, uint64_t seq) {
  int error;
  db_stream *x = port_stream(p, &error);
  if (!x) return;
  db_reader *r = mine(p, x);
  uint64_t claims = atomic_load_explicit(&r->claims, memory_order_relaxed);
  bool kept = p->slot[k].held != 0, claimed = (claims >> k & 1) != 0;
  uint32_t cpu = (uint32_t)sched_getcpu() + 1;
  if (atomic_load_explicit(&r->cpu, memory_order_relaxed) != cpu) atomic_store_explicit(&r->cpu, cpu, memory_order_relaxed);
  atomic_store_explicit(&r->seen, seq, memory_order_relaxed);
  if (atomic_load_explicit(&r->lost, memory_order_relaxed) != p->lost) atomic_store_explicit(&r->lost, p->lost, memory_order_relaxed);
  if (kept && !claimed) claim(p, x, k); /* before the promise ends */
  if (p->promised) {
    atomic_store(&r->cursor, seq + 1);
    STEP_OF(stream_moved, x, seq); /* sleepers look at their tick */
  }
  if (!kept && claimed) unclaim(p, x, k);
  p->n = seq + 1;
  stream_wake(p->shm, x, SW_SPACE | SW_ASK);
}

void read_unclaim(Port *p, uint32_t k) {
  int error;
  db_stream *x = port_stream(p, &error);
  if (x) unclaim_and_wake(p, x, k);
}

void read_leave(Port *p) {
  int error;
  db_stream *x = port_stream(p, &error);
  bool place = x && p->role >= 0 && p->role < ROLE_PRODUCER && atomic_load(&mine(p, x)->owner) == p->life;
  p->role = ROLE_NONE; /* before the wake-up, which this reader's descriptor hears of too: it must not wait for the next one */
  p->found = -1;
  if (!place) return;
  stream_place_free(x, p->place);
  stream_wake(p->shm, x, SW_NEWS | SW_SPACE | SW_ASK);
}
