/* fds.h - what the files of this folder share, and what each adds to the module. */
#ifndef DMABUF_FDS_H
#define DMABUF_FDS_H
#include "fds/same.h"
#include "python.h"
#include <sys/stat.h>

/* Is it a memfd with the seals of a buffer? Then its size never changes. 1, with *st filled in; 0. */
int buffer_is_sealed(int fd, struct stat *st);
/* Put the reference lock on a buffer's descriptor: a read lock on byte 0, which shows that the buffer is referenced. 1; 0: errno. */
int buffer_reference(int fd);

/* An OwnedFd of a descriptor, which is closed if this fails. mark: see fd_mark(). number -1: raises errno. */
PyObject *owned_fd(int number, int mark);
/* The same for a descriptor that fstat(2) was just asked about. */
PyObject *owned_fd_of(int number, const struct stat *st);
/* A list of OwnedFds of `count` new descriptors, not aligned. They are closed if this fails. */
PyObject *owned_fds(const void *numbers, Py_ssize_t count);
/* The descriptor of an OwnedFd, compared just now; -1 with an exception set. */
int owned_checked(PyObject *object, const char *op);
/* The number of an OwnedFd, which the caller owns from now on, and which file it is. NULL: an exception is set. */
PyObject *owned_take_number(PyObject *object, fd_id *id);

int probe_register(PyObject *module);
int passing_register(PyObject *module);
int messages_register(PyObject *module);
int descriptor_register(PyObject *module);
int file_register(PyObject *module);
int hold_register(PyObject *module);
#endif
