/* file.c - what Python's os module leaves out about files: to give a range of one back to the system (fallocate(2)).
 *
 * The range reads as zeros afterwards, in every mapping too; the size stays. */
#include "fds/fds.h"
#include <fcntl.h>

static PyObject *punch(PyObject *m, PyObject *args) { /* punch(fd, start, length); OSError */
  int fd, r, error;
  long long start, length;
  if (!PyArg_ParseTuple(args, "iLL:punch", &fd, &start, &length)) return NULL;
  do {
    Py_BEGIN_ALLOW_THREADS
    r = fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)start, (off_t)length);
    error = errno;
    Py_END_ALLOW_THREADS
  } while (r && error == EINTR && !PyErr_CheckSignals());
  if (!r) Py_RETURN_NONE;
  if (PyErr_Occurred()) return NULL;
  errno = error;
  return PyErr_SetFromErrno(PyExc_OSError);
}
static PyMethodDef methods[] = {{"punch", punch, METH_VARARGS, "Give a range of a file's memory or disk space back."}, {0}};
int file_register(PyObject *module) { return PyModule_AddFunctions(module, methods); }
