/* resv.h - the list of fences of a reservation object. */
#ifndef DMABUF_RESV_H
#define DMABUF_RESV_H
#include "domain/shm.h"

/* A walk along the list. */
typedef struct {
  Shm *s;
  db_resv *r;
  uint32_t i, block, blocks; /* the next entry; the present block + 1, and how many there were */
  uint32_t rec;
} cursor;

static inline cursor cursor_of(Shm *s, db_resv *r, uint32_t rec) { return (cursor){.s = s, .r = r, .rec = rec}; }

a64 *entry_in_block(cursor *c, uint32_t i);

static inline a64 *entry_next(cursor *c) { /* NULL at the end of the capacity */
  uint32_t i = c->i++;
  return i < INLINE_ENTRIES ? &c->r->entry[i] : entry_in_block(c, i - INLINE_ENTRIES);
}

/* With the lock: have room for n more entries. 0, -errno or RAISED. */
int entries_reserve(Shm *s, db_resv *r, uint32_t rec, uint32_t n);
/* With the lock: add a fence, or let it replace an earlier one of its context. 1: it took room; 0: it replaced; -1: there is no room. */
int entries_add(Shm *s, db_resv *r, uint32_t rec, uint64_t handle, uint32_t usage, long room);

/* A pending fence up to a usage, whose owner doesn't know of the stream of which the buffer is a slot; 0: at an instant there was none. */
uint64_t resv_foreign(Shm *s, uint32_t rec, uint32_t usage);

extern PyMethodDef resv_methods[];
#endif
