/* resv.h - the list of fences of a reservation object. */
#ifndef DMABUF_RESV_H
#define DMABUF_RESV_H
#include "domain/shm.h"

typedef struct {
  Shm *s;
  db_resv *r;
  uint32_t i, block, blocks, rec;
} cursor;

a64 *entry_in_block(cursor *c, uint32_t i);

static inline a64 *entry_next(cursor *c) { /* NULL at the end of the capacity */
  uint32_t i = c->i++;
  return i < INLINE_ENTRIES ? &c->r->entry[i] : entry_in_block(c, i - INLINE_ENTRIES);
}

int make_room(Shm *s, db_resv *r, uint32_t rec, uint32_t n);
int put(Shm *s, db_resv *r, uint32_t rec, uint64_t handle, uint32_t usage, long room);
extern PyMethodDef resv_methods[];
#endif
