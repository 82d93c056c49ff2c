/* port.h - what a process has of a stream: the place of a reader, or the part of the producer. docs/streams-protocol.md has the steps.
 *
 * One thread at a time uses a port. Its methods change the shared words and its own in one C call, so that no signal handler comes between.
 */
#ifndef DMABUF_PORT_H
#define DMABUF_PORT_H
#include "access/view.h"
#include "domain/streams.h"

enum { ROLE_NONE = -1, ROLE_PRODUCER = 100 }; /* else SR_ of a reader */

/* Why a frame's slot is not given back yet. */
enum {
  HELD_TURN = 1,  /* its block or loop turn lasts */
  HELD_FRAME = 2, /* frame.keep() */
  HELD_VIEW = 4,  /* an array that was made from its view is kept */
};

struct port;

typedef struct {
  PyObject_HEAD
  struct port *port;
  PyObject *view; /* once it was asked for; NULL */
  uint64_t seq;   /* 0: over */
  uint32_t slot;
  bool kept;  /* keep(): its end gives the slot back */
  bool sized; /* of a reader: it has fewer bytes than the slot */
} Frame;

typedef struct {
  struct port *port;
  PyObject *buf, *handle;
  Block *block;
  uint32_t held;
} port_slot;

typedef struct port {
  PyObject_HEAD
  Shm *shm;
  PyObject *meta; /* the mapping with the frames' metadata */
  port_slot slot[STREAM_SLOTS];
  Frame *current;          /* of this turn, borrowed: NULL if nobody refers to it any more */
  uint64_t turn;           /* number of this turn's frame, 0: there is none */
  uint32_t turn_slot;      /* and its slot */
  uint64_t used, fence;    /* of the frame that is made: its bytes, UINT64_MAX for all; for what readers wait first, 0: nothing */
  struct port *next, **at; /* the producers of this process */
  uint64_t n;              /* producer: the frame that it makes next; reader: the next that it wants */
  uint64_t was;            /* producer: the state of the slot before it was marked */
  uint64_t lost;
  uint64_t vain;    /* of a wait that has ended in vain: how often its word was woken before the last look, + 1; 0 */
  uint64_t due;     /* of a group that redelivers: slots whose frames are this member's, and that it has not shown */
  uint32_t adopted; /* places of dead members whose frames this one has */
  uint32_t stream, gen, life, slots, policy, meta_bytes;
  uint32_t last;  /* producer: the slot of the newest frame */
  uint32_t place; /* reader */
  uint32_t group;
  uint32_t bits; /* S_ bits of the frame that look() found */
  int role;
  int only;       /* producer: the slot that it wants, -1: any */
  int found;      /* the slot that look() found */
  bool busy;      /* a thread is inside */
  bool watched;   /* a descriptor says whether there is a next frame, and a rule is told of each that is taken */
  bool takeover;  /* it waits for another producer when there is none */
  bool promised;  /* a reader of all frames, which are promised to it */
  bool described; /* producer: the metadata of the frame that it makes was set */
} Port;

extern PyTypeObject *Frame_Type;

/* A result of the functions below: 0 if it is positive; -1 with an exception set. */
int port_checked(Port *p, const char *operation, int got);
int port_need(Port *p, const char *operation);  /* 0; -1: it is closed, and an exception is set */
int port_go_in(Port *p, const char *operation); /* one thread at a time. 0; -1: an exception is set */
/* One argument, timeout, by place or by name. NULL: an exception is set. */
PyObject *timeout_of(PyObject *const *a, Py_ssize_t n, PyObject *names, const char *operation);

/* The stream, if it is there and this process still lives in the domain; NULL: *error is an errno. */
db_stream *port_stream(Port *p, int *error);
#define META_HEAD 8 /* bytes before a frame's metadata */

/* Call a rule in Python with the port and these arguments, which it takes over. NULL: an exception is set. */
PyObject *port_rule(const char *name, PyObject *port, PyObject *arguments);
/* Raise the error for an errno: a rule in Python. -1. */
int port_failed(Port *p, const char *operation, int error);
/* Wait until look() is not 0 any more. What it returned; -errno; RAISED. */
int port_wait(Port *p, uint32_t word, int64_t until, int (*look)(Port *));

/* Is a foreign fence, of a writer only or of anybody, in the way of this slot? granted: only an access that was granted, or a job. */
int foreign_blocks(Shm *s, db_stream *x, uint32_t k, bool writers, bool granted);

/* ---- produce.c ---- */
int produce_begin(Port *p);               /* become the producer. 0; -errno */
int produce_take(Port *p, int64_t until); /* 1: p->found is marked; -errno; RAISED */
void produce_publish(Port *p, uint64_t used, uint64_t fence);
void produce_back(Port *p, bool written); /* written: the slot's content may have changed */
int produce_drained(Port *p);             /* for port_wait() */
void produce_end(Port *p);                /* in order */

/* ---- read.c ---- */
int read_join(Port *p, int role, uint64_t group, bool newest, uint64_t history); /* 0; -errno */
int fence_result(Shm *s, uint64_t fence);                                        /* what it ended with: 0, or a negative errno */
int read_take(Port *p, int64_t until);                                           /* 1: p->found is held; -errno; RAISED */
void read_give(Port *p, uint32_t k, uint64_t seq);                               /* the turn is over */
void read_unclaim(Port *p, uint32_t k);                                          /* what was kept is gone */
void read_leave(Port *p);
int read_ended(Port *p);        /* 1: no frame will come */
uint64_t read_waiting(Port *p); /* frames of dead members that wait for this one */

/* ---- frame.c ---- */
PyObject *frame_open(Port *p, uint32_t k, uint64_t seq); /* of this turn; NULL: an exception is set */
int frame_close(Port *p, bool failed);                   /* end a reader's turn. -1: an exception is set, and it has ended */
int frame_publish(Port *p);                              /* end a producer's. -1: an exception is set, and there is no frame */
int frame_discard(Port *p);
int frames_clear(Port *p); /* end what is kept, and detach it. 0; -1: something can't be detached */
int frame_register(PyObject *module);

int port_register(PyObject *module);
#endif
