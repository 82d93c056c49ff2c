/* path.h - AccessPath: what the accesses of one handle need, in one place that C reads without Python. */
#ifndef DMABUF_PATH_H
#define DMABUF_PATH_H
#include "domain/shm.h"
#include "memory/mapping.h"

typedef struct {
  PyObject_HEAD
  Shm *shm;
  PyObject *thread;  /* whose attribute `owner` stands for the running thread */
  PyObject *backing; /* whose ops each access asks; NULL: plain memory, which needs none */
  Mapping *mapping;  /* what the accesses look through, made by the first and kept; NULL: none yet */
  Py_ssize_t open;   /* accesses of the handle that are entered, or wait */
  uint32_t rec, target, timeline;
  uint32_t life; /* the membership in which this was true, 0: never */
  char kernel;   /* the kernel's fences come first, so that no access is granted at once */
} Path;

extern PyTypeObject *Path_Type;

int path_register(PyObject *module);
#endif
