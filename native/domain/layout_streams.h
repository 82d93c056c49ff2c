/* layout_streams.h - the part of the layout of a domain's file (layout.h) that is of streams. */
#ifndef DMABUF_LAYOUT_STREAMS_H
#define DMABUF_LAYOUT_STREAMS_H
#include "domain/layout.h"

/* ---- Streams ----
 *
 * A stream is a ring of buffers, its slots, which a producer hands to readers. docs/streams-protocol.md has the steps. A stream is in use
 * if its owner is a live record that names it: the record of the stream's own memory, which has the metadata of the frames. The record of
 * a slot's buffer names the slot.
 *
 * A frame's number, `seq`, begins at 1. A place belongs to a reader, and `owner` and `prod` name the life of the process, so a reaper knows
 * what was the dead one's.
 */
#define STREAMS_PER    4u                    /* streams in a chunk */
#define STREAM_SLOTS   64u                   /* slots of a stream at most */
#define STREAM_READERS 32u                   /* places for readers */
#define STREAM_GROUPS  8u                    /* groups of readers */
#define STREAM_NONE    0xffffffffffffffffull /* of a cursor: nothing is promised to it */
#define STREAM_READY   0xfffffffffffffffeull /* of a member's cursor: its group's counts for it */
#define STREAM_ORPHAN  0xffffffffu           /* of a place's owner: it died, and another member of its group may adopt the place */

typedef struct {
  a64 cursor; /* STREAM_NONE; STREAM_READY; or the oldest frame that it still needs */
  a64 claims; /* bit: it holds that slot */
  a32 owner;  /* life id; 0: free; STREAM_ORPHAN */
  a32 role;   /* SR_ of the reader */
  a32 group;  /* of a member */
  a32 cpu;    /* CPU on which it last gave a frame back, + 1; a hint */
  a64 lost;   /* frames that it has passed over */
  a64 seen;   /* the newest frame that it has had */
  a64 trying; /* of a group that redelivers: [seq 56 | unused 2 | slot 6] that the member is about to take; 0: it isn't */
  a64 joined; /* the frame that was the newest when it came */
} db_reader;

DB_SIZE(db_reader, 64);
DB_AT(db_reader, cursor, 0);
DB_AT(db_reader, claims, 8);
DB_AT(db_reader, owner, 16);
DB_AT(db_reader, role, 20);
DB_AT(db_reader, group, 24);
DB_AT(db_reader, cpu, 28);
DB_AT(db_reader, lost, 32);
DB_AT(db_reader, seen, 40);
DB_AT(db_reader, trying, 48);
DB_AT(db_reader, joined, 56);

typedef struct {
  a64 state;    /* [seq 56 | attempt 7 | it is being written 1] */
  a32 foreign;  /* [changes 31 | set 1]: somebody who doesn't know the stream has a fence in the buffer's list */
  a32 torn;     /* errno: what the producer left in the slot is no frame, and the record is marked torn too; 0 */
  a64 asked[2]; /* handle of a fence that ends when the slot's entry in that list does: of WRITE, of READ; 0: none */
  a32 rec;      /* record of the slot's buffer + 1, 0: none yet */
  a32 rec_gen;  /* and its generation */
  a64 stamp;    /* CLOCK_MONOTONIC ns of the frame */
  a64 used;     /* bytes of the frame */
  a64 fence;    /* handle of a fence for which readers wait first, 0: none */
} db_slot;

DB_SIZE(db_slot, 64);
DB_AT(db_slot, state, 0);
DB_AT(db_slot, foreign, 8);
DB_AT(db_slot, torn, 12);
DB_AT(db_slot, asked, 16);
DB_AT(db_slot, rec, 32);
DB_AT(db_slot, rec_gen, 36);
DB_AT(db_slot, stamp, 40);
DB_AT(db_slot, used, 48);
DB_AT(db_slot, fence, 56);

typedef struct {
  a32 owner;                        /* record of the stream's own memory + 1, 0: free */
  a32 gen;                          /* generation: one more with each use */
  a32 slots;                        /* how many it has */
  a32 policy;                       /* SP_WAIT or SP_DROP */
  a64 size;                         /* bytes of a slot */
  a32 meta;                         /* bytes of a frame's metadata at most */
  a32 spare[9];                     /* of this line */
  a64 head;                         /* [seq 56 | S_ bits 2 | slot 6]: the newest frame; the producer writes this line */
  a32 cpu;                          /* CPU on which the producer last published, + 1; a hint */
  a32 spare2[13];                   /* of this line */
  a32 want;                         /* SW_ bits: somebody sleeps on, or awaits, that word */
  a32 count[3];                     /* the words: futexes that count wake-ups */
  a64 readers;                      /* bit: the place is in use */
  a64 prod;                         /* [life id 32 | SD_ 8]: the producer, or why there is none */
  a64 woken[3];                     /* handle of a fence that ends with the next wake-up of each word, for who awaits it; 0: none */
  a64 orphans;                      /* bit: the place may be an orphan */
  a64 order[STREAM_SLOTS];          /* [seq 56 | S_ bits 2 | slot 6] of a frame, at seq % 64 */
  a64 group_cursor[STREAM_GROUPS];  /* [next frame of the group to hand out 56 | place that moved it there + 1, 0: nobody 8] */
  a64 group_name[STREAM_GROUPS];    /* a hash of its name, 0: free */
  db_reader reader[STREAM_READERS]; /* the places */
  db_slot slot[STREAM_SLOTS];       /* the slots */
  a64 got[STREAM_READERS];          /* of a place: [newest frame that others know it took 56 | its group 8] */
  a64 spare3[120];                  /* up to 8 KiB */
} db_stream;

DB_SIZE(db_stream, 8192);
DB_AT(db_stream, owner, 0);
DB_AT(db_stream, gen, 4);
DB_AT(db_stream, slots, 8);
DB_AT(db_stream, policy, 12);
DB_AT(db_stream, size, 16);
DB_AT(db_stream, meta, 24);
DB_AT(db_stream, spare, 28);
DB_AT(db_stream, head, 64);
DB_AT(db_stream, cpu, 72);
DB_AT(db_stream, spare2, 76);
DB_AT(db_stream, want, 128);
DB_AT(db_stream, count, 132);
DB_AT(db_stream, readers, 144);
DB_AT(db_stream, prod, 152);
DB_AT(db_stream, woken, 160);
DB_AT(db_stream, orphans, 184);
DB_AT(db_stream, order, 192);
DB_AT(db_stream, group_cursor, 704);
DB_AT(db_stream, group_name, 768);
DB_AT(db_stream, reader, 832);
DB_AT(db_stream, slot, 2880);
DB_AT(db_stream, got, 6976);
DB_AT(db_stream, spare3, 7232);

enum {
  SP_WAIT, /* the producer waits for readers of all frames */
  SP_DROP, /* it doesn't: such a reader may miss some */
};

enum {
  SD_NEVER,  /* nobody has produced yet */
  SD_ALIVE,  /* the life produces */
  SD_CLOSED, /* the last producer ended in order */
  SD_DIED,   /* it died */
};

enum {
  SR_QUEUE,     /* wants every frame, in order */
  SR_LATEST,    /* wants the newest */
  SR_MEMBER,    /* of a group, of which one member gets a frame */
  SR_REDELIVER, /* the same, and what a member has when it dies goes to another one */
  SR_LEFT,      /* no reader: what a dead member left, and another one, or a reaper, has adopted */
};

#define SW_NEWS  1u /* in `want`: for a frame, or the end of the producer */
#define SW_SPACE 2u /* for a slot that may be free */
#define SW_ASK   4u /* for an entry in the list of a slot's buffer that may be over */

#define SEQ_OF(word)  ((word) >> 8)             /* the frame of `head`, `state` or an entry of `order` */
#define SLOT_OF(word) ((uint32_t)((word) & 63)) /* the slot of `head` or an entry of `order` */
#define S_FENCED      64u                       /* in `head` and `order`: readers wait for the slot's fence first */
#define S_SIZED       128u                      /* in `head` and `order`: the frame has `used` bytes, and not the whole slot */
#define S_WRITING     1ull                      /* in `state` */
#define S_FOREIGN     1u                        /* in `foreign` */
#endif
