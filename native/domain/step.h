/* step.h - crash points: named points between the stores of a change, at which a test kills or holds the process, or which it logs.
 *
 * A crash point stands behind each store of a change that takes several, with a comment that names the state which a death leaves there.
 * Unless a test has armed it, it costs one branch that is not taken.
 */
#ifndef DMABUF_STEP_H
#define DMABUF_STEP_H
#include "python.h"
#include <stdint.h>

/* By part. */
/* clang-format off */
#define DB_STEPS(X) \
  X(rec_locked) X(rec_filled) X(rec_held) X(rec_live) X(rec_linked) X(rec_dying) X(rec_unlinked) X(rec_cleared) X(rec_freed) \
  X(name_written) X(name_switched) X(layout_filled) X(layout_named) X(read_layout) \
  X(timeline_half) X(timeline_filled) X(timeline_switched) X(ctx_read) \
  X(chunk_allocated) X(chunk_typed) X(chunk_published) X(chunk_owned) \
  X(block_taken) X(block_linked) \
  X(table_stolen) X(table_rebuilt) X(table_left) \
  X(fence_filled) X(fence_published) X(fence_dropped) X(fence_marking) X(fence_ending) X(fence_error) X(fence_stamped) \
  X(fence_signaled) X(fence_woken) X(fence_dispatchers_woken) \
  X(resv_locked) X(resv_next) X(resv_looked) X(resv_waiting) X(resv_stolen) X(resv_passed) X(resv_unlocked) \
  X(resv_return_to) X(resv_borrowed) X(resv_returned) \
  X(resv_read) X(resv_added) X(resv_copied) X(resv_cut) \
  X(access_fence) X(access_added) X(access_granted) X(access_torn) X(access_whole) X(access_ended) \
  X(stream_filled) X(stream_named) X(stream_owned) X(stream_slotted) X(stream_entered) \
  X(stream_marked) X(stream_chosen) X(stream_backed) X(stream_written) X(stream_published) X(stream_done) X(stream_aborted) \
  X(stream_claimed) X(stream_moved) X(stream_released) X(stream_placed) X(stream_listed) X(stream_promised) \
  X(stream_trying) X(stream_settled) X(stream_orphaned) X(stream_adopted) \
  X(stream_taken) X(stream_counted) X(stream_asked) X(stream_answered) X(stream_foreign) X(stream_cleared) \
  X(stream_unclaimed) X(stream_unpromised) X(stream_unlisted) X(stream_left) X(stream_torn) X(stream_unwritten) X(stream_ended) \
  X(sem_pointed) X(sem_left) \
  X(sync_bound) X(sync_written) X(sync_registered) X(sync_marked) X(sync_moved) X(sync_done) X(sync_readable) X(sync_over) \
  X(life_locked) X(life_alive) X(life_chunk) \
  X(reap_locked) X(reap_torn) X(reap_fence) X(reap_fences_done) X(reap_lock_returned) X(reap_ctx) X(reap_contexts_done) X(reap_outside) \
  X(reap_chunk) X(reap_returned) X(reap_clean) \
  X(boot_begun) X(left_copied) X(left_absent) \
  X(reset_begun) X(reset_judged) X(reset_rebuilt) X(reset_floors) X(reset_lists) X(reset_chunk) X(reset_counted) \
  X(reset_unlocked) X(reset_cut) X(reset_punched)
/* clang-format on */

enum {

#define X(name) STEP_##name,
  DB_STEPS(X)
#undef X
      STEP_COUNT
};

extern int step_armed; /* 0: no crash point is armed, and none is logged */
/* The process passes this crash point. For the log: what the change is of, by an address in the mapped file or NULL, and a number. */
void step_hit(int id, const void *object, uint64_t number);
void step_note(const char *name, const void *object, uint64_t number); /* only for the log: something is about to be done, or is done */
void step_sleeping(int id); /* the process is about to sleep in a wait, where a crash point of that name stands */

#define STEP_OF(name, object, number)                                           \
  do {                                                                          \
    if (__builtin_expect(step_armed, 0)) step_hit(STEP_##name, object, number); \
  } while (0)
#define STEP(name) STEP_OF(name, NULL, 0)
/* A log is written after a store or before it, and another process may come in between. So what gives something away is noted before, and
 * what takes it after: then of two owners that the log shows at once, both really were. */
#define STEP_NOTE(name, object, number)                                    \
  do {                                                                     \
    if (__builtin_expect(step_armed, 0)) step_note(#name, object, number); \
  } while (0)
#define STEP_SLEEPING(name)                                          \
  do {                                                               \
    if (__builtin_expect(step_armed, 0)) step_sleeping(STEP_##name); \
  } while (0)

/* The log names objects in this mapping by their offset in the domain's file, and by its inode number; length 0: no longer. */
void step_mapped(const void *base, size_t length, uint32_t domain);
int step_register(PyObject *module);
#endif
