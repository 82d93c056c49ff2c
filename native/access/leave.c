/* leave.c - how a block is left.
 *
 * If nothing is kept that was made from its view, the access ends at once. Else it depends:
 *
 *   left by an exception         what is kept is detached (detach.c), and the access ends; a write is torn
 *   a write                      what was written is complete, what is kept is detached, and a warning names who keeps it
 *   a read                       the access lasts until what is kept is gone, or until a writer has waited for it: then it is detached
 *
 * What can't be detached keeps the access, as it always did, and a write is torn; so it is if more was kept than is copied.
 */
#include "access/leave.h"
#include "access/detach.h"
#include "domain/fence.h"
#include "later.h"

/* The first of two exceptions that is there. */
static PyObject *first_of(PyObject *a, PyObject *b) {
  if (!a) return b;
  Py_XDECREF(b);
  return a;
}

/* The exception that a rule makes, or that it raised. */
static PyObject *rule_made(int which, Block *b) {
  PyObject *made = rule(which, (PyObject *)b, NULL, NULL);
  return made ? made : take_exception();
}

/* Something of the block is kept, and its exporter was asked: find out what its end can be called with later, or call it now. The exception
 * to raise, or NULL. */
static PyObject *keep_bracket(Block *b) {
  PyObject *kept = rule(RULE_KEEP, (PyObject *)b, b->asked, NULL);
  if (kept && kept != Py_None) {
    b->kept = kept;
    return NULL;
  }
  PyObject *raised = kept ? NULL : take_exception(); /* of a signal handler, since the rule itself raises nothing */
  Py_XDECREF(kept);
  return first_of(raised, b->asked && block_is_ours(b) ? block_end_bracket(b) : NULL);
}

/* Nothing was detached: the access lasts until what is kept is gone, or a writer wants the buffer. The exception to raise, or NULL. */
static PyObject *keep_access(Block *b, bool failed) {
  uint32_t use = b->use;
  PyObject *error = b->asked ? keep_bracket(b) : NULL;
  if (b->use != use || !block_is_ours(b)) return error;
  if (b->write) return failed ? error : first_of(error, rule_made(RULE_IN_USE, b));
  kept_add(b);
  if (b->over) return error; /* whoever needs the slot of the frame is told by the stream */
  fence_watch_deadline(b->shm, b->fence);
  return first_of(error, block_tell_kept(b, "read"));
}

/* Leave a block of which something is kept. The exception to raise, or NULL. */
static PyObject *leave_kept(Block *b, bool failed) {
  if (b->path) b->path->open--;
  b->state = LEFT; /* from here on the last hold ends it */
  uint32_t use = b->use;
  int detached = b->write || failed ? block_detach(b) : -1;
  bool whole = b->write && !failed && !detached;
  if (b->use != use) return NULL; /* a hook of the mapping has let go of what was kept */
  if (b->write && !whole) b->error = -ECANCELED;
  if (detached < 0) return keep_access(b, failed);
  PyObject *error = block_end_use(b); /* before Python code runs that may want the buffer */
  if (whole) return first_of(error, block_tell_kept(b, "detached"));
  if (detached) block_left_zeros(b);
  return b->write && !failed ? first_of(error, rule_made(RULE_IN_USE, b)) : error;
}

int block_leave(Block *b, bool failed) {
  if (b->state != OPEN) return 0;
  b->error = failed && b->write ? -ECANCELED : 0;
  PyObject *error = b->kept_count ? leave_kept(b, failed) : block_end_use(b);
  if (!error) return 0;
  PyErr_SetObject((PyObject *)Py_TYPE(error), error);
  Py_DECREF(error);
  return -1;
}
