/* callers.h - which library asks. */
#ifndef DMABUF_CALLERS_H
#define DMABUF_CALLERS_H
#include <stdbool.h>

/* Is the nearest code on the stack beside Python's and ours of torch? It costs microseconds. */
bool called_by_torch(void);
#endif
