/* block.h - a read() or write() block of one buffer: the state that C owns, so that no signal handler can lose it.
 *
 *   IDLE  --arrive-->  ENTERED  --granted, shown-->  OPEN  --leave, nothing kept-->  IDLE
 *                         |                            |
 *                         +--given up--> IDLE          +--leave, something kept--> LEFT  --the last hold goes--> IDLE
 *
 * The fence of the access is in `fence` from the instant at which it is in the buffer's list, and 0 from the instant at which it has ended.
 */
#ifndef DMABUF_BLOCK_H
#define DMABUF_BLOCK_H
#include "access/path.h"
#include "domain/held.h"

enum { IDLE, ENTERED, OPEN, LEFT };

typedef struct hold hold;

typedef struct block {
  PyObject_HEAD
  PyObject *buf, *handle, *timeout; /* timeout: None for no limit */
  Py_ssize_t offset, length;        /* the bytes to show; length -1: to the end */
  /* of the present use, NULL or 0 while IDLE */
  Path *path;
  Shm *shm;
  Mapping *mapping;
  PyObject *asked; /* the backing whose begin_cpu_access was called */
  PyObject *kept;  /* what its end is called with, if the access outlives the block, and perhaps the handle */
  hold *holds;     /* exports of views that somebody keeps */
  Py_ssize_t kept_count;
  struct block *sibling, **sibling_at; /* the blocks that use the mapping */
  struct block *kept_next, **kept_at;  /* those that were left, and that something keeps: detach.c */
  uint64_t fence;
  uint32_t rec, target, life;
  uint32_t forks; /* how often this process had forked when the block was left */
  uint32_t use;   /* counts the uses: a view belongs to one */
  int error;      /* what the fence ends with */
  char state, write;
  bool begun, told;                         /* the exporter's begin has returned; its end was called */
  void (*over)(struct block *, void *with); /* of a stream's frame, which has no fence: called when the use is over; NULL: an access */
  void *with;
} Block;

struct hold {
  PyObject_HEAD
  Block *block;
  Mapping *mapping;  /* which stays mapped as long, also when the access is over */
  hold *prev, *next; /* in block->holds */
  char *base;
  Py_ssize_t n, stride; /* bytes; stride: from one to the next */
  bool readonly;
  bool counted; /* it keeps the block's present use, whose end makes this false */
};

typedef struct { /* several that are granted together */
  PyObject_HEAD
  PyObject *parts; /* a tuple of Blocks */
  PyObject *timeout;
} Group;

extern PyTypeObject *Block_Type, *Group_Type;

/* Rules of the access that are Python code: methods of one object. NULL: an exception is set. */
enum {
  RULE_PREPARE, /* (block): check what can be checked, and return the handle's AccessPath, aimed at the buffer */
  RULE_UNTIL,   /* (block or blocks): the end of the wait, CLOCK_MONOTONIC ns, -1 for no limit */
  RULE_OWNER,   /* (block): the Owner that runs now */
  RULE_CHECK,   /* (block, owner): refuse an access under the buffer's own lock, warn in a signalling section */
  RULE_REFUSED, /* (block, errno): raise */
  RULE_TORN,    /* (block, errno): raise */
  RULE_WAIT,    /* (blocks, owner, handles, until): wait until nothing blocks the accesses */
  RULE_LOCKED,  /* (blocks, owner, until): return blocks.add(owner), called with all reservation locks */
  RULE_ARRIVE,  /* (blocks, owner, handles or None, until): a coroutine that arrives, if that was not done, and waits */
  RULE_WAITED,  /* (owner): it waits for nothing any more */
  RULE_MAP,     /* (block): the Mapping to look through */
  RULE_BEGIN,   /* (block, backing): the exporter's begin_cpu_access */
  RULE_END,     /* (block, backing, kept): its end_cpu_access */
  RULE_KEEP,    /* (block, backing): what its end can be called with later, or None */
  RULE_KEPT,    /* (block, how): something is kept: of a "read", "detached" of a write, or "zeros" where it was too much */
  RULE_IN_USE,  /* (block): the BufferError of a writer's block whose view is in use */
  RULE_REPORT,  /* (block, exception): nobody can catch it */
  RULES
};

PyObject *rule(int which, PyObject *block, PyObject *a, PyObject *b); /* a, b: NULL for no argument */
PyObject *rule_call(int which, PyObject *const *args, Py_ssize_t n);
PyObject *rule_method(const char *name); /* one that has no number above */
bool rules_check(void);                  /* Is RULE_CHECK needed though the owner holds no lock? */

/* Call an op of the exporter for a rule. Between the op and this note of it no signal handler runs. */
PyObject *block_begun(Block *b, PyObject *const *call, Py_ssize_t n);
PyObject *block_told(Block *b, PyObject *const *call, Py_ssize_t n);
/* Call the exporter's begin_cpu_access, and note that its end is to be called. 0, or -1 with an exception set. */
int block_ask(Block *b, PyObject *backing);
/* A wait of this owner raised: whatever it was, the owner waits for nothing any more. The exception that is set stays. */
void block_waited(PyObject *owner);
/* Give an entered access up: nobody has seen its view. The exception that is set stays. */
void block_abandon(Block *b);
/* Call the exporter's end, before the fence ends, and forget that it was asked. What it raised, as an object, or NULL. A write that the
 * exporter could not complete is torn. */
PyObject *block_end_bracket(Block *b);
/* End the access: the exporter's bracket, then the fence. What the former raised, as an object, or NULL. */
PyObject *block_end_use(Block *b);
/* The same, when nothing is kept any more and nobody can catch what is raised, which is reported. */
void block_end(Block *b);

/* A block without a fence, whose memory something else keeps others out of. */
Block *block_bare(PyObject *buf, PyObject *handle, bool write, void (*over)(Block *, void *), void *with);

/* A block that was left, and that something keeps, comes on this list of the process. Its end takes it off. */
extern Block *kept_first;
extern uint32_t kept_forks; /* how often this process has forked */
void kept_add(Block *b);

static inline bool block_is_ours(Block *b) { return b->life && my_life(b->shm) == b->life; } /* not a parent's, and not before leave() */

bool block_is_described(Block *b); /* Does the domain know a layout of its buffer? */

int block_register(PyObject *module);
#endif
