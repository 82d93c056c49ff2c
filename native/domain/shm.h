/* shm.h - Shm, the object of a mapped domain, and bounded ways to what is in it.
 *
 * Functions that return int and take no errno return 0, or -1 with an exception set, unless their comment says otherwise.
 */
#ifndef DMABUF_SHM_H
#define DMABUF_SHM_H
#include "domain/layout.h"
#include "fds/hold.h"
#include "fds/same.h"
#include "python.h"
#include <time.h>

/* In a page that fork wipes, so that a child begins without them. */
typedef struct {
  a64 life;       /* this process's life id, 0: none */
  lock_hold hold; /* what keeps the lock on the life's byte */
  a32 here;       /* 1: this process made the Shm, or has joined since the fork */
} own_words;

/* Fences that a process ended for a life, itself or a dead one. What follows their end is Python code, and waits until no lock is held. */
typedef struct {
  uint64_t *handles;
  uint32_t count, room;
} handle_list;

typedef struct {
  uint32_t me;       /* the life whose callbacks run in this process */
  handle_list local; /* with callbacks of this process */
  handle_list sync;  /* that sync files wait for */
} endings;

void list_handle(handle_list *list, uint64_t handle); /* append it */

typedef struct {
  PyObject_HEAD
  char *base;
  size_t length;
  int fd;          /* asked for with shm_file() (file.h), since somebody else may have closed it */
  fd_id id;        /* of the file */
  PyObject *path;  /* bytes: where the file can be opened again; NULL: nowhere */
  char owns_fd;    /* close the fd with the mapping: after every finalizer, whatever order the garbage collector takes */
  char copied;     /* what is mapped is a private copy: this process left, and nobody was there any more */
  uint32_t known;  /* chunks that this process has checked against the size of the file */
  uint32_t moves;  /* how often what is mapped was exchanged: an address of a chunk is good until the next time */
  a32 spinners;    /* threads that look at the mapping without the GIL */
  own_words *own;  /* of this process alone */
  char *presence;  /* a page that forks inherit: it keeps a read lock on the presence byte */
  int presence_fd; /* or, where a mapping doesn't keep a lock, a descriptor; -1: none */
  endings *ending; /* while a life is ended: what follows is put there, and not done */
  PyObject *tick;  /* tick(kind, value): a wait has lasted TICK_NS; may raise */
  PyObject *slow;  /* slow(kind, value): a wait has lasted slow_ns */
  int64_t slow_ns;
  PyObject *on_local; /* on_local(handle): this process signaled a fence that has callbacks here */
  PyObject *on_sync;  /* on_sync(handle): call sync_wake(handle) until it returns True */
  PyObject *fail;     /* errors.fail */
  PyObject *weakrefs;
  uint64_t *fifo; /* free fence slots of this life, oldest first, so that a slot rests as long as possible */
  uint32_t fifo_cap, fifo_head, fifo_count, fifo_life;
  handle_list asked; /* fences that this process made for entries of streams: streams.c */
  uint32_t asked_life;
  uint32_t claim_hint[CH_TYPES]; /* by chunk type: where to begin to look for an ownerless chunk */
} Shm;

#define SLOW_NS 10000000000ll /* a wait that lasts as long is logged, unless the domain's slow_ns is set to something else */

extern PyTypeObject *Shm_Type;

static inline int64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static inline db_header *hdr(Shm *s) { return (db_header *)s->base; }

static inline db_life *life_at(Shm *s, uint32_t index) { return (db_life *)(s->base + OFF_LIVES) + index; } /* index < DB_LIVES */

static inline db_life *life_slot(Shm *s, uint32_t id) { return life_at(s, LIFE_INDEX(id)); }

static inline uint32_t life_high(Shm *s) { /* slots below this one have been used; bounded */
  uint32_t high = atomic_load(&hdr(s)->life_high);
  return high < DB_LIVES ? high : DB_LIVES;
}

static inline a64 *chunk_entry(Shm *s, uint32_t i) { return (a64 *)(s->base + OFF_CHUNKTAB) + i; } /* i < DB_MAX_CHUNKS */

static inline uint32_t chunk_count(Shm *s) { /* published chunks; bounded */
  uint32_t n = atomic_load(&hdr(s)->nchunks);
  return n < DB_MAX_CHUNKS ? n : DB_MAX_CHUNKS;
}

static inline a32 *bucket(Shm *s, uint32_t i) { return (a32 *)(s->base + OFF_BUCKETS) + (i & (DB_BUCKETS - 1)); }

static inline uint32_t my_life(Shm *s) { return (uint32_t)atomic_load(&s->own->life); }

static inline int life_current(Shm *s, uint32_t id) { /* Is this the id of its slot's present life? Its process may be dead. */
  db_life *l = life_slot(s, id);
  return id && atomic_load(&l->state) == LIFE_ALIVE && LIFE_ID(LIFE_INDEX(id), atomic_load(&l->gen)) == id;
}

/* Learn how many chunks are published now. 0, or -1: the chunk is not among them, or the file lacks some. */
int chunks_refresh(Shm *s, uint32_t wanted);

/* The address of a chunk; NULL if there is no such chunk of that type. */
static inline char *chunk_at(Shm *s, uint32_t i, uint32_t type) {
  if (i >= DB_MAX_CHUNKS || (i >= s->known && chunks_refresh(s, i))) return NULL;
  if (CT_TYPE(atomic_load(chunk_entry(s, i))) != type) return NULL;
  return s->base + DB_HEADER_BYTES + (size_t)i * DB_CHUNK;
}

/* Can n be the count of published chunks? The count never shrinks while a process maps the file, and the file has the memory for it. */
int chunks_known(Shm *s, uint32_t n);
/* The address of n bytes at an offset of the file; NULL with an exception set. */
char *shm_bytes(Shm *s, unsigned long long offset, size_t n);

/* The descriptor of the domain's file. If somebody else closed it, or uses the number again, the file is opened anew. -1 with errno ESTALE:
 * that is impossible. The caller compares again in the call that uses it, or after it (fds/same.h). */
int shm_file(Shm *s);
/* Raise the error for -1 of shm_file(), and of fds/same.h for this descriptor. -1. */
int shm_lost(Shm *s, const char *op);
/* Does the file have all bytes of a range behind the published chunks? 1; 0. */
int shm_has(Shm *s, uint64_t from, uint64_t end);
/* Map the file, at the address that the Shm has already, or at a new one. 0; -1: errno. */
int shm_map_file(Shm *s);
/* Exchange what is mapped for a private copy at the same addresses: the process looks at how things stood. 0; -1: errno. */
int shm_map_copy(Shm *s);
/* Tell others that this process maps the file, or no longer. Before mapping it, and after. 0; -1: errno. */
int shm_show_presence(Shm *s);
void shm_end_presence(Shm *s);

/* Raise the error for an errno, in words: "op: obj: what (ERRNO); remedy". what: NULL for the C library's text. -1. */
int shm_fail(Shm *s, int err, const char *op, const char *obj, const char *what, const char *remedy);
/* Raise EUCLEAN: the file holds something impossible. -1. */
int shm_corrupt(Shm *s, const char *what);
/* 0, or raise EPERM in a forked child, whose parent's life is not its own. */
int shm_need_life(Shm *s, const char *op);

int shm_register(PyObject *module, PyMethodDef *const *sets); /* sets: the method tables of the type, ended by NULL */
#endif
