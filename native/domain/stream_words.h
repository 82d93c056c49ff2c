/* stream_words.h - the words of a stream: what each says. docs/streams-protocol.md has the steps.
 *
 * A stream's slot has two entries in the list of fences of its buffer, so that programs that use only the buffer keep out of the way: one
 * of usage WRITE, which is pending while the slot is being written, and one of usage READ, which is pending while a reader has it or is
 * promised it. They look like fences, and nothing ever signals them.
 */
#ifndef DMABUF_STREAM_WORDS_H
#define DMABUF_STREAM_WORDS_H
#include "domain/slots.h"

enum { ENTRY_WRITE, ENTRY_READ }; /* the lowest bit of such an entry's generation */

/* ---- names of things ---- */

/* The number of a slot among all slots of all streams, as it stands in a handle. */
static inline uint32_t stream_number(uint32_t stream, uint32_t slot) { return stream * STREAM_SLOTS + slot; }

static inline uint64_t stream_handle(uint32_t stream, uint32_t slot, uint32_t gen, int kind) {
  return H_MAKE(stream_number(stream, slot), (uint64_t)gen << 1 | (unsigned)kind);
}

/* The stream of a handle, while it is in its present use; NULL: it isn't a stream's, or it is past. */
static inline db_stream *stream_of(Shm *s, uint64_t handle) {
  db_stream *x = stream_at(s, H_SLOT(handle) / STREAM_SLOTS);
  return x && atomic_load(&x->owner) && (uint64_t)atomic_load(&x->gen) == H_GEN(handle) >> 1 ? x : NULL;
}

static inline uint32_t stream_slots(db_stream *x) { /* bounded */
  uint32_t n = atomic_load(&x->slots);
  return n < STREAM_SLOTS ? n : STREAM_SLOTS;
}

/* ---- who is promised what, and who holds what ---- */

static inline uint64_t stream_places(db_stream *x) { return atomic_load(&x->readers) & ((1ull << STREAM_READERS) - 1); }

/* The oldest frame that is promised to somebody who has not had it; STREAM_NONE: there is none. */
static inline uint64_t stream_promised(db_stream *x, uint64_t places) {
  uint64_t least = STREAM_NONE;
  for (uint64_t on = places; on; on &= on - 1) {
    db_reader *r = &x->reader[__builtin_ctzll(on)];
    uint64_t c = atomic_load(&r->cursor);
    if (c == STREAM_READY) c = SEQ_OF(atomic_load(&x->group_cursor[atomic_load(&r->group) % STREAM_GROUPS]));
    if (c < least) least = c;
  }
  return least;
}

static inline uint64_t stream_claims(db_stream *x, uint64_t places) { /* bit: somebody holds that slot */
  uint64_t all = 0;
  for (uint64_t on = places; on; on &= on - 1) all |= atomic_load(&x->reader[__builtin_ctzll(on)].claims);
  return all;
}

static inline bool stream_is_member(uint32_t role) { return role == SR_MEMBER || role == SR_REDELIVER; }

/* Has the group a member, besides that place? A dead one counts until it is reaped, and what it left doesn't. */
static inline bool stream_has_members(db_stream *x, uint32_t group, uint32_t but) {
  for (uint64_t on = stream_places(x); on; on &= on - 1) {
    uint32_t i = (uint32_t)__builtin_ctzll(on);
    db_reader *r = &x->reader[i];
    if (i != but && atomic_load(&r->owner) != STREAM_ORPHAN && stream_is_member(atomic_load(&r->role)) && atomic_load(&r->group) == group)
      return true;
  }
  return false;
}

/* Is frame q whole in its slot? For one who has promised it to itself, or claimed the slot, before: a producer that takes the slot after
 * that looks at both once it has marked the slot. The newest frame is never taken; its mark may be the one of its own making. */
static inline bool stream_is_there(db_stream *x, uint32_t k, uint64_t q) {
  uint64_t state = atomic_load(&x->slot[k].state);
  return SEQ_OF(state) == q && (!(state & S_WRITING) || SEQ_OF(atomic_load(&x->head)) == q);
}
#endif
