/* stream_slots.h - the slots for streams in the domain's file: given out and freed. */
#ifndef DMABUF_STREAM_SLOTS_H
#define DMABUF_STREAM_SLOTS_H
#include "domain/stream_words.h"

/* What a record says of the stream that it is part of: [stream and slot 22 | of a slot's buffer 1] + 1. */
#define PART_MAKE(number, of_slot) (((number) << 1 | (of_slot)) + 1)
#define PART_NUMBER(part)          (((part) - 1) >> 1)
#define PART_OF_SLOT(part)         (((part) - 1) & 1)

/* With the table lock: give the record a stream; -1: no slot for one is free. */
int64_t stream_give(Shm *s, uint32_t rec, db_rec *r, uint32_t slots, uint32_t policy, uint64_t size, uint32_t meta);
/* With the table lock: the record is being freed, and takes its stream with it. */
void stream_drop(Shm *s, uint32_t rec, db_rec *r);
/* With the table lock: free the streams whose owner's maker died while it made or freed them. */
void streams_rebuild(Shm *s, uint32_t chunks);
#endif
