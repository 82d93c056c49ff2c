/* locks.c - passes over /proc/locks.
 *
 * The kernel prints its list of locks a page at a time, and finds its place again by counting. If locks go in the meantime, the rest moves
 * forward, and a lock that is held all the time can be in no page at all. So two descriptors read in turn, half a page apart, and each page
 * must repeat several lines in a row of the page before. tests/model/proc_locks.pml checks that such a pass misses nothing, as long as no
 * two locks have the same line. Locks on the same bytes of one file do have the same line, hence several lines in a row.
 */
#include "fds/locks.h"
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#define PAGE       4096 /* what the kernel prints at once (seq_file) */
#define FULL       3072 /* a page with more text may have been cut short by a long record, so it is not the last one */
#define PAGE_LINES 512
#define ANCHOR     4 /* lines in a row that a page must repeat */
#define TRIES      20

typedef struct {
  uint64_t line[PAGE_LINES]; /* a digest of each line, without its number */
  size_t count;
} page_lines;

typedef struct {
  int fd;
  char rest[PAGE + 1]; /* the beginning of a line whose end is not read yet */
  size_t rested;
} reader;

static uint64_t digest(const char *text, size_t n) { /* FNV-1a */
  uint64_t h = 0xcbf29ce484222325ull;
  for (size_t i = 0; i < n; i++) h = (h ^ (unsigned char)text[i]) * 0x100000001b3ull;
  return h;
}

static int add_file(lock_pass *pass, size_t *room, uint64_t dev, uint64_t ino) {
  if (pass->count == *room) {
    size_t more = *room ? *room * 2 : 256;
    lock_file *files = realloc(pass->files, more * sizeof *files);
    if (!files) return -1;
    pass->files = files;
    *room = more;
  }
  pass->files[pass->count++] = (lock_file){dev, ino};
  return 0;
}

/* "12: OFDLCK ADVISORY  READ -1 00:01:1234 0 0", or "12: -> …" for one that waits. */
static int take_line(lock_pass *pass, size_t *room, page_lines *page, char *line) {
  char *text = strstr(line, ": ");
  unsigned major, minor;
  unsigned long long ino;
  if (!text) return 0;
  text += 2;
  if (page->count < PAGE_LINES) page->line[page->count++] = digest(text, strlen(text));
  if (sscanf(text, "OFDLCK %*s %*s %*s %x:%x:%llu", &major, &minor, &ino) != 3) return 0;
  return add_file(pass, room, makedev(major, minor), ino);
}

/* Read at most n bytes more, and take the lines that are whole. The bytes read; -1: errno. */
static ssize_t read_page(reader *r, size_t n, lock_pass *pass, size_t *room, page_lines *page) {
  char text[2 * PAGE + 2];
  ssize_t got;
  memcpy(text, r->rest, r->rested);
  do got = read(r->fd, text + r->rested, n);
  while (got < 0 && errno == EINTR);
  if (got < 0) return -1;
  char *line = text, *end = text + r->rested + got;
  page->count = 0;
  for (char *stop; (stop = memchr(line, '\n', (size_t)(end - line))); line = stop + 1) {
    *stop = 0;
    if (take_line(pass, room, page, line)) return -1;
  }
  r->rested = (size_t)(end - line);
  if (r->rested > PAGE) r->rested = 0; /* no line is that long */
  memcpy(r->rest, line, r->rested);
  return got;
}

static int repeats(const page_lines *before, const page_lines *page) {
  size_t wanted = before->count < ANCHOR ? before->count : ANCHOR;
  if (!wanted) return 0;
  for (size_t i = 0; i + wanted <= before->count; i++)
    for (size_t k = 0; k + wanted <= page->count; k++)
      if (!memcmp(before->line + i, page->line + k, wanted * sizeof *page->line)) return 1;
  return 0;
}

static int by_file(const void *a, const void *b) {
  const lock_file *x = a, *y = b;
  if (x->dev != y->dev) return x->dev < y->dev ? -1 : 1;
  return x->ino < y->ino ? -1 : x->ino > y->ino;
}

static int read_all(reader *half, reader *whole, lock_pass *pass) {
  static _Thread_local page_lines pages[2];
  size_t room = 0;
  ssize_t got = read_page(half, PAGE / 2, pass, &room, &pages[0]);
  if (got < 0) return -1;
  for (int n = 1;; n++) {
    page_lines *page = &pages[n & 1], *before = &pages[~n & 1];
    got = read_page(n & 1 ? whole : half, PAGE, pass, &room, page);
    if (got < 0) return -1;
    if (n == 1 && got < FULL) return 0; /* the whole list, at one moment */
    if (!repeats(before, page)) return 1;
    if (got < FULL) return 0;
  }
}

int lock_pass_make(lock_pass *pass) {
  *pass = (lock_pass){0};
  reader readers[2] = {{.fd = open("/proc/locks", O_RDONLY | O_CLOEXEC)}, {.fd = open("/proc/locks", O_RDONLY | O_CLOEXEC)}};
  int r = readers[0].fd < 0 || readers[1].fd < 0 ? -1 : read_all(&readers[0], &readers[1], pass), error = errno;
  for (int i = 0; i < 2; i++)
    if (readers[i].fd >= 0) close(readers[i].fd);
  if (r) lock_pass_free(pass);
  if (pass->count) qsort(pass->files, pass->count, sizeof *pass->files, by_file);
  errno = error;
  return r;
}

/* A new file with a lock, or -1. A sandbox may show an empty file, or the locks of others only, in place of /proc/locks. */
static int new_locked(lock_file *file) {
  struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_len = 1};
  struct stat st;
  int fd = memfd_create("dmabuf-lock", MFD_CLOEXEC);
  if (fd < 0) return -1;
  if (!fcntl(fd, F_OFD_SETLK, &lock) && !fstat(fd, &st)) {
    *file = (lock_file){st.st_dev, st.st_ino};
    return fd;
  }
  int error = errno;
  close(fd);
  errno = error;
  return -1;
}

int lock_pass_believed(lock_pass *pass) {
  lock_file mine;
  int fd = new_locked(&mine), r = fd < 0 ? -1 : 1, error = errno;
  for (int i = 0; r == 1 && i < TRIES; i++) {
    r = lock_pass_make(pass);
    error = r == 1 ? EAGAIN : errno;
  }
  if (!r && !lock_pass_has(pass, mine.dev, mine.ino)) {
    lock_pass_free(pass);
    r = -1;
    error = ENODATA;
  }
  if (fd >= 0) close(fd);
  errno = error;
  return r ? -1 : 0;
}

int lock_pass_has(const lock_pass *pass, uint64_t dev, uint64_t ino) {
  lock_file wanted = {dev, ino};
  return pass->count && bsearch(&wanted, pass->files, pass->count, sizeof wanted, by_file) != NULL;
}

void lock_pass_free(lock_pass *pass) {
  free(pass->files);
  *pass = (lock_pass){0};
}
