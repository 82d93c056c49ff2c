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

/* The place whose claim holds the slot for this reader: its own, or one that it has adopted. */
static uint32_t holder(Port *p, db_stream *x, uint32_t k) {
  for (uint32_t on = p->adopted; __builtin_expect(on != 0, 0); on &= on - 1)
    if (atomic_load(&x->reader[__builtin_ctz(on)].claims) >> k & 1) return (uint32_t)__builtin_ctz(on);
  return p->place;
}

static void unclaim(Port *p, db_stream *x, uint32_t k) {
  uint32_t place = holder(p, x, k);
  a64 *w = &x->reader[place].claims;
  uint64_t left = atomic_load_explicit(w, memory_order_relaxed) & ~(1ull << k);
  atomic_store(w, left);
  STEP_OF(stream_released, x, k); /* sleepers look at their tick */
  p->due &= ~(1ull << k);
  if (__builtin_expect(place == p->place || left, 1)) return;
  p->adopted &= ~(1u << place);
  stream_place_free(x, place);
}

static bool is_over(db_stream *x) {
  uint64_t why = atomic_load(&x->prod) & 255;
  return why == SD_CLOSED || why == SD_DIED;
}

/* After a claim was dropped: at the end of a stream a member waits for the frames of the others, too. */
static void wake_released(Port *p, db_stream *x) {
  stream_wake(p->shm, x, SW_SPACE | SW_ASK);
  if (p->role == SR_REDELIVER && is_over(x)) stream_wake(p->shm, x, SW_NEWS);
}

static void unclaim_and_wake(Port *p, db_stream *x, uint32_t k) {
  unclaim(p, x, k);
  wake_released(p, x);
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
    if (SEQ_OF(e) == q && k < p->slots && stream_is_there(x, k, q) && !spoiled(p, x, k, false)) continue;
    from = q + 1;
    atomic_store(&mine(p, x)->cursor, from);
    STEP_OF(stream_promised, x, from);
    stream_wake(p->shm, x, SW_SPACE | SW_ASK);
  }
  p->n = from;
}

/* With the table lock: members come one after the other. Members of a group must agree whether it redelivers. */
static int take_group(db_stream *x, uint64_t name, int role) {
  int free = -ENOSPC;
  for (uint32_t i = 0; i < STREAM_GROUPS; i++) {
    if (atomic_load(&x->group_name[i]) == name) {
      for (uint64_t on = stream_places(x); on; on &= on - 1) {
        db_reader *r = &x->reader[__builtin_ctzll(on)];
        uint32_t other = atomic_load(&r->role);
        if (atomic_load(&r->owner) != STREAM_ORPHAN && stream_is_member(other) && other != (uint32_t)role && atomic_load(&r->group) == i)
          return -EINVAL;
      }
      return (int)i;
    }
    if (free < 0 && !stream_has_members(x, i, STREAM_READERS)) free = (int)i;
  }
  if (free >= 0) atomic_store(&x->group_name[free], name); /* nobody is in it, so its cursor counts for nothing */
  return free;
}

/* With the table lock, so that one of several members that come at once is the first: it says where the group begins. */
static void promise_to_group(Port *p, db_stream *x, bool newest) {
  a64 *group = &x->group_cursor[p->group];
  bool first = !stream_has_members(x, p->group, p->place);
  uint64_t word;
  for (uint64_t on = first ? stream_places(x) : 0; on; on &= on - 1) { /* what members left that are all gone is nobody's any more */
    uint32_t i = (uint32_t)__builtin_ctzll(on);
    db_reader *r = &x->reader[i];
    uint32_t role = atomic_load(&r->role);
    if (i == p->place || atomic_load(&r->group) != p->group || !(stream_is_member(role) || role == SR_LEFT)) continue;
    atomic_store(&r->group, STREAM_GROUPS);
    if (stream_adopt(x, i, p->life)) stream_place_free(x, i);
  }
  do {
    uint64_t head = SEQ_OF(word = atomic_load(&x->head));
    if (first) atomic_store(group, (newest && head ? head : head + 1) << 8);
    atomic_store(&mine(p, x)->cursor, STREAM_READY);
    STEP_OF(stream_promised, x, head);
  } while (first && atomic_load(&x->head) != word);
}

int read_join(Port *p, int role, uint64_t group, bool newest, uint64_t history) {
  int error;
  db_stream *x = port_stream(p, &error);
  if (!x) return -error;
  bool member = stream_is_member((uint32_t)role);
  if (member && table_lock(p->shm)) return RAISED;
  int g = member ? take_group(x, group, role) : 0, place = g < 0 ? g : take_place(p, x);
  if (place < 0) {
    if (member) table_unlock(p->shm);
    return place;
  }
  p->place = (uint32_t)place;
  p->group = (uint32_t)g;
  p->role = role;
  p->found = -1;
  p->lost = p->due = p->adopted = 0;
  db_reader *r = mine(p, x);
  uint64_t head = SEQ_OF(atomic_load(&x->head));
  atomic_store(&r->cursor, STREAM_NONE);
  atomic_store(&r->claims, 0);
  atomic_store(&r->role, (uint32_t)role);
  atomic_store(&r->group, (uint32_t)g);
  atomic_store(&r->cpu, 0);
  atomic_store(&r->lost, 0);
  atomic_store(&r->seen, 0);
  atomic_store(&r->trying, 0);
  atomic_store(&x->got[place], (uint64_t)(role == SR_REDELIVER ? g : 255)); /* of the one before nobody notes anything any more */
  atomic_store(&r->joined, head);
  atomic_fetch_or(&x->readers, 1ull << place);
  STEP_OF(stream_listed, x, place); /* listed, and promised nothing */
  p->promised = role == SR_QUEUE && p->policy == SP_WAIT;
  uint64_t count = history > (newest ? 1 : 0) ? history : newest ? 1 : 0;
  if (count > STREAM_SLOTS) count = STREAM_SLOTS;
  p->n = head + 1 > count ? head + 1 - count : 1;
  if (p->promised) promise(p, x, count);
  if (member) {
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
    if (stream_is_there(x, k, p->n) && !spoiled(p, x, k, false)) return found(p, e);
    unclaim_and_wake(p, x, k);
  }
  return 0;
}

/* ---- of a group that redelivers ----
 *
 * A place whose owner died with frames is an orphan. Another member adopts it with all that it claims, by one compare-and-swap of its
 * owner. So a frame is in one word from its taking to its release, and whoever looks for it there can't miss it.
 */

static void adopt(Port *p, db_stream *x) {
  for (uint64_t on = atomic_load(&x->orphans) & stream_places(x); on; on &= on - 1) {
    uint32_t i = (uint32_t)__builtin_ctzll(on);
    db_reader *r = &x->reader[i];
    if (i == p->place || atomic_load(&r->group) != p->group || !stream_adopt(x, i, p->life)) continue;
    if (atomic_load(&r->group) != p->group) { /* another one's since */
      atomic_store(&r->owner, STREAM_ORPHAN);
      stream_wake(p->shm, x, SW_NEWS);
      continue;
    }
    atomic_fetch_and(&x->orphans, ~(1ull << i));
    p->adopted |= 1u << i;
    p->due |= atomic_load(&r->claims);
    return; /* one after the other, so that members that wait for frames get some */
  }
}

/* The slots of frames that were dead members' and that this one has not shown. */
static uint64_t adopted_due(Port *p, db_stream *x) {
  uint64_t all = 0;
  for (uint32_t on = p->adopted; on; on &= on - 1) all |= atomic_load(&x->reader[__builtin_ctz(on)].claims);
  return all & p->due;
}

static int look_adopted(Port *p, db_stream *x) { /* the oldest first. 0: there is none */
  if (__builtin_expect(!p->adopted && !atomic_load(&x->orphans), 1)) return 0;
  if (!adopted_due(p, x)) adopt(p, x);
  for (uint64_t due; (due = adopted_due(p, x));) {
    uint32_t k = (uint32_t)__builtin_ctzll(due);
    for (uint64_t on = due; on; on &= on - 1) {
      uint32_t i = (uint32_t)__builtin_ctzll(on);
      if (SEQ_OF(atomic_load(&x->slot[i].state)) < SEQ_OF(atomic_load(&x->slot[k].state))) k = i;
    }
    db_slot *slot = &x->slot[k];
    uint64_t q = SEQ_OF(atomic_load(&slot->state));
    if (k < p->slots && !p->slot[k].held && stream_is_there(x, k, q) && !spoiled(p, x, k, true)) {
      bool fenced = atomic_load(&slot->fence) != 0, sized = atomic_load(&slot->used) < atomic_load(&x->size);
      return found(p, q << 8 | k | (fenced ? S_FENCED : 0) | (sized ? S_SIZED : 0));
    }
    unclaim_and_wake(p, x, k); /* it had been torn */
    p->lost++;
  }
  return 0;
}

/* Before the cursor moves on: who moved it to where it is has taken the frame before that. */
static void note_taker(Port *p, db_stream *x, uint64_t word) {
  uint64_t place = (word & 255) - 1, note = (SEQ_OF(word) - 1) << 8 | p->group;
  if (place >= STREAM_READERS) return;
  uint64_t got = atomic_load(&x->got[place]);
  while ((got & 255) == p->group && got < note && !atomic_compare_exchange_weak(&x->got[place], &got, note)) {}
}

/* Does another member hold a frame? It may die, and then it is handed out again. */
static bool others_hold(Port *p, db_stream *x) {
  for (uint64_t on = stream_places(x); on; on &= on - 1) {
    uint32_t i = (uint32_t)__builtin_ctzll(on);
    db_reader *r = &x->reader[i];
    uint32_t role = atomic_load(&r->role);
    if (i == p->place || (p->adopted >> i & 1) || atomic_load(&r->group) != p->group) continue;
    if ((role == SR_REDELIVER || role == SR_LEFT) && atomic_load(&r->claims)) return true;
  }
  return false;
}

uint64_t read_waiting(Port *p) {
  int error;
  db_stream *x = port_stream(p, &error);
  if (!x) return 0;
  uint64_t waits = (uint64_t)__builtin_popcountll(adopted_due(p, x));
  for (uint64_t on = atomic_load(&x->orphans) & stream_places(x); on; on &= on - 1) {
    db_reader *r = &x->reader[__builtin_ctzll(on)];
    if (atomic_load(&r->owner) == STREAM_ORPHAN && atomic_load(&r->group) == p->group)
      waits += (uint64_t)__builtin_popcountll(atomic_load(&r->claims));
  }
  return waits;
}

static void tried(Port *p, db_stream *x) { /* its claims are frames, or there is none of what it tried */
  if (p->role == SR_REDELIVER) atomic_store(&mine(p, x)->trying, 0);
}

/* ---- of any group ---- */

static int none_in_group(Port *p, db_stream *x, uint64_t q) {
  int why = none_yet(p, x, q);
  return why && p->role == SR_REDELIVER && others_hold(p, x) ? 0 : why;
}

static int look_member(Port *p) {
  int error, got;
  db_stream *x = port_stream(p, &error);
  if (!x) return -error;
  bool again = p->role == SR_REDELIVER;
  if (again && (got = look_adopted(p, x))) return got;
  a64 *group = &x->group_cursor[p->group];
  for (uint32_t tries = 0; tries < STREAM_SLOTS; tries++) {
    uint64_t word = atomic_load(group), q = SEQ_OF(word), head = SEQ_OF(atomic_load(&x->head));
    if (head < q) return none_in_group(p, x, q);
    uint64_t e = atomic_load(&x->order[q % STREAM_SLOTS]);
    uint32_t k = SLOT_OF(e);
    if (again) note_taker(p, x, word);
    if (SEQ_OF(e) != q || k >= p->slots) { /* gone: the stream drops, or the group had nobody */
      uint64_t to = head - q >= STREAM_SLOTS ? head - (STREAM_SLOTS - 1) : q + 1;
      if (atomic_compare_exchange_strong(group, &word, to << 8)) p->lost += to - q;
      continue;
    }
    if (p->slot[k].held) return -EUCLEAN; /* a frame that it keeps is another one */
    if (again) {
      atomic_store(&mine(p, x)->trying, q << 8 | k);
      STEP_OF(stream_trying, x, q); /* the reaper finds nothing of it */
    }
    claim(p, x, k); /* before the group's cursor moves, so that the frame always has a keeper */
    if (!atomic_compare_exchange_strong(group, &word, (q + 1) << 8 | (again ? p->place + 1 : 0))) {
      unclaim_and_wake(p, x, k);
      tried(p, x);
      continue;
    }
    STEP_OF(stream_moved, x, q); /* the frame is this member's: if it dies now, it has had it, or its reaper passes it on */
    stream_wake(p->shm, x, SW_SPACE | SW_ASK);
    /* Of a promised frame a writer waits that doesn't know the stream, unless it was granted before. */
    if (stream_is_there(x, k, q) && !spoiled(p, x, k, p->policy == SP_WAIT)) {
      tried(p, x);
      p->due |= again ? 1ull << k : 0;
      return found(p, e);
    }
    unclaim_and_wake(p, x, k);
    tried(p, x);
    p->lost++;
  }
  return 0;
}

int read_ended(Port *p) {
  int error;
  db_stream *x = port_stream(p, &error);
  if (!x || p->role < 0 || p->role >= ROLE_PRODUCER || !ended(p, x)) return 0;
  return p->role != SR_REDELIVER || !others_hold(p, x);
}

static int (*look_of(Port *p))(Port *) {
  if (p->role == SR_LATEST) return look_latest;
  if (stream_is_member((uint32_t)p->role)) return look_member;
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
  uint64_t claims = atomic_load_explicit(&x->reader[holder(p, x, k)].claims, memory_order_relaxed);
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
  wake_released(p, x);
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
  bool again = p->role == SR_REDELIVER;
  p->role = ROLE_NONE; /* before the wake-up, which this reader's descriptor hears of too: it must not wait for the next one */
  p->found = -1;
  if (!place) return;
  if (again) { /* what it has not shown is for others */
    atomic_fetch_and(&mine(p, x)->claims, p->due);
    for (uint32_t on = p->adopted; on; on &= on - 1) {
      atomic_fetch_and(&x->reader[__builtin_ctz(on)].claims, p->due);
      stream_place_end(x, (uint32_t)__builtin_ctz(on));
    }
  }
  stream_place_end(x, p->place);
  if (again) stream_orphans_free(x, p->life);
  stream_wake(p->shm, x, SW_NEWS | SW_SPACE | SW_ASK);
}
