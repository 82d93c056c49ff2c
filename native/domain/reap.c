/* reap.c - the end of a life, its own or by a reaper. See reap.h. */
#include "domain/reap.h"
#include "domain/fence.h"
#include "domain/lend.h"
#include "domain/step.h"
#include "domain/streams.h"
#include "domain/ticker.h"

/* The next chunk that a life owns, from *at on. 1, with its type; 0: no more. */
static int next_owned(Shm *s, uint32_t life, uint32_t *at, uint32_t *type) {
  for (uint32_t n = chunk_count(s); *at < n; ++*at) {
    uint64_t e = atomic_load(chunk_entry(s, *at));
    if (CT_LIFE(e) != life) continue;
    *type = CT_TYPE(e);
    return 1;
  }
  return 0;
}

/* The content is torn if the fence is a granted write() of the record's present use. */
static void mark_torn(Shm *s, db_fence *f, uint32_t life) {
  const uint32_t granted_write = FF_ACCESS | FF_WRITE | FF_GRANTED;
  if ((atomic_load(&f->flags) & granted_write) != granted_write) return;
  uint32_t rec = atomic_load(&f->rec);
  db_rec *r = rec ? rec_at(s, rec - 1) : NULL;
  if (r && atomic_load(&r->gen) == atomic_load(&f->rec_gen))
    atomic_store(&r->torn, TORN_MAKE(atomic_load(&life_slot(s, life)->pid), EOWNERDEAD));
  STEP_OF(reap_torn, f, life); /* torn and pending: the next reaper marks it again. A reader that comes in after the fence finds the mark */
}

static void end_fences(Shm *s, uint32_t chunk, uint32_t life) {
  for (uint32_t i = 0; i < FENCES_PER; i++) {
    uint32_t slot = chunk * FENCES_PER + i;
    db_fence *f = fence_at(s, slot);
    if (!f) return;
    uint32_t word = atomic_load(&f->word);
    uint64_t handle = H_MAKE(slot, END_GEN(atomic_load(&f->end)));
    if (word & FW_SIGNALED) {
      if (word & FW_SYNC) fence_wake_sync_files(s, handle, f); /* its owner, or a reaper, died after signaling it and before waking them */
      continue;
    }
    STEP_NOTE(reap_pending, f, handle);
    mark_torn(s, f, life);
    fence_finish(s, handle, f, -EOWNERDEAD, 0, fence_for_all(f));
    STEP(reap_fence); /* signaled: the next reaper goes on with the others */
  }
}

static void end_contexts(Shm *s, uint32_t chunk, uint32_t type) {
  char *p = chunk_at(s, chunk, type);
  if (!p) return;
  for (uint32_t i = type == CH_LIFE ? CTX_FIRST_IN_LIFE : 0; i < CTX_PER; i++) {
    db_ctx *x = (db_ctx *)p + i;
    if (!atomic_load(&x->life)) continue;
    /* Before another process may take the lock. */
    resv_return_dead(s, x, (uint64_t)atomic_load(&x->gen) << 32 | (chunk * CTX_PER + i));
    STEP_NOTE(ctx_closing, x, (uint64_t)atomic_load(&x->gen) << 32 | (chunk * CTX_PER + i));
    atomic_fetch_add(&x->gen, 1); /* from here on every lock that it named can be taken */
    atomic_store(&x->waits_on, 0);
    atomic_store(&x->life, 0);
    STEP_OF(reap_ctx, x, chunk * CTX_PER + i); /* closed: the next reaper goes on with the others */
  }
  if (type == CH_LIFE)
    for (uint32_t i = 0; i < REC_CHUNKS; i++) atomic_store((a64 *)p + i, 0);
}

static void close_timelines(Shm *s, uint32_t chunk) {
  for (uint32_t i = 0; i < TIMELINES_PER; i++) {
    db_timeline *t = timeline_at(s, chunk * TIMELINES_PER + i);
    if (t) atomic_store(&t->open, 0);
  }
}

/* Derived parts may be wrong: its next owner makes them again. */
static void leave_table(Shm *s, uint32_t life) {
  a32 *w = &hdr(s)->table_lock;
  uint32_t v = atomic_load(w);
  while ((v & ~TL_WAITERS) == life)
    if (atomic_compare_exchange_weak(w, &v, TL_NOBODY | (v & TL_WAITERS))) {
      STEP_OF(table_left, w, life); /* it names nobody: whoever looks takes it and repairs the table */
      word_wake(w, INT32_MAX);
      return;
    }
}

void life_end(Shm *s, uint32_t life, endings *then) {
  uint32_t c, type;
  s->ending = then;
  if (life_current(s, life)) atomic_store(&life_slot(s, life)->served, 0);
  for (c = 0; next_owned(s, life, &c, &type); c++)
    if (type == CH_FENCE) end_fences(s, c, life);
  STEP_OF(reap_fences_done, life_slot(s, life), life);
  for (c = 0; next_owned(s, life, &c, &type); c++) {
    if (type == CH_LIFE || type == CH_CTX) end_contexts(s, c, type);
    if (type == CH_TIMELINE) close_timelines(s, c);
  }
  STEP_OF(reap_contexts_done, life_slot(s, life), life);
  streams_end(s, life); /* after its fences, so that whoever is woken finds them ended */
  leave_table(s, life);
  s->ending = NULL;
}

static int sync_files_wait(Shm *s, uint32_t chunk) {
  for (uint32_t i = 0; i < FENCES_PER; i++) {
    db_fence *f = fence_at(s, chunk * FENCES_PER + i);
    if (f && (atomic_load(&f->word) & (FW_SIGNALED | FW_SYNC)) == (FW_SIGNALED | FW_SYNC)) return 1;
  }
  return 0;
}

int life_clean(Shm *s, uint32_t life) {
  uint32_t c, type;
  if (!life_current(s, life)) return -1;
  for (c = 0; next_owned(s, life, &c, &type); c++)
    if (type == CH_FENCE && sync_files_wait(s, c)) return 0;
  for (c = 0; next_owned(s, life, &c, &type); c++) {
    uint64_t e = atomic_load(chunk_entry(s, c));
    STEP_NOTE(chunk_returning, chunk_entry(s, c), life);
    if (CT_LIFE(e) == life) atomic_compare_exchange_strong(chunk_entry(s, c), &e, CT_MAKE(type, CT_ORD(e), 0));
    STEP_OF(reap_chunk, chunk_entry(s, c), life); /* ownerless: the next life that needs one takes it */
  }
  STEP_OF(reap_returned, life_slot(s, life), life);
  /* State and generation in one word: a reaper that was slow finds that the slot is not this life's any more. */
  db_life *l = life_slot(s, life);
  uint64_t now = atomic_load((a64 *)&l->state);
  while ((uint32_t)now == LIFE_ALIVE && LIFE_ID(LIFE_INDEX(life), (uint32_t)(now >> 32)) == life)
    if (atomic_compare_exchange_weak((a64 *)&l->state, &now, (now >> 32 << 32) | LIFE_CLEAN)) break;
  STEP_OF(reap_clean, life_slot(s, life), life);
  return 1;
}
