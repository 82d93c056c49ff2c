/* stream_slots.c - the slots for streams in the domain's file.
 *
 * Streams are few and long-lived, so nothing is derived: a slot is free if its owner is 0. An owner that is no record, or names another
 * stream, is one whose process died in the middle, and table_rebuild() frees the slot.
 */
#include "domain/stream_slots.h"
#include "domain/step.h"
#include "domain/ticker.h"

_Static_assert(STREAMS_PER * sizeof(db_stream) == DB_CHUNK, "a chunk is full of its streams");
_Static_assert(STREAMS_PER *STREAM_SLOTS == FENCES_PER, "a handle of a stream's slot has a number as one of a fence has");

static int names(db_rec *r, uint32_t stream, db_stream *x) {
  uint32_t part = r ? atomic_load(&r->stream) : 0;
  return part && !PART_OF_SLOT(part) && PART_NUMBER(part) / STREAM_SLOTS == stream && atomic_load(&r->stream_gen) == atomic_load(&x->gen) &&
         atomic_load(&r->state) != REC_FREE;
}

static void empty(db_stream *x) {
  atomic_store(&x->prod, SD_NEVER);
  atomic_store(&x->readers, 0);
  atomic_store(&x->head, 0);
  atomic_store(&x->orphans, 0);
  for (uint32_t i = 0; i < STREAM_SLOTS; i++) {
    atomic_store(&x->order[i], 0);
    memset(&x->slot[i], 0, sizeof x->slot[i]);
  }
  for (uint32_t i = 0; i < STREAM_GROUPS; i++) {
    atomic_store(&x->group_cursor[i], 0);
    atomic_store(&x->group_name[i], 0);
  }
  for (uint32_t i = 0; i < STREAM_READERS; i++) {
    memset(&x->reader[i], 0, sizeof x->reader[i]);
    atomic_store(&x->reader[i].cursor, STREAM_NONE);
    atomic_store(&x->got[i], 0);
  }
}

static int64_t stream_free(Shm *s) { /* the first that is free, or -1 */
  for (uint32_t c = 0, n = chunk_count(s); c < n; c++) {
    if (CT_TYPE(atomic_load(chunk_entry(s, c))) != CH_STREAM) continue;
    for (uint32_t i = c * STREAMS_PER; i < (c + 1) * STREAMS_PER; i++) {
      db_stream *x = stream_at(s, i);
      if (x && !atomic_load(&x->owner)) return i;
    }
  }
  return -1;
}

int64_t stream_give(Shm *s, uint32_t rec, db_rec *r, uint32_t slots, uint32_t policy, uint64_t size, uint32_t meta) {
  int64_t i = stream_free(s);
  if (i < 0) return -1;
  db_stream *x = stream_at(s, (uint32_t)i);
  uint64_t gen = atomic_load(&x->gen), floor = atomic_load(&hdr(s)->floor[CH_STREAM]);
  gen = (gen > floor ? gen : floor) + 1;
  atomic_store(&x->gen, (uint32_t)gen); /* from here on handles of its last use are past */
  empty(x);
  atomic_store(&x->slots, slots);
  atomic_store(&x->policy, policy);
  atomic_store(&x->size, size);
  atomic_store(&x->meta, meta);
  atomic_store(&x->want, 0);
  for (int b = 0; b < 3; b++) atomic_store(&x->woken[b], 0);
  STEP_OF(stream_filled, x, gen); /* free, whatever it says: the record doesn't name it */
  atomic_store(&r->stream_gen, (uint32_t)gen);
  atomic_store(&r->stream, PART_MAKE(stream_number((uint32_t)i, 0), 0));
  STEP_OF(stream_named, x, gen); /* named and unowned: free */
  atomic_store(&x->owner, rec + 1);
  STEP_OF(stream_owned, x, gen); /* in use as long as the record is */
  return i;
}

static void stream_end(db_stream *x) {
  atomic_store(&x->gen, atomic_load(&x->gen) + 1); /* asked fences end at their askers' ticks */
  atomic_store(&x->owner, 0);
  for (int b = 0; b < 3; b++) {
    atomic_fetch_add(&x->count[b], 1);
    word_wake(&x->count[b], INT32_MAX);
  }
}

void stream_drop(Shm *s, uint32_t rec, db_rec *r) {
  uint32_t part = atomic_load(&r->stream);
  if (!part || PART_OF_SLOT(part)) return; /* a slot that lost its buffer: its stream goes with its own record */
  db_stream *x = stream_at(s, PART_NUMBER(part) / STREAM_SLOTS);
  if (x && atomic_load(&x->owner) == rec + 1 && atomic_load(&x->gen) == atomic_load(&r->stream_gen)) stream_end(x);
}

void streams_rebuild(Shm *s, uint32_t chunks) {
  for (uint32_t c = 0; c < chunks; c++) {
    if (CT_TYPE(atomic_load(chunk_entry(s, c))) != CH_STREAM) continue;
    for (uint32_t i = c * STREAMS_PER; i < (c + 1) * STREAMS_PER; i++) {
      db_stream *x = stream_at(s, i);
      uint32_t owner = x ? atomic_load(&x->owner) : 0;
      if (owner && !names(rec_at(s, owner - 1), i, x)) stream_end(x);
    }
  }
}
