/* callers.c - which library asks for a buffer.
 *
 * The buffer protocol doesn't say. `torch.frombuffer` asks for a writable buffer, takes a read-only one if it must, and makes a tensor of
 * it that can be written all the same. Others ask in the same way (`fcntl.ioctl`) and behave. So the stack is looked at, which only happens
 * after such a pair of requests.
 */
#include "access/callers.h"
#include <dlfcn.h>
#include <string.h>
#include <unwind.h>

#define NEAREST 6 /* frames: ours, PyObject_GetBuffer, and the caller, with what a compiler may put in between */

typedef struct {
  int seen;
  bool found;
} Search;

static _Unwind_Reason_Code look(struct _Unwind_Context *context, void *arg) {
  Search *search = arg;
  Dl_info about;
  if (dladdr((void *)_Unwind_GetIP(context), &about) && about.dli_fname && strstr(about.dli_fname, "torch")) search->found = true;
  return search->found || ++search->seen == NEAREST ? _URC_END_OF_STACK : _URC_NO_REASON;
}

bool called_by_torch(void) {
  Search search = {.seen = 0};
  _Unwind_Backtrace(look, &search);
  return search.found;
}
