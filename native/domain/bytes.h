/* bytes.h - the bytes of a domain's file on which processes have locks (fcntl(2), open file description locks).
 */
#ifndef DMABUF_BYTES_H
#define DMABUF_BYTES_H
#include "domain/shm.h"
#include <fcntl.h>

/* A new description of the domain's file, as a descriptor; -1: errno. */
int description_of(Shm *s);

/* Lock (F_WRLCK, F_RDLCK) or unlock (F_UNLCK) a byte for a description of the domain's file. 1; 0: another one's lock conflicts; -1:
 * errno. */
int byte_lock(Shm *s, int fd, int type, long long at);

/* Does another description than fd have a lock on one of n bytes? 1, 0; -1: errno. */
int byte_locked(Shm *s, int fd, long long at, long long n);

/* Keep the locks of a description after its descriptor is closed: as long as the page that is returned is mapped, which a fork inherits.
 * (fds/hold.h keeps a lock that no fork inherits.) NULL: errno. */
char *keep_lock(int fd);
void let_go(char *page);
#endif
