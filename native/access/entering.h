/* entering.h - the awaitable of `async with`. */
#ifndef DMABUF_ENTERING_H
#define DMABUF_ENTERING_H
#include "python.h"

/* An awaitable that enters `whole`, a block or a group; or with NULL one that is done, with a result. */
PyObject *entering_new(PyObject *whole, PyObject *result);

int entering_register(PyObject *module);
#endif
