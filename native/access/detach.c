/* detach.c - take the shared memory away from what outlives its block, and leave it a private copy.
 *
 * An array that was made from a view shows addresses, and its owner can't be told of others. So the addresses stay, and other memory comes
 * to lie there: what is kept is copied into anonymous memory, which is moved over the range of the mapping in one system call. Only
 * then does the fence end. What a notebook or a traceback keeps stays true, and is private.
 *
 * A MAP_PRIVATE mapping of the file is no such copy: pages that were not touched would show later writes.
 */
#include "access/detach.h"
#include "access/holds.h"
#include "domain/fence.h"
#include "later.h"
#include <sys/mman.h>
#include <unistd.h>

#define HUGE (2 << 20) /* from this many bytes on, huge pages make the copy cheaper */

/* Does anybody but blocks, what they left, and the handle refer to the mapping, as an exporter does that gives out one for all accesses?
 * He would find the private copy there. */
static bool is_others(Block *b) {
  Mapping *m = b->mapping;
  Py_ssize_t known = b->path && b->path->mapping == m;
  for (Block *x = m->blocks; x; x = x->sibling) known += 1 + x->kept_count;
  return m->exports || Py_REFCNT(m) > known;
}

/* The range of bytes that anybody shows of a mapping: from *low to *high. Returns whether a block is open. */
static bool shown(Block *b, Py_ssize_t *low, Py_ssize_t *high) {
  bool open = false;
  Mapping *m = b->mapping;
  *low = m->length;
  *high = 0;
  for (Block *x = m->blocks; x; x = x->sibling) {
    if (x->state == OPEN) { /* a reader, since an access that was left is in a writer's way: it shows whatever it likes */
      *low = 0;
      *high = m->length;
      open = true;
    }
    for (hold *h = x->holds; h; h = h->next) {
      if (!h->n) continue; /* it may lie at the very end */
      Py_ssize_t first = h->base - m->base, last = first + (h->n - 1) * h->stride;
      if (first > last) {
        Py_ssize_t swap = first;
        first = last;
        last = swap;
      }
      if (first < *low) *low = first;
      if (last + 1 > *high) *high = last + 1;
    }
  }
  return open;
}

static int put_private(Block *b) {
  Mapping *m = b->mapping;
  size_t page = (size_t)sysconf(_SC_PAGESIZE), whole = ((size_t)(m->lead + m->length) + page - 1) / page * page;
  char *start = m->base - m->lead, *fresh;
  Py_ssize_t low, high;
  bool open = shown(b, &low, &high);
  bool zeros = !open && high > low && high - low > DETACH_MOST; /* an open block must not find zeros */
  fresh = mmap(NULL, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (fresh == MAP_FAILED) return -1;
  if (high > low && !zeros) {
    if (high - low >= HUGE) madvise(fresh, whole, MADV_HUGEPAGE); /* where it can't, the pages are small */
    memcpy(fresh + m->lead + low, m->base + low, (size_t)(high - low));
  }
  if (mremap(fresh, whole, whole, MREMAP_MAYMOVE | MREMAP_FIXED, start) == MAP_FAILED) {
    munmap(fresh, whole);
    return -1;
  }
  mapping_hide(start, whole);
  m->detached = true;
  return zeros;
}

int block_detach(Block *b) {
  Mapping *m = b->mapping;
  if (!m || !m->base || m->detached) return m && m->detached ? 0 : -1;
  if (is_others(b)) return -1;
  int result = put_private(b);
  if (result < 0) return result;
  if (b->path && b->path->mapping == m) Py_CLEAR(b->path->mapping);
  call_once(&m->on_close); /* it shows the file no longer */
  return result;
}

/* ---- what is kept, in this process ---- */

PyObject *block_tell_kept(Block *b, const char *how) {
  PyObject *text = PyUnicode_FromString(how), *result = NULL, *error = NULL;
  for (int calls = 0; text && !result && calls < 8; calls++) {
    result = rule(RULE_KEPT, (PyObject *)b, text, NULL);
    if (!result) Py_XSETREF(error, take_exception());
    if (error && PyErr_GivenExceptionMatches(error, PyExc_Warning)) break; /* a warning that is an error: it was told */
  }
  Py_XDECREF(result);
  Py_XDECREF(text);
  return error;
}

void block_left_zeros(Block *b) {
  PyObject *error = block_tell_kept(b, "zeros");
  if (!error) return;
  PyErr_SetObject((PyObject *)Py_TYPE(error), error);
  Py_DECREF(error);
  PyErr_WriteUnraisable((PyObject *)b);
}

int kept_release(Shm *s, uint32_t target, uint64_t fence) {
  int released = 0;
  for (bool again = true; again;) {
    again = false;
    for (Block *b = kept_first; b; b = b->kept_next) {
      if (b->shm != s || (target != ANY_TARGET && b->target != target) || (fence && b->fence != fence) || b->state != LEFT ||
          !block_is_ours(b))
        continue;
      if (b->forks != kept_forks) { /* a child shows it too, and nobody can take it away from there */
        fence_ignore_deadline(s, b->fence);
        continue;
      }
      Py_INCREF(b);
      uint32_t use = b->use;
      int detached = block_detach(b);
      if (detached >= 0) {
        if (b->use == use) block_end(b); /* else the mapping's hook has let go of what was kept */
        if (detached) block_left_zeros(b);
        released++;
        again = true; /* Python code has run, and may have changed the list */
      } else {
        fence_ignore_deadline(s, b->fence); /* it doesn't give way, so it may be in a cycle of waits */
      }
      Py_DECREF(b);
      if (again) break;
    }
  }
  return released;
}

static PyObject *release_kept(PyObject *module, PyObject *args) {
  Shm *s;
  unsigned target;
  unsigned long long fence;
  if (!PyArg_ParseTuple(args, "O!IK", Shm_Type, &s, &target, &fence)) return NULL;
  return PyLong_FromLong(kept_release(s, target, fence));
}

static PyObject *kept_before_fork(PyObject *module, PyObject *unused) {
  kept_forks++;
  Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    METHOD(kept_before_fork, METH_NOARGS, "($module, /)", "What is kept now stays as it is from now on: a forked child will show it too."),
    METHOD(release_kept, METH_VARARGS, "($module, shm, target, fence, /)",
           "Detach what read() blocks that were left keep, and end their accesses.\n\n"
           "Args:\n"
           "    target: The record whose reservation object counts for them; ANY_TARGET for all.\n"
           "    fence: Of one access; 0 for all of this process.\n\n"
           "Returns:\n"
           "    The number of accesses that ended."),
    {0}};

int detach_register(PyObject *module) { return PyModule_AddFunctions(module, functions) ? -1 : 0; }
