/* locks.h - which files have locks, as /proc/locks shows it (proc(5)), in passes that can be believed. No Python. */
#ifndef DMABUF_LOCKS_H
#define DMABUF_LOCKS_H
#include <stddef.h>
#include <stdint.h>

typedef struct {
  uint64_t dev, ino;
} lock_file;

typedef struct {
  lock_file *files; /* sorted; a file with several locks is there several times */
  size_t count;
} lock_pass;

/* Make one pass over the open file description locks of the system. 0: every lock that was there all the time is in it; 1: the pass is
 * refused, since it may lack some; -1: errno. */
int lock_pass_make(lock_pass *pass);

/* Make passes until one is not refused, but not for ever. A pass that lacks a lock of this process, made to be found, proves nothing.
 * 0; -1: errno, EAGAIN if each was refused, ENODATA if /proc/locks doesn't show the lock. */
int lock_pass_believed(lock_pass *pass);

int lock_pass_has(const lock_pass *pass, uint64_t dev, uint64_t ino);
void lock_pass_free(lock_pass *pass);
#endif
