/* sync.h - sync files: descriptors that become readable when their fences are signaled, whoever has them. */
#ifndef DMABUF_SYNC_H
#define DMABUF_SYNC_H
#include "domain/shm.h"

/* A fence that sync files wait for has been signaled: advance them. 0; -errno: call again, a descriptor could not be made readable. */
int sync_wake(Shm *s, uint64_t handle, db_fence *f);
/* Advance every sync file of the domain. ended: no process lives in it, so every fence is signaled. As above. */
int sync_wake_all(Shm *s, int ended);
/* Note how the fences of all sync files ended, before what their slots say goes. Each is signaled. */
void sync_note_results(Shm *s);
/* Is no slot of a chunk of sync files, or of their fences, in use? Asks the kernel about each sync file in it. */
int sync_chunk_unused(Shm *s, uint32_t chunk);

extern PyMethodDef sync_methods[];
#endif
