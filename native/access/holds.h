/* holds.h - a hold: what an export of a View hands on. Whoever keeps any reference to it keeps the access. */
#ifndef DMABUF_HOLDS_H
#define DMABUF_HOLDS_H
#include "access/block.h"

/* A new hold on an open block. NULL: an exception is set. */
hold *hold_new(Block *b, char *base, Py_ssize_t n, Py_ssize_t stride, bool readonly);
/* Fill in a buffer that refers to the hold, as PyObject_GetBuffer() wants it. 0; -1: an exception is set. */
int hold_fill(hold *h, Py_buffer *buffer, int flags);

int holds_register(PyObject *module);
#endif
