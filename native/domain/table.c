/* table.c - the table lock; chunks, blocks and the lists of records: what changes under that lock.
 *
 * The table lock is one 32-bit word that names its owner's life. The state of a record (and the owner of a block) is the
 * truth; the hash chains and the free list are derived from it and are made anew whenever the lock is taken from a dead
 * owner. So nothing in here has to be undone: whatever prefix of the stores happened, `table_rebuild` gives a whole table. */
#include "domain/table.h"
#include "domain/sleep.h"
#include "domain/step.h"
#include "domain/ticker.h"
#include <fcntl.h>
#include <stdlib.h>
#include <sys/stat.h>

/* ---- bounded addresses ---- */
#define AT(name, type, kind, per)            \
  type *name(Shm *s, uint32_t i) {           \
    char *c = chunk_at(s, i / (per), kind);  \
    return c ? (type *)c + i % (per) : NULL; \
  }
AT(rec_at, db_rec, CH_REC, RECS_PER)
AT(block_at, db_block, CH_BLOCK, BLOCKS_PER)
AT(timeline_at, db_timeline, CH_TIMELINE, TIMELINES_PER)
AT(fence_at, db_fence, CH_FENCE, FENCES_PER)

db_ctx *ctx_at(Shm *s, uint32_t i) {
  char *c = chunk_at(s, i / CTX_PER, CH_CTX);
  if (c) return (db_ctx *)c + i % CTX_PER;
  c = i % CTX_PER >= CTX_FIRST_IN_LIFE ? chunk_at(s, i / CTX_PER, CH_LIFE) : NULL;
  return c ? (db_ctx *)c + i % CTX_PER : NULL;
}

a64 *held_word(Shm *s, uint32_t life_index, uint32_t rec) { /* the word of that life's bitmap with rec's bit */
  db_life *l = (db_life *)(s->base + OFF_LIVES) + life_index;
  uint32_t chunk = atomic_load(&l->chunk);
  char *c = chunk ? chunk_at(s, chunk - 1, CH_LIFE) : NULL;
  if (rec / RECS_PER >= DB_MAX_CHUNKS) return NULL;
  uint32_t ord = CT_ORD(atomic_load(chunk_entry(s, rec / RECS_PER)));
  return c && ord < REC_CHUNKS ? (a64 *)c + ord : NULL;
}

int held_by_living(Shm *s, uint32_t rec) {
  uint32_t high = atomic_load(&hdr(s)->life_high);
  if (high > DB_LIVES) high = DB_LIVES;
  for (uint32_t i = 0; i < high; i++) {
    if (atomic_load(&((db_life *)(s->base + OFF_LIVES) + i)->state) != LIFE_ALIVE) continue;
    a64 *w = held_word(s, i, rec);
    if (w && (atomic_load(w) >> (rec % RECS_PER) & 1)) return 1;
  }
  return 0;
}

/* ---- the lock ---- */
int table_lock(Shm *s) {
  if (shm_need_life(s, "table lock")) return -1;
  uint32_t me = my_life(s);
  a32 *w = &hdr(s)->table_lock;
  for (;;) {
    uint32_t v = 0;
    if (atomic_compare_exchange_strong(w, &v, me)) return 0;
    uint32_t owner = v & ~TL_WAITERS;
    /* free with sleepers; its owner was reaped; or it names us, who hold it only between two calls from Python: a lie */
    if (!owner || owner == me || !life_current(s, owner)) {
      if (!atomic_compare_exchange_strong(w, &v, me | TL_WAITERS)) continue;
      if (owner) {
        STEP(table_stolen);
        table_rebuild(s);
        STEP(table_rebuilt);
      }
      return 0;
    }
    if (!(v & TL_WAITERS) && !atomic_compare_exchange_strong(w, &v, v | TL_WAITERS)) continue;
    if (step_armed) step_sleeping(STEP_rec_locked);
    if (shm_sleep(s, w, v | TL_WAITERS, -1, TICK_TABLE, owner) == -1) return -1;
  }
}

void table_unlock(Shm *s) {
  a32 *w = &hdr(s)->table_lock;
  if (atomic_exchange(w, 0) & TL_WAITERS) word_wake(w, INT32_MAX);
}

/* ---- chunks ---- */
enum { GROW_FULL = -1, GROW_NO_ROOM = -2, GROW_NO_MEMORY = -3, GROW_CORRUPT = -4 };

int64_t chunk_grow(Shm *s, uint32_t type, uint32_t owner) {
  db_header *h = hdr(s);
  uint32_t n = atomic_load(&h->nchunks);
  if (!chunks_known(s, n)) return GROW_CORRUPT; /* it never shrinks, and the file has what it counts */
  uint32_t ord = 0;
  if (type == CH_REC) {
    ord = atomic_load(&h->rec_chunks);
    if (ord >= REC_CHUNKS) n = DB_MAX_CHUNKS;
  }
  if (n == DB_MAX_CHUNKS) return GROW_FULL;
  off_t at = (off_t)DB_HEADER_BYTES + (off_t)n * DB_CHUNK;
  int r, tries = 0;
  do r = fallocate(s->fd, 0, at, DB_CHUNK);
  while (r && errno == EINTR && ++tries < 100);
  if (r) return errno == ENOSPC ? GROW_NO_ROOM : GROW_NO_MEMORY;
  STEP(chunk_allocated); /* memory behind the end, not published: the next growth uses it again */
  char *c = s->base + DB_HEADER_BYTES + (size_t)n * DB_CHUNK;
  memset(c, 0, DB_CHUNK);
  if (type == CH_FENCE)
    for (uint32_t i = 0; i < FENCES_PER; i++) atomic_store(&((db_fence *)c)[i].word, FW_SIGNALED);
  atomic_store(chunk_entry(s, n), CT_MAKE(type, ord, owner));
  STEP(chunk_typed);
  if (type == CH_REC) atomic_store(&h->rec_chunks, ord + 1); /* a death here wastes one ordinal */
  atomic_store(&h->nchunks, n + 1);
  STEP(chunk_published);
  return n;
}

int grow_failed(Shm *s, int64_t why) {
  if (why == GROW_CORRUPT) return shm_corrupt(s, "the number of chunks");
  if (why == GROW_FULL)
    return shm_fail(s, ENOSPC, "allocate", "the domain",
                    "every slot is in use: close buffers and drop fences, or use a second domain (DMABUF_DOMAIN)");
  return shm_fail(s, why == GROW_NO_ROOM ? ENOSPC : ENOMEM, "allocate", "the domain",
                  "its file system (a tmpfs, usually) has no room to grow the domain");
}

int64_t chunk_claim(Shm *s, uint32_t type, uint32_t owner) {
  /* without the lock first: an ownerless chunk changes hands by one compare-and-swap that names the owner */
  uint32_t n = atomic_load(&hdr(s)->nchunks);
  if (n > DB_MAX_CHUNKS) return shm_corrupt(s, "more chunks than there can be");
  for (uint32_t k = 0; k < n; k++) {
    uint32_t i = (s->claim_hint[type] + k) % n;
    uint64_t e = atomic_load(chunk_entry(s, i));
    if (CT_TYPE(e) != type || CT_LIFE(e)) continue;
    if (atomic_compare_exchange_strong(chunk_entry(s, i), &e, CT_MAKE(type, CT_ORD(e), owner))) {
      STEP(chunk_owned);
      s->claim_hint[type] = i + 1;
      return chunk_at(s, i, type) ? (int64_t)i : shm_corrupt(s, "a chunk outside of the file");
    }
  }
  if (table_lock(s)) return -1;
  int64_t c = chunk_grow(s, type, owner);
  table_unlock(s);
  return c < 0 ? grow_failed(s, c) : c;
}

/* ---- the hash and the free list: derived ---- */
static uint32_t bucket_of(uint64_t dev, uint64_t ino) {
  uint64_t x = (ino + dev * 0x9e3779b97f4a7c15ull) * 0xbf58476d1ce4e5b9ull;
  return (uint32_t)(x >> 40) & (DB_BUCKETS - 1);
}

void link_rec(Shm *s, uint32_t i, db_rec *r) {
  a32 *b = bucket(s, bucket_of(r->dev, r->ino));
  atomic_store(&r->hnext, atomic_load(b));
  atomic_store(b, i + 1);
}

void unlink_rec(Shm *s, uint32_t i, db_rec *r) {
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

db_rec *find_rec(Shm *s, uint64_t dev, uint64_t ino, uint32_t *at) {
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

static void blocks_release(Shm *s, uint32_t rec, a32 *link) { /* table lock held: give back the chain behind link */
  uint32_t v = atomic_exchange(link, 0);
  for (uint32_t n = 0; v && n < DB_MAX_CHUNKS * BLOCKS_PER; n++) {
    db_block *b = block_at(s, v - 1);
    if (!b || atomic_load(&b->owner) != rec + 1) return; /* what is cut off here is found by table_rebuild */
    v = atomic_load(&b->next);
    atomic_store(&b->next, 0);
    for (uint32_t i = 0; i < BLOCK_ENTRIES; i++) atomic_store(&b->entry[i], 0);
    atomic_store(&b->owner, 0);
  }
}

void clear_rec(Shm *s, uint32_t i, db_rec *r) { /* DYING -> FREE; table lock held, not in any chain */
  blocks_release(s, i, &r->resv.block);
  uint32_t gen = atomic_load(&r->gen);
  bytes_follow(); /* who reads them looks at the state and the generation afterwards */
  memset((char *)r + offsetof(db_rec, dev), 0, sizeof *r - offsetof(db_rec, dev));
  STEP(rec_cleared);
  atomic_store(&r->gen, gen + 1 ? gen + 1 : 1);
  atomic_store(&r->state, REC_FREE);
}

static void blocks_rebuild(Shm *s, uint32_t chunks) { /* a block that is in no list, taken but not linked, belongs to nobody */
  uint8_t *seen = calloc(chunks, BLOCKS_PER / 8);
  if (!seen) return; /* they stay taken until the next time */
  for (uint32_t i = 0; i < chunks * RECS_PER; i++) {
    db_rec *r = rec_at(s, i);
    if (!r) {
      i |= RECS_PER - 1;
      continue;
    }
    a32 *link = &r->resv.block;
    while (atomic_load(&r->state) == REC_LIVE && atomic_load(link)) {
      uint32_t v = atomic_load(link) - 1;
      db_block *b = block_at(s, v);
      if (!b || v / BLOCKS_PER >= chunks || atomic_load(&b->owner) != i + 1 || seen[v / 8] >> v % 8 & 1) {
        atomic_store(link, 0);
        break;
      }
      seen[v / 8] |= (uint8_t)(1 << v % 8);
      link = &b->next;
    }
  }
  for (uint32_t i = 0; i < chunks * BLOCKS_PER; i++) {
    db_block *b = block_at(s, i);
    if (!b) {
      i |= BLOCKS_PER - 1;
      continue;
    }
    if (!atomic_load(&b->owner) || seen[i / 8] >> i % 8 & 1) continue;
    for (uint32_t m = 0; m < BLOCK_ENTRIES; m++) atomic_store(&b->entry[m], 0);
    atomic_store(&b->next, 0);
    atomic_store(&b->owner, 0);
  }
  free(seen);
}

void table_rebuild(Shm *s) { /* table lock held */
  db_header *h = hdr(s);
  uint32_t n = atomic_load(&h->nchunks);
  if (n > DB_MAX_CHUNKS) n = DB_MAX_CHUNKS;
  for (uint32_t i = 0; i < DB_BUCKETS; i++) atomic_store(bucket(s, i), 0);
  atomic_store(&h->rec_free, 0);
  for (uint32_t c = 0; c < n; c++) {
    uint32_t type = CT_TYPE(atomic_load(chunk_entry(s, c)));
    if (type == CH_REC) {
      for (uint32_t k = 0; k < RECS_PER; k++) {
        uint32_t i = c * RECS_PER + k;
        db_rec *r = rec_at(s, i);
        if (!r) break;
        atomic_store(&r->hnext, 0);
        if (atomic_load(&r->state) == REC_DYING) {
          if (held_by_living(s, i))
            atomic_store(&r->state, REC_LIVE);
          else
            clear_rec(s, i, r);
        }
        if (atomic_load(&r->state) == REC_LIVE) {
          if (r->ino) link_rec(s, i, r);
        } else {
          atomic_store(&r->free_next, atomic_load(&h->rec_free));
          atomic_store(&h->rec_free, i + 1);
        }
      }
    }
  }
  blocks_rebuild(s, n);
}

/* ---- blocks ---- */
int blocks_add(Shm *s, uint32_t rec, a32 *link, uint32_t count) { /* resv lock held: append `count` blocks behind *link */
  if (table_lock(s)) return -1;
  uint32_t total = 0, seen = 0;
  while (count) {
    uint32_t n = atomic_load(&hdr(s)->nchunks);
    uint32_t i = UINT32_MAX;
    db_block *b = NULL;
    if (n > DB_MAX_CHUNKS) {
      table_unlock(s);
      return shm_corrupt(s, "more chunks than there can be");
    }
    for (; seen < n && i == UINT32_MAX; seen += i == UINT32_MAX) {
      uint32_t c = (s->claim_hint[CH_BLOCK] + seen) % n;
      if (CT_TYPE(atomic_load(chunk_entry(s, c))) != CH_BLOCK) continue;
      for (uint32_t k = 0; k < BLOCKS_PER; k++) {
        b = block_at(s, c * BLOCKS_PER + k);
        if (!b) break;
        if (!atomic_load(&b->owner)) {
          i = c * BLOCKS_PER + k;
          break;
        }
      }
    }
    if (i == UINT32_MAX) {
      int64_t c = chunk_grow(s, CH_BLOCK, 0);
      if (c < 0) {
        table_unlock(s);
        return grow_failed(s, c);
      }
      i = (uint32_t)c * BLOCKS_PER;
      b = block_at(s, i);
      s->claim_hint[CH_BLOCK] = (uint32_t)c;
      seen = 0;
    }
    if (!b) {
      table_unlock(s);
      return shm_corrupt(s, "a block outside of the file");
    }
    atomic_store(&b->next, 0);
    atomic_store(&b->owner, rec + 1);
    STEP(block_taken); /* taken, unlinked: table_rebuild gives it back */
    atomic_store(link, i + 1);
    STEP(block_linked);
    link = &b->next;
    count--;
    if (++total > DB_MAX_CHUNKS * BLOCKS_PER) break;
  }
  table_unlock(s);
  return 0;
}

/* ---- methods ---- */
static PyObject *table_audit(Shm *s, PyObject *unused) {
  /* (free records that no list has, live ones that the hash does not find, blocks of no list): all 0 in a whole table */
  if (table_lock(s)) return NULL;
  db_header *h = hdr(s);
  uint32_t n = atomic_load(&h->nchunks), lost = 0, hidden = 0, stray = 0, listed = 0, blocks = 0;
  if (n > DB_MAX_CHUNKS) n = DB_MAX_CHUNKS;
  uint32_t v = atomic_load(&h->rec_free);
  for (db_rec *r; v && listed < DB_MAX_CHUNKS * RECS_PER && (r = rec_at(s, v - 1)); v = atomic_load(&r->free_next)) listed++;
  for (uint32_t c = 0; c < n; c++) {
    uint32_t type = CT_TYPE(atomic_load(chunk_entry(s, c)));
    for (uint32_t k = 0; type == CH_REC && k < RECS_PER; k++) {
      db_rec *r = rec_at(s, c * RECS_PER + k);
      uint32_t at;
      if (!r) continue;
      if (atomic_load(&r->state) == REC_FREE)
        lost++;
      else if (r->ino && find_rec(s, r->dev, r->ino, &at) != r)
        hidden++;
      uint32_t b = atomic_load(&r->state) == REC_LIVE ? atomic_load(&r->resv.block) : 0;
      for (db_block *x; b && blocks < DB_MAX_CHUNKS * BLOCKS_PER && (x = block_at(s, b - 1)); b = atomic_load(&x->next)) blocks++;
    }
    for (uint32_t k = 0; type == CH_BLOCK && k < BLOCKS_PER; k++) {
      db_block *x = block_at(s, c * BLOCKS_PER + k);
      if (x && atomic_load(&x->owner)) stray++;
    }
  }
  table_unlock(s);
  return Py_BuildValue("iii", (int)lost - (int)listed, (int)hidden, (int)stray - (int)blocks);
}

static PyObject *py_chunk_claim(Shm *s, PyObject *arg) {
  long type = PyLong_AsLong(arg);
  if (type == -1 && PyErr_Occurred()) return NULL;
  if (type <= CH_NONE || type > CH_CTX) {
    PyErr_SetString(PyExc_ValueError, "chunk_claim: no such type");
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
#define M(n, flags, doc) {#n, (PyCFunction)n, flags, doc}
    M(table_audit, METH_NOARGS, "What the derived parts of the table miss: (free records, live records, blocks)."),
    {"chunk_claim", (PyCFunction)py_chunk_claim, METH_O, "Own a chunk of a type."},
    {"life_current", (PyCFunction)py_life_current, METH_O, "Is this life id its slot's present one?"},
    {0}};
