/* table.h - chunks, records and blocks: the table lock, and what changes under it. */
#ifndef DMABUF_TABLE_H
#define DMABUF_TABLE_H
#include "domain/slots.h"

/* ---- addresses of parts of slots; NULL: there is none ---- */
db_ctx *ctx_at(Shm *s, uint32_t index);
a64 *ref_word(Shm *s, uint32_t life_index, uint32_t rec); /* the word of that life's bitmap that has the record's bit */

static inline uint64_t ref_bit(uint32_t rec) { return 1ull << (rec % RECS_PER); } /* the record's bit in that word */

int rec_referenced(Shm *s, uint32_t rec); /* Does a living process reference the record? */

/* ---- the table lock ---- */
int table_lock(Shm *s);
void table_unlock(Shm *s);

/* ---- chunks ---- */
/* A chunk for this life; -1: an exception is set. And the first one of a life that is about to begin. */
int64_t chunk_claim(Shm *s, uint32_t type, uint32_t owner);
int64_t chunk_claim_first(Shm *s, uint32_t owner);
int64_t chunk_grow(Shm *s, uint32_t type, uint32_t owner); /* with the table lock: a new chunk, or a reason for grow_failed() */
int grow_failed(Shm *s, int64_t reason);                   /* raise it, once the lock is free: raising runs Python. -1 */

/* ---- with the table lock, except rec_by_inode ---- */
void rec_link(Shm *s, uint32_t i, db_rec *r);   /* put it into the chain of its bucket */
void rec_unlink(Shm *s, uint32_t i, db_rec *r); /* take it out of that chain */
void rec_clear(Shm *s, uint32_t i, db_rec *r);  /* DYING -> FREE, of a record that is in no chain */
void rec_push(Shm *s, uint32_t i, db_rec *r);   /* put it at the head of the free list */
void table_rebuild(Shm *s);                     /* make what is derived again: chains, the free list, blocks without an owner */

/* The live record of an inode; NULL: none. Without the lock it may be freed at any time. */
db_rec *rec_by_inode(Shm *s, uint64_t dev, uint64_t ino, uint32_t *at);

/* With the reservation lock: append `count` blocks of the record behind *link. */
int blocks_add(Shm *s, uint32_t rec, a32 *link, uint32_t count);

extern PyMethodDef table_methods[];
#endif
