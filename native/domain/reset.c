/* reset.c - the last process that leaves gives the file's memory back. tests/model/facts.pml checks the order of these steps.
 *
 * What is said of memory lives as long as that memory. A buffer in a message, or in a program that doesn't use this library, has no living
 * process here, so its record stays, with its torn mark and its name, and the chunk with it. All other chunks go: each says so before its
 * memory goes, and no generation of a slot in it is used again. A process that comes later need not know that there was a reset. One that
 * is killed leaves floors that are too high, chunks without a type that still have memory, or a file that is longer than it counts. Each is
 * harmless, and the next reset finishes the work.
 *
 * The caller holds the lifecycle lock. Nobody lives, every slot is CLEAN, and nobody else maps the file.
 */
#include "domain/reset.h"
#include "domain/buffer_layout.h"
#include "domain/bytes.h"
#include "domain/fence.h"
#include "domain/file.h"
#include "domain/step.h"
#include "domain/stream_words.h"
#include "domain/sync.h"
#include "domain/table.h"
#include "fds/locks.h"
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#define PASSES      3  /* over /proc/locks: a buffer is gone if none of them shows its reference lock */
#define PRESENCE_MS 10 /* programs that look through /proc map or open the file for an instant: ask again for so long */

/* ---- what is left ---- */

static int rec_stays(db_rec *r) { return r && atomic_load(&r->state) == REC_LIVE; }

static int chunk_stays(Shm *s, uint32_t c) {
  uint32_t type = CT_TYPE(atomic_load(chunk_entry(s, c)));
  if (type == CH_SYNC || type == CH_LEAF) return !sync_chunk_unused(s, c);
  if (type == CH_LAYOUT) return layouts_used(s, c);
  for (uint32_t k = 0; k < RECS_PER; k++)
    if (rec_stays(rec_at(s, c * RECS_PER + k))) return 1;
  return 0;
}

/* A record whose buffer no reference lock shows becomes DYING. What can't be judged stays. */
static void judge(Shm *s) {
  lock_pass pass[PASSES] = {{0}};
  uint32_t records = chunk_count(s) * RECS_PER, wanted = 0;
  for (uint32_t i = 0; i < records && !wanted; i++) {
    db_rec *r = rec_at(s, i);
    wanted = rec_stays(r) && r->ino;
  }
  int known = 1;
  for (int k = 0; wanted && known && k < PASSES; k++) known = !lock_pass_believed(&pass[k]);
  for (uint32_t i = 0; i < records; i++) {
    db_rec *r = rec_at(s, i);
    if (!rec_stays(r)) continue;
    int held = r->ino && !known;
    for (int k = 0; k < PASSES && r->ino && !held; k++) held = lock_pass_has(&pass[k], r->dev, r->ino);
    if (!held) atomic_store(&r->state, REC_DYING);
    STEP_OF(reset_judged, r, 0); /* DYING: the next owner of the table lock frees it */
  }
  for (int k = 0; k < PASSES; k++) lock_pass_free(&pass[k]);
}

static void floor_up(Shm *s, uint32_t type, uint64_t gen) {
  if (gen > atomic_load(&hdr(s)->floor[type])) atomic_store(&hdr(s)->floor[type], gen);
}

static void raise_floors(Shm *s) {
  for (uint32_t c = 0, n = chunk_count(s); c < n; c++) {
    uint32_t type = CT_TYPE(atomic_load(chunk_entry(s, c)));
    char *p = type == CH_NONE ? NULL : chunk_at(s, c, type);
    if (!p) continue;
    if (type == CH_FENCE)
      for (uint32_t i = 0; i < FENCES_PER; i++) floor_up(s, type, END_GEN(atomic_load(&((db_fence *)p)[i].end)));
    else if (type == CH_TIMELINE)
      for (uint32_t i = 0; i < TIMELINES_PER; i++) floor_up(s, type, atomic_load(&((db_timeline *)p)[i].gen));
    else if (type == CH_CTX || type == CH_LIFE)
      for (uint32_t i = type == CH_LIFE ? CTX_FIRST_IN_LIFE : 0; i < CTX_PER; i++) floor_up(s, CH_CTX, atomic_load(&((db_ctx *)p)[i].gen));
    else if (type == CH_REC)
      for (uint32_t i = 0; i < RECS_PER; i++) floor_up(s, type, atomic_load(&((db_rec *)p)[i].gen));
    else if (type == CH_SYNC)
      for (uint32_t i = 0; i < SYNC_PER; i++) floor_up(s, type, atomic_load(&((db_sync *)p)[i].gen));
    else if (type == CH_LEAF)
      for (uint32_t i = 0; i < SYNC_PER; i++) floor_up(s, type, atomic_load(&((db_leaf *)p)[i].gen));
    else if (type == CH_STREAM)
      for (uint32_t i = 0; i < STREAMS_PER; i++) floor_up(s, type, atomic_load(&((db_stream *)p)[i].gen));
  }
}

/* The fences of a record that stays have ended, and their chunks go. */
static void empty_lists(Shm *s) {
  for (uint32_t i = 0, n = chunk_count(s) * RECS_PER; i < n; i++) {
    db_rec *r = rec_at(s, i);
    if (!rec_stays(r)) continue;
    for (uint32_t k = 0; k < INLINE_ENTRIES; k++) atomic_store(&r->resv.entry[k], 0);
    atomic_store(&r->resv.block, 0);
    atomic_store(&r->stream, 0); /* streams go with the last process */
    atomic_store(&r->resv.next, 0);
    atomic_store(&r->resv.lock, 0);
  }
}

/* ---- the reset ---- */

static void punch(int fd, off_t at, off_t n) { fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, at, n); }

static void reset(Shm *s, int fd) {
  db_header *h = hdr(s);
  atomic_store(&h->table_lock, TL_NOBODY);
  STEP_OF(reset_begun, h, 0); /* the next owner of the table lock makes the derived parts again, whatever follows */
  judge(s);
  table_rebuild(s);
  STEP_OF(reset_rebuilt, h, 0);
  sync_note_results(s);
  raise_floors(s);
  STEP_OF(reset_floors, h, 0); /* no slot has a generation above its floor: higher ones only */
  empty_lists(s);
  STEP_OF(reset_lists, h, 0);
  uint32_t n = chunk_count(s), last = 0;
  for (uint32_t c = n; c-- > 0;) {
    if (chunk_stays(s, c)) {
      if (!last) last = c + 1;
      continue;
    }
    atomic_store(chunk_entry(s, c), 0);
    STEP_OF(reset_chunk, chunk_entry(s, c), 0); /* without a type, with its memory: the next growth takes it */
  }
  atomic_store(&h->nchunks, last);
  STEP_OF(reset_counted, h, 0); /* the file is longer than it counts: the next growth uses what is there */
  s->known = 0;
  table_rebuild(s);
  atomic_store(&h->table_lock, 0);
  STEP_OF(reset_unlocked, h, 0);
  off_t end = DB_HEADER_BYTES + (off_t)last * DB_CHUNK;
  struct stat st;
  if (fstat(fd, &st) || !stat_is(&st, &s->id)) return;
  /* A private domain's file can't become shorter. Where presence is a descriptor, a process that closed it may still map the file. */
  if ((s->presence_fd >= 0 || ftruncate(fd, end)) && st.st_size > end) punch(fd, end, st.st_size - end);
  STEP_OF(reset_cut, h, 0);
  for (uint32_t c = 0; c < last; c++) {
    if (CT_TYPE(atomic_load(chunk_entry(s, c))) != CH_NONE) continue;
    punch(fd, DB_HEADER_BYTES + (off_t)c * DB_CHUNK, DB_CHUNK);
    STEP_OF(reset_punched, chunk_entry(s, c), 0);
  }
}

/* The file through a mapping of its own: what the process maps is a private copy by now. */
static void reset_file(Shm *s, int fd, int by_fd) {
  own_words nothing = {0};
  Shm view = {.length = s->length, .fd = fd, .id = s->id, .own = &nothing, .presence_fd = by_fd ? fd : -1};
  view.base = mmap(NULL, s->length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
  if (view.base == MAP_FAILED) return;
  step_mapped(view.base, s->length, (uint32_t)s->id.ino);
  if (chunks_known(&view, atomic_load(&hdr(&view)->nchunks))) reset(&view, fd);
  step_mapped(view.base, 0, 0);
  munmap(view.base, s->length);
}

/* ---- beginning and ending to look at the file ---- */

static int lived_in(Shm *s, int fd) { /* a byte is locked, or a slot has something of a life; or that can't be known */
  if (byte_locked(s, fd, LIFE_BYTE, DB_LIVES)) return 1;
  for (uint32_t i = 0, high = life_high(s); i < high; i++)
    if (atomic_load(&life_at(s, i)->state) != LIFE_CLEAN) return 1;
  return 0;
}

static int anybody_present(Shm *s, int fd) {
  for (int ms = 0;; ms++) {
    int r = byte_locked(s, fd, PRESENCE_BYTE, 1);
    if (!r || ms == PRESENCE_MS) return r != 0;
    usleep(1000);
  }
}

void reset_at_end(int fd, const fd_id *id, int by_fd) {
  own_words nothing = {0};
  Shm view = {
      .length = DB_HEADER_BYTES + (size_t)DB_MAX_CHUNKS * DB_CHUNK, .fd = fd, .id = *id, .own = &nothing, .presence_fd = by_fd ? fd : -1};
  view.base = mmap(NULL, view.length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
  if (view.base == MAP_FAILED) return;
  if (!lived_in(&view, fd) && !anybody_present(&view, fd) && chunks_known(&view, atomic_load(&hdr(&view)->nchunks))) reset(&view, fd);
  munmap(view.base, view.length);
}

static PyObject *look_away(Shm *s, PyObject *unused) {
  if (s->copied) Py_RETURN_TRUE;
  if (my_life(s)) Py_RETURN_FALSE;
  int fd = description_of(s), done = 0, by_fd = s->presence_fd >= 0;
  if (fd < 0) Py_RETURN_FALSE; /* without a free descriptor nobody can ask: the next process that leaves gives the memory back */
  if (lived_in(s, fd) || shm_map_copy(s)) goto out;
  /* A child that a raw fork makes before this has the page, and after it the copy. The other way round it could have neither. */
  STEP_OF(left_copied, NULL, s->id.ino); /* the kernel ends the presence */
  shm_end_presence(s);
  STEP_OF(left_absent, NULL, s->id.ino);
  Py_BEGIN_ALLOW_THREADS
  done = !anybody_present(s, fd);
  if (done) reset_file(s, fd, by_fd);
  Py_END_ALLOW_THREADS
  /* A child that has not joined, or a process that looks on. This one goes on to look at the file, too. */
  if (!done && !shm_show_presence(s)) shm_map_file(s);
out:
  close(fd);
  return PyBool_FromLong(done);
}

/* No memory outlives a boot, and no process. Whatever the file says of buffers is of others that have the same inode number by now. */
static PyObject *begin_boot(Shm *s, PyObject *arg) {
  char boot[sizeof hdr(s)->boot];
  if (!PyBytes_Check(arg) || PyBytes_GET_SIZE(arg) != sizeof boot) {
    PyErr_SetString(PyExc_ValueError, "begin_boot: the id of a boot must have 16 bytes");
    return NULL;
  }
  memcpy(boot, PyBytes_AS_STRING(arg), sizeof boot);
  static const char unknown[sizeof boot];
  if (!memcmp(hdr(s)->boot, boot, sizeof boot) || !memcmp(unknown, boot, sizeof boot)) Py_RETURN_FALSE;
  int fd = shm_file(s);
  if (fd < 0 || byte_locked(s, fd, LIFE_BYTE, DB_LIVES)) Py_RETURN_FALSE; /* a container may be told another id than its host */
  if (!memcmp(hdr(s)->boot, unknown, sizeof boot)) {
    memcpy(hdr(s)->boot, boot, sizeof boot);
    Py_RETURN_FALSE;
  }
  atomic_store(&hdr(s)->table_lock, TL_NOBODY); /* the next owner frees what is DYING; before the rest, since that may end here */
  for (uint32_t i = 0, n = chunk_count(s) * RECS_PER; i < n; i++) {
    db_rec *r = rec_at(s, i);
    if (rec_stays(r)) atomic_store(&r->state, REC_DYING);
  }
  STEP(boot_begun); /* the next process that joins does it again */
  memcpy(hdr(s)->boot, boot, sizeof boot);
  Py_RETURN_TRUE;
}

static PyObject *look_again(Shm *s, PyObject *unused) {
  if (!s->copied) Py_RETURN_NONE;
  if (shm_show_presence(s) || shm_map_file(s)) return shm_lost(s, "join"), NULL;
  Py_RETURN_NONE;
}

PyMethodDef reset_methods[] = {
    METHOD(look_away, METH_NOARGS, "($self, /)",
           "If nobody lives in the domain and nobody else maps its file, look at a private copy from now on, and give the file's memory\n"
           "back. The lifecycle lock is held. Return whether it was given back."),
    METHOD(begin_boot, METH_O, "($self, boot, /)",
           "Forget all buffers if the file is of another boot of the machine, and nobody lives there. Zeros are an id that isn't known.\n"
           "The lifecycle lock is held. Return whether it was."),
    METHOD(look_again, METH_NOARGS, "($self, /)", "Map the file again if a private copy is mapped. The lifecycle lock is held."),
    {0}};
