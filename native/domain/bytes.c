/* bytes.c - locks on bytes of a domain's file. */
#include "domain/bytes.h"
#include <sys/mman.h>

int description_of(Shm *s) {
  int fd = shm_file(s);
  return fd < 0 ? -1 : fd_reopen(fd, &s->id, O_RDWR);
}

int byte_lock(Shm *s, int fd, int type, long long at) { return fd_set_lock(fd, &s->id, type, at, 1, false); }

int byte_locked(Shm *s, int fd, long long at, long long n) { return fd_get_lock(fd, &s->id, F_WRLCK, at, n); }

/* The mapping refers to the open file description, so the locks of that description last as long as the mapping. */
char *keep_lock(int fd) {
  char *page = mmap(NULL, DB_PAGE, PROT_READ, MAP_SHARED, fd, 0);
  return page == MAP_FAILED ? NULL : page;
}

void let_go(char *page) { munmap(page, DB_PAGE); }
