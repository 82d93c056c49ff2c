/* lend.h - reservation locks on loan to another process. */
#ifndef DMABUF_LEND_H
#define DMABUF_LEND_H
#include "domain/shm.h"

/* The context's life is being reaped: return the lock that it borrowed. The caller moves its generation after that, so that the lock is
 * never free in between. */
void resv_return_dead(Shm *s, db_ctx *c, uint64_t word);

extern PyMethodDef lend_methods[];
#endif
