/* mapping.h - Mapping, the memory of a buffer as Python sees it. The contract stands in mapping.c. */
#ifndef DMABUF_MAPPING_H
#define DMABUF_MAPPING_H
#include "python.h"
#include <stdbool.h>

typedef struct {
  PyObject_HEAD
  char *base; /* NULL: closed */
  Py_ssize_t length;
  Py_ssize_t exports;
  Py_ssize_t views;            /* of it that are not done */
  Py_ssize_t lead;             /* bytes mapped in front of base, and not shown */
  unsigned long long dev, ino; /* of the file, as fstat(2) said */
  long long offset;
  PyObject *on_close; /* NULL: none, or called already */
  PyObject *weakrefs;
  struct block *blocks; /* accesses that look through it (access/block.h) */
  bool writable;
  bool detached; /* private memory lies at its addresses, for those who kept something of a block: nothing new may look through it */
} Mapping;

/* The object as an open Mapping; NULL with TypeError (not a Mapping) or ValueError (closed) set. Its memory is valid as long as something
 * keeps it open: an export, a view, or the GIL while no Python code runs. */
Mapping *mapping_of(PyObject *object);

bool mapping_is_open(const Mapping *self); /* false with ValueError set: it is closed */

/* Items and slices, in mapping_items.c. */
PyObject *mapping_subscript(PyObject *mapping, PyObject *key);
int mapping_ass_subscript(PyObject *mapping, PyObject *key, PyObject *value);

/* Keep memory out of core dumps, unless the process was told otherwise. */
void mapping_hide(void *start, size_t length);

/* Call *callable, if there is one, and clear it: once. An exception that is on its way stays as it is, and what the call raises is reported
 * to sys.unraisablehook. */
void call_once(PyObject **callable);

/* Raise OSError(number, text), which is the subclass for that errno. */
void os_error(int number, const char *format, ...);

int mapping_register(PyObject *module);
#endif
