/* mapping.c - Mapping, the memory of a buffer as Python sees it.
 *
 * A Mapping owns one MAP_SHARED range of an fd that it neither duplicates nor keeps: the kernel's reference from the mapping to the file
 * keeps the memory, and the reference lock on it.
 *
 * - It exports its bytes through the buffer protocol, and counts the exports.
 * - close() raises BufferError while an export or a view is open, because unmapping memory in use turns the next touch into SIGSEGV.
 * - Once it is closed, every use is ValueError, as of any closed Python file, except close(), closed, exports, views, dev, ino, offset
 *   and repr().
 * - It remembers which bytes of which inode it shows, and calls on_close() once, after the memory is unmapped by whatever means.
 *
 * All of this runs under the GIL. It is released only for system calls that may take long, when the object shows its final state already,
 * or still shows its first.
 */
#include "memory/mapping.h"
#include "fds/same.h"
#include "later.h"
#include <stdarg.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* From this many bytes on, unmapping frees so many pages and tables that other threads profit from the GIL meanwhile. */
#define LONG_UNMAP (1 << 20)

/* One interpreter (sub-interpreters are not supported), so one type. An object from before the module was loaded again is recognized. */
static PyTypeObject *mapping_type;

static bool dumped; /* Does the memory of buffers belong into a core dump of this process? */

void mapping_hide(void *start, size_t length) {
  if (!dumped) madvise(start, length, MADV_DONTDUMP); /* a kernel that can't do it dumps more */
}

/* ---- for this folder ---- */

void os_error(int number, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  PyObject *text = PyUnicode_FromFormatV(format, arguments);
  va_end(arguments);
  if (!text) return;
  PyObject *error = PyObject_CallFunction(PyExc_OSError, "iN", number, text);
  if (!error) return;
  PyErr_SetObject((PyObject *)Py_TYPE(error), error);
  Py_DECREF(error);
}

void call_once(PyObject **callable) {
  PyObject *call = *callable;
  if (!call) return;
  *callable = NULL;
  PyObject *type, *value, *traceback;
  PyErr_Fetch(&type, &value, &traceback);
  PyObject *result = PyObject_CallNoArgs(call);
  if (!result) {
    if (PyErr_ExceptionMatches(PyExc_Exception))
      PyErr_WriteUnraisable(call);
    else
      report_later(call); /* of a signal handler, as Ctrl-C is */
  }
  Py_XDECREF(result);
  Py_DECREF(call);
  PyErr_Restore(type, value, traceback);
}

bool mapping_is_open(const Mapping *self) {
  if (self->base) return true;
  PyErr_SetString(PyExc_ValueError, "the mapping is closed");
  return false;
}

Mapping *mapping_of(PyObject *object) {
  if (Py_IS_TYPE(object, mapping_type)) return mapping_is_open((Mapping *)object) ? (Mapping *)object : NULL;
  PyErr_Format(PyExc_TypeError, "a Mapping is required, not %s", Py_TYPE(object)->tp_name);
  return NULL;
}

/* ---- making and unmaking ---- */

/* A memfd can be mapped beyond its end, and the touch there is SIGBUS. A kernel dma-buf is not a regular file, and checks the range itself
 * (semantics 2.17). id: the file that it must be, NULL for any. */
static bool within_file(int fd, const fd_id *id, Py_ssize_t length, long long offset, long page, struct stat *st) {
  if (fd_stat(fd, st) && !(id && errno == EBADF)) {
    os_error(errno, "mmap: fd %d: %s", fd, strerror(errno));
    return false;
  }
  if (id && !stat_is(st, id)) {
    errno = ESTALE;
    fd_error("mmap", fd);
    return false;
  }
  if (!S_ISREG(st->st_mode)) return true;
  unsigned long long end = (unsigned long long)offset + (unsigned long long)length;
  unsigned long long pages = ((unsigned long long)st->st_size + (unsigned long long)page - 1) / (unsigned long long)page;
  if (end <= pages * (unsigned long long)page) return true;
  os_error(EINVAL, "mmap: fd %d: bytes %lld to %llu reach beyond the end of the file at %lld (EINVAL); map less", fd, offset, end,
           (long long)st->st_size);
  return false;
}

static PyObject *mapped(int fd, const fd_id *id, Py_ssize_t length, long long offset, int writable, int from_start, PyObject *on_close) {
  struct stat st = {.st_ino = 0};
  long page = sysconf(_SC_PAGESIZE);
  if (length <= 0) {
    os_error(EINVAL, "mmap: fd %d: length %zd is not positive (EINVAL); pass a number of bytes", fd, length);
    return NULL;
  }
  if (offset < 0 || offset % page) {
    os_error(EINVAL, "mmap: fd %d: offset %lld is not a multiple of the page size (EINVAL); pass a multiple of %ld", fd, offset, page);
    return NULL;
  }
  Py_ssize_t lead = from_start ? (Py_ssize_t)offset : 0;
  /* Before the look at the file: the allocation may collect garbage, whose finalizers may close the descriptor or make the file shorter. */
  Mapping *self = (Mapping *)mapping_type->tp_alloc(mapping_type, 0);
  if (!self) return NULL;
  if (!within_file(fd, id, length, offset, page, &st)) { /* just before the mapping: the number may be used again */
    Py_DECREF(self);
    return NULL;
  }
  if (lead > PY_SSIZE_T_MAX - length) {
    Py_DECREF(self);
    os_error(EINVAL, "mmap: fd %d: offset %lld and length %zd exceed the address range (EINVAL); map less", fd, offset, length);
    return NULL;
  }
  char *base;
  int error;
  Py_BEGIN_ALLOW_THREADS
  base = mmap(NULL, (size_t)(lead + length), writable ? PROT_READ | PROT_WRITE : PROT_READ, MAP_SHARED, fd, (off_t)offset - (off_t)lead);
  error = errno;
  Py_END_ALLOW_THREADS
  if (base == MAP_FAILED) {
    Py_DECREF(self);
    os_error(error, "mmap: fd %d: %s, for %zd %s bytes at %lld", fd, strerror(error), length, writable ? "writable" : "read-only", offset);
    return NULL;
  }
  mapping_hide(base, (size_t)(lead + length));
  self->base = base + lead;
  self->length = length;
  self->lead = lead;
  self->writable = writable != 0;
  self->dev = (unsigned long long)st.st_dev;
  self->ino = (unsigned long long)st.st_ino;
  self->offset = offset;
  if (on_close != Py_None) self->on_close = Py_NewRef(on_close);
  return (PyObject *)self;
}

static PyObject *mapping_new(PyTypeObject *type, PyObject *args, PyObject *kwargs) {
  static char *names[] = {"fd", "length", "offset", "writable", "from_start", "on_close", NULL};
  int fd, writable = 1, from_start = 0;
  Py_ssize_t length;
  long long offset = 0;
  PyObject *on_close = Py_None;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "in|$LppO:Mapping", names, &fd, &length, &offset, &writable, &from_start, &on_close))
    return NULL;
  return mapped(fd, NULL, length, offset, writable, from_start, on_close);
}

static PyObject *map_same(PyObject *module, PyObject *const *a, Py_ssize_t n) {
  fd_id id = {.marked = false};
  if (n != 7) {
    PyErr_SetString(PyExc_TypeError, "map_same(fd, length, offset, writable, from_start, dev, ino)");
    return NULL;
  }
  uint64_t dev, ino;
  int fd = (int)PyLong_AsLong(a[0]);
  Py_ssize_t length = PyNumber_AsSsize_t(a[1], PyExc_OverflowError);
  if (PyErr_Occurred()) return NULL;
  long long offset = PyLong_AsLongLong(a[2]);
  if (PyErr_Occurred() || arg_u64(a[5], &dev) || arg_u64(a[6], &ino)) return NULL;
  id.dev = dev;
  id.ino = ino;
  int writable = PyObject_IsTrue(a[3]), from_start = PyObject_IsTrue(a[4]);
  if (writable < 0 || from_start < 0) return NULL;
  return mapped(fd, &id, length, offset, writable, from_start, Py_None);
}

static void unmap(Mapping *self) {
  if (!self->base) return;
  char *base = self->base - self->lead;
  size_t length = (size_t)(self->lead + self->length);
  self->base = NULL; /* closed before the GIL is released: no thread may find the range half unmapped */
  if (length < LONG_UNMAP) {
    munmap(base, length);
  } else {
    Py_BEGIN_ALLOW_THREADS
    munmap(base, length);
    Py_END_ALLOW_THREADS
  }
  call_once(&self->on_close);
}

static int mapping_traverse(Mapping *self, visitproc visit, void *arg) {
  Py_VISIT(Py_TYPE(self));
  Py_VISIT(self->on_close);
  return 0;
}

static void mapping_dealloc(Mapping *self) {
  PyTypeObject *type = Py_TYPE(self);
  PyObject_GC_UnTrack(self);
  if (self->weakrefs) PyObject_ClearWeakRefs((PyObject *)self);
  unmap(self);              /* exports and views own references, so none is left */
  Py_CLEAR(self->on_close); /* of a mapping that could not be made */
  type->tp_free(self);
  Py_DECREF(type);
}

static int mapping_getbuffer(Mapping *self, Py_buffer *buffer, int flags) {
  buffer->obj = NULL;
  if (!mapping_is_open(self)) return -1;
  if (PyBuffer_FillInfo(buffer, (PyObject *)self, self->base, self->length, !self->writable, flags) < 0) return -1;
  self->exports++;
  return 0;
}

static void mapping_releasebuffer(Mapping *self, Py_buffer *buffer) { self->exports--; }

/* ---- methods ---- */

static PyObject *mapping_close(Mapping *self, PyObject *unused) {
  if (self->exports > 0 || self->views > 0)
    return PyErr_Format(PyExc_BufferError, "close: mapping: %zd buffers and %zd blocks still use it; release them first", self->exports,
                        self->views);
  unmap(self);
  Py_RETURN_NONE;
}

static PyObject *mapping_enter(Mapping *self, PyObject *unused) { return mapping_is_open(self) ? Py_NewRef(self) : NULL; }

static PyObject *mapping_exit(Mapping *self, PyObject *const *args, Py_ssize_t count) { return mapping_close(self, NULL); }

static PyObject *mapping_repr(Mapping *self) {
  if (!self->base) return PyUnicode_FromString("<Mapping, closed>");
  return PyUnicode_FromFormat("<Mapping of %zd bytes at %p, %s, %zd exports, %zd views>", self->length, (void *)self->base,
                              self->writable ? "writable" : "read-only", self->exports, self->views);
}

static Py_ssize_t mapping_length(Mapping *self) { return mapping_is_open(self) ? self->length : -1; }

static PyObject *get_size(Mapping *self, void *unused) { return mapping_is_open(self) ? PyLong_FromSsize_t(self->length) : NULL; }

static PyObject *get_writable(Mapping *self, void *unused) { return mapping_is_open(self) ? PyBool_FromLong(self->writable) : NULL; }

static PyObject *get_address(Mapping *self, void *unused) { return mapping_is_open(self) ? PyLong_FromVoidPtr(self->base) : NULL; }

static PyObject *get_closed(Mapping *self, void *unused) { return PyBool_FromLong(!self->base); }

static PyMethodDef methods[] = {{"close", (PyCFunction)mapping_close, METH_NOARGS,
                                 "close($self, /)\n--\n\n"
                                 "Unmap the memory. Closing twice has no effect.\n\n"
                                 "Raises:\n"
                                 "    BufferError: A buffer taken from the mapping, or a view of it, is open."},
                                {"__enter__", (PyCFunction)mapping_enter, METH_NOARGS, NULL},
                                {"__exit__", (PyCFunction)(void *)mapping_exit, METH_FASTCALL, NULL},
                                {0}};
static PyGetSetDef getset[] = {{"size", (getter)get_size, NULL, "The bytes that it shows.", NULL},
                               {"writable", (getter)get_writable, NULL, "Whether the bytes may be written.", NULL},
                               {"address", (getter)get_address, NULL, "Where this process sees the memory.", NULL},
                               {"closed", (getter)get_closed, NULL, "Whether it is closed.", NULL},
                               {0}};
static PyMemberDef members[] = {
    {"detached", T_BOOL, offsetof(Mapping, detached), READONLY, "Whether it shows a private copy, which something made from a view keeps."},
    {"dev", T_ULONGLONG, offsetof(Mapping, dev), READONLY, "st_dev of the file."},
    {"ino", T_ULONGLONG, offsetof(Mapping, ino), READONLY, "st_ino of the file."},
    {"offset", T_LONGLONG, offsetof(Mapping, offset), READONLY, "Where in the file the bytes begin."},
    {"exports", T_PYSSIZET, offsetof(Mapping, exports), READONLY, "Buffers taken from the mapping itself and not released."},
    {"views", T_PYSSIZET, offsetof(Mapping, views), READONLY, "Views that are not done."},
    {"__weaklistoffset__", T_PYSSIZET, offsetof(Mapping, weakrefs), READONLY, NULL},
    {0}};
static PyType_Slot slots[] = {
    {Py_tp_doc, "Mapping(fd, length, *, offset=0, writable=True, from_start=False, on_close=None)\n--\n\n"
                "A shared memory mapping of a file descriptor, which the caller keeps.\n\n"
                "It exports its bytes as a flat buffer.\n\n"
                "Args:\n"
                "    length: Bytes to show.\n"
                "    offset: Where they begin in the file, a multiple of the page size.\n"
                "    from_start: Map from the start of the file, and show this part only.\n"
                "    on_close: Called once when the memory is unmapped, by close() or by the garbage collector at any point of the\n"
                "        program. It must not wait.\n\n"
                "Raises:\n"
                "    OSError: The length is not positive, the offset is not a multiple of the page size, or the range reaches beyond\n"
                "        the end of a regular file (EINVAL); or what mmap(2) answers (EACCES, EBADF, ENODEV, ENOMEM).\n\n"
                "See semantics 2.17."},
    {Py_tp_new, mapping_new},
    {Py_tp_dealloc, mapping_dealloc},
    {Py_tp_traverse, mapping_traverse},
    {Py_tp_repr, mapping_repr},
    {Py_tp_methods, methods},
    {Py_tp_getset, getset},
    {Py_tp_members, members},
    {Py_bf_getbuffer, mapping_getbuffer},
    {Py_bf_releasebuffer, mapping_releasebuffer},
    {Py_mp_length, mapping_length},
    {Py_mp_subscript, mapping_subscript},
    {Py_mp_ass_subscript, mapping_ass_subscript},
    {0, NULL}};
static PyType_Spec spec = {
    .name = "dmabuf._native.Mapping",
    .basicsize = sizeof(Mapping),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = slots,
};

static PyObject *buffer_address(PyObject *module, PyObject *object) {
  Py_buffer buffer;
  if (PyObject_GetBuffer(object, &buffer, PyBUF_SIMPLE) < 0) return NULL;
  PyObject *address = PyLong_FromVoidPtr(buffer.buf);
  PyBuffer_Release(&buffer);
  return address;
}

static PyMethodDef functions[] = {METHOD(buffer_address, METH_O, "($module, buffer, /)",
                                         "Return where this process sees the first byte of a contiguous buffer.\n\n"
                                         "The address is valid as long as the caller keeps a buffer of the object.\n\n"
                                         "Raises:\n"
                                         "    TypeError: The object has no buffer.\n"
                                         "    BufferError: The buffer is not contiguous."),
                                  METHOD(map_same, METH_FASTCALL, "($module, fd, length, offset, writable, from_start, dev, ino, /)",
                                         "Return a Mapping of a descriptor of the file with that inode.\n\n"
                                         "Raises:\n"
                                         "    ClosedError: The descriptor is another file's (EBADF).\n"
                                         "    OSError: As Mapping()."),
                                  {0}};

int mapping_register(PyObject *module) {
  const char *wanted = getenv("DMABUF_CORE_DUMPS");
  dumped = wanted && !strcmp(wanted, "1");
  if (!mapping_type && !(mapping_type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &spec, NULL))) return -1;
  return PyModule_AddType(module, mapping_type) || PyModule_AddFunctions(module, functions) ? -1 : 0;
}
