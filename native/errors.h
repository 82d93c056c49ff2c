/* errors.h - the errors of the package, raised from C. */
#ifndef DMABUF_ERRORS_H
#define DMABUF_ERRORS_H
#include "python.h"

/* Raise "op: obj: what (ERRNO); remedy". what: NULL for the C library's text. -1. */
int raise_error(int err, const char *op, const char *obj, const char *what, const char *remedy);
/* The same, made by this function. fail: dmabuf.errors.fail; NULL: a plain OSError. */
int raise_error_by(PyObject *fail, int err, const char *op, const char *obj, const char *what, const char *remedy);

int errors_register(PyObject *module);
#endif
