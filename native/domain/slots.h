/* slots.h - bounded addresses of slots. */
#ifndef DMABUF_SLOTS_H
#define DMABUF_SLOTS_H
#include "domain/layout_buffers.h"
#include "domain/layout_streams.h"
#include "domain/layout_sync.h"
#include "domain/shm.h"

/* ---- addresses; NULL: there is no such slot of that type ---- */
#define SLOT_AT(name, type, kind, per)           \
  static inline type *name(Shm *s, uint32_t i) { \
    char *c = chunk_at(s, i / (per), kind);      \
    return c ? (type *)c + i % (per) : NULL;     \
  }
SLOT_AT(rec_at, db_rec, CH_REC, RECS_PER)
SLOT_AT(block_at, db_block, CH_BLOCK, BLOCKS_PER)
SLOT_AT(timeline_at, db_timeline, CH_TIMELINE, TIMELINES_PER)
SLOT_AT(fence_at, db_fence, CH_FENCE, FENCES_PER)
SLOT_AT(sync_at, db_sync, CH_SYNC, SYNC_PER)
SLOT_AT(leaf_at, db_leaf, CH_LEAF, SYNC_PER)
SLOT_AT(layout_at, db_layout, CH_LAYOUT, LAYOUTS_PER)
SLOT_AT(stream_at, db_stream, CH_STREAM, STREAMS_PER)
#endif
