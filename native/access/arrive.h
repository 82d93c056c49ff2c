/* arrive.h - how blocks are entered, one or several that are granted together. */
#ifndef DMABUF_ARRIVE_H
#define DMABUF_ARRIVE_H
#include "access/block.h"

/* The end of a wait, CLOCK_MONOTONIC ns, -1 for no limit; or -1 with an exception set. */
int64_t accesses_until(PyObject *whole, PyObject *timeout);

/* Enter blocks, and wait as long as it takes. Returns the view of one block, or a tuple of views if `whole` is no block; NULL: an
 * exception is set, and nothing is entered. whole: the block, or the group of the blocks, as the rules get it. */
PyObject *accesses_enter(Block **blocks, Py_ssize_t n, PyObject *whole, PyObject *timeout);

/* The parts of it, for a coroutine. Each returns -1, or NULL, with an exception set; then the caller calls accesses_abandon(). */

/* Check what can be checked, and have the blocks belong to this use. */
int accesses_begin(Block **blocks, Py_ssize_t n);
/* The owner that runs now, checked against what it holds. A new reference. */
PyObject *accesses_owner(Block **blocks, Py_ssize_t n);
/* Take the locks, snapshots of what blocks the accesses, and add the fences. *pending: a new list of the handles that block them, or NULL
 * if nothing does. may_wait: for the locks, until `until`; else 1: a lock isn't free. */
int accesses_arrive(Block **blocks, Py_ssize_t n, PyObject *owner, int64_t until, bool may_wait, PyObject **pending);
/* Add the fences while the caller holds all locks. The list of what blocks them, or NULL. */
PyObject *accesses_add(Block **blocks, Py_ssize_t n, PyObject *owner);
/* Nothing blocks them any more: grant them, ask their exporters, and return what the block gives. */
PyObject *accesses_show(Block **blocks, Py_ssize_t n, PyObject *whole);
void accesses_abandon(Block **blocks, Py_ssize_t n);
bool accesses_are_plain(Block **blocks, Py_ssize_t n); /* Is it plain memory, so that no Python code is asked? */
/* Enter a bare block, and show its bytes. NULL: an exception is set, and it isn't entered. */
PyObject *bare_open(Block *b);

int arrive_register(PyObject *module);
#endif
