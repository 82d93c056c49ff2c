/* reap.h - what a life leaves in the domain, ended: its fences, contexts, locks and references, and then its chunks and its slot.
 *
 * The caller holds the write lock on the life's byte: the process itself, or its reaper, to whom it proves the death. Both functions can be
 * called again after a process died in the middle of one. None of them runs Python, so that nothing foreign runs while the byte is locked.
 */
#ifndef DMABUF_REAP_H
#define DMABUF_REAP_H
#include "domain/shm.h"

/* Everything but the chunks and the slot. What follows the end of the fences is listed in *then. */
void life_end(Shm *s, uint32_t life, endings *then);

/* The chunks, and then the slot becomes CLEAN. 1; 0: a sync file still waits for a fence of it that has ended, and nothing was done;
 * -1: it is not its slot's present life any more. */
int life_clean(Shm *s, uint32_t life);
#endif
