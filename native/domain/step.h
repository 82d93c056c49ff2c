/* step.h - the named steps at which a test kills or holds a process, see step.c. */
#ifndef DMABUF_STEP_H
#define DMABUF_STEP_H
#include "python.h"

#define DB_STEPS(X)                                                                                                                       \
  X(rec_locked)                                                                                                                           \
  X(rec_filled) X(rec_held) X(rec_live) X(rec_linked) X(rec_dying) X(rec_unlinked) X(rec_cleared) X(rec_freed) X(chunk_allocated)         \
      X(chunk_typed) X(chunk_published) X(chunk_owned) X(fence_filled) X(fence_published) X(fence_dropped) X(fence_marking)               \
          X(fence_ending) X(fence_error) X(fence_stamped) X(fence_signaled) X(fence_woken) X(fence_rung) X(resv_locked) X(resv_next)      \
              X(resv_waiting) X(resv_stolen) X(resv_passed) X(resv_heir) X(resv_borrowed) X(resv_returned) X(resv_unlocked) X(resv_added) \
                  X(resv_copied) X(resv_cut) X(block_taken) X(block_linked) X(access_fence) X(access_added) X(access_granted)             \
                      X(access_torn) X(access_whole) X(access_ended) X(name_written) X(name_switched) X(reap_torn) X(reap_fence)          \
                          X(reap_heir) X(reap_ctx) X(reap_chunk) X(table_stolen) X(table_rebuilt)

enum {

#define X(n) STEP_##n,
  DB_STEPS(X)
#undef X
      STEP_COUNT
};
extern int step_armed;
void step_hit(int id);
void step_sleeping(int id);
#define STEP(n)                                              \
  do {                                                       \
    if (__builtin_expect(step_armed, 0)) step_hit(STEP_##n); \
  } while (0)
int step_register(PyObject *module);
#endif
