/* buffer_layout.h - what the bytes of a buffer mean, in a slot that the buffer's record names. */
#ifndef DMABUF_BUFFER_LAYOUT_H
#define DMABUF_BUFFER_LAYOUT_H
#include "domain/layout_buffers.h"
#include "domain/shm.h"

/* A layout as it was packed, and which of a picture's buffers this one is. */
typedef struct {
  uint32_t length;
  uint32_t part;
  uint8_t bytes[LAYOUT_BYTES];
} layout_copy;

/* ---- with the table lock ---- */
/* Give a record that has none a layout. 0: no slot is free; layouts_add() puts those of a new chunk into the free list. */
int layout_give(Shm *s, uint32_t rec, db_rec *r, uint32_t part, const char *bytes, size_t n);
void layouts_add(Shm *s, uint32_t chunk);
void layout_drop(Shm *s, uint32_t rec, db_rec *r);              /* of a record that is being freed */
void layouts_rebuild(Shm *s, uint32_t chunks);                  /* make the free list again, with the slots that no live record names */
int layouts_used(Shm *s, uint32_t chunk);                       /* Does a live record name a slot of this chunk? */
void layouts_count(Shm *s, uint32_t *unused, uint32_t *listed); /* free slots, and those in the free list: the same in a whole table */

/* ---- without it ---- */
/* Copy the layout of a record. 0: it has none. The record's state and generation, looked at afterwards, say whether the copy counts. */
int layout_read(Shm *s, uint32_t rec, db_rec *r, layout_copy *to);
#endif
