/* weak_values.h - a dictionary that doesn't keep its values. */
#ifndef DMABUF_WEAK_VALUES_H
#define DMABUF_WEAK_VALUES_H
#include "python.h"

int weak_values_register(PyObject *module);
#endif
