/* layout_sync.h - the part of the layout of a domain's file (layout.h) that is of sync files. */
#ifndef DMABUF_LAYOUT_SYNC_H
#define DMABUF_LAYOUT_SYNC_H
#include "domain/layout.h"

/* ---- Sync files ----
 *
 * A sync file has a slot, and a slot for each of its fences. Its descriptor is a socket whose abstract name has the domain's identity, the
 * slot and its generation. The slots are in use as long as some process has the socket, which only the kernel knows.
 */
typedef struct {
  a32 gen;       /* generation: one more with each use of the slot */
  a32 count;     /* its fences; 0: it is being made */
  a32 first;     /* slot of the first fence + 1 */
  a32 at;        /* slot of the fence that it waits for + 1; a hint */
  a64 waits;     /* handle of that fence, 0: the descriptor was made readable */
  a64 net;       /* cookie of the network namespace that the socket is in (SO_NETNS_COOKIE), 0: not known */
  char name[32]; /* its name, with a NUL */
  a64 spare[8];
} db_sync;

DB_SIZE(db_sync, 128);
DB_AT(db_sync, gen, 0);
DB_AT(db_sync, count, 4);
DB_AT(db_sync, first, 8);
DB_AT(db_sync, at, 12);
DB_AT(db_sync, waits, 16);
DB_AT(db_sync, net, 24);
DB_AT(db_sync, name, 32);
DB_AT(db_sync, spare, 64);

typedef struct {
  a32 gen;         /* generation: one more with each use of the slot */
  a32 next;        /* slot of the next fence + 1, 0: the last */
  a64 head;        /* the sync file: [generation 32 | slot + 1 32]; 0: none */
  a32 index;       /* its place among the fences */
  a32 timeline;    /* slot of the fence's timeline + 1, 0: none */
  a64 handle;      /* the fence */
  a64 context;     /* its context */
  a64 seqno;       /* and its number there */
  a64 result;      /* [generation 32 | unused 19 | signaled 1 | -error 12], once it is known to be signaled */
  a64 timestamp;   /* CLOCK_MONOTONIC ns of the signal, STAMP_NONE of the generation: not known */
  char driver[32]; /* its driver's name, cut, with a NUL */
  char name[32];   /* its timeline's name, cut, with a NUL */
} db_leaf;

DB_SIZE(db_leaf, 128);
DB_AT(db_leaf, gen, 0);
DB_AT(db_leaf, next, 4);
DB_AT(db_leaf, head, 8);
DB_AT(db_leaf, index, 16);
DB_AT(db_leaf, timeline, 20);
DB_AT(db_leaf, handle, 24);
DB_AT(db_leaf, context, 32);
DB_AT(db_leaf, seqno, 40);
DB_AT(db_leaf, result, 48);
DB_AT(db_leaf, timestamp, 56);
DB_AT(db_leaf, driver, 64);
DB_AT(db_leaf, name, 96);

#define SYNC_MANY 0xffffffu /* in the sync word of a fence: several sync files may wait for it, or none */
#endif
