/* timeline_slot.h - a timeline's slot of this life, as an object that closes it. */
#ifndef DMABUF_TIMELINE_SLOT_H
#define DMABUF_TIMELINE_SLOT_H
#include "python.h"

int timeline_slot_register(PyObject *module);
#endif
