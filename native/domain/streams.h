/* streams.h - streams as processes meet there: waking, fences for those who know only a slot's buffer, and the end of a life. */
#ifndef DMABUF_STREAMS_H
#define DMABUF_STREAMS_H
#include "domain/stream_words.h"

/* Is the entry of this handle pending? 0 too if it is not a stream's. */
int stream_pending(Shm *s, uint64_t handle);

/* ---- waking ---- */

/* Wake who waits for one of these SW_ words, after a change that may be what they wait for. */
void stream_wake_those(Shm *s, db_stream *x, uint32_t words);

static inline void stream_wake(Shm *s, db_stream *x, uint32_t words) {
  if (__builtin_expect(atomic_load(&x->want) & words, 0)) stream_wake_those(s, x, words);
}

/* A fence that ends with the next wake-up of a word, for who looks after that and then awaits it. 0: an exception is set. */
uint64_t stream_await(Shm *s, db_stream *x, uint32_t word);

/* ---- for those who know only the buffer ---- */

/* With the reservation lock: a fence is about to come into the list of the record, and has come into it. */
void stream_mark_fence(db_rec *r, db_fence *f);
void stream_note_foreign(Shm *s, db_rec *r);
/* The entry of the record's buffer in its list; 0: it is no stream's slot. */
uint64_t stream_entry_of(Shm *s, db_rec *r, int kind);
/* A fence that ends when the entry does; 0: it isn't pending (any more), or an exception is set. */
uint64_t stream_ask(Shm *s, uint64_t handle);
/* Does the entry keep this process from ever ending it: its own frame? */
int stream_is_own(Shm *s, uint64_t handle);
/* A waiter's tick: end the asked fence if its entry is over, in case that whoever ended it died before it did. */
void stream_look(Shm *s, uint64_t asked);

void streams_prepare(void); /* before anything else here: fences wake streams */

/* ---- its end ---- */

/* End what a life has in streams. Every step is idempotent. */
void streams_end(Shm *s, uint32_t life);
/* Free a reader's place, or end the producer, with a reason. For its own process, or its reaper. */
void stream_place_free(db_stream *x, uint32_t place);
/* The same, but a member's of a group that redelivers becomes an orphan if it holds frames. stream_orphans_free() comes after it. */
void stream_place_end(db_stream *x, uint32_t place);
/* An orphan may be the caller's from now on: 1, its life is the owner. */
int stream_adopt(db_stream *x, uint32_t place, uint32_t life);
/* Free the orphans of groups without members. */
void stream_orphans_free(db_stream *x, uint32_t life);
void stream_producer_end(Shm *s, db_stream *x, uint32_t life, uint32_t reason);
#endif
