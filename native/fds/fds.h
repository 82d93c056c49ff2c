/* fds.h - what each file of this folder adds to the module. */
#ifndef DMABUF_FDS_H
#define DMABUF_FDS_H
#include "python.h"

int passing_register(PyObject *module);
int descriptor_register(PyObject *module);
int probe_register(PyObject *module);
int file_register(PyObject *module);
#endif
