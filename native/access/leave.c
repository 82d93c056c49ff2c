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

/* Something of the block is kept, and its exporter was asked: find out what its end can be called with later, or call it now. The exception
 * to raise, or NULL. */
static PyObject *keep_bracket(Block *b) {
  PyObject *kept = rule(RULE_KEEP, (PyObject *)b, b->asked, NULL);
  if (kept && kept != Py_None) {
    b->kept = kept;
    return NULL;
  }
  if (!kept) PyErr_Clear();
  Py_XDECREF(kept);
  return b->asked && block_is_ours(b) ? block_end_bracket(b) : NULL;
}

/* Leave a block of which something is kept. The exception to raise, or NULL. */
static PyObject *leave_kept(Block *b, bool failed) {
  if (b->path) b->path->open--;
  b->state = LEFT; /* from here on the last hold ends it */
  PyObject *error = b->asked ? keep_bracket(b) : NULL;
  if (b->state != LEFT || !block_is_ours(b)) return error;
  if (!b->write && !failed) { /* it lasts until what is kept is gone, or a writer wants the buffer */
    kept_add(b);
    fence_watch_deadline(b->shm, b->fence);
    PyObject *raised = block_tell_kept(b, "read");
    if (!error) return raised;
    Py_XDECREF(raised);
    return error;
  }
  int detached = block_detach(b);
  bool whole = b->write && !failed && !detached;
  if (b->write && !whole && !b->error) b->error = -ECANCELED;
  PyObject *raised = NULL;
  if (whole)
    raised = block_tell_kept(b, "detached"); /* while what is kept can still be named */
  else if (detached > 0)
    block_left_zeros(b);
  if (b->write && !failed && !whole) raised = rule(RULE_IN_USE, (PyObject *)b, NULL, NULL);
  if (detached >= 0 && b->state == LEFT) block_end(b);
  if (!raised && PyErr_Occurred()) raised = take_exception();
  if (!error) return raised;
  Py_XDECREF(raised);
  return error;
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
