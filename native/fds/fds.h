/* fds.h - what the files of this folder share, and what each adds to the module. */
#ifndef DMABUF_FDS_H
#define DMABUF_FDS_H
#include "python.h"
#include <sys/stat.h>

/* Is it a memfd with the seals of a buffer? Then its size never changes. 1, with *st filled in; 0. */
int buffer_is_sealed(int fd, struct stat *st);
/* Put the reference lock on a buffer's descriptor: a read lock on byte 0, which shows that the buffer is referenced. 1; 0: errno. */
int buffer_reference(int fd);

int probe_register(PyObject *module);
int passing_register(PyObject *module);
int descriptor_register(PyObject *module);
int file_register(PyObject *module);
#endif
