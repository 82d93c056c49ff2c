/* ending.h - what a process does for its domains at its very end. */
#ifndef DMABUF_ENDING_H
#define DMABUF_ENDING_H
#include "python.h"

int ending_register(PyObject *module);

extern PyMethodDef ending_methods[];
#endif
