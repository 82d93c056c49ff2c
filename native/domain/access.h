/* access.h - the fence of an access: how it comes into the list, is granted, and ends. */
#ifndef DMABUF_ACCESS_H
#define DMABUF_ACCESS_H
#include "domain/shm.h"

/* Handles that block an access. Not a list: an object that is allocated under the lock may collect garbage there, and a finalizer of the
 * program may wait for the process or thread that waits for the lock. */
#define FEW_HANDLES 16

typedef struct {
  uint64_t *more; /* NULL: they are in `few`; else all of them are here */
  uint32_t count, room;
  uint64_t few[FEW_HANDLES];
} handles;

void handles_begin(handles *x);
void handles_end(handles *x);
uint64_t *handles_all(handles *x);
PyObject *handles_list(handles *x); /* NULL: an exception is set */

/* With the lock of `target`: append the handles that block an access of `rec` to *pending, and add the access's own fence. Returns its
 * handle, or 0 with *error set, or with an exception set. me: the word of the context of the thread or task. */
uint64_t access_add(Shm *s, db_resv *r, uint32_t target, uint32_t rec, uint64_t me, int write, uint32_t timeline, handles *pending,
                    int *error);
/* WAITING -> GRANTED. 0; or the errno of a torn write(), which keeps a reader out. */
int access_let_in(Shm *s, uint64_t handle, uint32_t rec, int write);
/* After its waits: append the handles that block the access still, of a stream that has the buffer. 0, -errno, or RAISED. */
int access_blocked(Shm *s, uint32_t rec, int write, handles *pending);
/* End it. error: 0, or a negative errno, and the content is torn. */
void access_finish(Shm *s, uint64_t handle, uint32_t rec, int write, int error);

extern PyMethodDef access_methods[];
#endif
