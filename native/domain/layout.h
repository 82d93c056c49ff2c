/* layout.h - the layout of a domain file, and nothing else: no Python, no code that runs.
 *
 * A domain is one file that every taking-part process maps whole. It is: one header page, the table of lives, the table
 * of chunks, the buckets of the buffer hash, and then chunks of 32 KiB. A chunk holds slots of one type for ever (a slot
 * number stays valid as an address), so a stale handle can only meet a slot of its own type with another generation.
 *
 * Rules for everything in here:
 *   - a number read from the file is bounded before it is used as an index (chunk_at, rec_at, ...);
 *   - a walk is capped by the size of the pool it walks;
 *   - a change that matters is one atomic store; what several stores make is ordered so that any prefix of them is a state
 *     that the next process understands. The states are named where the stores are;
 *   - a word that changes while others may look is _Atomic, and every load and store of it is sequentially consistent: what is
 *     ordered here in the text is ordered for every process, on arm64 too. The one exception is a hint, db_life.cpu;
 *   - bytes (names, nonces) can't be atomic, and may only stand between words that tell of them:
 *         who writes:  a word changes (state, generation, which half counts), bytes_follow(), the bytes, a word that lets others in
 *         who reads:   the word, the bytes, bytes_read(), the word again: the same, or what was read counts for nothing.
 */
#ifndef DMABUF_LAYOUT_H
#define DMABUF_LAYOUT_H
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

typedef _Atomic uint32_t a32;
typedef _Atomic uint64_t a64;
/* An atomic with a lock of the C library's would be atomic within one process only. */
_Static_assert(ATOMIC_INT_LOCK_FREE == 2 && ATOMIC_LLONG_LOCK_FREE == 2, "atomics that processes share");

static inline void bytes_follow(void) { atomic_thread_fence(memory_order_release); } /* no store below is seen before one above */

static inline void bytes_read(void) { atomic_thread_fence(memory_order_acquire); } /* no load below is done before one above */

#define DB_MAGIC       "DMABUFDM"
#define DB_VERSION     3u
#define DB_PAGE        4096u
#define DB_CHUNK       32768u
#define DB_MAX_CHUNKS  16384u /* 512 MiB of chunks */
#define DB_LIVES       2048u
#define DB_BUCKETS     16384u
#define DB_TICK_NS     40000000ll
#define DB_SPIN_NS     20000ll
#define DB_SPIN_GIL_NS 1000ll

enum { CH_NONE, CH_LIFE, CH_FENCE, CH_REC, CH_BLOCK, CH_TIMELINE, CH_CTX };

enum { LIFE_CLEAN, LIFE_ALIVE };

enum { REC_FREE, REC_LIVE, REC_DYING };

/* slots in a chunk */
#define FENCES_PER        256u
#define RECS_PER          64u
#define BLOCKS_PER        256u
#define TIMELINES_PER     32u
#define CTX_PER           512u
#define CTX_FIRST_IN_LIFE 256u  /* the first half of a life chunk is its bitmap of held buffers */
#define REC_CHUNKS        2048u /* one 64-bit word of that bitmap for each chunk of records */

typedef struct {
  char magic[8];
  uint32_t version, header_bytes;
  char id[32]; /* 16 hexadecimal digits and NULs; never changes, survives a reset */
  uint32_t chunk_bytes, max_chunks, lives, buckets;
  a32 nchunks;    /* published chunks; everything below is allocated memory */
  a32 table_lock; /* [waiters 1 | life 31]; guards growth, ownerless pools, the hash */
  a64 next_context, next_stamp;
  a64 sweep_ns;
  a32 rec_chunks, rec_free; /* rec_free: first free record + 1 */
  a32 life_high;            /* lives below this were used at least once */
  a32 block_rotor;
} db_header;

typedef struct {              /* 64 bytes */
  a32 state, gen, pid, chunk; /* chunk: life chunk + 1 */
  a64 start;                  /* start time of the process, clock ticks (proc(5)) */
  a32 bell, served, cpu,
      uid; /* bell: futex of the dispatcher, [rings 10 | last slot 22]; served: it has one; cpu: last signalled from, + 1 */
  a64 joined;
  char comm[16];
} db_life;

typedef struct { /* 64 bytes: who holds or wants reservation locks and accesses */
  a32 gen, life;
  a64 stamp;
  a64 waits_on; /* handle of the fence being waited for, 0: none */
  a64 wait_stamp;
  a32 tid, real; /* real: a WwAcquireContext, not a lock without one */
  a64 heir;      /* ctx word of who lent it a lock and gets that back, whatever becomes of it; 0: none */
  a32 heir_rec, spare32;
  a64 spare;
} db_ctx;

#define FENCE_PAST 5u

typedef struct { /* 128 bytes */
  a32 word;      /* [generation 26 | flags 6], the futex */
  a32 flags;
  a64 end; /* [generation 40 | 11 unused | decided 1 | -error 12]: how it ends is decided once, for this generation */
  a64 context, seqno;
  a64 timestamp;         /* STAMP_NONE of the generation until it is stamped */
  _Atomic int32_t error; /* what its owner has set for its end, before it */
  a32 timeline;          /* + 1, 0: none */
  a64 bells;             /* bit (life index % 64): that process wants to be rung */
  a64 deadline;          /* STAMP_NONE of the generation: none */
  a64 owner;             /* ctx word of the access's owner, 0: not an access */
  a32 rec, rec_gen;
  a64 created;
  a64 past[FENCE_PAST]; /* [generation 52 | -error 12] of this slot's last failed uses */
} db_fence;

#define FW_SIGNALED   1u
#define FW_WAITERS    2u
#define FW_SHARED     4u
#define FW_SYNC       8u  /* a sync file's descriptor waits for it: who ends it rings, and then clears the bit */
#define FW_DROPPED    16u /* its owner lets go of it, known to nobody: too late to share it */
#define FW_SHIFT      6
#define END_OPEN(gen) ((uint64_t)(gen) << 24)
#define END_DECIDED   0x1000u
#define END_GEN(e)    ((e) >> 24)
#define END_ERROR(e)  (-(int)((e) & 0xfff))
#define STAMP_NONE(gen) \
  (1ull << 63 | (gen)) /* no time has it, and no other generation: so a compare-and-swap from it is for this one alone */
#define FF_ACCESS    1u
#define FF_WRITE     2u
#define FF_GRANTED   4u
#define FF_SEQNO64   8u  /* its seqno counts in 64 bits; without it in 32, which wrap (spec 3.10) */
#define FF_CONTAINER 16u /* an array or a chain: a reservation object is no place for it */
#define FF_HASTY     64u /* its owner wants to hear of deadlines that others set: they ring it */
#define FF_ANYBODY   32u /* every process of the domain may end it, not its owner alone */

typedef struct { /* 1024 bytes */
  a32 gen, open;
  a64 context, seqno;
  a32 life, spare;
  char driver[64], name[64];
  char pad[1024 - 32 - 128 - 512];
  a64 ring[64]; /* [slot 22 | low part of generation 30 | -error 12] of the last failed fences, at seqno % 64 */
} db_timeline;

#define INLINE_ENTRIES 16u

typedef struct { /* the reservation object inside a record */
  a64 lock;      /* [context generation 32 | waiters 1 | context index 31] */
  a64 next;      /* the oldest waiter, same form without the waiters bit */
  a32 block, spare;
  a64 spare2;
  a64 entry[INLINE_ENTRIES]; /* [generation 40 | usage 2 | slot 22], 0 ends the list */
} db_resv;

typedef struct { /* 512 bytes: a buffer, or a reservation object of its own */
  a32 state, gen;
  a64 dev, ino, size;
  uint8_t nonce[16];
  a64 created;
  a32 life, pid;
  a32 hnext, kind; /* hnext: next in bucket + 1 */
  _Atomic int32_t torn;
  a32 torn_pid;
  a32 absent, resv; /* resv: record + 1 of a foreign reservation object, 0: the own one */
  a64 absent_ns;
  a32 name_version, free_next;
  uint8_t name_len[2], exp_len, home_len, pad[4]; /* name_len: length + 1, 0: never set */
  char name[2][32], exp_name[32], home[32];
  a64 spare[2];
  db_resv r;
  a64 spare3[12];
} db_rec;

#define BLOCK_ENTRIES 15u

typedef struct {   /* 128 bytes: more entries of a reservation object */
  a32 owner, next; /* record + 1 (0: free); block + 1 */
  a64 entry[BLOCK_ENTRIES];
} db_block;

#define OFF_LIVES       DB_PAGE
#define OFF_CHUNKTAB    (OFF_LIVES + DB_LIVES * 64u)
#define OFF_BUCKETS     (OFF_CHUNKTAB + DB_MAX_CHUNKS * 8u)
#define DB_HEADER_BYTES (OFF_BUCKETS + DB_BUCKETS * 4u)
_Static_assert(sizeof(db_header) <= DB_PAGE, "header");
_Static_assert(sizeof(db_life) == 64, "life");
_Static_assert(sizeof(db_ctx) == 64, "ctx");
_Static_assert(sizeof(db_fence) == 128, "fence");
_Static_assert(sizeof(db_timeline) == 1024, "timeline");
_Static_assert(sizeof(db_rec) == 512, "record");
_Static_assert(sizeof(db_block) == 128, "block");
_Static_assert(DB_HEADER_BYTES % DB_PAGE == 0, "header pages");

/* chunk table entry: [owner life 32 | 8 unused | ordinal 16 | type 8] */
#define CT_TYPE(e)               ((uint32_t)((e) & 0xff))
#define CT_ORD(e)                ((uint32_t)(((e) >> 8) & 0xffff))
#define CT_LIFE(e)               ((uint32_t)((e) >> 32))
#define CT_MAKE(type, ord, life) ((uint64_t)(type) | (uint64_t)(ord) << 8 | (uint64_t)(life) << 32)

#define LIFE_INDEX(id)      ((id) & (DB_LIVES - 1))
#define LIFE_ID(index, gen) (((gen) & 0xfffffu) << 11 | (index))
#define TL_WAITERS          0x80000000u

#define CTX_WAITERS  0x80000000ull
#define CTX_INDEX(w) ((uint32_t)((w) & 0x7fffffffu))
#define CTX_GEN(w)   ((uint32_t)((w) >> 32))

#define SLOT_MASK         0x3fffffull
#define H_SLOT(h)         ((uint32_t)((h) & SLOT_MASK))
#define H_GEN(h)          ((h) >> 24)
#define H_MAKE(slot, gen) ((uint64_t)(slot) | ((uint64_t)(gen) << 24))
#define E_USAGE(e)        ((uint32_t)(((e) >> 22) & 3))
#define E_HANDLE(e)       ((e) & ~(3ull << 22))
#define E_MAKE(h, usage)  ((h) | (uint64_t)(usage) << 22)
#define GEN_MASK          0xffffffffffull
#define WORD_OF(gen)      ((uint32_t)((gen) & 0x3ffffffu) << FW_SHIFT)
#endif
