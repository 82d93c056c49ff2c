/* reset.h - methods of Shm by which a process begins and ends to look at the file, and the last one gives its memory back. */
#ifndef DMABUF_RESET_H
#define DMABUF_RESET_H
#include "domain/shm.h"

/* At the end of a process that looks at nothing any more: give the memory back if nobody lives there, and nobody maps the file. The
 * lifecycle lock is held through fd. No Python. */
void reset_at_end(int fd, const fd_id *id, int by_fd);

extern PyMethodDef reset_methods[];
#endif
