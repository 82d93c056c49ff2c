/* table.c - chunks, the table lock, and what changes under it.
 *
 * The table lock is one word that names its owner's life. The states of records and the owners of blocks are the truth; the chains of the
 * hash and the free list are derived from them. A process that takes the lock from a dead owner makes the derived parts again, so nothing
 * here needs to be undone: whichever of a change's stores were done, table_rebuild() turns them into a whole table.
 */
#include "domain/table.h"
#include "domain/buffer_layout.h"
#include "domain/sleep.h"
#include "domain/step.h"
#include "domain/stream_slots.h"
#include "domain/ticker.h"
#include <fcntl.h>
#include <stdlib.h>
#include <sys/resource.h>

_Static_assert(sizeof(db_header) <= DB_PAGE, "the header is one page");
_Static_assert(OFF_CHUNKTAB == OFF_LIVES + DB_LIVES * sizeof(db_life), "the chunk table follows the process slots");
_Static_assert(DB_HEADER_BYTES % DB_PAGE == 0, "chunks begin at a page");
_Static_assert(FENCES_PER * sizeof(db_fence) == DB_CHUNK && RECS_PER * sizeof(db_rec) == DB_CHUNK, "a chunk is full of fences, of records");
_Static_assert(BLOCKS_PER * sizeof(db_block) == DB_CHUNK && TIMELINES_PER * sizeof(db_timeline) == DB_CHUNK, "of blocks, of timelines");
_Static_assert(SYNC_PER * sizeof(db_sync) == DB_CHUNK && SYNC_PER * sizeof(db_leaf) == DB_CHUNK, "of sync files, of their fences");
_Static_assert(CTX_PER * sizeof(db_ctx) == DB_CHUNK && REC_CHUNKS * sizeof(a64) == CTX_FIRST_IN_LIFE * sizeof(db_ctx), "of contexts");

/* ---- addresses ---- */

db_ctx *ctx_at(Shm *s, uint32_t i) {
  char *c = chunk_at(s, i / CTX_PER, CH_CTX);
  if (!c && i % CTX_PER >= CTX_FIRST_IN_LIFE) c = chunk_at(s, i / CTX_PER, CH_LIFE);
  return c ? (db_ctx *)c + i % CTX_PER : NULL;
}

a64 *ref_word(Shm *s, uint32_t life_index, uint32_t rec) {
  uint32_t chunk = atomic_load(&life_at(s, life_index)->chunk);
  char *c = chunk ? chunk_at(s, chunk - 1, CH_LIFE) : NULL;
  if (rec / RECS_PER >= DB_MAX_CHUNKS) return NULL;
  uint32_t ord = CT_ORD(atomic_load(chunk_entry(s, rec / RECS_PER)));
  return c && ord < REC_CHUNKS ? (a64 *)c + ord : NULL;
}

int rec_referenced(Shm *s, uint32_t rec) {
  for (uint32_t i = 0, high = life_high(s); i < high; i++) {
    if (atomic_load(&life_at(s, i)->state) != LIFE_ALIVE) continue;
    a64 *w = ref_word(s, i, rec);
    if (w && (atomic_load(w) & ref_bit(rec))) return 1;
  }
  return 0;
}

/* ---- the lock ---- */

/* A process that is stopped inside of the lock would keep all others: at a tick, raise ETIMEDOUT once a wait has lasted three times
 * as long as one that is logged. -1: raised. */
static int too_long(Shm *s, int64_t *begun, uint32_t owner) {
  int64_t now = now_ns(), limit = 3 * s->slow_ns;
  if (!*begun) *begun = now;
  if (now - *begun < limit) return 0;
  char what[96];
  unsigned pid = atomic_load(&life_slot(s, owner)->pid);
  snprintf(what, sizeof what, "process %u has held its table's lock for %.3g s", pid, (double)limit / 1e9);
  return shm_fail(s, ETIMEDOUT, "table lock", "the domain", what, "continue that process (kill -CONT), or end it");
}

/* For a life that is about to begin (joining), or the present one. */
static int lock_for(Shm *s, uint32_t me, int joining) {
  a32 *w = &hdr(s)->table_lock;
  int64_t since = 0, begun = 0;
  for (;;) {
    if (!joining && my_life(s) != me)
      return shm_fail(s, EOWNERDEAD, "table lock", "the domain", "this process left it meanwhile", "call again, which joins again");
    uint32_t v = 0;
    if (atomic_compare_exchange_strong(w, &v, me)) {
      STEP_NOTE(table_locked, w, me);
      return 0;
    }
    uint32_t owner = v & ~TL_WAITERS;
    /* It can be taken when it is free but has sleepers, when its owner was reaped or it names nobody, and when it names this process. That
     * last is a lie of the file: this process holds it only inside of a call, and calls don't nest. */
    if (!owner || owner == me || !life_current(s, owner)) {
      if (!atomic_compare_exchange_strong(w, &v, me | TL_WAITERS)) continue;
      if (owner) {
        STEP_OF(table_stolen, w,
                owner); /* derived parts are wrong, and the lock names this process: the next one that takes it rebuilds them */
        table_rebuild(s);
        STEP_OF(table_rebuilt, w, owner);
      } else {
        STEP_NOTE(table_locked, w, me);
      }
      return 0;
    }
    if (!(v & TL_WAITERS) && !atomic_compare_exchange_strong(w, &v, v | TL_WAITERS)) continue;
    STEP_SLEEPING(rec_locked);
    int k = shm_sleep(s, w, v | TL_WAITERS, -1, TICK_TABLE, owner);
    if (k == SLEEP_RAISED || (k == SLEEP_TICK && (shm_lasts(s, &since, TICK_TABLE, owner) || too_long(s, &begun, owner)))) return -1;
  }
}

int table_lock(Shm *s) { return shm_need_life(s, "table lock") ? -1 : lock_for(s, my_life(s), 0); }

void table_unlock(Shm *s) {
  a32 *w = &hdr(s)->table_lock;
  STEP_NOTE(table_unlocking, w, my_life(s));
  if (atomic_exchange(w, 0) & TL_WAITERS) word_wake(w, INT32_MAX);
}

/* ---- chunks ---- */

enum { GROW_FULL = -1, GROW_NO_ROOM = -2, GROW_NO_MEMORY = -3, GROW_CORRUPT = -4, GROW_LOST = -5 };

/* The lowest ordinal that no chunk of records has; REC_CHUNKS: none is left. */
static uint32_t free_ordinal(Shm *s, uint32_t count) {
  uint64_t taken[REC_CHUNKS / 64] = {0};
  for (uint32_t i = 0; i < count; i++) {
    uint64_t e = atomic_load(chunk_entry(s, i));
    if (CT_TYPE(e) == CH_REC && CT_ORD(e) < REC_CHUNKS) taken[CT_ORD(e) / 64] |= 1ull << CT_ORD(e) % 64;
  }
  uint32_t ord = 0;
  while (ord < REC_CHUNKS && taken[ord / 64] >> ord % 64 & 1) ord++;
  return ord;
}

/* An empty chunk of a type. Its generations go on from the floor: the first use of a slot is above it, and so is a record's present one. */
static void fill_chunk(Shm *s, uint32_t type, char *c) {
  uint64_t floor = atomic_load(&hdr(s)->floor[type == CH_LIFE ? CH_CTX : type]);
  memset(c, 0, DB_CHUNK);
  if (type == CH_FENCE)
    /* Of generation 0, which no handle has. One of the floor's generation would be the handle of a fence from before. */
    for (uint32_t i = 0; i < FENCES_PER; i++) atomic_store(&((db_fence *)c)[i].word, FW_SIGNALED);
  else if (type == CH_TIMELINE)
    for (uint32_t i = 0; i < TIMELINES_PER; i++) atomic_store(&((db_timeline *)c)[i].gen, (uint32_t)floor);
  else if (type == CH_CTX || type == CH_LIFE)
    for (uint32_t i = type == CH_LIFE ? CTX_FIRST_IN_LIFE : 0; i < CTX_PER; i++) atomic_store(&((db_ctx *)c)[i].gen, (uint32_t)floor);
  else if (type == CH_REC)
    for (uint32_t i = 0; i < RECS_PER; i++) atomic_store(&((db_rec *)c)[i].gen, (uint32_t)floor + 1 ? (uint32_t)floor + 1 : 1);
  else if (type == CH_SYNC)
    for (uint32_t i = 0; i < SYNC_PER; i++) atomic_store(&((db_sync *)c)[i].gen, (uint32_t)floor);
  else if (type == CH_LEAF)
    for (uint32_t i = 0; i < SYNC_PER; i++) atomic_store(&((db_leaf *)c)[i].gen, (uint32_t)floor);
}

int64_t chunk_grow(Shm *s, uint32_t type, uint32_t owner) {
  db_header *h = hdr(s);
  uint32_t count = atomic_load(&h->nchunks), n = s->claim_hint[CH_NONE], ord = 0;
  if (!chunks_known(s, count)) return GROW_CORRUPT;
  /* The first that was given back, or one more. None is given back while a process maps the file, so the search goes on where it ended. */
  if (n > count) n = count;
  while (n < count && CT_TYPE(atomic_load(chunk_entry(s, n))) != CH_NONE) n++;
  s->claim_hint[CH_NONE] = n;
  if (type == CH_REC) {
    ord = free_ordinal(s, count);
    if (ord >= REC_CHUNKS) n = DB_MAX_CHUNKS;
  }
  if (n >= DB_MAX_CHUNKS) return GROW_FULL;
  off_t at = (off_t)DB_HEADER_BYTES + (off_t)n * DB_CHUNK;
  int r, tries = 0;
  do {
    int fd = shm_file(s); /* compared just before: nobody else's file grows */
    if (fd < 0) return GROW_LOST;
    r = fallocate(fd, 0, at, DB_CHUNK);
  } while (r && errno == EINTR && ++tries < 100);
  if (r) return errno == ENOSPC ? GROW_NO_ROOM : GROW_NO_MEMORY;
  STEP_OF(chunk_allocated, chunk_entry(s, n),
          type); /* memory behind the published chunks, or of one without a type: the next growth uses it */
  fill_chunk(s, type, s->base + DB_HEADER_BYTES + (size_t)n * DB_CHUNK);
  atomic_store(chunk_entry(s, n), CT_MAKE(type, ord, owner));
  STEP_OF(chunk_typed, chunk_entry(s, n),
          type); /* behind the published chunks: the next growth types it again. Else it is as if published */
  if (n == count) atomic_store(&h->nchunks, n + 1);
  STEP_OF(chunk_published, chunk_entry(s, n),
          type); /* the reaper of the owner returns it; table_rebuild() finds the slots of one without an owner */
  return n;
}

int grow_failed(Shm *s, int64_t reason) {
  if (reason == GROW_CORRUPT) return shm_corrupt(s, "its number of chunks is impossible");
  if (reason == GROW_LOST) {
    errno = ESTALE;
    return shm_lost(s, "allocate");
  }
  if (reason == GROW_FULL)
    return shm_fail(s, ENOSPC, "allocate", "the domain", "every slot is in use",
                    "close buffers and drop fences, or use a second domain (DMABUF_DOMAIN)");
  struct rlimit limit;
  uint64_t wanted = DB_HEADER_BYTES + (uint64_t)(atomic_load(&hdr(s)->nchunks) + 1) * DB_CHUNK;
  if (!getrlimit(RLIMIT_FSIZE, &limit) && limit.rlim_cur != RLIM_INFINITY && limit.rlim_cur < wanted)
    return shm_fail(s, ENOMEM, "allocate", "the domain", "RLIMIT_FSIZE doesn't allow its file to become larger", "raise it (ulimit -f)");
  return shm_fail(s, reason == GROW_NO_ROOM ? ENOSPC : ENOMEM, "allocate", "the domain", "its file system has no room for a larger file",
                  "free space there, which is memory in a tmpfs");
}

static int64_t claim(Shm *s, uint32_t type, uint32_t owner, int joining) {
  /* First without the lock: an ownerless chunk changes hands by one compare-and-swap that names the new owner. */
  uint32_t n = atomic_load(&hdr(s)->nchunks);
  if (n > DB_MAX_CHUNKS) return shm_corrupt(s, "it counts more chunks than there can be");
  for (uint32_t k = 0; k < n; k++) {
    uint32_t i = (s->claim_hint[type] + k) % n;
    uint64_t e = atomic_load(chunk_entry(s, i));
    if (CT_TYPE(e) != type || CT_LIFE(e)) continue;
    if (!atomic_compare_exchange_strong(chunk_entry(s, i), &e, CT_MAKE(type, CT_ORD(e), owner))) continue;
    STEP_OF(chunk_owned, chunk_entry(s, i), owner); /* the owner's reaper returns it */
    s->claim_hint[type] = i + 1;
    return chunk_at(s, i, type) ? (int64_t)i : shm_corrupt(s, "a chunk lies outside of it");
  }
  if (lock_for(s, owner, joining)) return -1;
  int64_t c = chunk_grow(s, type, owner);
  table_unlock(s);
  return c < 0 ? grow_failed(s, c) : c;
}

int64_t chunk_claim(Shm *s, uint32_t type, uint32_t owner) { return claim(s, type, owner, 0); }

int64_t chunk_claim_first(Shm *s, uint32_t owner) { return claim(s, CH_LIFE, owner, 1); }

/* ---- the hash and the free list: derived ---- */

static uint32_t bucket_of(uint64_t dev, uint64_t ino) {
  uint64_t x = (ino + dev * 0x9e3779b97f4a7c15ull) * 0xbf58476d1ce4e5b9ull;
  return (uint32_t)(x >> 40) & (DB_BUCKETS - 1);
}

void rec_link(Shm *s, uint32_t i, db_rec *r) {
  a32 *b = bucket(s, bucket_of(r->dev, r->ino));
  atomic_store(&r->hnext, atomic_load(b));
  atomic_store(b, i + 1);
}

void rec_unlink(Shm *s, uint32_t i, db_rec *r) {
  a32 *link = bucket(s, bucket_of(r->dev, r->ino));
  for (uint32_t n = 0; n < REC_CHUNKS * RECS_PER; n++) {
    uint32_t v = atomic_load(link);
    if (v == i + 1) {
      atomic_store(link, atomic_load(&r->hnext));
      return;
    }
    db_rec *x = v ? rec_at(s, v - 1) : NULL;
    if (!x) return;
    link = &x->hnext;
  }
}

db_rec *rec_by_inode(Shm *s, uint64_t dev, uint64_t ino, uint32_t *at) {
  uint32_t v = atomic_load(bucket(s, bucket_of(dev, ino)));
  for (uint32_t n = 0; v && n < REC_CHUNKS * RECS_PER; n++) {
    db_rec *r = rec_at(s, v - 1);
    if (!r) return NULL;
    if (atomic_load(&r->state) == REC_LIVE && r->dev == dev && r->ino == ino) {
      *at = v - 1;
      return r;
    }
    v = atomic_load(&r->hnext);
  }
  return NULL;
}

void rec_push(Shm *s, uint32_t i, db_rec *r) {
  atomic_store(&r->free_next, atomic_load(&hdr(s)->rec_free));
  atomic_store(&hdr(s)->rec_free, i + 1);
}

/* Put an unowned block at the head of the free list. */
static void block_push(Shm *s, uint32_t i, db_block *b) {
  atomic_store(&b->next, atomic_load(&hdr(s)->block_free));
  atomic_store(&hdr(s)->block_free, i + 1);
}

static void block_clear(Shm *s, uint32_t i, db_block *b) {
  for (uint32_t k = 0; k < BLOCK_ENTRIES; k++) atomic_store(&b->entry[k], 0);
  atomic_store(&b->owner, 0);
  block_push(s, i, b);
}

static void blocks_free(Shm *s, uint32_t rec, a32 *link) { /* Free the blocks of a record from *link on. */
  uint32_t v = atomic_exchange(link, 0);
  for (uint32_t n = 0; v && n < DB_MAX_CHUNKS * BLOCKS_PER; n++) {
    db_block *b = block_at(s, v - 1);
    if (!b || atomic_load(&b->owner) != rec + 1) return; /* table_rebuild() frees what is cut off here */
    uint32_t next = atomic_load(&b->next);
    block_clear(s, v - 1, b);
    v = next;
  }
}

void rec_clear(Shm *s, uint32_t i, db_rec *r) {
  blocks_free(s, i, &r->resv.block);
  layout_drop(s, i, r);
  stream_drop(s, i, r);
  uint32_t gen = atomic_load(&r->gen);
  bytes_follow(); /* a reader looks at the state and the generation after it has read the bytes */
  memset((char *)r + offsetof(db_rec, dev), 0, sizeof *r - offsetof(db_rec, dev));
  STEP_OF(rec_cleared, r, gen); /* DYING, in no chain, and empty: table_rebuild() clears it again */
  atomic_store(&r->gen, gen + 1 ? gen + 1 : 1);
  atomic_store(&r->state, REC_FREE);
}

/* Make the free list again, with the blocks that are in no record's list: their owner died after taking them and before linking them. */
static void blocks_rebuild(Shm *s, uint32_t chunks) {
  uint8_t *seen = calloc(chunks, BLOCKS_PER / 8);
  atomic_store(&hdr(s)->block_free, 0);
  if (!seen) return; /* they stay taken until the next time */
  for (uint32_t i = 0; i < chunks * RECS_PER; i++) {
    db_rec *r = rec_at(s, i);
    if (!r) {
      i |= RECS_PER - 1; /* no chunk of records */
      continue;
    }
    a32 *link = &r->resv.block;
    while (atomic_load(&r->state) == REC_LIVE && atomic_load(link)) {
      uint32_t v = atomic_load(link) - 1;
      db_block *b = block_at(s, v);
      if (!b || v / BLOCKS_PER >= chunks || atomic_load(&b->owner) != i + 1 || seen[v / 8] >> v % 8 & 1) {
        atomic_store(link, 0); /* not a block of this record, or one of its list twice: the list ends here */
        break;
      }
      seen[v / 8] |= (uint8_t)(1 << v % 8);
      link = &b->next;
    }
  }
  for (uint32_t i = 0; i < chunks * BLOCKS_PER; i++) {
    db_block *b = block_at(s, i);
    if (!b)
      i |= BLOCKS_PER - 1;
    else if (!atomic_load(&b->owner))
      block_push(s, i, b);
    else if (!(seen[i / 8] >> i % 8 & 1))
      block_clear(s, i, b);
  }
  free(seen);
}

void table_rebuild(Shm *s) {
  uint32_t n = chunk_count(s);
  for (uint32_t i = 0; i < DB_BUCKETS; i++) atomic_store(bucket(s, i), 0);
  atomic_store(&hdr(s)->rec_free, 0);
  for (uint32_t c = 0; c < n; c++) {
    if (CT_TYPE(atomic_load(chunk_entry(s, c))) != CH_REC) continue;
    for (uint32_t i = c * RECS_PER; i < (c + 1) * RECS_PER; i++) {
      db_rec *r = rec_at(s, i);
      if (!r) break;
      atomic_store(&r->hnext, 0);
      if (atomic_load(&r->state) == REC_DYING) {
        if (rec_referenced(s, i))
          atomic_store(&r->state, REC_LIVE);
        else
          rec_clear(s, i, r);
      }
      if (atomic_load(&r->state) != REC_LIVE)
        rec_push(s, i, r);
      else if (r->ino)
        rec_link(s, i, r);
    }
  }
  blocks_rebuild(s, n);
  layouts_rebuild(s, n);
  streams_rebuild(s, n);
}

/* ---- blocks ---- */

/* Take a block out of the free list, into which more are put if it is empty. NULL: *failed is a reason for grow_failed(), or 0 if the
 * file is corrupt. */
static db_block *block_take(Shm *s, uint32_t *at, int64_t *failed) {
  *failed = 0;
  for (int k = 0; k < 2; k++) {
    uint32_t v = atomic_load(&hdr(s)->block_free);
    db_block *b = v ? block_at(s, v - 1) : NULL;
    if (b && !atomic_load(&b->owner)) {
      *at = v - 1;
      atomic_store(&hdr(s)->block_free, atomic_load(&b->next)); /* unowned and in no list: table_rebuild() puts it into the free list */
      return b;
    }
    if (v) { /* the list lies */
      blocks_rebuild(s, chunk_count(s));
      if (atomic_load(&hdr(s)->block_free)) continue;
    }
    int64_t c = chunk_grow(s, CH_BLOCK, 0);
    if (c < 0) {
      *failed = c;
      return NULL;
    }
    for (uint32_t i = (uint32_t)(c + 1) * BLOCKS_PER; i-- > (uint32_t)c * BLOCKS_PER && (b = block_at(s, i));) block_push(s, i, b);
  }
  return NULL;
}

int blocks_add(Shm *s, uint32_t rec, a32 *link, uint32_t count) {
  if (table_lock(s)) return -1;
  for (uint32_t total = 0; count && total <= DB_MAX_CHUNKS * BLOCKS_PER; count--, total++) {
    uint32_t i = 0;
    int64_t failed;
    db_block *b = block_take(s, &i, &failed);
    if (!b) {
      table_unlock(s);
      return failed ? grow_failed(s, failed) : shm_corrupt(s, "a block lies outside of it");
    }
    atomic_store(&b->next, 0);
    atomic_store(&b->owner, rec + 1);
    STEP_OF(block_taken, b, rec); /* taken and in no list: table_rebuild() frees it */
    atomic_store(link, i + 1);
    STEP_OF(block_linked, b, rec); /* part of the list, with nothing in it */
    link = &b->next;
  }
  table_unlock(s);
  return 0;
}

/* ---- methods ---- */

static PyObject *table_audit(Shm *s, PyObject *unused) {
  if (table_lock(s)) return NULL;
  uint32_t n = chunk_count(s), unused_recs = 0, hidden = 0, blocks = 0, listed = 0, linked = 0;
  uint32_t v = atomic_load(&hdr(s)->rec_free);
  for (db_rec *r; v && listed < DB_MAX_CHUNKS * RECS_PER && (r = rec_at(s, v - 1)); v = atomic_load(&r->free_next)) listed++;
  v = atomic_load(&hdr(s)->block_free);
  for (db_block *x; v && linked < DB_MAX_CHUNKS * BLOCKS_PER && (x = block_at(s, v - 1)); v = atomic_load(&x->next)) linked++;
  for (uint32_t c = 0; c < n; c++) {
    uint32_t type = CT_TYPE(atomic_load(chunk_entry(s, c)));
    for (uint32_t k = 0; type == CH_REC && k < RECS_PER; k++) {
      db_rec *r = rec_at(s, c * RECS_PER + k);
      uint32_t at;
      if (!r) continue;
      if (atomic_load(&r->state) == REC_FREE)
        unused_recs++;
      else if (r->ino && rec_by_inode(s, r->dev, r->ino, &at) != r)
        hidden++;
      uint32_t b = atomic_load(&r->state) == REC_LIVE ? atomic_load(&r->resv.block) : 0;
      for (db_block *x; b && linked < DB_MAX_CHUNKS * BLOCKS_PER && (x = block_at(s, b - 1)); b = atomic_load(&x->next)) linked++;
    }
    if (type == CH_BLOCK) blocks += BLOCKS_PER;
  }
  uint32_t layouts, listed_layouts;
  layouts_count(s, &layouts, &listed_layouts);
  table_unlock(s);
  return Py_BuildValue("iiii", (int)unused_recs - (int)listed, (int)hidden, (int)blocks - (int)linked, (int)layouts - (int)listed_layouts);
}

static PyObject *py_chunk_claim(Shm *s, PyObject *arg) {
  long type = PyLong_AsLong(arg);
  if (type == -1 && PyErr_Occurred()) return NULL;
  if (type <= CH_NONE || type >= CH_TYPES) {
    PyErr_SetString(PyExc_ValueError, "chunk_claim: not a type of chunk");
    return NULL;
  }
  if (shm_need_life(s, "claim")) return NULL;
  int64_t c = chunk_claim(s, (uint32_t)type, my_life(s));
  return c < 0 ? NULL : PyLong_FromLongLong(c);
}

static PyObject *py_life_current(Shm *s, PyObject *arg) {
  unsigned long id = PyLong_AsUnsignedLong(arg);
  if (id == (unsigned long)-1 && PyErr_Occurred()) return NULL;
  return PyBool_FromLong(id <= 0x7fffffff && life_current(s, (uint32_t)id));
}

PyMethodDef table_methods[] = {
    METHOD(
        table_audit, METH_NOARGS, "($self, /)",
        "Return how many (free records, live records, blocks, free layouts) the derived parts of the table miss: all 0 in a whole table."),
    {"chunk_claim", (PyCFunction)py_chunk_claim, METH_O,
     "chunk_claim($self, type, /)\n--\n\nReturn a chunk of the type, which this life owns from now on."},
    {"life_current", (PyCFunction)py_life_current, METH_O,
     "life_current($self, life, /)\n--\n\nReturn True if this is the id of its slot's present life. Its process may be dead."},
    {0}};
