/* table.h - what changes under the table lock: chunks, the lists of records and of blocks. */
#ifndef DMABUF_TABLE_H
#define DMABUF_TABLE_H
#include "domain/shm.h"

int table_lock(Shm *s);
void table_unlock(Shm *s);
int64_t chunk_claim(Shm *s, uint32_t type, uint32_t owner); /* chunk, or -1 with an exception */
db_rec *rec_at(Shm *s, uint32_t rec);
db_block *block_at(Shm *s, uint32_t block);
db_ctx *ctx_at(Shm *s, uint32_t index);
db_timeline *timeline_at(Shm *s, uint32_t index);
int blocks_add(Shm *s, uint32_t rec, a32 *link, uint32_t count); /* 0 or -1 with an exception */

db_fence *fence_at(Shm *s, uint32_t slot);

/* With the table lock held, but held_word, held_by_living and find_rec. */

a64 *held_word(Shm *s, uint32_t life_index, uint32_t rec); /* the word of that life's bitmap with rec's bit; NULL: none */
int held_by_living(Shm *s, uint32_t rec);

/* The chunk, or why not, to be raised by grow_failed once the lock is free (raising runs Python). */
int64_t chunk_grow(Shm *s, uint32_t type, uint32_t owner);
int grow_failed(Shm *s, int64_t why); /* -1 */

void link_rec(Shm *s, uint32_t i, db_rec *r); /* into the chain of its bucket */
void unlink_rec(Shm *s, uint32_t i, db_rec *r);
db_rec *find_rec(Shm *s, uint64_t dev, uint64_t ino, uint32_t *at); /* NULL: no live record; without the lock, perhaps not for long */
void clear_rec(Shm *s, uint32_t i, db_rec *r);                      /* DYING -> FREE; not in any chain */
void table_rebuild(Shm *s);                                         /* makes anew what is derived: chains, free list, ownerless blocks */
extern PyMethodDef table_methods[];
extern PyMethodDef record_methods[];
extern PyMethodDef pool_methods[];
#endif
