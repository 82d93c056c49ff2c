/* arrive.c - how blocks are entered, one or several that are granted together.
 *
 * One step under the reservation locks takes a snapshot of the fences that block the accesses, and adds the accesses' own fences. The
 * accesses then wait for the snapshots. So accesses are granted in the order of their arrival.
 *
 * In the common case (plain memory, locks that are free, nothing in the way) no Python code runs. The rest are rules in Python. They change
 * nothing that would have to be undone: what they take is noted here, before or as they return, and a block that can't be entered is
 * abandoned here, whatever they raised.
 */
#include "access/arrive.h"
#include "access/detach.h"
#include "access/handle.h"
#include "access/view.h"
#include "domain/access.h"
#include "domain/fence.h"
#include "domain/resv.h"
#include "domain/resv_lock.h"

static PyObject *s_owner, *s_asyncio, *s_trio;
static PyObject *running_loop; /* _asyncio._get_running_loop, once asyncio is imported */

/* ---- who ---- */

/* 1: a task of asyncio or trio may run here; 0; -1 */
static int task_may_run(void) {
  PyObject *modules = PyImport_GetModuleDict();
  if (PyDict_GetItemWithError(modules, s_trio)) return 1;
  if (PyErr_Occurred()) return -1;
  if (!running_loop) {
    if (!PyDict_GetItemWithError(modules, s_asyncio)) return PyErr_Occurred() ? -1 : 0;
    PyObject *module = PyImport_ImportModule("_asyncio");
    running_loop = module ? PyObject_GetAttrString(module, "_get_running_loop") : NULL;
    Py_XDECREF(module);
    if (!running_loop) {
      PyErr_Clear();
      return 1;
    }
  }
  PyObject *loop = PyObject_CallNoArgs(running_loop);
  if (!loop) return -1;
  Py_DECREF(loop);
  return loop != Py_None;
}

PyObject *accesses_owner(Block **blocks, Py_ssize_t n) {
  Path *p = blocks[0]->path;
  PyObject *owner = NULL;
  int task = task_may_run();
  if (task < 0) return NULL;
  if (!task) {
    owner = PyObject_GetAttr(p->thread, s_owner);
    if (!owner) return NULL;
    Context *c = PyObject_TypeCheck(owner, Context_Type) ? (Context *)owner : NULL;
    if (!c || !c->word || c->life != blocks[0]->life) Py_CLEAR(owner);
  }
  if (!owner && !(owner = rule(RULE_OWNER, (PyObject *)blocks[0], NULL, NULL))) return NULL;
  if (!PyObject_TypeCheck(owner, Context_Type)) {
    PyErr_SetString(PyExc_TypeError, "an Owner is a Context");
    Py_DECREF(owner);
    return NULL;
  }
  return owner;
}

/* ---- before anything is shared ---- */

static int refused(Block *b, int error) {
  PyObject *number = PyLong_FromLong(error), *result = number ? rule(RULE_REFUSED, (PyObject *)b, number, NULL) : NULL;
  if (result) PyErr_SetString(PyExc_SystemError, "a refused access must raise");
  Py_XDECREF(number);
  Py_XDECREF(result);
  return -1;
}

static bool path_serves(Path *p, Block *b) {
  return p->life && my_life(p->shm) == p->life && !p->backing && p->mapping && p->mapping->base && !p->mapping->detached &&
         (!b->write || p->mapping->writable);
}

static int begin(Block *b) {
  if (b->state != IDLE) return refused(b, EBUSY);
  PyObject *path = handle_path(b->handle);
  if (!path) return PyErr_Format(PyExc_TypeError, "a handle of a buffer is required"), -1;
  Py_INCREF(path);
  if (!Py_IS_TYPE(path, Path_Type) || !path_serves((Path *)path, b)) {
    Py_DECREF(path);
    b->state = ENTERED; /* first, so that the rule can't enter it again */
    if (!(path = rule(RULE_PREPARE, (PyObject *)b, NULL, NULL))) {
      b->state = IDLE;
      return -1;
    }
    if (!Py_IS_TYPE(path, Path_Type) || !((Path *)path)->shm) {
      PyErr_SetString(PyExc_TypeError, "an AccessPath is required");
      Py_DECREF(path);
      b->state = IDLE;
      return -1;
    }
  }
  Path *p = (Path *)path;
  b->path = p;
  b->shm = (Shm *)Py_NewRef(p->shm);
  b->rec = p->rec;
  b->target = p->target;
  b->life = p->life;
  b->error = 0;
  b->state = ENTERED;
  return 0;
}

int accesses_begin(Block **blocks, Py_ssize_t n) {
  for (Py_ssize_t i = 0; i < n; i++)
    if (begin(blocks[i])) {
      accesses_abandon(blocks, i);
      return -1;
    }
  return 0;
}

void accesses_abandon(Block **blocks, Py_ssize_t n) {
  while (n-- > 0) block_abandon(blocks[n]);
}

bool accesses_are_plain(Block **blocks, Py_ssize_t n) {
  for (Py_ssize_t i = 0; i < n; i++)
    if (blocks[i]->path->backing) return false;
  return true;
}

/* ---- arriving ---- */

/* This process left the domain meanwhile, or it is a forked child: nothing of the block counts any more. */
static int still_ours(Block *b) {
  if (block_is_ours(b)) return 0;
  return refused(b, EOWNERDEAD);
}

static int add(Block *b, db_resv *r, uint64_t me, handles *pending) {
  int error;
  uint64_t h = access_add(b->shm, r, b->target, b->rec, me, b->write, b->path->timeline, pending, &error);
  if (h) {
    b->fence = h;
    return 0;
  }
  return PyErr_Occurred() ? RAISED : error;
}

PyObject *accesses_add(Block **blocks, Py_ssize_t n, PyObject *owner) {
  handles pending;
  handles_begin(&pending);
  int failed = 0;
  Py_ssize_t i;
  for (i = 0; i < n && !failed; i++) {
    db_resv *r = still_ours(blocks[i]) ? NULL : resv_of(blocks[i]->shm, blocks[i]->target);
    failed = r ? add(blocks[i], r, ((Context *)owner)->word, &pending) : RAISED;
  }
  PyObject *list = NULL;
  if (failed > 0)
    refused(blocks[i - 1], failed);
  else if (!failed)
    list = handles_list(&pending);
  handles_end(&pending);
  return list;
}

/* Several locks, without waiting. 1: one isn't free; 0: all accesses are added, or *failed.
 *
 * A lock that isn't free has the process look for deaths, which runs Python code. If that leaves the domain, the contexts of all locks are
 * closed, and what is at their addresses may be another mapping's. */
static int arrive_at_once(Block **blocks, Py_ssize_t n, uint64_t me, handles *pending, int *failed, Block **where) {
  db_resv *few[8], **locks = n <= 8 ? few : PyMem_New(db_resv *, (size_t)n);
  Shm *s = blocks[0]->shm; /* of all of them */
  uint32_t moves = s->moves;
  Py_ssize_t held = 0;
  int result = 0;
  if (!locks) {
    PyErr_NoMemory();
    *failed = RAISED;
    return 0;
  }
  for (Py_ssize_t i = 0; i < n && !result && !*failed; i++) {
    db_resv *r = resv_of(blocks[i]->shm, blocks[i]->target);
    bool again = false;
    for (Py_ssize_t k = 0; k < held; k++) again |= locks[k] == r;
    if (again) continue;
    int got = r ? resv_take(s, r, me, 0, 0, 1, -1) : RAISED;
    if (got >= 0)
      locks[held++] = r;
    else if (got == RAISED)
      *failed = RAISED;
    else
      result = 1;
    if (!block_is_ours(blocks[i])) break;
  }
  if (!*failed && still_ours(blocks[0])) *failed = RAISED;
  for (Py_ssize_t i = 0; i < n && !result && !*failed; i++) {
    *where = blocks[i];
    *failed = add(blocks[i], resv_of(blocks[i]->shm, blocks[i]->target), me, pending);
  }
  while (held && s->moves == moves) resv_release(locks[--held], me);
  if (locks != few) PyMem_Free(locks);
  return result;
}

/* Leave the group's own fences out, which others of the group may have found. */
static PyObject *list_of_others(Block **blocks, Py_ssize_t n, handles *pending) {
  uint64_t *all = handles_all(pending);
  uint32_t kept = 0;
  for (uint32_t i = 0; i < pending->count; i++) {
    bool own = false;
    for (Py_ssize_t k = 0; k < n; k++) own |= blocks[k]->fence == all[i];
    if (!own) all[kept++] = all[i];
  }
  pending->count = kept;
  return handles_list(pending);
}

/* 0; 1: a lock isn't free; -1: an exception is set, or *error, of which block. */
static int arrive(Block **blocks, Py_ssize_t n, PyObject *owner, int64_t until, bool may_wait, PyObject **pending, int *error, Block **of) {
  *pending = NULL;
  *error = 0;
  Context *c = (Context *)owner;
  PyObject *checked = NULL;
  bool kernel = false;
  for (Py_ssize_t i = 0; i < n; i++) kernel |= blocks[i]->path->kernel;
  for (Py_ssize_t i = 0; i < n; i++) {
    if (c->locks || rules_check()) {
      if (!(checked = rule(RULE_CHECK, (PyObject *)blocks[i], owner, NULL))) return -1;
      Py_DECREF(checked);
    }
    if (still_ours(blocks[i])) return -1;
  }
  uint64_t me = c->word;
  handles found;
  handles_begin(&found);
  int failed = 0, busy = 0;
  Block *where = blocks[0];
  if (n == 1) {
    Shm *s = where->shm;
    db_resv *r = resv_of(s, where->target);
    int got = r ? resv_take(s, r, me, 0, 0, !may_wait, until) : RAISED;
    uint32_t moves = s->moves;
    if (got >= 0) {
      failed = add(where, r, me, &found);
      if (s->moves == moves) resv_release(r, me); /* else another thread left the domain, and `r` may be gone */
    } else if (got == -EBUSY && !may_wait) {
      busy = 1;
    } else {
      failed = got == RAISED ? RAISED : got == -EDEADLK ? EALREADY : got == -EBUSY ? EAGAIN : -got;
    }
  } else {
    busy = arrive_at_once(blocks, n, me, &found, &failed, &where);
  }
  if (!failed && !busy && (found.count || kernel)) {
    *pending = n == 1 ? handles_list(&found) : list_of_others(blocks, n, &found);
    if (!*pending) failed = RAISED;
  }
  handles_end(&found);
  if (!failed) return busy;
  if (failed != RAISED) *error = failed;
  *of = where;
  return -1;
}

int accesses_arrive(Block **blocks, Py_ssize_t n, PyObject *owner, int64_t until, bool may_wait, PyObject **pending) {
  int error;
  Block *of;
  int got = arrive(blocks, n, owner, until, may_wait, pending, &error, &of);
  if (got >= 0 || !error) return got;
  if (error == EDEADLK) { /* an access of this thread or task is in the way: one that was left, and only something kept, gives way */
    for (Py_ssize_t i = 0; i < n; i++) {
      uint64_t fence = blocks[i]->fence;
      blocks[i]->fence = 0;
      if (fence) fence_end(blocks[i]->shm, fence, 0);
    }
    if (kept_release(of->shm, of->target, 0)) {
      if (still_ours(of)) return -1;
      got = arrive(blocks, n, owner, until, may_wait, pending, &error, &of);
      if (got >= 0 || !error) return got;
    }
  }
  return refused(of, error);
}

/* ---- granted ---- */

static int show_one(Block *b, PyObject **view) {
  Path *p = b->path;
  if (p->backing && !b->asked && block_ask(b, p->backing)) return -1;
  PyObject *mapping = NULL;
  if (!p->backing && p->mapping && p->mapping->base && !p->mapping->detached && (!b->write || p->mapping->writable))
    mapping = Py_NewRef((PyObject *)p->mapping);
  else if (!(mapping = rule(RULE_MAP, (PyObject *)b, NULL, NULL)))
    return -1;
  Mapping *m = mapping_of(mapping);
  if (!m || still_ours(b)) {
    Py_DECREF(mapping);
    return -1;
  }
  Py_ssize_t offset = b->offset, length = b->length < 0 ? m->length - offset : b->length;
  if (offset < 0 || length < 0 || offset > m->length || length > m->length - offset) {
    Py_DECREF(mapping);
    return refused(b, EINVAL);
  }
  m->views++;
  p->open++;
  b->mapping = m;
  b->sibling = m->blocks;
  b->sibling_at = &m->blocks;
  if (m->blocks) m->blocks->sibling_at = &b->sibling;
  m->blocks = b;
  b->state = OPEN;
  *view = view_new(b, m->base + offset, length, 1, !b->write);
  return *view ? 0 : -1;
}

PyObject *accesses_show(Block **blocks, Py_ssize_t n, PyObject *whole) {
  for (Py_ssize_t i = 0; i < n; i++) {
    Block *b = blocks[i];
    if (still_ours(b)) return NULL;
    int torn = access_let_in(b->shm, b->fence, b->rec, b->write);
    if (torn) {
      PyObject *number = PyLong_FromLong(torn), *result = number ? rule(RULE_TORN, (PyObject *)b, number, NULL) : NULL;
      Py_XDECREF(number);
      Py_XDECREF(result);
      return NULL;
    }
  }
  PyObject *view = NULL;
  if ((PyObject *)blocks[0] == whole) return show_one(blocks[0], &view) ? (Py_XDECREF(view), NULL) : view;
  PyObject *views = PyTuple_New(n);
  for (Py_ssize_t i = 0; views && i < n; i++) {
    if (show_one(blocks[i], &view))
      Py_CLEAR(views);
    else
      PyTuple_SET_ITEM(views, i, view);
  }
  return views;
}

PyObject *bare_open(Block *b) {
  PyObject *view = NULL;
  if (begin(b)) return NULL;
  if (show_one(b, &view)) {
    Py_XDECREF(view);
    block_abandon(b);
    return NULL;
  }
  return view;
}

/* ---- all of it ---- */

int64_t accesses_until(PyObject *whole, PyObject *timeout) {
  if (timeout == Py_None) return -1;
  PyObject *number = rule(RULE_UNTIL, whole, NULL, NULL);
  int64_t until = number ? PyLong_AsLongLong(number) : -1;
  Py_XDECREF(number);
  return until;
}

PyObject *accesses_enter(Block **blocks, Py_ssize_t n, PyObject *whole, PyObject *timeout) {
  int64_t until = accesses_until(whole, timeout);
  if (until == -1 && PyErr_Occurred()) return NULL;
  if (!n) return PyTuple_New(0);
  if (accesses_begin(blocks, n)) return NULL;
  PyObject *owner = accesses_owner(blocks, n), *pending = NULL, *view = NULL;
  int got = owner ? accesses_arrive(blocks, n, owner, until, n == 1, &pending) : -1;
  if (got == 1) { /* one of several locks isn't free: in their order, and with waits */
    PyObject *number = PyLong_FromLongLong(until), *args[] = {whole, owner, number};
    pending = number ? rule_call(RULE_LOCKED, args, 3) : NULL;
    Py_XDECREF(number);
    got = pending ? 0 : -1;
  }
  if (!got && pending) {
    PyObject *number = PyLong_FromLongLong(until), *args[] = {whole, owner, pending, number};
    PyObject *waited = number ? rule_call(RULE_WAIT, args, 4) : NULL;
    Py_XDECREF(number);
    Py_XDECREF(waited);
    if (!waited) {
      got = -1;
      block_waited(owner);
    }
  }
  if (!got) view = accesses_show(blocks, n, whole);
  if (!view) accesses_abandon(blocks, n);
  Py_XDECREF(owner);
  Py_XDECREF(pending);
  return view;
}

int arrive_register(PyObject *module) {
  if (!s_owner && !(s_owner = PyUnicode_InternFromString("owner"))) return -1;
  if (!s_asyncio && !(s_asyncio = PyUnicode_InternFromString("asyncio"))) return -1;
  if (!s_trio && !(s_trio = PyUnicode_InternFromString("trio"))) return -1;
  return 0;
}
