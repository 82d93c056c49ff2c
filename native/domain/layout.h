/* layout.h - the layout of a domain's file, and nothing else: it needs no Python and has no code of its own. The slots of sync files are
 * in layout_sync.h, those of buffers' layouts in layout_buffers.h, and those of streams in layout_streams.h. docs/layout.md is made from
 * all of them by `python -m tools.layout`, which says what it expects of them. A change of the layout changes DB_VERSION, which is part of
 * the file's name.
 */
#ifndef DMABUF_LAYOUT_H
#define DMABUF_LAYOUT_H
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

/* ---- The file ----
 *
 * A domain is one file that every process of the domain maps whole. It begins with a header page, the table of process slots, the table of
 * chunks and the buckets of the hash of records. Chunks of 32 KiB follow. They are allocated one at a time and published by the header's
 * count, so the file never counts memory that it does not have.
 *
 * A chunk holds slots of one type, and a slot keeps its number. Chunks that are given back may get another type. No new use of a slot has a
 * generation at or below the type's floor, so a stale handle can meet only another generation, or one that is over.
 *
 * All numbers are little-endian. The offsets of this table are from the start of the file.
 */
#define DB_MAGIC        "DMABUFDM"
#define DB_VERSION      7u                                  /* of the layout */
#define DB_PAGE         4096u                               /* bytes of the header page */
#define DB_CHUNK        32768u                              /* bytes of a chunk */
#define DB_MAX_CHUNKS   16384u                              /* chunks at most, 512 MiB */
#define DB_LIVES        2048u                               /* process slots */
#define DB_BUCKETS      16384u                              /* buckets of the hash from (st_dev, st_ino) to records */
#define OFF_LIVES       DB_PAGE                             /* offset of the process slots, db_life */
#define OFF_CHUNKTAB    (OFF_LIVES + DB_LIVES * 64u)        /* offset of the chunk table, one word of 64 bits a chunk */
#define OFF_BUCKETS     (OFF_CHUNKTAB + DB_MAX_CHUNKS * 8u) /* offset of the buckets, a word of 32 bits each: first record + 1, 0: empty */
#define DB_HEADER_BYTES (OFF_BUCKETS + DB_BUCKETS * 4u)     /* offset of the first chunk, and size of an empty domain */
#define LIFE_BYTE       (1ll << 40)                         /* the byte of the first life's lock */
#define LIFECYCLE_BYTE  (1ll << 41)                         /* the byte of the lifecycle lock */
#define PRESENCE_BYTE   (1ll << 42)                         /* the byte on which all that map the file have a read lock */

/* ---- Rules ----
 *
 * - A number read from the file is bounded before it is used as an index.
 * - A walk is capped by the size of the pool that it walks.
 * - A change that matters is one atomic store. Several stores are ordered so that a death after any of them leaves a state that the next
 *   process repairs. The C code names these states where the stores are.
 * - A word that changes while others read it is atomic (`a32`, `a64`), and its loads and stores are sequentially consistent: their order in
 *   the code is their order for every process, on arm64 too. The one exception is a hint, `db_life.cpu`.
 * - Bytes (names, nonces) can't be atomic. A writer changes a word (a state, a generation, a version), calls `bytes_follow()`, writes the
 *   bytes, and then stores a word that lets readers in. A reader loads the word, copies the bytes, calls `bytes_read()`, and loads the word
 *   again: if it has changed, the copy counts for nothing.
 */
typedef _Atomic uint32_t a32;
typedef _Atomic uint64_t a64;
typedef _Atomic int32_t ai32;
/* An atomic that takes a lock of the C library's would be atomic within one process only. */
_Static_assert(ATOMIC_INT_LOCK_FREE == 2 && ATOMIC_LLONG_LOCK_FREE == 2, "atomics that processes share");

static inline void bytes_follow(void) { atomic_thread_fence(memory_order_release); } /* no store after it is seen before one in front */

static inline void bytes_read(void) { atomic_thread_fence(memory_order_acquire); } /* no load after it is done before one in front */

/* The compiler holds this file to the documented offset of each field, whatever the machine. */
#define DB_AT(type, field, offset) _Static_assert(offsetof(type, field) == (offset), #type "." #field " is not at byte " #offset)
#define DB_SIZE(type, bytes)       _Static_assert(sizeof(type) == (bytes), #type " has not " #bytes " bytes")

/* ---- The header ---- */
typedef struct {
  char magic[8];         /* DB_MAGIC */
  uint32_t version;      /* DB_VERSION */
  uint32_t header_bytes; /* DB_HEADER_BYTES */
  char id[32];           /* the domain's identity: 16 hexadecimal digits, then NULs; stays as long as the file does */
  uint32_t chunk_bytes;  /* DB_CHUNK */
  uint32_t max_chunks;   /* DB_MAX_CHUNKS */
  uint32_t lives;        /* DB_LIVES */
  uint32_t buckets;      /* DB_BUCKETS */
  a32 nchunks;           /* published chunks: never more than the file has memory for; fewer only after a reset */
  a32 table_lock;        /* [waiters 1 | life id 31]: guards growth, records, blocks, layouts and the hash; their futex */
  a64 next_context;      /* the next fence context */
  a64 next_stamp;        /* the next stamp of a db_ctx: smaller is older */
  a64 sweep_ns;          /* when dead processes were last looked for, CLOCK_MONOTONIC ns; the process that moves it does so */
  a32 layout_free;       /* first free layout + 1, 0: none */
  a32 rec_free;          /* first free record + 1, 0: none */
  a32 life_high;         /* process slots below this one have been used */
  a32 block_free;        /* first free block + 1, 0: none */
  a64 floor[16];         /* by chunk type: no generation of a slot at or below this one is used again; CH_CTX: of chunks of lives too */
  char boot[16];         /* the boot in which processes last lived here (/proc/sys/kernel/random/boot_id) */
  a64 dev;               /* st_dev and */
  a64 ino;               /* st_ino of this file, which tell it from a copy of it, and from what another mount shows of it */
} db_header;

DB_SIZE(db_header, 272);
DB_AT(db_header, magic, 0);
DB_AT(db_header, version, 8);
DB_AT(db_header, header_bytes, 12);
DB_AT(db_header, id, 16);
DB_AT(db_header, chunk_bytes, 48);
DB_AT(db_header, max_chunks, 52);
DB_AT(db_header, lives, 56);
DB_AT(db_header, buckets, 60);
DB_AT(db_header, nchunks, 64);
DB_AT(db_header, table_lock, 68);
DB_AT(db_header, next_context, 72);
DB_AT(db_header, next_stamp, 80);
DB_AT(db_header, sweep_ns, 88);
DB_AT(db_header, layout_free, 96);
DB_AT(db_header, rec_free, 100);
DB_AT(db_header, life_high, 104);
DB_AT(db_header, block_free, 108);
DB_AT(db_header, floor, 112);
DB_AT(db_header, boot, 240);
DB_AT(db_header, dev, 256);
DB_AT(db_header, ino, 264);

/* ---- Process slots ----
 *
 * A process that uses the domain has a life: a slot of this table, and a write lock on a byte of the file that the kernel drops with the
 * process's memory. A life id names one use of a slot: `[generation 20 | index 11]`, never 0.
 */
enum {
  LIFE_CLEAN, /* free, and nothing is left of the last life */
  LIFE_ALIVE, /* in use, or its process died and nobody has reaped it yet */
};

typedef struct {
  a32 state;     /* LIFE_CLEAN or LIFE_ALIVE */
  a32 gen;       /* generation: one more with each life */
  a32 pid;       /* the process */
  a32 chunk;     /* the life's first chunk + 1 (CH_LIFE), 0: none yet */
  a64 start;     /* start time of the process, in clock ticks (proc(5)); bit 63: a thread keeps the lock, and not a mapping */
  a32 doorbell;  /* futex of the dispatcher: [wake-ups 10 | slot of the last fence 22] */
  a32 served;    /* 1: a dispatcher sleeps on the doorbell, or will */
  a32 cpu;       /* CPU from which the process last signaled a fence, + 1; a hint */
  a32 uid;       /* effective user id */
  a64 joined;    /* CLOCK_REALTIME ns */
  char comm[16]; /* the program's name, as in /proc/PID/comm */
} db_life;

DB_SIZE(db_life, 64);
DB_AT(db_life, state, 0);
DB_AT(db_life, gen, 4);
DB_AT(db_life, pid, 8);
DB_AT(db_life, chunk, 12);
DB_AT(db_life, start, 16);
DB_AT(db_life, doorbell, 24);
DB_AT(db_life, served, 28);
DB_AT(db_life, cpu, 32);
DB_AT(db_life, uid, 36);
DB_AT(db_life, joined, 40);
DB_AT(db_life, comm, 48);

#define LIFE_BY_THREAD      (1ull << 63) /* a thread keeps the lock on the life's byte, not a mapping */
#define LIFE_INDEX(id)      ((id) & (DB_LIVES - 1))
#define LIFE_ID(index, gen) (((gen) & 0xfffffu) << 11 | (index))
#define TL_WAITERS          0x80000000u /* in the table lock: a thread sleeps on it */
#define TL_NOBODY           0x000007ffu /* in the table lock: a life id without a generation, which no life has; the next owner repairs */

/* ---- Chunks ----
 *
 * A word of the chunk table is `[owner's life id 32 | unused 8 | ordinal 16 | type 8]`. The ordinal numbers the chunks of records. Chunks
 * of records, blocks, layouts and streams have no owner and are given out under the table lock. The others are written by the life that
 * owns them. When their owner is 0, the next life that needs a chunk of the type takes them.
 */
enum {
  CH_NONE,     /* given back, or not published */
  CH_LIFE,     /* of one life: the bitmap of the records that it references (2,048 words of 64 bits), then 256 contexts */
  CH_FENCE,    /* 256 db_fence */
  CH_REC,      /* 64 db_rec */
  CH_BLOCK,    /* 256 db_block */
  CH_TIMELINE, /* 32 db_timeline */
  CH_CTX,      /* 512 db_ctx */
  CH_SYNC,     /* 256 db_sync */
  CH_LEAF,     /* 256 db_leaf */
  CH_LAYOUT,   /* 120 db_layout */
  CH_STREAM,   /* 4 db_stream */
  CH_TYPES,    /* how many there are */
};

#define FENCES_PER        256u  /* fences in a chunk */
#define RECS_PER          64u   /* records in a chunk */
#define BLOCKS_PER        256u  /* blocks in a chunk */
#define TIMELINES_PER     32u   /* timelines in a chunk */
#define CTX_PER           512u  /* contexts in a chunk of them */
#define SYNC_PER          256u  /* sync files in a chunk, or fences of sync files */
#define CTX_FIRST_IN_LIFE 256u  /* the first context in a chunk of a life */
#define REC_CHUNKS        2048u /* chunks of records at most: the bitmap has a word for each, by its ordinal */

#define CT_TYPE(e)               ((uint32_t)((e) & 0xff))
#define CT_ORD(e)                ((uint32_t)(((e) >> 8) & 0xffff))
#define CT_LIFE(e)               ((uint32_t)((e) >> 32))
#define CT_MAKE(type, ord, life) ((uint64_t)(type) | (uint64_t)(ord) << 8 | (uint64_t)(life) << 32)

/* ---- Contexts ----
 *
 * A context holds or wants reservation locks and accesses. Its word, `[generation 32 | unused 1 | index 31]`, names it in a lock and in a
 * fence. The generation moves when the context is closed or its life is reaped. From then on every lock that the word names can be taken.
 */
typedef struct {
  a32 gen;        /* generation */
  a32 life;       /* the life that has it open, 0: closed */
  a64 stamp;      /* age for wait-die: smaller is older */
  a64 waits_on;   /* handle of the fence that its thread waits for, 0: none */
  a64 wait_stamp; /* stamp of that wait */
  a32 tid;        /* the thread */
  a32 real;       /* 1: a WwAcquireContext; 0: made for a lock or an access without one */
  a64 return_to;  /* of a lock on loan: word of the context that gets it back, whatever becomes of this one; 0: none */
  a32 return_rec; /* the record of that lock */
  a32 spare[3];
} db_ctx;

DB_SIZE(db_ctx, 64);
DB_AT(db_ctx, gen, 0);
DB_AT(db_ctx, life, 4);
DB_AT(db_ctx, stamp, 8);
DB_AT(db_ctx, waits_on, 16);
DB_AT(db_ctx, wait_stamp, 24);
DB_AT(db_ctx, tid, 32);
DB_AT(db_ctx, real, 36);
DB_AT(db_ctx, return_to, 40);
DB_AT(db_ctx, return_rec, 48);
DB_AT(db_ctx, spare, 52);

#define CTX_WAITERS  0x80000000ull /* in a lock: a thread sleeps on it */
#define CTX_INDEX(w) ((uint32_t)((w) & 0x7fffffffu))
#define CTX_GEN(w)   ((uint32_t)((w) >> 32))

/* ---- Fences ----
 *
 * A handle names one use of a slot: `[generation 40 | unused 2 | slot 22]`, never 0. A fence is pending while its slot has the handle's
 * generation and its word lacks FW_SIGNALED. A slot rests as long as possible before it is used again, and keeps the errors of its last
 * failed uses, so that a process that looks late still finds a failure.
 */
#define FENCE_PAST 4u /* failed uses that a slot remembers */

typedef struct {
  a32 word;             /* [low part of the generation 26 | FW_ flags 6]; the futex of its waiters */
  a32 flags;            /* FF_ flags */
  a64 end;              /* [generation 40 | unused 11 | decided 1 | -error 12]: how it ends is decided once for a generation */
  a64 context;          /* fence context: the timeline it is on */
  a64 seqno;            /* its number there */
  a64 timestamp;        /* CLOCK_MONOTONIC ns; STAMP_NONE of the generation until it is set */
  ai32 error;           /* the error that its owner has set for its end, 0 or negative */
  a32 timeline;         /* slot of the timeline + 1, 0: none */
  a64 wake_mask;        /* bit (process slot % 64): wake that process's dispatcher */
  a64 deadline;         /* CLOCK_MONOTONIC ns; STAMP_NONE of the generation: none */
  a64 owner;            /* of an access: word of the context that made it; else 0 */
  a32 rec;              /* of an access: its record + 1 */
  a32 rec_gen;          /* and that record's generation */
  a64 created;          /* CLOCK_MONOTONIC ns */
  a64 sync;             /* [generation 40 | slot 24]: the sync file that waits for it, its slot + 1; SYNC_MANY: several may */
  a64 past[FENCE_PAST]; /* [generation 52 | -error 12] of the last failed uses of the slot */
} db_fence;

DB_SIZE(db_fence, 128);
DB_AT(db_fence, word, 0);
DB_AT(db_fence, flags, 4);
DB_AT(db_fence, end, 8);
DB_AT(db_fence, context, 16);
DB_AT(db_fence, seqno, 24);
DB_AT(db_fence, timestamp, 32);
DB_AT(db_fence, error, 40);
DB_AT(db_fence, timeline, 44);
DB_AT(db_fence, wake_mask, 48);
DB_AT(db_fence, deadline, 56);
DB_AT(db_fence, owner, 64);
DB_AT(db_fence, rec, 72);
DB_AT(db_fence, rec_gen, 76);
DB_AT(db_fence, created, 80);
DB_AT(db_fence, sync, 88);
DB_AT(db_fence, past, 96);

#define FW_SIGNALED 1u  /* it has ended, with or without an error */
#define FW_WAITERS  2u  /* a thread sleeps on it */
#define FW_SHARED   4u  /* others than the owner may know the fence */
#define FW_SYNC     8u  /* a sync file waits for it: the process that signals it advances that, then clears the bit */
#define FW_DROPPED  16u /* known to nobody else, and its owner is dropping it: too late to share it */

#define FF_ACCESS         1u   /* it stands for a read() or write() block */
#define FF_WRITE          2u   /* of write() */
#define FF_GRANTED        4u   /* the block has been entered: if its writer dies, the content is torn */
#define FF_SEQNO64        8u   /* its number counts in 64 bits; without this flag in 32, which wrap (semantics 3.10) */
#define FF_CONTAINER      16u  /* an array or a chain: not for a reservation object */
#define FF_ANYBODY        32u  /* every process of the domain may signal it, not its owner alone */
#define FF_WATCH_DEADLINE 64u  /* its owner is woken when another process sets a deadline */
#define FF_STREAM         256u /* it is in the list of a stream's slot: its end wakes the streams */
#define FF_ASKED          128u /* it ends when the entry of a stream's slot does, whose handle is its number */

#define FW_SHIFT          6
#define FW_GEN(w)         ((w) & ~((1u << FW_SHIFT) - 1))
#define WORD_OF(gen)      ((uint32_t)((gen) & 0x3ffffffu) << FW_SHIFT)
#define GEN_MASK          0xffffffffffull
#define SLOT_MASK         0x3fffffull
#define H_SLOT(h)         ((uint32_t)((h) & SLOT_MASK))
#define H_GEN(h)          ((h) >> 24)
#define H_MAKE(slot, gen) ((uint64_t)(slot) | ((uint64_t)(gen) << 24))
#define END_OPEN(gen)     ((uint64_t)(gen) << 24)
#define END_DECIDED       0x1000u
#define END_GEN(e)        ((e) >> 24)
#define END_ERROR(e)      (-(int)((e) & 0xfff))
/* No time has this value and no other generation has it, so a compare-and-swap from it can only meet this generation. */
#define STAMP_NONE(gen) (1ull << 63 | (gen))

/* ---- Timelines ----
 *
 * What names it is there twice. Opening the slot writes the copy that does not count, and then switches. The names stay until then.
 */
typedef struct {
  a64 context; /* fence context */
  a32 life;    /* the life that made it */
  a32 spare;
  char driver[64]; /* the driver's name, with a NUL */
  char name[64];   /* its name, with a NUL */
} db_origin;

DB_SIZE(db_origin, 144);
DB_AT(db_origin, context, 0);
DB_AT(db_origin, life, 8);
DB_AT(db_origin, spare, 12);
DB_AT(db_origin, driver, 16);
DB_AT(db_origin, name, 80);

typedef struct {
  a32 gen;             /* generation: one more with each use of the slot; its lowest bit tells which copy of the origin counts */
  a32 open;            /* 1: in use */
  db_origin origin[2]; /* what names it, twice */
  char pad[216];
  a64 ring[64]; /* at seqno % 64: [slot 22 | low part of the generation 30 | -error 12] of the last failed fences */
} db_timeline;

DB_SIZE(db_timeline, 1024);
DB_AT(db_timeline, gen, 0);
DB_AT(db_timeline, open, 4);
DB_AT(db_timeline, origin, 8);
DB_AT(db_timeline, pad, 296);
DB_AT(db_timeline, ring, 512);

#define RING_SLOTS  64u /* errors that a timeline remembers */
#define RING_TAG(h) (((uint64_t)H_SLOT(h) << 30 | (H_GEN(h) & 0x3fffffff)) << 12)

/* ---- Reservation objects ----
 *
 * A reservation object is part of a record. Its list of fences is an array of words `[generation 40 | usage 2 | slot 22]`, and a 0 ends
 * it. A long list continues in blocks.
 */
#define INLINE_ENTRIES 16u /* entries in the record itself */
#define BLOCK_ENTRIES  15u /* entries in a block */

typedef struct {
  a64 lock;    /* [context generation 32 | waiters 1 | context index 31], 0: free; its low half is the futex */
  a64 next;    /* the oldest waiter, in the same form but without the bit for waiters; 0: none */
  a32 block;   /* first block + 1, 0: none */
  a32 changes; /* one more before each store into the list */
  a64 spare2;
  a64 entry[INLINE_ENTRIES]; /* the list */
} db_resv;

DB_SIZE(db_resv, 160);
DB_AT(db_resv, lock, 0);
DB_AT(db_resv, next, 8);
DB_AT(db_resv, block, 16);
DB_AT(db_resv, changes, 20);
DB_AT(db_resv, spare2, 24);
DB_AT(db_resv, entry, 32);

typedef struct {
  a32 owner;                /* record + 1, 0: free */
  a32 next;                 /* next block of the record, or free one, + 1; 0: the last */
  a64 entry[BLOCK_ENTRIES]; /* more of the list */
} db_block;

DB_SIZE(db_block, 128);
DB_AT(db_block, owner, 0);
DB_AT(db_block, next, 4);
DB_AT(db_block, entry, 8);

#define E_USAGE(e)       ((uint32_t)(((e) >> 22) & 3))
#define E_HANDLE(e)      ((e) & ~(3ull << 22))
#define E_MAKE(h, usage) ((h) | (uint64_t)(usage) << 22)

/* ---- Records ----
 *
 * A record is a buffer, or a reservation object that belongs to no buffer. A process that has the buffer open references the record by a
 * bit in its first chunk. The record stays while a living process references it.
 */
enum {
  REC_FREE,  /* in the free list, or about to be */
  REC_LIVE,  /* in use */
  REC_DYING, /* being freed, unless a process references it at the same moment */
};

typedef struct {
  a32 state;           /* REC_FREE, REC_LIVE or REC_DYING */
  a32 gen;             /* generation: one more each time the record is freed */
  a64 dev;             /* st_dev of the buffer */
  a64 ino;             /* st_ino of the buffer, 0: a reservation object of its own */
  a64 size;            /* bytes */
  uint8_t nonce[16];   /* tells this buffer from another one with the same inode number */
  a64 created;         /* CLOCK_REALTIME ns */
  a32 life;            /* the life that made the record */
  a32 pid;             /* its process */
  a32 hnext;           /* next record of the bucket + 1, 0: the last */
  a32 kind;            /* 0: a buffer, 1: a reservation object of its own */
  a64 torn;            /* [process 32 | errno 32] of the last write() that did not end well, 0: the content is whole */
  a32 absent;          /* passes over /proc/locks that found no reference lock on the buffer */
  a32 foreign_resv;    /* record + 1 of the reservation object that the exporter gave, 0: its own */
  a64 absent_ns;       /* when the last of these passes was, CLOCK_MONOTONIC ns */
  a32 name_version;    /* its lowest bit tells which of the two names counts */
  a32 free_next;       /* next free record + 1, 0: the last */
  uint8_t name_len[2]; /* length of each name + 1, 0: never set */
  uint8_t exp_len;     /* length of exp_name */
  uint8_t home_len;    /* length of home */
  a32 foreign_gen;     /* and that record's generation */
  char name[2][32];    /* the name, twice: a rename writes the one that does not count, then switches */
  char exp_name[32];   /* the exporter's name */
  char home[32];       /* what kind of memory it is, `buf.home` */
  a32 layout;          /* slot of its layout + 1, 0: none; set once */
  a32 stream;          /* [stream 16 | slot 6 | of a slot's buffer 1] + 1: the stream that it is part of; 0: none */
  a32 stream_gen;      /* and that stream's generation */
  a32 spare;
  db_resv resv; /* the reservation object */
  a64 spare3[12];
} db_rec;

DB_SIZE(db_rec, 512);
DB_AT(db_rec, state, 0);
DB_AT(db_rec, gen, 4);
DB_AT(db_rec, dev, 8);
DB_AT(db_rec, ino, 16);
DB_AT(db_rec, size, 24);
DB_AT(db_rec, nonce, 32);
DB_AT(db_rec, created, 48);
DB_AT(db_rec, life, 56);
DB_AT(db_rec, pid, 60);
DB_AT(db_rec, hnext, 64);
DB_AT(db_rec, kind, 68);
DB_AT(db_rec, torn, 72);
DB_AT(db_rec, absent, 80);
DB_AT(db_rec, foreign_resv, 84);
DB_AT(db_rec, absent_ns, 88);
DB_AT(db_rec, name_version, 96);
DB_AT(db_rec, free_next, 100);
DB_AT(db_rec, name_len, 104);
DB_AT(db_rec, exp_len, 106);
DB_AT(db_rec, home_len, 107);
DB_AT(db_rec, foreign_gen, 108);
DB_AT(db_rec, name, 112);
DB_AT(db_rec, exp_name, 176);
DB_AT(db_rec, home, 208);
DB_AT(db_rec, layout, 240);
DB_AT(db_rec, stream, 244);
DB_AT(db_rec, stream_gen, 248);
DB_AT(db_rec, spare, 252);
DB_AT(db_rec, resv, 256);
DB_AT(db_rec, spare3, 416);

#define TORN_MAKE(pid, error) ((uint64_t)(pid) << 32 | (uint32_t)(error))
#endif
