/* fork_lock.h - re-entrant locks that are free in a forked child. */
#ifndef DMABUF_FORK_LOCK_H
#define DMABUF_FORK_LOCK_H
#include "python.h"

int fork_lock_register(PyObject *module);
#endif
