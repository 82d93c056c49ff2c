/* detach.h - take the shared memory away from what outlives its block, and leave it a private copy. */
#ifndef DMABUF_DETACH_H
#define DMABUF_DETACH_H
#include "access/block.h"

#define DETACH_MOST (256ll << 20) /* bytes that are copied; of more, zeros are left */

/* Detach what is kept of a block that was left, which can then end. 0; 1: so much that it was left zeros; -1: it can't be detached. */
int block_detach(Block *b);

/* More was kept than is copied, so that zeros lie there: say so. */
void block_left_zeros(Block *b);
/* Call RULE_KEPT until it ends. What it, or a signal handler in its middle, raised; NULL: nothing. */
PyObject *block_tell_kept(Block *b, const char *how);

#define ANY_TARGET UINT32_MAX

/* Detach and end the kept read() blocks of a buffer, or with ANY_TARGET of all, that hold this fence; fence 0: all of them that this
 * reservation object counts for.
 * The number of blocks that were ended. */
int kept_release(Shm *s, uint32_t target, uint64_t fence);

int detach_register(PyObject *module);
#endif
