/* Mapping: the memory of a buffer as Python sees it.
 *
 * Mapping owns one MAP_SHARED range of somebody else's fd.  It neither
 * duplicates nor keeps the fd: the kernel's reference from the mapping to the
 * file is what keeps the memory (and the lease that travels with it) alive.
 *
 *   - It exports its bytes through the buffer protocol and counts the exports.
 *   - close() is refused with BufferError while an export or a window is open,
 *     because unmapping under a live view turns the next touch into SIGSEGV.
 *   - Once closed, every use but close(), closed, exports, windows, dev, ino,
 *     offset and repr is ValueError, as with any closed Python file.
 *   - It remembers which bytes of which inode it shows, and calls on_close()
 *     once, after the memory is unmapped, however that comes about.
 *
 * Everything here runs under the GIL; it is let go only around the system calls
 * that take long, when the object already (or still) shows its final state.
 */
#include "memory/mapping.h"

#include <errno.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <structmember.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* Bytes from which unmapping may take long enough (it frees the pages and their
 * tables) for other threads to profit from the GIL. */
#define LONG_UNMAP (1 << 20)

/* One interpreter (sub-interpreters are not supported), so one type:
 * an object made before a module was loaded again is still recognised. */
static PyTypeObject *mapping_type;

/* ---------------------------------------------------------------- errors -- */

void os_error(int number, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  PyObject *text = PyUnicode_FromFormatV(format, arguments);
  va_end(arguments);
  if (text == NULL) return;
  PyObject *error = PyObject_CallFunction(PyExc_OSError, "iN", number, text);
  if (error == NULL) return;
  PyErr_SetObject((PyObject *)Py_TYPE(error), error);
  Py_DECREF(error);
}

bool mapping_is_open(const Mapping *self) {
  if (self->base != NULL) return true;
  PyErr_SetString(PyExc_ValueError, "the mapping is closed");
  return false;
}

/* --------------------------------------------------------------- mapping -- */

/* A memfd accepts a mapping beyond its end and answers the touch with SIGBUS;
 * a real dma-buf checks by itself (spec 2.17) and isn't a regular file. */
static bool within_file(int fd, Py_ssize_t length, long long offset, long page, struct stat *found) {
  struct stat status;
  if (fstat(fd, &status) != 0) {
    os_error(errno, "mmap: fd %d: %s", fd, strerror(errno));
    return false;
  }
  *found = status;
  if (!S_ISREG(status.st_mode)) return true;
  unsigned long long end = (unsigned long long)offset + (unsigned long long)length;
  unsigned long long whole =
      ((unsigned long long)status.st_size + (unsigned long long)page - 1) / (unsigned long long)page * (unsigned long long)page;
  if (end <= whole) return true;
  os_error(EINVAL, "mmap: fd %d: bytes %lld to %llu reach beyond the end of the file at %lld", fd, offset, end, (long long)status.st_size);
  return false;
}

static PyObject *mapping_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
  static char *names[] = {"fd", "length", "offset", "writable", "from_start", "on_close", NULL};
  int fd, writable = 1, from_start = 0;
  Py_ssize_t length;
  long long offset = 0;
  PyObject *on_close = Py_None;
  struct stat status;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "in|$LppO:Mapping", names, &fd, &length, &offset, &writable, &from_start, &on_close))
    return NULL;
  long page = sysconf(_SC_PAGESIZE);
  if (length <= 0) {
    os_error(EINVAL, "mmap: fd %d: length %zd is not positive", fd, length);
    return NULL;
  }
  if (offset < 0 || offset % page != 0) {
    os_error(EINVAL, "mmap: fd %d: offset %lld is not a multiple of the page size %ld", fd, offset, page);
    return NULL;
  }
  if (!within_file(fd, length, offset, page, &status)) return NULL;

  Mapping *self = (Mapping *)type->tp_alloc(type, 0);
  if (self == NULL) return NULL;
  char *base;
  int error;
  Py_ssize_t lead = from_start ? (Py_ssize_t)offset : 0;
  if (lead > PY_SSIZE_T_MAX - length) {
    Py_DECREF(self);
    os_error(EINVAL, "mmap: fd %d: offset %lld and length %zd pass the address range", fd, offset, length);
    return NULL;
  }
  Py_BEGIN_ALLOW_THREADS
  base = mmap(NULL, (size_t)(lead + length), writable ? PROT_READ | PROT_WRITE : PROT_READ, MAP_SHARED, fd, (off_t)offset - (off_t)lead);
  error = errno;
  Py_END_ALLOW_THREADS
  if (base == MAP_FAILED) {
    Py_DECREF(self);
    os_error(error, "mmap: fd %d: %s (%zd bytes at %lld, %s)", fd, strerror(error), length, offset, writable ? "writable" : "read-only");
    return NULL;
  }
  self->base = base + lead;
  self->length = length;
  self->lead = lead;
  self->writable = writable != 0;
  self->dev = (unsigned long long)status.st_dev;
  self->ino = (unsigned long long)status.st_ino;
  self->offset = offset;
  if (on_close != Py_None) self->on_close = Py_NewRef(on_close);
  return (PyObject *)self;
}

static void mapping_unmap(Mapping *self) {
  char *base = self->base;
  if (base == NULL) return;
  base -= self->lead;
  size_t length = (size_t)(self->lead + self->length);
  /* Closed before the GIL goes: nobody may find the range half unmapped. */
  self->base = NULL;
  if (length < LONG_UNMAP) {
    munmap(base, length);
  } else {
    Py_BEGIN_ALLOW_THREADS
    munmap(base, length);
    Py_END_ALLOW_THREADS
  }
  PyObject *call = self->on_close;
  if (call == NULL) return;
  /* It may come from the garbage collector, in the middle of somebody's error. */
  self->on_close = NULL;
  PyObject *type, *value, *traceback;
  PyErr_Fetch(&type, &value, &traceback);
  PyObject *answer = PyObject_CallNoArgs(call);
  if (answer == NULL) PyErr_WriteUnraisable(call);
  Py_XDECREF(answer);
  Py_DECREF(call);
  PyErr_Restore(type, value, traceback);
}

static int mapping_traverse(PyObject *self, visitproc visit, void *arg) {
  Py_VISIT(Py_TYPE(self));
  Py_VISIT(((Mapping *)self)->on_close);
  return 0;
}

static void mapping_dealloc(PyObject *op) {
  Mapping *self = (Mapping *)op;
  PyTypeObject *type = Py_TYPE(op);
  PyObject_GC_UnTrack(op);
  if (self->weakrefs != NULL) PyObject_ClearWeakRefs(op);
  mapping_unmap(self);      /* exports and windows own references: none is left */
  Py_CLEAR(self->on_close); /* of a mapping that never was */
  type->tp_free(op);
  Py_DECREF(type);
}

static int mapping_getbuffer(PyObject *op, Py_buffer *view, int flags) {
  Mapping *self = (Mapping *)op;
  view->obj = NULL;
  if (!mapping_is_open(self)) return -1;
  if (PyBuffer_FillInfo(view, op, self->base, self->length, !self->writable, flags) < 0) return -1;
  self->exports++;
  return 0;
}

static void mapping_releasebuffer(PyObject *op, Py_buffer *Py_UNUSED(view)) { ((Mapping *)op)->exports--; }

static PyObject *mapping_close(PyObject *op, PyObject *Py_UNUSED(ignored)) {
  Mapping *self = (Mapping *)op;
  if (self->exports > 0 || self->windows > 0)
    return PyErr_Format(PyExc_BufferError,
                        "close: %zd views and %zd accesses still use the mapping; "
                        "release them first",
                        self->exports, self->windows);
  mapping_unmap(self);
  Py_RETURN_NONE;
}

static PyObject *mapping_enter(PyObject *op, PyObject *Py_UNUSED(ignored)) {
  if (!mapping_is_open((Mapping *)op)) return NULL;
  return Py_NewRef(op);
}

static PyObject *mapping_exit(PyObject *op, PyObject *const *Py_UNUSED(args), Py_ssize_t Py_UNUSED(count)) {
  return mapping_close(op, NULL);
}

static PyObject *mapping_repr(PyObject *op) {
  Mapping *self = (Mapping *)op;
  if (self->base == NULL) return PyUnicode_FromString("<Mapping, closed>");
  return PyUnicode_FromFormat("<Mapping of %zd bytes at %p, %s, %zd exports, %zd windows>", self->length, (void *)self->base,
                              self->writable ? "writable" : "read-only", self->exports, self->windows);
}

static Py_ssize_t mapping_length(PyObject *op) {
  Mapping *self = (Mapping *)op;
  return mapping_is_open(self) ? self->length : -1;
}

static PyObject *mapping_get_size(PyObject *op, void *Py_UNUSED(closure)) {
  Mapping *self = (Mapping *)op;
  return mapping_is_open(self) ? PyLong_FromSsize_t(self->length) : NULL;
}

static PyObject *mapping_get_writable(PyObject *op, void *Py_UNUSED(closure)) {
  Mapping *self = (Mapping *)op;
  return mapping_is_open(self) ? PyBool_FromLong(self->writable) : NULL;
}

static PyObject *mapping_get_address(PyObject *op, void *Py_UNUSED(closure)) {
  Mapping *self = (Mapping *)op;
  return mapping_is_open(self) ? PyLong_FromVoidPtr(self->base) : NULL;
}

static PyObject *mapping_get_dev(PyObject *op, void *Py_UNUSED(closure)) { return PyLong_FromUnsignedLongLong(((Mapping *)op)->dev); }

static PyObject *mapping_get_ino(PyObject *op, void *Py_UNUSED(closure)) { return PyLong_FromUnsignedLongLong(((Mapping *)op)->ino); }

static PyObject *mapping_get_offset(PyObject *op, void *Py_UNUSED(closure)) { return PyLong_FromLongLong(((Mapping *)op)->offset); }

static PyObject *mapping_get_closed(PyObject *op, void *Py_UNUSED(closure)) { return PyBool_FromLong(((Mapping *)op)->base == NULL); }

PyDoc_STRVAR(mapping_doc, "Mapping(fd, length, *, offset=0, writable=True, from_start=False, on_close=None)\n--\n\n"
                          "A shared memory mapping of a file descriptor that others own.\n\n"
                          "The fd is neither duplicated nor kept. Exports its bytes as a flat buffer.\n"
                          "length, offset: bytes; offset is a multiple of the page size. from_start: map\n"
                          "from the start of the file, and show the part only. on_close: called once when\n"
                          "the memory is unmapped, by close() or by the garbage collector, which may come\n"
                          "anywhere: it must not wait.\n"
                          "Raises OSError: EINVAL for a length <= 0, an offset that is negative or not a\n"
                          "multiple of the page size, or a range beyond the end of a regular file; else what\n"
                          "mmap(2) answers (EACCES, EBADF, ENODEV, ENOMEM).\n"
                          "Source: spec 2.17, mmap(2).");

static PyMethodDef mapping_methods[] = {
    {"close", mapping_close, METH_NOARGS,
     PyDoc_STR("close($self, /)\n--\n\n"
               "Unmap the memory; a second call does nothing.\n\n"
               "Raises BufferError while an export or a window is open.")},
    {"__enter__", mapping_enter, METH_NOARGS, NULL},
    {"__exit__", (PyCFunction)(void (*)(void))mapping_exit, METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef mapping_getset[] = {
    {"size", mapping_get_size, NULL, PyDoc_STR("Bytes mapped."), NULL},
    {"writable", mapping_get_writable, NULL, PyDoc_STR("Whether the bytes may be written."), NULL},
    {"address", mapping_get_address, NULL, PyDoc_STR("Where this process sees the memory."), NULL},
    {"closed", mapping_get_closed, NULL, PyDoc_STR("Whether close() was done."), NULL},
    {"dev", mapping_get_dev, NULL, PyDoc_STR("st_dev of the file."), NULL},
    {"ino", mapping_get_ino, NULL, PyDoc_STR("st_ino of the file."), NULL},
    {"offset", mapping_get_offset, NULL, PyDoc_STR("Where in the file the bytes begin."), NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMemberDef mapping_members[] = {
    {"exports", T_PYSSIZET, offsetof(Mapping, exports), READONLY, PyDoc_STR("Buffers taken from the mapping itself and not yet released.")},
    {"windows", T_PYSSIZET, offsetof(Mapping, windows), READONLY, PyDoc_STR("Windows that are not done.")},
    {"__weaklistoffset__", T_PYSSIZET, offsetof(Mapping, weakrefs), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot mapping_slots[] = {
    {Py_tp_doc, (void *)mapping_doc},
    {Py_tp_new, mapping_new},
    {Py_tp_dealloc, mapping_dealloc},
    {Py_tp_traverse, mapping_traverse},
    {Py_tp_repr, mapping_repr},
    {Py_tp_methods, mapping_methods},
    {Py_tp_getset, mapping_getset},
    {Py_tp_members, mapping_members},
    {Py_bf_getbuffer, mapping_getbuffer},
    {Py_bf_releasebuffer, mapping_releasebuffer},
    {Py_mp_length, mapping_length},
    {Py_mp_subscript, mapping_subscript},
    {Py_mp_ass_subscript, mapping_ass_subscript},
    {0, NULL},
};

static PyType_Spec mapping_spec = {
    .name = "dmabuf._native.Mapping",
    .basicsize = sizeof(Mapping),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = mapping_slots,
};

int mapping_memory(PyObject *op, char **address, Py_ssize_t *length) {
  if (!Py_IS_TYPE(op, mapping_type)) {
    PyErr_Format(PyExc_TypeError, "a Mapping is required, not %s", Py_TYPE(op)->tp_name);
    return -1;
  }
  Mapping *self = (Mapping *)op;
  if (!mapping_is_open(self)) return -1;
  *address = self->base;
  *length = self->length;
  return 0;
}

bool mapping_writable(PyObject *op) { return ((Mapping *)op)->writable; }

void mapping_windows(PyObject *op, int change) { ((Mapping *)op)->windows += change; }

/* ------------------------------------------------------------- functions -- */

PyDoc_STRVAR(buffer_address_doc, "buffer_address($module, buffer, /)\n--\n\n"
                                 "Where this process sees the first byte of a contiguous buffer.\n\n"
                                 "Valid for as long as the caller keeps a buffer of the object.\n"
                                 "Raises TypeError (no buffer), BufferError (not contiguous).");

static PyObject *buffer_address(PyObject *Py_UNUSED(module), PyObject *object) {
  Py_buffer view;
  if (PyObject_GetBuffer(object, &view, PyBUF_SIMPLE) < 0) return NULL;
  PyObject *address = PyLong_FromVoidPtr(view.buf);
  PyBuffer_Release(&view);
  return address;
}

static PyMethodDef functions[] = {
    {"buffer_address", buffer_address, METH_O, buffer_address_doc},
    {NULL, NULL, 0, NULL},
};

int mapping_register(PyObject *module) {
  if (mapping_type == NULL) mapping_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &mapping_spec, NULL);
  if (mapping_type == NULL || PyModule_AddType(module, mapping_type) < 0) return -1;
  return PyModule_AddFunctions(module, functions);
}
