/* later.h - an exception that the caller of this code can't be given, raised in the main thread a moment later. */
#ifndef DMABUF_LATER_H
#define DMABUF_LATER_H
#include "python.h"
#include <stdbool.h>

bool in_main_thread(void); /* the one in which Python runs signal handlers */

/* Take over an exception, and raise it in the main thread at its next call or jump. false, and it is still the caller's, in another thread
 * or if too many wait. */
bool raise_later(PyObject *error);

/* Clear the exception that is set, and raise it later, or report it to sys.unraisablehook. */
void report_later(PyObject *where);

/* Make a call. Once more if a signal handler raised in the middle, since then its work is begun, or done. What it raised is reported
 * afterwards. */
void call_till_done(PyObject *(*call)(void *), void *with, PyObject *where);
/* The same with a hook and a handle. */
void call_hook(PyObject *hook, uint64_t handle);

PyObject *take_exception(void); /* the exception that is set, as an object with its traceback; it is set no longer */

int later_register(PyObject *module);
#endif
