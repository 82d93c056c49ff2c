/* same.h - is the descriptor still the one that it was? A number says nothing: whoever closes it, and opens another file, has it too.
 *
 * A descriptor is compared by its file's (st_dev, st_ino) in the call that uses it. Between the comparison and the system call another
 * thread can still close it; docs/design.md says how long that is. Where a system call answers and changes nothing, or makes a descriptor,
 * the comparison comes after it, and there is no such moment.
 */
#ifndef DMABUF_SAME_H
#define DMABUF_SAME_H
#include "python.h"
#include <stdbool.h>
#include <sys/stat.h>

typedef struct {
  unsigned long long dev, ino;
  bool marked; /* all eventfds, and all inotify descriptors, have one inode: these are told apart by a mark, see fd_mark() */
} fd_id;

int fd_stat(int fd, struct stat *st); /* fstat(2) by the shorter system call: the C library's one takes a path as well */
int fd_identify(int fd, fd_id *id);   /* 0, or -1 with errno */
int fd_mark(int fd, fd_id *id);       /* Mark the description if its inode is not its own, and identify it. 0, or -1 with errno. */
bool fd_is(int fd, const fd_id *id);
bool stat_is(const struct stat *st, const fd_id *id);

/* Each of these compares. -1 with errno, ESTALE if the descriptor is another one, or none. */
int fd_close(int fd, const fd_id *id); /* a descriptor of somebody else stays open */
int fd_dup(int fd, const fd_id *id, int command, int lowest);
int fd_reopen(int fd, const fd_id *id, int flags);     /* through /proc: another open file description of the file */
int fd_renew(int fd, const fd_id *id, long long byte); /* give the number a new description of the file, with a read lock on the byte */
int fd_set_lock(int fd, const fd_id *id, int kind, long long start, long long length, bool wait); /* 1; 0: another one's lock conflicts */
int fd_get_lock(int fd, const fd_id *id, int kind, long long start, long long length); /* 1: another description's lock is there */

/* Raise errno: ESTALE as EBADF, in words, and every other as OSError. NULL. */
PyObject *fd_error(const char *op, int fd);

int same_register(PyObject *module);
#endif
