/* leave.h - how a block is left. */
#ifndef DMABUF_LEAVE_H
#define DMABUF_LEAVE_H
#include "access/block.h"

/* Leave an open block; failed: by an exception. 0, or -1 with an exception set; the block is left in any case. */
int block_leave(Block *b, bool failed);
#endif
