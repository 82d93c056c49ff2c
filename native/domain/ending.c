/* ending.c - the end of a process that closed not all of its buffers, or that left a domain while others lived there.
 *
 * When Python's exit handlers run, the program may still use its buffers: in finalizers, in other handlers, in threads. So only when the
 * interpreter is gone are their descriptors closed and their mappings ended, and only then can a reset see that nobody holds them. Nothing
 * here needs Python. The kernel would close and unmap everything a moment later, but then no process would be left to give memory back.
 */
#include "domain/ending.h"
#include "domain/bytes.h"
#include "domain/reset.h"
#include "fds/same.h"
#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#define LOCK_TRIES 50 /* for the lifecycle lock, 2 ms apart: the end of a process does not wait for one that is stopped */

typedef struct file {
  struct file *next;
  int fd, presence_fd;
  fd_id id;
  char *presence;
} file;

typedef struct {
  unsigned long long dev, ino;
} inode;

static file *files;
static inode *buffers;
static size_t buffer_count;
static pid_t of; /* the process that filled these in: a child that is forked after that has nothing to do */

static int is_buffer(unsigned long long dev, unsigned long long ino) {
  for (size_t i = 0; i < buffer_count; i++)
    if (buffers[i].dev == dev && buffers[i].ino == ino) return 1;
  return 0;
}

static void close_buffers(void) {
  DIR *all = opendir("/proc/self/fd");
  for (struct dirent *e; all && (e = readdir(all));) {
    struct stat st;
    int fd = atoi(e->d_name);
    if (*e->d_name != '.' && fd != dirfd(all) && !fstat(fd, &st) && is_buffer(st.st_dev, st.st_ino)) close(fd);
  }
  if (all) closedir(all);
}

/* A thread that has not ended may be in the middle of reading a mapping, without the interpreter's lock. */
static int alone(void) {
  int threads = 0;
  DIR *all = opendir("/proc/self/task");
  for (struct dirent *e; all && (e = readdir(all));) {
    char path[320], name[16] = "";
    snprintf(path, sizeof path, "/proc/self/task/%s/comm", e->d_name);
    FILE *f = *e->d_name == '.' ? NULL : fopen(path, "re");
    if (!f) continue;
    if (!fgets(name, sizeof name, f) || strncmp(name, "dmabuf-tick", 11)) threads++;
    fclose(f);
  }
  if (all) closedir(all);
  return threads == 1;
}

static void unmap_buffers(void) {
  FILE *maps = alone() ? fopen("/proc/self/maps", "re") : NULL;
  unsigned long *ranges = NULL;
  size_t count = 0, room = 0;
  char line[512];
  while (maps && fgets(line, sizeof line, maps)) {
    unsigned long start, end;
    unsigned major, minor;
    unsigned long long ino;
    if (sscanf(line, "%lx-%lx %*s %*s %x:%x %llu", &start, &end, &major, &minor, &ino) != 5 || !is_buffer(makedev(major, minor), ino))
      continue;
    if (count + 2 > room) {
      unsigned long *more = realloc(ranges, (room = room ? room * 2 : 64) * sizeof *more);
      if (!more) break;
      ranges = more;
    }
    ranges[count++] = start;
    ranges[count++] = end;
  }
  if (maps) fclose(maps);
  for (size_t i = 0; i < count; i += 2) munmap((void *)ranges[i], ranges[i + 1] - ranges[i]);
  free(ranges);
}

static void end_file(file *f) {
  if (f->presence) let_go(f->presence);
  if (f->presence_fd >= 0) fd_close(f->presence_fd, &f->id);
  int own = fd_reopen(f->fd, &f->id, O_RDWR), got = 0;
  for (int i = 0; own >= 0 && i < LOCK_TRIES && !(got = fd_set_lock(own, &f->id, F_WRLCK, LIFECYCLE_BYTE, 1, false)); i++) usleep(2000);
  if (got == 1) {
    reset_at_end(own, &f->id, f->presence_fd >= 0);
    fd_set_lock(own, &f->id, F_UNLCK, LIFECYCLE_BYTE, 1, false);
  }
  if (own >= 0) close(own);
  fd_close(f->fd, &f->id);
}

static void end_all(void) {
  if (of != getpid()) return;
  if (buffer_count) {
    close_buffers();
    unmap_buffers();
  }
  for (file *f = files; f; f = f->next) end_file(f);
}

/* ---- methods and functions ---- */

static PyObject *at_exit(Shm *s, PyObject *unused) {
  if (s->copied && !buffer_count) Py_RETURN_NONE; /* it was the last process, and has given all of it back */
  int fd = shm_file(s);
  file *f = fd < 0 ? NULL : calloc(1, sizeof *f);
  if (!f) Py_RETURN_NONE; /* the next process that leaves gives the memory back */
  f->fd = fd_dup(fd, &s->id, F_DUPFD_CLOEXEC, 3);
  if (f->fd < 0) {
    free(f);
    Py_RETURN_NONE;
  }
  f->id = s->id;
  f->presence = s->presence;
  f->presence_fd = s->presence_fd;
  s->presence = NULL;
  s->presence_fd = -1;
  f->next = files;
  files = f;
  of = getpid();
  Py_RETURN_NONE;
}

static PyObject *close_at_exit(PyObject *module, PyObject *arg) {
  PyObject *list = PySequence_Tuple(arg);
  inode *more = list ? realloc(buffers, (buffer_count + (size_t)PyTuple_GET_SIZE(list) + 1) * sizeof *more) : NULL;
  if (more) buffers = more;
  for (Py_ssize_t i = 0; more && i < PyTuple_GET_SIZE(list); i++) {
    inode *b = &buffers[buffer_count];
    if (!PyArg_ParseTuple(PyTuple_GET_ITEM(list, i), "KK", &b->dev, &b->ino)) {
      Py_DECREF(list);
      return NULL;
    }
    buffer_count++;
  }
  Py_XDECREF(list);
  if (!list) return NULL;
  of = getpid();
  Py_RETURN_NONE;
}

PyMethodDef ending_methods[] = {
    METHOD(at_exit, METH_NOARGS, "($self, /)",
           "This process has left, and its exit handlers run: when the interpreter is gone, end to look at the file, and give its memory\n"
           "back if this is the last process."),
    {0}};

static PyMethodDef functions[] = {
    METHOD(close_at_exit, METH_O, "($module, inodes, /)",
           "Close what this process still has of buffers with these (st_dev, st_ino), when the interpreter is gone."),
    {0}};

int ending_register(PyObject *module) {
  static int once;
  if (!once++ && Py_AtExit(end_all)) once = 0; /* no room: the next process that leaves gives the memory back */
  return PyModule_AddFunctions(module, functions);
}
