/* view.h - View, the bytes of a block. The contract stands in view.c. */
#ifndef DMABUF_VIEW_H
#define DMABUF_VIEW_H
#include "access/block.h"

typedef struct {
  PyObject_HEAD
  Block *block;
  char *base;
  Py_ssize_t n, stride;
  uint32_t use; /* of the block */
  bool readonly, released;
  unsigned long asked;  /* the thread that has just asked as np.ndarray(buffer=view) asks first */
  unsigned long wanted; /* the thread that has just asked for a writable buffer, in vain */
} View;

extern PyTypeObject *View_Type;

PyObject *view_new(Block *b, char *base, Py_ssize_t n, Py_ssize_t stride, bool readonly);
void view_put(View *v);     /* its memory, once nobody refers to it */
bool view_is_open(View *v); /* false with ValueError set */

/* Items, slices and comparison: view_items.c. */
Py_ssize_t view_length(PyObject *view);
PyObject *view_item(PyObject *view, Py_ssize_t index);
PyObject *view_subscript(PyObject *view, PyObject *key);
int view_ass_subscript(PyObject *view, PyObject *key, PyObject *value);
PyObject *view_compare(PyObject *a, PyObject *b, int op);

#endif
