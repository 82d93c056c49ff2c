/* guard.h - what a signal handler that raises can't cut short. */
#ifndef DMABUF_GUARD_H
#define DMABUF_GUARD_H
#include "python.h"
#include <stdbool.h>

/* Call fn again until it ends, and then raise what a signal handler raised meanwhile; later: in the main thread, a moment later. */
PyObject *guard_finish(PyObject *fn, PyObject *const *args, size_t nargsf, PyObject *names, bool later);

/* Is the exception that is set one that a function of this library raises by itself, so that it isn't called again? */
bool guard_is_own(void);

int guard_register(PyObject *module);
#endif
