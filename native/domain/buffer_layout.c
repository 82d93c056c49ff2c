/* buffer_layout.c - what the bytes of a buffer mean, in a slot that the buffer's record names.
 *
 * The library packs a layout and checks what it unpacks; here it is bytes. A record gets a layout once, before it is LIVE or later, and
 * keeps it. So one store of the slot's number into the record is the whole change, and a process that reads that number finds every byte. A
 * slot is in use if its owner is a LIVE record that names it. Whatever else a death leaves is free, and table_rebuild() puts it into the
 * free list.
 */
#include "domain/buffer_layout.h"
#include "domain/slots.h"
#include "domain/step.h"

_Static_assert(LAYOUTS_PER * sizeof(db_layout) <= DB_CHUNK, "a chunk has room for its layouts");

static void layout_push(Shm *s, uint32_t i, db_layout *l) {
  atomic_store(&l->owner, 0);
  atomic_store(&l->next, atomic_load(&hdr(s)->layout_free));
  atomic_store(&hdr(s)->layout_free, i + 1);
}

static int names(db_rec *r, uint32_t slot) { return r && atomic_load(&r->state) == REC_LIVE && atomic_load(&r->layout) == slot + 1; }

void layouts_rebuild(Shm *s, uint32_t chunks) {
  atomic_store(&hdr(s)->layout_free, 0);
  for (uint32_t i = 0; i < chunks * RECS_PER; i++) {
    db_rec *r = rec_at(s, i);
    if (!r) {
      i |= RECS_PER - 1; /* no chunk of records */
      continue;
    }
    uint32_t v = atomic_load(&r->layout);
    db_layout *l = v ? layout_at(s, v - 1) : NULL;
    if (v && atomic_load(&r->state) == REC_LIVE && (!l || atomic_load(&l->owner) != i + 1)) atomic_store(&r->layout, 0); /* it lies */
  }
  for (uint32_t c = 0; c < chunks; c++) {
    if (CT_TYPE(atomic_load(chunk_entry(s, c))) != CH_LAYOUT) continue;
    for (uint32_t i = c * LAYOUTS_PER; i < (c + 1) * LAYOUTS_PER; i++) {
      db_layout *l = layout_at(s, i);
      if (!l) break;
      uint32_t owner = atomic_load(&l->owner);
      if (!owner || !names(rec_at(s, owner - 1), i)) layout_push(s, i, l);
    }
  }
}

void layouts_add(Shm *s, uint32_t chunk) {
  db_layout *l;
  for (uint32_t i = (chunk + 1) * LAYOUTS_PER; i-- > chunk * LAYOUTS_PER && (l = layout_at(s, i));) layout_push(s, i, l);
}

/* Take a slot out of the free list; NULL: it is empty. */
static db_layout *layout_take(Shm *s, uint32_t *at) {
  for (int k = 0; k < 2; k++) {
    uint32_t v = atomic_load(&hdr(s)->layout_free);
    if (!v) return NULL;
    db_layout *l = layout_at(s, v - 1);
    if (l && !atomic_load(&l->owner)) {
      *at = v - 1;
      atomic_store(&hdr(s)->layout_free, atomic_load(&l->next)); /* unowned and in no list: table_rebuild() puts it into the free list */
      return l;
    }
    layouts_rebuild(s, chunk_count(s)); /* the list lies */
  }
  return NULL;
}

int layout_give(Shm *s, uint32_t rec, db_rec *r, uint32_t part, const char *bytes, size_t n) {
  uint32_t i = 0;
  db_layout *l = layout_take(s, &i);
  if (!l) return 0;
  bytes_follow(); /* a reader that still copies the slot's last use must see that the record is another one by now */
  memset(l->bytes, 0, sizeof l->bytes);
  memcpy(l->bytes, bytes, n);
  l->length = (uint32_t)n;
  l->part = part;
  atomic_store(&l->owner, rec + 1);
  STEP_OF(layout_filled, r, atomic_load(&r->gen)); /* owned, and the record doesn't name it: table_rebuild() frees it */
  atomic_store(&r->layout, i + 1);
  STEP_OF(layout_named, r, atomic_load(&r->gen)); /* the record has it; of a record that is not LIVE yet table_rebuild() frees it */
  return 1;
}

void layout_drop(Shm *s, uint32_t rec, db_rec *r) {
  uint32_t v = atomic_exchange(&r->layout, 0);
  db_layout *l = v ? layout_at(s, v - 1) : NULL;
  if (l && atomic_load(&l->owner) == rec + 1) layout_push(s, v - 1, l); /* else it lies, and table_rebuild() finds what is cut off here */
}

int layouts_used(Shm *s, uint32_t chunk) {
  for (uint32_t i = chunk * LAYOUTS_PER; i < (chunk + 1) * LAYOUTS_PER; i++) {
    db_layout *l = layout_at(s, i);
    if (!l) break;
    uint32_t owner = atomic_load(&l->owner);
    if (owner && names(rec_at(s, owner - 1), i)) return 1;
  }
  return 0;
}

void layouts_count(Shm *s, uint32_t *unused, uint32_t *listed) {
  *unused = *listed = 0;
  uint32_t v = atomic_load(&hdr(s)->layout_free), most = DB_MAX_CHUNKS * LAYOUTS_PER;
  for (db_layout *l; v && *listed < most && (l = layout_at(s, v - 1)); v = atomic_load(&l->next)) ++*listed;
  for (uint32_t c = 0, n = chunk_count(s); c < n; c++)
    for (uint32_t i = c * LAYOUTS_PER; i < (c + 1) * LAYOUTS_PER; i++) {
      db_layout *l = layout_at(s, i);
      if (!l) break;
      uint32_t owner = atomic_load(&l->owner);
      *unused += !owner || !names(rec_at(s, owner - 1), i);
    }
}

int layout_read(Shm *s, uint32_t rec, db_rec *r, layout_copy *to) {
  uint32_t v = atomic_load(&r->layout);
  db_layout *l = v ? layout_at(s, v - 1) : NULL;
  if (!l || atomic_load(&l->owner) != rec + 1) return 0;
  to->length = l->length > LAYOUT_BYTES ? LAYOUT_BYTES : l->length;
  to->part = l->part;
  memcpy(to->bytes, l->bytes, LAYOUT_BYTES);
  bytes_read();
  STEP(read_layout);
  return 1;
}
