/* view.c - View, what a read() or write() block gives: its bytes, as long as the block lasts. view_type.c has its methods.
 *
 * A view shows memory that belongs to its block's use. After the block every use of it is ValueError, so a view that is kept keeps nothing.
 * What is made from it (a memoryview, an array, a tensor) refers to a Hold, and keeps the access.
 */
#include "access/view.h"

PyTypeObject *View_Type;

bool view_is_open(View *v) {
  if (v->block->state == OPEN && v->use == v->block->use && !v->released) return true;
  PyErr_SetString(PyExc_ValueError, "operation forbidden on a released view: its block is over, or release() was called");
  return false;
}

/* Each block and each slice makes one: the memory of a few is used again. */
static View *spare[8];
static int spares;

void view_put(View *v) {
  if (spares < (int)(sizeof spare / sizeof *spare)) {
    spare[spares++] = v; /* it keeps its reference to the type */
    return;
  }
  PyTypeObject *type = Py_TYPE(v);
  PyObject_Free(v);
  Py_DECREF(type);
}

PyObject *view_new(Block *b, char *base, Py_ssize_t n, Py_ssize_t stride, bool readonly) {
  View *v = spares ? spare[--spares] : PyObject_New(View, View_Type);
  if (!v) return NULL;
  Py_SET_REFCNT(v, 1);
  v->block = (Block *)Py_NewRef((PyObject *)b);
  v->base = base;
  v->n = n;
  v->stride = stride;
  v->use = b->use;
  v->readonly = readonly;
  v->released = false;
  v->asked = v->wanted = 0;
  return (PyObject *)v;
}
