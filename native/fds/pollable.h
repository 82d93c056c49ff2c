/* pollable.h - descriptors that any process can make readable, by their name alone.
 *
 * Such a descriptor is a listening socket (unix(7)) with an abstract name. A connection that waits in its queue makes it readable in every
 * process that has it, for good, and nothing else does: it is never writable and never hung up. The kernel forgets the name with the last
 * descriptor, so nothing is left behind, whoever dies, and a name that is free again shows that no process has the descriptor any more.
 */
#ifndef DMABUF_POLLABLE_H
#define DMABUF_POLLABLE_H
#include "python.h"
#include <stdbool.h>
#include <sys/socket.h>
#include <sys/un.h>

typedef struct {
  struct sockaddr_un address;
  socklen_t length;
} pollable_name;

/* A name from text, at most 107 bytes. */
void pollable_set(pollable_name *n, const char *text, size_t length);

int pollable_bind(const pollable_name *n); /* a descriptor that has the name and can't be made readable yet, or -errno */
int pollable_listen(int fd);               /* from here on it can be. 0 or -errno */

/* The network namespace that a socket is in, 0: not known. Names are of one: a process of another can neither see nor wake them. */
uint64_t pollable_net(int fd);
/* Make it readable. 1; 0: no process has it; -EREMOTE: it is in another namespace than `net`, unless that is 0; -errno. Needs no free
 * descriptor. */
int pollable_wake(const pollable_name *n, uint64_t net);
/* Does a process have it, or a message in flight? 1, 0, -errno as above. */
int pollable_exists(const pollable_name *n, uint64_t net);

int pollable_register(PyObject *module);
#endif
