/* table.c - chunks, records and blocks: what changes under the table lock.
 *
 * The table lock is one 32-bit word that names its owner's life. The state of a record (and the owner of a block) is the
 * truth; the hash chains and the free list are derived from it and are made anew whenever the lock is taken from a dead
 * owner. So nothing in here has to be undone: whatever prefix of the stores happened, `rebuild` gives a whole table. */
#include "native.h"
#include <fcntl.h>
#include <stdlib.h>
#include <sys/stat.h>

static void rebuild(Shm *s);

/* ---- bounded addresses ---- */
#define AT(name, type, kind, per)           \
  type *name(Shm *s, uint32_t i) {          \
    char *c = chunk_at(s, i / (per), kind); \
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
static a64 *held_word(Shm *s, uint32_t life_index, uint32_t rec) { /* the word of that life's bitmap with rec's bit */
  db_life *l = (db_life *)(s->base + OFF_LIVES) + life_index;
  uint32_t chunk = atomic_load(&l->chunk);
  char *c = chunk ? chunk_at(s, chunk - 1, CH_LIFE) : NULL;
  if (rec / RECS_PER >= DB_MAX_CHUNKS) return NULL;
  uint32_t ord = CT_ORD(atomic_load(chunk_entry(s, rec / RECS_PER)));
  return c && ord < REC_CHUNKS ? (a64 *)c + ord : NULL;
}
static int held_by_living(Shm *s, uint32_t rec) {
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
        rebuild(s);
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
/* Table lock held; the chunk, or why not, to be raised by grow_failed once the lock is free (raising runs Python). */
enum { GROW_FULL = -1, GROW_NO_ROOM = -2, GROW_NO_MEMORY = -3, GROW_CORRUPT = -4 };
static int64_t chunk_grow(Shm *s, uint32_t type, uint32_t owner) {
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
static int grow_failed(Shm *s, int64_t why) {
  if (why == GROW_CORRUPT) return shm_corrupt(s, "the number of chunks");
  if (why == GROW_FULL)
    return shm_fail(s, ENOSPC, "allocate", "the domain", "every slot is in use: close buffers and drop fences, or use a second domain (DMABUF_DOMAIN)");
  return shm_fail(s, why == GROW_NO_ROOM ? ENOSPC : ENOMEM, "allocate", "the domain", "its file system (a tmpfs, usually) has no room to grow the domain");
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
static void link_rec(Shm *s, uint32_t i, db_rec *r) {
  a32 *b = bucket(s, bucket_of(r->dev, r->ino));
  atomic_store(&r->hnext, atomic_load(b));
  atomic_store(b, i + 1);
}
static void unlink_rec(Shm *s, uint32_t i, db_rec *r) {
  a32 *link = bucket(s, bucket_of(r->dev, r->ino));
  for (uint32_t n = 0; n < REC_CHUNKS * RECS_PER; n++) {
    uint32_t v = atomic_load(link);
    if (v == i + 1) { atomic_store(link, atomic_load(&r->hnext)); return; }
    db_rec *x = v ? rec_at(s, v - 1) : NULL;
    if (!x) return;
    link = &x->hnext;
  }
}
static db_rec *find_rec(Shm *s, uint64_t dev, uint64_t ino, uint32_t *at) {
  uint32_t v = atomic_load(bucket(s, bucket_of(dev, ino)));
  for (uint32_t n = 0; v && n < REC_CHUNKS * RECS_PER; n++) {
    db_rec *r = rec_at(s, v - 1);
    if (!r) return NULL;
    if (atomic_load(&r->state) == REC_LIVE && r->dev == dev && r->ino == ino) { *at = v - 1; return r; }
    v = atomic_load(&r->hnext);
  }
  return NULL;
}
static void blocks_release(Shm *s, uint32_t rec, a32 *link) { /* table lock held: give back the chain behind link */
  uint32_t v = atomic_exchange(link, 0);
  for (uint32_t n = 0; v && n < DB_MAX_CHUNKS * BLOCKS_PER; n++) {
    db_block *b = block_at(s, v - 1);
    if (!b || atomic_load(&b->owner) != rec + 1) return; /* what is cut off here is found by rebuild */
    v = atomic_load(&b->next);
    atomic_store(&b->next, 0);
    for (uint32_t i = 0; i < BLOCK_ENTRIES; i++) atomic_store(&b->entry[i], 0);
    atomic_store(&b->owner, 0);
  }
}
static void clear_rec(Shm *s, uint32_t i, db_rec *r) { /* DYING -> FREE; table lock held, not in any chain */
  blocks_release(s, i, &r->r.block);
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
    if (!r) { i |= RECS_PER - 1; continue; }
    a32 *link = &r->r.block;
    while (atomic_load(&r->state) == REC_LIVE && atomic_load(link)) {
      uint32_t v = atomic_load(link) - 1;
      db_block *b = block_at(s, v);
      if (!b || v / BLOCKS_PER >= chunks || atomic_load(&b->owner) != i + 1 || seen[v / 8] >> v % 8 & 1) { atomic_store(link, 0); break; }
      seen[v / 8] |= (uint8_t)(1 << v % 8);
      link = &b->next;
    }
  }
  for (uint32_t i = 0; i < chunks * BLOCKS_PER; i++) {
    db_block *b = block_at(s, i);
    if (!b) { i |= BLOCKS_PER - 1; continue; }
    if (!atomic_load(&b->owner) || seen[i / 8] >> i % 8 & 1) continue;
    for (uint32_t m = 0; m < BLOCK_ENTRIES; m++) atomic_store(&b->entry[m], 0);
    atomic_store(&b->next, 0);
    atomic_store(&b->owner, 0);
  }
  free(seen);
}
static void rebuild(Shm *s) { /* table lock held */
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
          if (held_by_living(s, i)) atomic_store(&r->state, REC_LIVE);
          else clear_rec(s, i, r);
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
    if (n > DB_MAX_CHUNKS) { table_unlock(s); return shm_corrupt(s, "more chunks than there can be"); }
    for (; seen < n && i == UINT32_MAX; seen += i == UINT32_MAX) {
      uint32_t c = (s->claim_hint[CH_BLOCK] + seen) % n;
      if (CT_TYPE(atomic_load(chunk_entry(s, c))) != CH_BLOCK) continue;
      for (uint32_t k = 0; k < BLOCKS_PER; k++) {
        b = block_at(s, c * BLOCKS_PER + k);
        if (!b) break;
        if (!atomic_load(&b->owner)) { i = c * BLOCKS_PER + k; break; }
      }
    }
    if (i == UINT32_MAX) {
      int64_t c = chunk_grow(s, CH_BLOCK, 0);
      if (c < 0) { table_unlock(s); return grow_failed(s, c); }
      i = (uint32_t)c * BLOCKS_PER;
      b = block_at(s, i);
      s->claim_hint[CH_BLOCK] = (uint32_t)c;
      seen = 0;
    }
    if (!b) { table_unlock(s); return shm_corrupt(s, "a block outside of the file"); }
    atomic_store(&b->next, 0);
    atomic_store(&b->owner, rec + 1);
    STEP(block_taken); /* taken, unlinked: rebuild gives it back */
    atomic_store(link, i + 1);
    STEP(block_linked);
    link = &b->next;
    count--;
    if (++total > DB_MAX_CHUNKS * BLOCKS_PER) break;
  }
  table_unlock(s);
  return 0;
}

/* ---- methods: records ---- */
static void set_bounded(char *to, uint8_t *len, const char *from, Py_ssize_t n) {
  memcpy(to, from, (size_t)n);
  *len = (uint8_t)n;
}
static PyObject *rec_create(Shm *s, PyObject *args) {
  /* rec_create(dev, ino, size, nonce, exp_name, home, name|None, kind, pid, created) -> (rec, gen, made) */
  unsigned long long dev, ino, size, created;
  const char *nonce, *exp, *home, *name;
  Py_ssize_t nnonce, nexp, nhome, nname;
  unsigned kind, pid;
  if (!PyArg_ParseTuple(args, "KKKy#y#y#z#IIK", &dev, &ino, &size, &nonce, &nnonce, &exp, &nexp, &home, &nhome, &name, &nname, &kind, &pid, &created)) return NULL;
  if (nnonce != 16 || nexp > 31 || nhome > 31 || (name && nname > 31)) {
    PyErr_SetString(PyExc_ValueError, "rec_create: nonce is 16 bytes, names at most 31");
    return NULL;
  }
  if (table_lock(s)) return NULL;
  STEP(rec_locked);
  uint32_t i = 0;
  db_rec *r = ino ? find_rec(s, dev, ino, &i) : NULL;
  uint32_t me = my_life(s);
  if (r && !memcmp(r->nonce, nonce, 16)) { /* another receiver was quicker: its record it is */
    a64 *w = held_word(s, LIFE_INDEX(me), i);
    if (w) atomic_fetch_or(w, 1ull << (i % RECS_PER));
    table_unlock(s);
    return Py_BuildValue("IIO", i, atomic_load(&r->gen), Py_False);
  }
  if (r) { /* the inode number was used again, so the buffer of this record is gone for certain */
    atomic_store(&r->state, REC_DYING);
    unlink_rec(s, i, r);
    clear_rec(s, i, r);
    atomic_store(&r->free_next, atomic_load(&hdr(s)->rec_free));
    atomic_store(&hdr(s)->rec_free, i + 1);
  }
  uint32_t v = atomic_load(&hdr(s)->rec_free);
  r = v ? rec_at(s, v - 1) : NULL;
  if (v && (!r || atomic_load(&r->state) != REC_FREE)) { /* a free list that lies is made anew */
    rebuild(s);
    v = atomic_load(&hdr(s)->rec_free);
    r = v ? rec_at(s, v - 1) : NULL;
  }
  if (!v) {
    int64_t c = chunk_grow(s, CH_REC, 0);
    if (c < 0) { table_unlock(s); grow_failed(s, c); return NULL; }
    for (uint32_t k = RECS_PER; k-- > 0;) {
      db_rec *x = rec_at(s, (uint32_t)c * RECS_PER + k);
      if (!x) break;
      atomic_store(&x->gen, 1);
      atomic_store(&x->free_next, atomic_load(&hdr(s)->rec_free));
      atomic_store(&hdr(s)->rec_free, (uint32_t)c * RECS_PER + k + 1);
    }
    v = atomic_load(&hdr(s)->rec_free);
    r = v ? rec_at(s, v - 1) : NULL;
  }
  if (!r) { table_unlock(s); shm_corrupt(s, "a record outside of the file"); return NULL; }
  i = v - 1;
  atomic_store(&hdr(s)->rec_free, atomic_load(&r->free_next));
  bytes_follow();
  r->dev = dev; r->ino = ino; r->size = size; r->created = created;
  memcpy(r->nonce, nonce, 16);
  r->life = me; r->pid = pid; r->kind = kind;
  set_bounded(r->exp_name, &r->exp_len, exp, nexp);
  set_bounded(r->home, &r->home_len, home, nhome);
  if (name) {
    memcpy(r->name[0], name, (size_t)nname);
    r->name_len[0] = (uint8_t)(nname + 1);
  }
  STEP(rec_filled); /* FREE and in no list: rebuild finds it */
  a64 *w = held_word(s, LIFE_INDEX(me), i);
  if (!w) { table_unlock(s); shm_corrupt(s, "a life without its chunk"); return NULL; }
  atomic_fetch_or(w, 1ull << (i % RECS_PER));
  STEP(rec_held); /* our bit on a FREE record: cleared with our life */
  atomic_store(&r->state, REC_LIVE);
  STEP(rec_live); /* LIVE, not yet found by its inode: rebuild links it, the sweep frees it */
  if (ino) link_rec(s, i, r);
  STEP(rec_linked);
  table_unlock(s);
  return Py_BuildValue("IIO", i, atomic_load(&r->gen), Py_True);
}
static PyObject *rec_find(Shm *s, PyObject *args) { /* rec_find(dev, ino) -> (rec, gen, nonce) | None; no lock */
  unsigned long long dev, ino;
  if (!PyArg_ParseTuple(args, "KK", &dev, &ino)) return NULL;
  uint32_t i;
  db_rec *r = find_rec(s, dev, ino, &i);
  if (!r) Py_RETURN_NONE;
  uint32_t gen = atomic_load(&r->gen);
  char nonce[16];
  memcpy(nonce, r->nonce, 16);
  bytes_read();
  /* the generation last: it only grows, so these are all of one use of the slot */
  if (atomic_load(&r->state) != REC_LIVE || r->dev != dev || r->ino != ino || atomic_load(&r->gen) != gen) Py_RETURN_NONE;
  return Py_BuildValue("IIy#", i, gen, nonce, (Py_ssize_t)16);
}
static PyObject *rec_hold(Shm *s, PyObject *args) { /* rec_hold(rec, gen) -> still that record */
  unsigned i, gen;
  if (!PyArg_ParseTuple(args, "II", &i, &gen)) return NULL;
  if (shm_need_life(s, "hold")) return NULL;
  db_rec *r = rec_at(s, i);
  a64 *w = r ? held_word(s, LIFE_INDEX(my_life(s)), i) : NULL;
  if (!w) Py_RETURN_FALSE;
  uint64_t bit = 1ull << (i % RECS_PER), before = atomic_fetch_or(w, bit);
  /* the sweep stores DYING and then looks at the bits: one of us sees the other */
  if (atomic_load(&r->state) == REC_LIVE && atomic_load(&r->gen) == gen) Py_RETURN_TRUE;
  if (!(before & bit)) atomic_fetch_and(w, ~bit);
  Py_RETURN_FALSE;
}
static PyObject *rec_drop(Shm *s, PyObject *arg) { /* rec_drop(rec) -> a living process still holds it */
  unsigned long i = PyLong_AsUnsignedLong(arg);
  if (i == (unsigned long)-1 && PyErr_Occurred()) return NULL;
  if (!my_life(s)) Py_RETURN_TRUE;
  a64 *w = rec_at(s, (uint32_t)i) ? held_word(s, LIFE_INDEX(my_life(s)), (uint32_t)i) : NULL;
  if (w) atomic_fetch_and(w, ~(1ull << (i % RECS_PER)));
  return PyBool_FromLong(held_by_living(s, (uint32_t)i));
}
static PyObject *rec_free(Shm *s, PyObject *args) { /* rec_free(rec, gen) -> freed; False while a living process holds it */
  unsigned i, gen;
  if (!PyArg_ParseTuple(args, "II", &i, &gen)) return NULL;
  if (table_lock(s)) return NULL;
  db_rec *r = rec_at(s, i);
  int done = 0;
  if (r && atomic_load(&r->gen) == gen && atomic_load(&r->state) == REC_LIVE) {
    atomic_store(&r->state, REC_DYING);
    STEP(rec_dying);
    if (held_by_living(s, i)) atomic_store(&r->state, REC_LIVE);
    else {
      if (r->ino) unlink_rec(s, i, r);
      STEP(rec_unlinked); /* DYING in no chain: rebuild finishes it */
      clear_rec(s, i, r);
      STEP(rec_freed); /* FREE in no list: rebuild finds it */
      atomic_store(&r->free_next, atomic_load(&hdr(s)->rec_free));
      atomic_store(&hdr(s)->rec_free, i + 1);
      done = 1;
    }
  }
  table_unlock(s);
  return PyBool_FromLong(done);
}
static int rec_there(Shm *s, uint32_t i, db_rec *r) {
  uint32_t state = r ? atomic_load(&r->state) : REC_FREE;
  if (state == REC_DYING) { /* rec_free looks who holds it, and gives up when it sees our bit */
    a64 *held = my_life(s) ? held_word(s, LIFE_INDEX(my_life(s)), i) : NULL;
    if (held && atomic_load(held) >> (i % RECS_PER) & 1) state = REC_LIVE;
  }
  return state == REC_LIVE;
}
static PyObject *rec_info(Shm *s, PyObject *arg) { /* what a record says, all of it of one buffer; None: free, or given to another meanwhile */
  unsigned long i = PyLong_AsUnsignedLong(arg);
  if (i == (unsigned long)-1 && PyErr_Occurred()) return NULL;
  db_rec *r = rec_at(s, (uint32_t)i);
  uint32_t gen = r ? atomic_load(&r->gen) : 0;
  if (!rec_there(s, (uint32_t)i, r)) Py_RETURN_NONE;
  char name[32];
  uint32_t v, len;
  int tries = 0;
  do { /* a rename writes the other half and then switches; two renames while we copy: copy again */
    v = atomic_load(&r->name_version);
    len = r->name_len[v & 1];
    memcpy(name, r->name[v & 1], 32);
    bytes_read();
  } while (atomic_load(&r->name_version) != v && ++tries < 1000);
  if (len > 32) len = 32;
  PyObject *n = len ? PyBytes_FromStringAndSize(name, len - 1) : Py_NewRef(Py_None);
  if (!n) return NULL;
  uint8_t el = r->exp_len > 31 ? 31 : r->exp_len, hl = r->home_len > 31 ? 31 : r->home_len;
  PyObject *out = Py_BuildValue("{sI,sK,sK,sK,sy#,sK,sI,sI,sI,si,sI,sI,sK,sI,sN,sy#,sy#}", "gen", gen, "dev", r->dev,
                       "ino", r->ino, "size", r->size, "nonce", (const char *)r->nonce, (Py_ssize_t)16, "created", r->created, "life", r->life,
                       "pid", r->pid, "kind", r->kind, "torn", atomic_load(&r->torn), "torn_pid", r->torn_pid, "absent",
                       r->absent, "absent_ns", r->absent_ns, "resv", r->resv, "name", n, "exp_name", r->exp_name, (Py_ssize_t)el,
                       "home", r->home, (Py_ssize_t)hl);
  bytes_read();
  if (!out || (rec_there(s, (uint32_t)i, r) && atomic_load(&r->gen) == gen)) return out; /* in this order: see rec_find */
  Py_DECREF(out);
  Py_RETURN_NONE;
}
static PyObject *rec_name(Shm *s, PyObject *args) { /* rec_name(rec, bytes): rename */
  unsigned i;
  const char *name;
  Py_ssize_t n;
  if (!PyArg_ParseTuple(args, "Iy#", &i, &name, &n)) return NULL;
  if (n > 31) { PyErr_SetString(PyExc_ValueError, "rec_name: at most 31 bytes"); return NULL; }
  if (table_lock(s)) return NULL;
  db_rec *r = rec_at(s, i);
  if (r && atomic_load(&r->state) == REC_LIVE) {
    uint32_t v = atomic_load(&r->name_version) + 1;
    bytes_follow(); /* who still copies this half must see that the other one counts */
    memset(r->name[v & 1], 0, 32);
    memcpy(r->name[v & 1], name, (size_t)n);
    r->name_len[v & 1] = (uint8_t)(n + 1);
    STEP(name_written); /* the old name still counts */
    atomic_store(&r->name_version, v);
    STEP(name_switched);
  }
  table_unlock(s);
  Py_RETURN_NONE;
}
static PyObject *rec_set(Shm *s, PyObject *args) { /* rec_set(rec, field, value) */
  unsigned i;
  const char *field;
  long long v;
  if (!PyArg_ParseTuple(args, "IsL", &i, &field, &v)) return NULL;
  db_rec *r = rec_at(s, i);
  if (!r) { shm_corrupt(s, "a record outside of the file"); return NULL; }
  if (!strcmp(field, "torn")) atomic_store(&r->torn, (int32_t)v);
  else if (!strcmp(field, "torn_pid")) r->torn_pid = (uint32_t)v;
  else if (!strcmp(field, "absent")) r->absent = (uint32_t)v;
  else if (!strcmp(field, "absent_ns")) r->absent_ns = (uint64_t)v;
  else if (!strcmp(field, "resv")) r->resv = (uint32_t)v;
  else { PyErr_SetString(PyExc_ValueError, "rec_set: no such field"); return NULL; }
  Py_RETURN_NONE;
}
static PyObject *rec_torn(Shm *s, PyObject *arg) { /* errno of the mark, 0: whole */
  unsigned long i = PyLong_AsUnsignedLong(arg);
  if (i == (unsigned long)-1 && PyErr_Occurred()) return NULL;
  db_rec *r = rec_at(s, (uint32_t)i);
  return PyLong_FromLong(r ? atomic_load(&r->torn) : 0);
}
static PyObject *rec_holders(Shm *s, PyObject *arg) { /* living life indices with a bit */
  unsigned long i = PyLong_AsUnsignedLong(arg);
  if (i == (unsigned long)-1 && PyErr_Occurred()) return NULL;
  PyObject *out = PyList_New(0);
  uint32_t high = atomic_load(&hdr(s)->life_high);
  for (uint32_t k = 0; out && k < high && k < DB_LIVES && rec_at(s, (uint32_t)i); k++) {
    if (atomic_load(&((db_life *)(s->base + OFF_LIVES) + k)->state) != LIFE_ALIVE) continue;
    a64 *w = held_word(s, k, (uint32_t)i);
    if (!w || !(atomic_load(w) >> (i % RECS_PER) & 1)) continue;
    PyObject *n = PyLong_FromUnsignedLong(k);
    if (!n || PyList_Append(out, n)) Py_CLEAR(out);
    Py_XDECREF(n);
  }
  return out;
}
static PyObject *rec_list(Shm *s, PyObject *unused) { /* every live record's number */
  PyObject *out = PyList_New(0);
  uint32_t n = atomic_load(&hdr(s)->nchunks);
  for (uint32_t c = 0; out && c < n && c < DB_MAX_CHUNKS; c++) {
    if (CT_TYPE(atomic_load(chunk_entry(s, c))) != CH_REC) continue;
    for (uint32_t k = 0; out && k < RECS_PER; k++) {
      db_rec *r = rec_at(s, c * RECS_PER + k);
      if (!r) break;
      if (atomic_load(&r->state) != REC_LIVE) continue;
      PyObject *x = PyLong_FromUnsignedLong(c * RECS_PER + k);
      if (!x || PyList_Append(out, x)) Py_CLEAR(out);
      Py_XDECREF(x);
    }
  }
  return out;
}

static PyObject *rec_orphans(Shm *s, PyObject *unused) { /* [(rec, gen, dev, ino, absent, absent_ns)] that no living process holds */
  PyObject *out = PyList_New(0);
  uint32_t n = atomic_load(&hdr(s)->nchunks);
  for (uint32_t c = 0; out && c < n && c < DB_MAX_CHUNKS; c++) {
    if (CT_TYPE(atomic_load(chunk_entry(s, c))) != CH_REC) continue;
    for (uint32_t i = c * RECS_PER; out && i < (c + 1) * RECS_PER; i++) {
      db_rec *r = rec_at(s, i);
      if (!r) break;
      if (atomic_load(&r->state) != REC_LIVE || held_by_living(s, i)) continue;
      PyObject *x = Py_BuildValue("IIKKIK", i, atomic_load(&r->gen), r->dev, r->ino, r->absent, r->absent_ns);
      if (!x || PyList_Append(out, x)) Py_CLEAR(out);
      Py_XDECREF(x);
    }
  }
  return out;
}

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
      if (atomic_load(&r->state) == REC_FREE) lost++;
      else if (r->ino && find_rec(s, r->dev, r->ino, &at) != r) hidden++;
      uint32_t b = atomic_load(&r->state) == REC_LIVE ? atomic_load(&r->r.block) : 0;
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

/* ---- methods: chunks, lives, lock ---- */
static PyObject *py_chunk_claim(Shm *s, PyObject *arg) {
  long type = PyLong_AsLong(arg);
  if (type == -1 && PyErr_Occurred()) return NULL;
  if (type <= CH_NONE || type > CH_CTX) { PyErr_SetString(PyExc_ValueError, "chunk_claim: no such type"); return NULL; }
  if (shm_need_life(s, "claim")) return NULL;
  int64_t c = chunk_claim(s, (uint32_t)type, my_life(s));
  return c < 0 ? NULL : PyLong_FromLongLong(c);
}
static PyObject *chunks_of(Shm *s, PyObject *arg) { /* chunks_of(life) -> [(chunk, type)] */
  unsigned long life = PyLong_AsUnsignedLong(arg);
  if (life == (unsigned long)-1 && PyErr_Occurred()) return NULL;
  PyObject *out = PyList_New(0);
  uint32_t n = atomic_load(&hdr(s)->nchunks);
  for (uint32_t c = 0; out && c < n && c < DB_MAX_CHUNKS; c++) {
    uint64_t e = atomic_load(chunk_entry(s, c));
    if (CT_LIFE(e) != life) continue;
    PyObject *x = Py_BuildValue("II", c, CT_TYPE(e));
    if (!x || PyList_Append(out, x)) Py_CLEAR(out);
    Py_XDECREF(x);
  }
  return out;
}
static PyObject *chunk_return(Shm *s, PyObject *args) { /* chunk_return(chunk, life): ownerless again */
  unsigned c, life;
  if (!PyArg_ParseTuple(args, "II", &c, &life)) return NULL;
  if (c >= DB_MAX_CHUNKS) { shm_corrupt(s, "a chunk outside of the table"); return NULL; }
  uint64_t e = atomic_load(chunk_entry(s, c));
  if (CT_LIFE(e) == life) atomic_compare_exchange_strong(chunk_entry(s, c), &e, CT_MAKE(CT_TYPE(e), CT_ORD(e), 0));
  STEP(reap_chunk);
  Py_RETURN_NONE;
}
static PyObject *reap_life_chunk(Shm *s, PyObject *args) { /* (chunk, type): contexts get a new generation, bits go */
  unsigned c, type;
  if (!PyArg_ParseTuple(args, "II", &c, &type)) return NULL;
  char *p = type == CH_LIFE || type == CH_CTX ? chunk_at(s, c, type) : NULL;
  if (!p) { shm_corrupt(s, "a chunk outside of the file"); return NULL; }
  for (uint32_t i = type == CH_LIFE ? CTX_FIRST_IN_LIFE : 0; i < CTX_PER; i++) {
    db_ctx *x = (db_ctx *)p + i;
    if (!atomic_load(&x->life)) continue;
    resv_bequeath(s, x, (uint64_t)atomic_load(&x->gen) << 32 | (c * CTX_PER + i)); /* before anybody may take it */
    atomic_fetch_add(&x->gen, 1); /* every lock it named can be taken from now on */
    atomic_store(&x->waits_on, 0);
    atomic_store(&x->life, 0);
    STEP(reap_ctx);
  }
  if (type == CH_LIFE)
    for (uint32_t i = 0; i < REC_CHUNKS; i++) atomic_store((a64 *)p + i, 0);
  Py_RETURN_NONE;
}
static PyObject *reap_table_lock(Shm *s, PyObject *arg) { /* the dead life's hold on the table lock ends here */
  unsigned long life = PyLong_AsUnsignedLong(arg);
  if (life == (unsigned long)-1 && PyErr_Occurred()) return NULL;
  if (!my_life(s)) Py_RETURN_FALSE; /* its waiters take it themselves once the life is no longer current */
  a32 *w = &hdr(s)->table_lock;
  uint32_t v = atomic_load(w);
  if ((v & ~TL_WAITERS) != life || !atomic_compare_exchange_strong(w, &v, my_life(s) | TL_WAITERS)) Py_RETURN_FALSE;
  STEP(table_stolen);
  rebuild(s);
  STEP(table_rebuilt);
  table_unlock(s);
  Py_RETURN_TRUE;
}
static PyObject *py_life_current(Shm *s, PyObject *arg) {
  unsigned long id = PyLong_AsUnsignedLong(arg);
  if (id == (unsigned long)-1 && PyErr_Occurred()) return NULL;
  return PyBool_FromLong(id <= 0x7fffffff && life_current(s, (uint32_t)id));
}

PyMethodDef table_methods[] = {
#define M(n, flags, doc) {#n, (PyCFunction)n, flags, doc}
    M(rec_create, METH_VARARGS, "Make or find the record of a buffer and hold it."),
    M(rec_find, METH_VARARGS, "Find a record by (dev, ino), without a lock."),
    M(rec_hold, METH_VARARGS, "Hold (rec, gen) for this life -> it is still that record."),
    M(rec_drop, METH_O, "Let go of a record -> a living process still holds it."),
    M(rec_free, METH_VARARGS, "Free (rec, gen) unless a living process holds it -> freed."),
    M(rec_info, METH_O, "What a record says, or None."), M(rec_name, METH_VARARGS, "Rename (rec, bytes)."),
    M(rec_set, METH_VARARGS, "Set (rec, field, value)."), M(rec_torn, METH_O, "The torn mark of a record."),
    M(rec_holders, METH_O, "Indices of the living lives that hold a record."), M(rec_list, METH_NOARGS, "Every live record."),
    M(table_audit, METH_NOARGS, "What the derived parts of the table miss: (free records, live records, blocks)."),
    M(rec_orphans, METH_NOARGS, "Live records that no living process holds."),
    {"chunk_claim", (PyCFunction)py_chunk_claim, METH_O, "Own a chunk of a type."},
    M(chunks_of, METH_O, "Chunks of a life: [(chunk, type)]."), M(chunk_return, METH_VARARGS, "Give (chunk, life) back."),
    M(reap_life_chunk, METH_VARARGS, "End the contexts and holds in (chunk, type)."),
    M(reap_table_lock, METH_O, "Take the table lock from a dead life and repair."),
    {"life_current", (PyCFunction)py_life_current, METH_O, "Is this life id its slot's present one?"},
    {0}};
