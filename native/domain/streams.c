/* streams.c - streams as processes meet there: waking, fences for those who know only a slot's buffer, and the end of a life. */
#include "domain/streams.h"
#include "domain/fence.h"
#include "domain/step.h"
#include "domain/stream_slots.h"
#include "domain/ticker.h"

/* ---- pending ---- */

static int slot_pending(Shm *s, db_stream *x, uint32_t k, int kind) {
  uint64_t state = atomic_load(&x->slot[k].state), fence = atomic_load(&x->slot[k].fence);
  if (fence && fence_pending(s, fence, NULL)) return 1; /* who is to fill the frame has not ended */
  if (kind == ENTRY_WRITE) return (state & S_WRITING) != 0;
  uint64_t on = stream_places(x);
  /* The promise before the claims: a member claims a frame before its group's cursor moves past it. */
  if (SEQ_OF(state) && atomic_load(&x->policy) == SP_WAIT && SEQ_OF(state) >= stream_promised(x, on)) return 1;
  return (stream_claims(x, on) >> k & 1) != 0;
}

int stream_pending(Shm *s, uint64_t handle) {
  db_stream *x = stream_of(s, handle);
  uint32_t k = H_SLOT(handle) % STREAM_SLOTS;
  return x && k < stream_slots(x) && slot_pending(s, x, k, H_GEN(handle) & 1);
}

int stream_is_own(Shm *s, uint64_t handle) {
  db_stream *x = stream_of(s, handle);
  uint32_t k = H_SLOT(handle) % STREAM_SLOTS, me = my_life(s);
  if (!x || !me) return 0;
  if (!(H_GEN(handle) & 1)) /* a frame that it makes, and not one that is published and waits for its fence */
    return (atomic_load(&x->slot[k].state) & S_WRITING) && atomic_load(&x->prod) == ((uint64_t)me << 8 | SD_ALIVE);
  for (uint64_t on = stream_places(x); on; on &= on - 1) {
    db_reader *r = &x->reader[__builtin_ctzll(on)];
    if (atomic_load(&r->owner) == me && (atomic_load(&r->claims) >> k & 1)) return 1;
  }
  return 0;
}

/* ---- asked fences ---- */

/* An asked fence is for the frame that was in the slot: another one there says that it is over. The lowest half of its number will do, as
 * an equal one of a later frame only makes the fence end later. */
static int frame_pending(Shm *s, db_stream *x, uint32_t k, int kind, db_fence *f) {
  uint32_t frame = (uint32_t)SEQ_OF(atomic_load(&x->slot[k].state));
  return frame == atomic_load(&f->rec_gen) && slot_pending(s, x, k, kind);
}

/* End the asked fence of an entry that is over. 1: it is pending still. */
static int answer(Shm *s, db_stream *x, uint32_t k, int kind) {
  uint64_t asked = atomic_load(&x->slot[k].asked[kind]);
  db_fence *f;
  if (!asked) return 0;
  if (fence_pending(s, asked, &f) && f && fence_for_all(f)) {
    if (frame_pending(s, x, k, kind, f)) return 1;
    fence_finish(s, asked, f, 0, 0, 1);
    STEP_OF(stream_answered, x, asked); /* signaled, and still named: another asker finds that it is past */
  }
  atomic_compare_exchange_strong(&x->slot[k].asked[kind], &asked, 0);
  return 0;
}

/* Whoever has taken SW_ASK ends what is over. If something stays, the next change must wake again. */
static void answer_all(Shm *s, db_stream *x) {
  int stays = 0;
  for (uint32_t k = 0, n = stream_slots(x); k < n; k++)
    for (int kind = 0; kind < 2; kind++) stays |= answer(s, x, k, kind);
  if (!stays) return;
  atomic_fetch_or(&x->want, SW_ASK);
  for (uint32_t k = 0, n = stream_slots(x); k < n; k++) /* it may be over by now, and whoever ended it may have missed the bit */
    for (int kind = 0; kind < 2; kind++) answer(s, x, k, kind);
}

/* The slots of fences that this process made for stream_ask() and that have ended: it may use them again. */
static void free_ended(Shm *s) {
  if (s->asked_life != my_life(s)) {
    s->asked_life = my_life(s);
    s->asked.count = 0;
  }
  uint32_t kept = 0;
  for (uint32_t i = 0; i < s->asked.count; i++) {
    uint64_t h = s->asked.handles[i];
    if (fence_pending(s, h, NULL))
      s->asked.handles[kept++] = h;
    else if (fence_free_slot(s, H_SLOT(h)))
      PyErr_Clear(); /* it returns with its chunk */
  }
  s->asked.count = kept;
}

static uint64_t make_asked(Shm *s, uint64_t number, uint32_t flags, uint64_t frame) { /* 0: an exception is set */
  db_fence *f;
  free_ended(s);
  uint64_t made = fence_make(s, 0, atomic_fetch_add(&hdr(s)->next_context, 1), number, FF_ANYBODY | flags, 0, 0);
  if (made && fence_pending(s, made, &f) && f) {
    fence_flag(made, f, FW_SHARED);
    atomic_store(&f->rec_gen, (uint32_t)frame);
  }
  return made;
}

uint64_t stream_ask(Shm *s, uint64_t handle) {
  db_stream *x = stream_of(s, handle);
  uint32_t k = H_SLOT(handle) % STREAM_SLOTS;
  int kind = H_GEN(handle) & 1;
  if (!x || k >= stream_slots(x)) return 0;
  a64 *word = &x->slot[k].asked[kind];
  for (int tries = 0; tries < 64 && slot_pending(s, x, k, kind); tries++) { /* more: it was over as often, for other frames */
    uint64_t fence = atomic_load(&x->slot[k].fence), found = atomic_load(word);
    if (fence && fence_pending(s, fence, NULL)) return fence; /* whoever waits for it asks again after that */
    db_fence *f;
    if (found && fence_pending(s, found, &f) && f) {
      if (!frame_pending(s, x, k, kind, f)) { /* of a frame that is over */
        answer(s, x, k, kind);
        continue;
      }
    } else {
      uint64_t made = make_asked(s, handle, FF_ASKED, SEQ_OF(atomic_load(&x->slot[k].state)));
      if (!made) return 0;
      if (!atomic_compare_exchange_strong(word, &found, made)) {
        fence_end(s, made, 0);
        continue;
      }
      list_handle(&s->asked, made);
      found = made;
    }
    STEP_OF(stream_asked, x, found); /* named: whoever ends the entry signals it; the death of its maker ends it too */
    atomic_fetch_or(&x->want, SW_ASK);
    return answer(s, x, k, kind) || fence_pending(s, found, NULL) ? found : 0;
  }
  return 0;
}

void stream_look(Shm *s, uint64_t asked) {
  db_fence *f;
  if (!fence_pending(s, asked, &f) || !f || !(atomic_load(&f->flags) & FF_ASKED)) return;
  uint64_t handle = atomic_load(&f->seqno);
  db_stream *x = stream_of(s, handle);
  uint32_t k = H_SLOT(handle) % STREAM_SLOTS;
  if (!x || k >= stream_slots(x))
    fence_finish(s, asked, f, -ENODEV, 0, 1); /* the stream is over */
  else if (atomic_load(&x->slot[k].asked[H_GEN(handle) & 1]) == asked)
    answer(s, x, k, H_GEN(handle) & 1);
}

/* ---- waking ---- */

/* Who awaits a word has a fence there. Another one that comes late finds it ended, and puts its own in its place. */
static void end_woken(Shm *s, db_stream *x, int b) {
  uint64_t h = atomic_load(&x->woken[b]) ? atomic_exchange(&x->woken[b], 0) : 0;
  db_fence *f;
  if (h && fence_pending(s, h, &f) && f && fence_for_all(f)) fence_finish(s, h, f, 0, 0, 1);
}

uint64_t stream_await(Shm *s, db_stream *x, uint32_t word) {
  int b = word == SW_NEWS ? 0 : word == SW_SPACE ? 1 : 2;
  uint64_t found = atomic_load(&x->woken[b]), made = 0;
  while (!found || !fence_pending(s, found, NULL)) {
    if (!made && !(made = make_asked(s, 0, 0, 0))) return 0;
    if (!atomic_compare_exchange_strong(&x->woken[b], &found, made)) continue;
    list_handle(&s->asked, made);
    found = made;
    made = 0;
  }
  if (made) fence_end(s, made, 0);
  atomic_fetch_or(&x->want, word); /* whoever takes the bit finds the fence */
  return found;
}

/* Take the bit away, then count, then wake. Whoever set the bit read the count before, so either the futex finds another count, or the
 * sleeper is woken. A death in between loses one wake-up: sleepers look again at their next tick. */
void stream_wake_those(Shm *s, db_stream *x, uint32_t words) {
  uint32_t taken = 0;
  for (int b = 0; b < 3; b++) {
    if (!(words >> b & 1) || !(atomic_fetch_and(&x->want, ~(1u << b)) >> b & 1)) continue;
    STEP_OF(stream_taken, x, 1u << b);
    atomic_fetch_add(&x->count[b], 1);
    STEP_OF(stream_counted, x, 1u << b);
    word_wake(&x->count[b], INT32_MAX);
    taken |= 1u << b;
  }
  for (int b = 0; b < 3; b++)
    if (taken >> b & 1) end_woken(s, x, b);
  if (taken & SW_ASK) answer_all(s, x);
}

/* ---- foreign fences ---- */

static db_stream *stream_of_slot(Shm *s, db_rec *r, uint32_t *k) { /* of the buffer's record; NULL: of none */
  uint32_t part = atomic_load(&r->stream);
  if (__builtin_expect(!part, 1) || !PART_OF_SLOT(part)) return NULL;
  db_stream *x = stream_at(s, PART_NUMBER(part) / STREAM_SLOTS);
  *k = PART_NUMBER(part) % STREAM_SLOTS;
  return x && atomic_load(&x->owner) && atomic_load(&x->gen) == atomic_load(&r->stream_gen) ? x : NULL;
}

uint64_t stream_entry_of(Shm *s, db_rec *r, int kind) {
  uint32_t k;
  db_stream *x = stream_of_slot(s, r, &k);
  return x ? stream_handle(PART_NUMBER(atomic_load(&r->stream)) / STREAM_SLOTS, k, atomic_load(&x->gen), kind) : 0;
}

void stream_note_foreign(Shm *s, db_rec *r) {
  uint32_t k;
  db_stream *x = stream_of_slot(s, r, &k);
  if (!x) return;
  /* The fence is in the list already. Who clears the bit looks at the list between two looks at this word. */
  a32 *w = &x->slot[k].foreign;
  uint32_t was = atomic_load(w);
  while (!atomic_compare_exchange_weak(w, &was, ((was >> 1) + 1) << 1 | S_FOREIGN)) {}
  STEP_OF(stream_foreign, x, k); /* set: whoever finds it looks at the list */
}

void stream_mark_fence(db_rec *r, db_fence *f) {
  if (__builtin_expect(atomic_load(&r->stream), 0)) atomic_fetch_or(&f->flags, FF_STREAM);
}

/* Any fence of a slot has ended: an access says of which buffer, another one may be in the lists of several. */
static void wake_streams(Shm *s, uint32_t rec) {
  db_rec *r = rec ? rec_at(s, rec - 1) : NULL;
  uint32_t k;
  db_stream *x = r ? stream_of_slot(s, r, &k) : NULL;
  if (x) stream_wake(s, x, SW_NEWS | SW_SPACE | SW_ASK);
  for (uint32_t c = 0, n = rec ? 0 : chunk_count(s); c < n; c++)
    for (uint32_t i = c * STREAMS_PER; i < (c + 1) * STREAMS_PER && (x = stream_at(s, i)); i++)
      if (atomic_load(&x->owner)) stream_wake(s, x, SW_NEWS | SW_SPACE | SW_ASK);
}

/* A fence that fails makes the frames that wait for it no frames. They are marked, since a fence's slot soon forgets how it ended. */
static void spoil_frames(Shm *s, uint64_t handle, int error) {
  for (uint32_t c = 0, n = chunk_count(s); c < n; c++)
    for (uint32_t i = c * STREAMS_PER; i < (c + 1) * STREAMS_PER; i++) {
      db_stream *x = stream_at(s, i);
      if (!x) break;
      for (uint32_t k = 0, slots = atomic_load(&x->owner) ? stream_slots(x) : 0; k < slots; k++)
        if (atomic_load(&x->slot[k].fence) == handle) atomic_store(&x->slot[k].torn, (uint32_t)-error);
    }
}

void streams_prepare(void) {
  fence_wake_streams = wake_streams;
  fence_spoil_frames = spoil_frames;
}

/* ---- the end of a life ---- */

void stream_place_free(db_stream *x, uint32_t place) {
  db_reader *r = &x->reader[place];
  atomic_store(&r->claims, 0);
  STEP_OF(stream_unclaimed, x, place); /* the place is the dead life's still, so the next reaper goes on */
  atomic_store(&r->cursor, STREAM_NONE);
  STEP_OF(stream_unpromised, x, place);
  atomic_fetch_and(&x->readers, ~(1ull << place));
  STEP_OF(stream_unlisted, x, place);
  if (atomic_load(&x->orphans) >> place & 1) atomic_fetch_and(&x->orphans, ~(1ull << place));
  atomic_store(&r->owner, 0);
  STEP_OF(stream_left, x, place); /* free */
}

/* Did the owner of a place move its group's cursor past frame q? Whoever moves it on notes that first, and in this order of looks either
 * the note or the cursor says so. */
static bool took(db_stream *x, uint32_t place, uint32_t group, uint64_t q) {
  for (int look = 0; look < 2; look++) {
    uint64_t got = atomic_load(&x->got[place]);
    if ((got & 255) == group && SEQ_OF(got) >= q) return true;
    if (atomic_load(&x->group_cursor[group]) == ((q + 1) << 8 | (place + 1))) return true;
  }
  return false;
}

/* What a member was about to take when it died is its frame, or its claim is of nothing. From here on each claim is of a frame. */
static void settle(db_stream *x, uint32_t place) {
  db_reader *r = &x->reader[place];
  uint64_t trying = atomic_load(&r->trying);
  if (!trying) return;
  uint32_t k = SLOT_OF(trying), group = atomic_load(&r->group) % STREAM_GROUPS;
  bool has = took(x, place, group, SEQ_OF(trying)) && stream_is_there(x, k, SEQ_OF(trying));
  /* A stream that drops promises nothing: whoever doesn't know the stream may write what was not yet claimed when it looked. */
  if (atomic_load(&x->policy) == SP_DROP && (atomic_load(&x->slot[k].foreign) & S_FOREIGN)) has = false;
  if (!has) atomic_store(&r->claims, atomic_load(&r->claims) & ~(1ull << k));
  atomic_store(&r->trying, 0);
  STEP_OF(stream_settled, x, place); /* the place is the dead life's still, so the next reaper goes on */
}

void stream_place_end(db_stream *x, uint32_t place) {
  db_reader *r = &x->reader[place];
  if (atomic_load(&r->role) == SR_REDELIVER || atomic_load(&r->role) == SR_LEFT) {
    settle(x, place);
    if (atomic_load(&r->claims)) {
      atomic_store(&r->cursor, STREAM_NONE);
      STEP_OF(stream_unpromised, x, place);
      atomic_fetch_or(&x->orphans, 1ull << place); /* before it is one: members look here, and only who owns it takes the bit away */
      atomic_store(&r->owner, STREAM_ORPHAN);
      STEP_OF(stream_orphaned, x, place); /* nobody's: whoever ends a member, or a life, frees it if the group has no members */
      return;
    }
  }
  stream_place_free(x, place);
}

int stream_adopt(db_stream *x, uint32_t place, uint32_t life) {
  uint32_t owner = STREAM_ORPHAN;
  if (atomic_load(&x->reader[place].owner) != owner || !atomic_compare_exchange_strong(&x->reader[place].owner, &owner, life)) return 0;
  STEP_OF(stream_adopted, x, place); /* with all that it claims: if this life dies, its reaper makes an orphan of it again */
  atomic_store(&x->reader[place].role, SR_LEFT);
  return 1;
}

void stream_orphans_free(db_stream *x, uint32_t life) {
  uint64_t on = atomic_load(&x->orphans) & stream_places(x);
  for (uint32_t tries = 0; on && tries < 4 * STREAM_READERS; tries++) {
    uint32_t i = (uint32_t)__builtin_ctzll(on);
    if (atomic_load(&x->reader[i].owner) != STREAM_ORPHAN || stream_has_members(x, atomic_load(&x->reader[i].group), i)) {
      on &= on - 1;
      continue;
    }
    if (!stream_adopt(x, i, life)) continue;
    /* Who joined since either took the place for a member's, and goes on where the group was, or is the first and has taken the place out
     * of the group. It may leave again before the place is an orphan, so the same place comes once more. */
    if (stream_has_members(x, atomic_load(&x->reader[i].group), i))
      atomic_store(&x->reader[i].owner, STREAM_ORPHAN);
    else
      stream_place_free(x, i);
  }
}

static void mark_torn(Shm *s, db_slot *slot, uint32_t life, int error) {
  uint32_t rec = atomic_load(&slot->rec);
  db_rec *r = rec ? rec_at(s, rec - 1) : NULL;
  atomic_store(&slot->torn, (uint32_t)error);
  if (r && atomic_load(&r->gen) == atomic_load(&slot->rec_gen))
    atomic_store(&r->torn, TORN_MAKE(atomic_load(&life_slot(s, life)->pid), error));
}

void stream_producer_end(Shm *s, db_stream *x, uint32_t life, uint32_t reason) {
  uint64_t head = atomic_load(&x->head);
  for (uint32_t k = 0, n = stream_slots(x); k < n; k++) {
    uint64_t state = atomic_load(&x->slot[k].state);
    if (!(state & S_WRITING)) continue;
    if (SEQ_OF(state) > SEQ_OF(head)) { /* not published: no frame, and torn for those who know only the buffer */
      mark_torn(s, &x->slot[k], life, reason == SD_DIED ? EOWNERDEAD : ECANCELED);
      STEP_OF(stream_torn, x, k); /* torn and being written: the next reaper marks it again */
      atomic_store(&x->slot[k].state, state & 0xfe);
    } else { /* published, and only this was left to do; or marked, and not written */
      atomic_store(&x->slot[k].state, state & ~S_WRITING);
    }
    STEP_OF(stream_unwritten, x, k);
  }
  atomic_store(&x->prod, reason); /* last: a successor finds nothing to repair */
  STEP_OF(stream_ended, x, reason);
}

/* Also those whose bit the dead one has taken away, and then died. It may have ended accesses too, and so concern any stream. */
static void wake_everybody(Shm *s, db_stream *x) {
  atomic_fetch_or(&x->want, SW_NEWS | SW_SPACE | SW_ASK);
  stream_wake_those(s, x, SW_NEWS | SW_SPACE | SW_ASK);
}

void streams_end(Shm *s, uint32_t life) {
  for (uint32_t c = 0, n = chunk_count(s); c < n; c++) {
    if (CT_TYPE(atomic_load(chunk_entry(s, c))) != CH_STREAM) continue;
    for (uint32_t i = c * STREAMS_PER; i < (c + 1) * STREAMS_PER; i++) {
      db_stream *x = stream_at(s, i);
      if (!x || !atomic_load(&x->owner)) continue;
      for (uint32_t k = 0; k < STREAM_READERS; k++)
        if (atomic_load(&x->reader[k].owner) == life) stream_place_end(x, k);
      stream_orphans_free(x, life);
      if (atomic_load(&x->prod) == ((uint64_t)life << 8 | SD_ALIVE)) stream_producer_end(s, x, life, SD_DIED);
      wake_everybody(s, x);
    }
  }
}
