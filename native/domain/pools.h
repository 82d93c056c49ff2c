/* pools.h - contexts and timelines: slots that one life owns, and methods of Shm on them. */
#ifndef DMABUF_POOLS_H
#define DMABUF_POOLS_H
#include "domain/shm.h"

uint64_t pool_ctx_open(Shm *s, uint32_t index, uint32_t tid, int real, uint64_t stamp); /* its word; 0 with an exception set */
void pool_ctx_close(Shm *s, uint64_t word);
/* Open a timeline in a slot that is free. 0, or -1 with an exception set. */
int pool_timeline_open(Shm *s, uint32_t index, uint64_t context, const char *driver, size_t ndriver, const char *name, size_t nname);

extern PyMethodDef pool_methods[];
#endif
