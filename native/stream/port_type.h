/* port_type.h - Port. */
#ifndef DMABUF_PORT_TYPE_H
#define DMABUF_PORT_TYPE_H
#include "stream/port.h"

extern PyTypeObject *Port_Type;

int port_type_register(PyObject *module);
#endif
