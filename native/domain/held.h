/* held.h - contexts as Python objects, and what this process knows of a reservation lock that it holds. */
#ifndef DMABUF_HELD_H
#define DMABUF_HELD_H
#include "domain/shm.h"

typedef struct {
  PyObject_HEAD
  Shm *shm;
  PyObject *pool; /* the indices of the life's free contexts */
  unsigned long long word;
  unsigned life, locks;            /* locks: how many the context holds, or the owner that it stands for */
  PyObject *word_seen, *life_seen; /* the same as numbers of Python, which each access and each lock reads */
} Context;

extern PyTypeObject *Context_Type;

/* Undo the items of a list from index `first` on, the last one first, and cut it: locks are released, contexts closed. -1: an exception
 * is set, and everything has been undone all the same. */
int taken_undo(PyObject *taken, Py_ssize_t first);

int held_register(PyObject *module);

extern PyMethodDef held_methods[];
#endif
