/* hold.h - what keeps a lock for a process. */
#ifndef DMABUF_HOLD_H
#define DMABUF_HOLD_H
#include <stdbool.h>
#include <sys/types.h>

typedef struct {
  void *address; /* of a page, or of a thread; NULL: nothing */
  bool by_thread;
} lock_hold;

/* Keep the write lock that `own` has on a byte, until hold_drop() or the end of the process, and close `own`. No fork inherits it. That
 * others see it is proved through fd, another description of the file. The caller keeps everybody else from the byte.
 * 0; -1 with errno, which is ENOTSUP if nothing keeps it: the lock is free. */
int hold_keep(int own, int fd, off_t byte, lock_hold *h);
/* End it. The lock is free when this returns. */
void hold_drop(lock_hold *h);
#endif
