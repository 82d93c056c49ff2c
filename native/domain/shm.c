/* shm.c - Shm: a domain's file, mapped whole. module.c lists the tables of its methods. */
#include "domain/shm.h"
#include "domain/step.h"
#include "errors.h"
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

PyTypeObject *Shm_Type;

/* ---- errors ---- */

int shm_fail(Shm *s, int err, const char *op, const char *obj, const char *what, const char *remedy) {
  return raise_error_by(s->fail, err, op, obj, what, remedy);
}

int shm_corrupt(Shm *s, const char *what) {
  return shm_fail(s, EUCLEAN, "domain", "the domain's file", what, "end the processes that use it, then open it again");
}

int shm_need_life(Shm *s, const char *op) {
  if (my_life(s)) return 0;
  return shm_fail(s, EPERM, op, "an object of the parent process", "a forked child inherited it", "make the object in this process");
}

/* ---- bounds ---- */

int chunks_refresh(Shm *s, uint32_t wanted) {
  uint32_t n = atomic_load(&hdr(s)->nchunks);
  if (s->copied || n > DB_MAX_CHUNKS || wanted >= n) return -1;
  if (!shm_has(s, DB_HEADER_BYTES + (uint64_t)s->known * DB_CHUNK, DB_HEADER_BYTES + (uint64_t)n * DB_CHUNK)) return -1;
  s->known = n;
  return 0;
}

int chunks_known(Shm *s, uint32_t n) {
  if (n > DB_MAX_CHUNKS || n < s->known) return 0;
  return n == s->known || !chunks_refresh(s, n - 1);
}

char *shm_bytes(Shm *s, unsigned long long offset, size_t n) {
  uint64_t end = offset + n;
  if (end < offset || end > s->length) goto bad;
  if (end > DB_HEADER_BYTES) {
    uint32_t last = (uint32_t)((end - 1 - DB_HEADER_BYTES) / DB_CHUNK);
    if (last >= s->known && chunks_refresh(s, last)) goto bad;
  }
  return s->base + offset;
bad:
  shm_corrupt(s, "an offset lies outside of it");
  return NULL;
}

/* Without memory a handle is left out. The dispatcher finds it at its next tick, and FW_SYNC keeps the life's slot from being CLEAN. */
void list_handle(handle_list *list, uint64_t handle) {
  if (list->count == list->room) {
    uint32_t room = list->room ? list->room * 2 : 64;
    uint64_t *more = realloc(list->handles, room * sizeof *more);
    if (!more) return;
    list->handles = more;
    list->room = room;
  }
  list->handles[list->count++] = handle;
}

/* ---- the type ---- */

static PyObject *shm_new(PyTypeObject *type, PyObject *args, PyObject *kw) {
  static char *names[] = {"fd", "fail", NULL};
  int fd;
  PyObject *fail = NULL;
  if (!PyArg_ParseTupleAndKeywords(args, kw, "i|O", names, &fd, &fail)) return NULL;
  Shm *s = (Shm *)type->tp_alloc(type, 0);
  if (!s) return NULL;
  s->fd = fd;
  s->slow_ns = SLOW_NS;
  s->presence_fd = -1;
  s->length = DB_HEADER_BYTES + (size_t)DB_MAX_CHUNKS * DB_CHUNK;
  s->fail = Py_XNewRef(fail);
  struct stat st;
  if (fstat(fd, &st) || fd_identify(fd, &s->id)) goto os;
  if ((uint64_t)st.st_size < DB_HEADER_BYTES) {
    shm_corrupt(s, "it is shorter than its header");
    goto out;
  }
  if (shm_show_presence(s) || shm_map_file(s)) goto os;
  void *p = mmap(NULL, DB_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) goto os;
  s->own = p;
  if (madvise(p, DB_PAGE, MADV_WIPEONFORK)) goto os;
  atomic_store(&s->own->here, 1);
  db_header *h = hdr(s);
  if (memcmp(h->magic, DB_MAGIC, 8) || h->version != DB_VERSION || h->header_bytes != DB_HEADER_BYTES || h->chunk_bytes != DB_CHUNK ||
      h->max_chunks != DB_MAX_CHUNKS || h->lives != DB_LIVES || h->buckets != DB_BUCKETS) {
    shm_corrupt(s, "its header is of another layout");
    goto out;
  }
  return (PyObject *)s;
os:
  PyErr_SetFromErrno(PyExc_OSError);
out:
  Py_DECREF(s);
  return NULL;
}

static int shm_traverse(Shm *s, visitproc visit, void *arg) {
  Py_VISIT(Py_TYPE(s));
  Py_VISIT(s->tick);
  Py_VISIT(s->slow);
  Py_VISIT(s->on_local);
  Py_VISIT(s->on_sync);
  Py_VISIT(s->fail);
  return 0;
}

static int shm_clear(Shm *s) {
  Py_CLEAR(s->tick);
  Py_CLEAR(s->slow);
  Py_CLEAR(s->on_local);
  Py_CLEAR(s->on_sync);
  return 0; /* not fail: a finalizer that runs after this may still have something to say */
}

static void shm_dealloc(Shm *s) {
  PyTypeObject *type = Py_TYPE(s);
  PyObject_GC_UnTrack(s);
  if (s->weakrefs) PyObject_ClearWeakRefs((PyObject *)s);
  shm_clear(s);
  Py_CLEAR(s->fail);
  Py_CLEAR(s->path);
  if (s->base) {
    step_mapped(s->base, 0, 0);
    munmap(s->base, s->length);
  }
  shm_end_presence(s);
  if (s->own) hold_drop(&s->own->hold);
  if (s->owns_fd) fd_close(s->fd, &s->id);
  if (s->own) munmap(s->own, DB_PAGE);
  PyMem_Free(s->fifo);
  free(s->asked.handles);
  type->tp_free(s);
  Py_DECREF(type);
}

static PyObject *get_life(Shm *s, void *unused) { return PyLong_FromUnsignedLong(my_life(s)); }

static int set_life(Shm *s, PyObject *value, void *unused) {
  unsigned long id = value ? PyLong_AsUnsignedLong(value) : 0;
  if (PyErr_Occurred()) return -1;
  atomic_store(&s->own->life, id);
  return 0;
}

static PyObject *get_forked(Shm *s, void *unused) { return PyBool_FromLong(!atomic_load(&s->own->here)); }

static PyObject *get_copied(Shm *s, void *unused) { return PyBool_FromLong(s->copied); }

static PyObject *get_fd(Shm *s, void *unused) {
  int fd = shm_file(s);
  return fd < 0 ? (shm_lost(s, "fileno"), NULL) : PyLong_FromLong(fd);
}

static PyObject *get_path(Shm *s, void *unused) { return Py_NewRef(s->path ? s->path : Py_None); }

static int set_path(Shm *s, PyObject *value, void *unused) {
  if (value && value != Py_None && !PyBytes_Check(value)) {
    PyErr_SetString(PyExc_TypeError, "the path of a domain's file is bytes");
    return -1;
  }
  Py_XSETREF(s->path, value && value != Py_None ? Py_NewRef(value) : NULL);
  return 0;
}

static PyMemberDef members[] = {
    {"tick", T_OBJECT, offsetof(Shm, tick), 0, "tick(kind, value), called at each tick of a wait"},
    {"slow", T_OBJECT, offsetof(Shm, slow), 0, "slow(kind, value), called once in a wait that lasts longer than slow_ns"},
    {"slow_ns", T_LONGLONG, offsetof(Shm, slow_ns), 0, "ns after which slow() is called"},
    {"on_local", T_OBJECT, offsetof(Shm, on_local), 0,
     "on_local(handle), called when this process signals a fence that has callbacks here"},
    {"on_sync", T_OBJECT, offsetof(Shm, on_sync), 0, "on_sync(handle), called to call sync_wake(handle) until it returns True"},
    {"fail", T_OBJECT, offsetof(Shm, fail), 0, "fail(errno, operation, object, remedy, *, what), which makes an error"},
    {"owns_fd", T_BOOL, offsetof(Shm, owns_fd), 0, "whether the fd is closed with the mapping"},
    {"__weaklistoffset__", T_PYSSIZET, offsetof(Shm, weakrefs), READONLY, NULL},
    {0}};
static PyGetSetDef getset[] = {
    {"fd", (getter)get_fd, NULL, "the domain's descriptor, opened again if somebody else closed it", NULL},
    {"forked", (getter)get_forked, NULL, "whether the process was forked, and has not joined since", NULL},
    {"copied", (getter)get_copied, NULL, "whether a private copy is mapped, because this process left as the last one", NULL},
    {"path", (getter)get_path, (setter)set_path, "where the domain's file can be opened again; None: nowhere", NULL},
    {"life", (getter)get_life, (setter)set_life, "this process's life id in the domain; 0: none, or forked since", NULL},
    {0}};

int shm_register(PyObject *module, PyMethodDef *const *sets) {
  static PyMethodDef all[96];
  size_t n = 0;
  for (; *sets; sets++)
    for (PyMethodDef *d = *sets; d->ml_name; d++) {
      if (n + 1 >= sizeof all / sizeof *all) {
        PyErr_SetString(PyExc_SystemError, "Shm has more methods than its table has room for");
        return -1;
      }
      all[n++] = *d;
    }
  PyType_Slot slots[] = {
      {Py_tp_doc, "Shm(fd, fail=None)\n--\n\nA domain's file, mapped: bounded atomics, pools, fences and reservation locks."},
      {Py_tp_new, shm_new},
      {Py_tp_dealloc, shm_dealloc},
      {Py_tp_traverse, shm_traverse},
      {Py_tp_clear, shm_clear},
      {Py_tp_methods, all},
      {Py_tp_members, members},
      {Py_tp_getset, getset},
      {0, NULL}};
  PyType_Spec spec = {"dmabuf._native.Shm", sizeof(Shm), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_BASETYPE, slots};
  Shm_Type = (PyTypeObject *)PyType_FromModuleAndSpec(module, &spec, NULL);
  return Shm_Type ? PyModule_AddObjectRef(module, "Shm", (PyObject *)Shm_Type) : -1;
}
