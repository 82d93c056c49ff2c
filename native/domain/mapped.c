/* mapped.c - what a Shm has mapped: the domain's file, or a private copy of it at the same addresses; and how others see that. */
#include "domain/bytes.h"
#include "domain/step.h"
#include "domain/ticker.h"
#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>

/* Threads that sleep on words of what was mapped look again, and come back when they have the GIL. Those that spin without it are done in
 * a moment, and must be before the old addresses show something else. */
static void moved(Shm *s) {
  s->moves++;
  s->known = 0;
  s->fifo_count = 0;
  for (int i = 0; i < CH_TYPES; i++) s->claim_hint[i] = 0;
}

int shm_map_file(Shm *s) {
  int fd = shm_file(s);
  if (fd < 0) return -1;
  while (atomic_load(&s->spinners)) sched_yield();
  char *p = mmap(s->base, s->length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE | (s->base ? MAP_FIXED : 0), fd, 0);
  if (p == MAP_FAILED) return -1;
  s->base = p;
  s->copied = 0;
  step_mapped(p, 0, 0);
  step_mapped(p, s->length, (uint32_t)s->id.ino);
  moved(s);
  madvise(p, s->length, MADV_DONTDUMP);
  return 0;
}

int shm_map_copy(Shm *s) {
  uint32_t n = chunk_count(s);
  if (!chunks_known(s, n)) {
    errno = EUCLEAN;
    return -1;
  }
  size_t used = DB_HEADER_BYTES + (size_t)n * DB_CHUNK;
  int fd = shm_file(s);
  if (fd < 0) return -1;
  char *file = mmap(NULL, used, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0); /* to wake the sleepers on its words */
  if (file == MAP_FAILED) return -1;
  char *copy = mmap(NULL, used, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (copy != MAP_FAILED) {
    memcpy(copy, file, used);
    if (mremap(copy, used, used, MREMAP_MAYMOVE | MREMAP_FIXED, s->base) == MAP_FAILED) {
      int error = errno;
      munmap(copy, used);
      errno = error;
      copy = MAP_FAILED;
    }
  }
  if (copy == MAP_FAILED) {
    int error = errno;
    munmap(file, used);
    errno = error;
    return -1;
  }
  /* Nobody looks behind the chunks, so this may fail. */
  mmap(s->base + used, s->length - used, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  s->copied = 1;
  step_mapped(s->base, 0, 0); /* what happens to it happens to nobody */
  moved(s);
  s->known = n;
  sleepers_wake(s->base, used, file);
  munmap(file, used);
  return 0;
}

int shm_show_presence(Shm *s) {
  if (s->presence || s->presence_fd >= 0) return 0;
  int own = description_of(s);
  if (own < 0) return -1;
  if (byte_lock(s, own, F_RDLCK, PRESENCE_BYTE) < 0) goto failed;
  /* A byte that nobody else has shows whether a mapping keeps the locks. */
  long long mark = PRESENCE_BYTE + 1 + (now_ns() ^ (long long)getpid() << 32) % PRESENCE_BYTE;
  if (byte_lock(s, own, F_RDLCK, mark) < 0) goto failed;
  s->presence = keep_lock(own);
  if (!s->presence) goto failed;
  close(own);
  if (byte_locked(s, shm_file(s), mark, 1)) return 0;
  /* As on overlayfs. Forks inherit a descriptor as well, but a process that closes all of them is not seen any more. */
  let_go(s->presence);
  s->presence = NULL;
  own = description_of(s);
  if (own < 0) return -1;
  if (byte_lock(s, own, F_RDLCK, PRESENCE_BYTE) < 0) goto failed;
  s->presence_fd = own;
  return 0;
failed:;
  int error = errno;
  close(own);
  errno = error;
  return -1;
}

void shm_end_presence(Shm *s) {
  if (s->presence) let_go(s->presence);
  if (s->presence_fd >= 0) fd_close(s->presence_fd, &s->id);
  s->presence = NULL;
  s->presence_fd = -1;
}
