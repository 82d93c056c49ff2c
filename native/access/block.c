/* block.c - the block of one buffer: its rules in Python, and how its use ends. arrive.c has how it begins, leave.c how it is left. */
#include "access/block.h"
#include "domain/access.h"
#include "domain/fence.h"
#include "later.h"
#include <frameobject.h>
#include <opcode.h>

#define MOST_CALLS 100 /* of a rule that signal handlers interrupt each time */

PyTypeObject *Block_Type, *Group_Type;
static PyObject *block_rules, *sections; /* sections: a set, empty unless somebody is in a signalling section */

static const char *const rule_texts[RULES] = {
    [RULE_PREPARE] = "prepare", [RULE_UNTIL] = "until",   [RULE_OWNER] = "owner",   [RULE_CHECK] = "check",   [RULE_REFUSED] = "refused",
    [RULE_TORN] = "torn",       [RULE_WAIT] = "wait",     [RULE_LOCKED] = "locked", [RULE_ARRIVE] = "arrive", [RULE_WAITED] = "waited",
    [RULE_MAP] = "map",         [RULE_BEGIN] = "begin",   [RULE_END] = "end",       [RULE_KEEP] = "keep",     [RULE_KEPT] = "kept",
    [RULE_IN_USE] = "in_use",   [RULE_REPORT] = "report",
};
static PyObject *rule_names[RULES];

PyObject *rule_call(int which, PyObject *const *args, Py_ssize_t n) {
  PyObject *all[6];
  if (!block_rules) return PyErr_Format(PyExc_RuntimeError, "the rules of accesses are not set: import dmabuf");
  all[0] = block_rules;
  for (Py_ssize_t i = 0; i < n; i++) all[i + 1] = args[i];
  return PyObject_VectorcallMethod(rule_names[which], all, (size_t)n + 1, NULL);
}

PyObject *rule_method(const char *name) {
  if (!block_rules) return PyErr_Format(PyExc_RuntimeError, "the rules of accesses are not set: import dmabuf");
  return PyObject_GetAttrString(block_rules, name);
}

bool rules_check(void) { return sections && PySet_GET_SIZE(sections) > 0; }

PyObject *rule(int which, PyObject *block, PyObject *a, PyObject *b) {
  PyObject *args[3] = {block, a, b};
  return rule_call(which, args, a ? b ? 3 : 2 : 1);
}

PyObject *block_begun(Block *b, PyObject *const *call, Py_ssize_t n) {
  PyObject *result = PyObject_Vectorcall(call[0], call + 1, (size_t)n - 1, NULL);
  if (result) b->begun = true;
  return result;
}

/* Did a signal handler raise the exception that is set before the first act of the function in Python that was called? */
static bool is_before_first_act(void) {
  PyObject *kind, *value, *trace;
  PyErr_Fetch(&kind, &value, &trace);
  bool result = false;
  if (trace && ((PyTracebackObject *)trace)->tb_next) { /* the handler's frame is below */
    PyCodeObject *code = PyFrame_GetCode(((PyTracebackObject *)trace)->tb_frame);
    PyObject *bytes = PyCode_GetCode(code);
    int at = ((PyTracebackObject *)trace)->tb_lasti;
    if (bytes) result = at >= 0 && at < PyBytes_GET_SIZE(bytes) && (unsigned char)PyBytes_AS_STRING(bytes)[at] == RESUME;
    Py_XDECREF(bytes);
    Py_DECREF(code);
    PyErr_Clear();
  }
  PyErr_Restore(kind, value, trace);
  return result;
}

PyObject *block_told(Block *b, PyObject *const *call, Py_ssize_t n) {
  PyObject *result = PyObject_Vectorcall(call[0], call + 1, (size_t)n - 1, NULL);
  if (result || !is_before_first_act()) b->told = true;
  return result;
}

/* The block was given up while another thread, or an exporter, was in its begin: end that at once. */
static void end_unasked(Block *b, PyObject *backing, uint64_t fence) {
  PyObject *kind, *value, *trace;
  PyErr_Fetch(&kind, &value, &trace);
  bool idle = b->state == IDLE;
  if (idle) b->fence = fence; /* it names the bracket in the exporter's process */
  PyObject *result = rule(RULE_END, (PyObject *)b, backing, Py_None);
  if (!result) report_later((PyObject *)b);
  Py_XDECREF(result);
  if (idle && b->state == IDLE) b->fence = 0;
  PyErr_Restore(kind, value, trace);
}

int block_ask(Block *b, PyObject *backing) {
  Py_INCREF(backing);
  uint32_t use = b->use;
  uint64_t fence = b->fence;
  Shm *shm = (Shm *)Py_NewRef(b->shm);
  uint32_t life = b->life;
  b->begun = false;
  PyObject *result = rule(RULE_BEGIN, (PyObject *)b, backing, NULL);
  bool begun = result || b->begun, mine = b->use == use && !b->asked, raised = !result;
  Py_XDECREF(result);
  if (begun && mine)
    b->asked = Py_NewRef(backing); /* its end is to be called, also if a signal handler raised since */
  else if (begun && my_life(shm) == life)
    end_unasked(b, backing, fence);
  if (!raised && !mine) PyErr_SetString(PyExc_RuntimeError, "the block was given up meanwhile");
  Py_DECREF(shm);
  Py_DECREF(backing);
  return raised || !mine ? -1 : 0;
}

void block_waited(PyObject *owner) {
  PyObject *kind, *value, *trace, *done = NULL;
  PyErr_Fetch(&kind, &value, &trace);
  for (int calls = 0; !done && calls < 8; calls++) { /* again if a signal handler raised in the middle; the first exception counts */
    PyErr_Clear();
    done = rule(RULE_WAITED, owner, NULL, NULL);
  }
  Py_XDECREF(done);
  PyErr_Restore(kind, value, trace);
}

Block *block_bare(PyObject *buf, PyObject *handle, bool write, void (*over)(Block *, void *), void *with) {
  Block *b = (Block *)Block_Type->tp_alloc(Block_Type, 0);
  if (!b) return NULL;
  b->buf = Py_NewRef(buf);
  b->handle = Py_NewRef(handle);
  b->timeout = Py_NewRef(Py_None);
  b->write = write;
  b->length = -1;
  b->over = over;
  b->with = with;
  return b;
}

/* ---- what is kept, in this process ---- */

Block *kept_first;
uint32_t kept_forks;

void kept_add(Block *b) {
  b->forks = kept_forks;
  b->kept_next = kept_first;
  b->kept_at = &kept_first;
  if (kept_first) kept_first->kept_at = &b->kept_next;
  kept_first = b;
}

static void kept_remove(Block *b) {
  if (!b->kept_at) return;
  *b->kept_at = b->kept_next;
  if (b->kept_next) b->kept_next->kept_at = b->kept_at;
  b->kept_next = NULL;
  b->kept_at = NULL;
}

/* ---- how a use ends ---- */

static void holds_forget(Block *b) {
  hold *next;
  for (hold *h = b->holds; h; h = next) {
    next = h->next;
    h->prev = h->next = NULL;
    h->counted = false;
  }
  b->holds = NULL;
  b->kept_count = 0;
}

/* Forget the use, whose fence has ended. */
static void use_over(Block *b) {
  Path *path = b->path;
  Mapping *mapping = b->mapping;
  PyObject *asked = b->asked, *kept = b->kept;
  Shm *shm = b->shm;
  b->path = NULL;
  b->mapping = NULL;
  b->asked = b->kept = NULL;
  b->shm = NULL;
  b->life = 0;
  b->fence = 0;
  if (path && b->state == OPEN) path->open--;
  if (mapping) {
    mapping->views--;
    *b->sibling_at = b->sibling;
    if (b->sibling) b->sibling->sibling_at = b->sibling_at;
    b->sibling = NULL;
    b->sibling_at = NULL;
  }
  kept_remove(b);
  holds_forget(b); /* what is still held shows private memory, or a forked child's */
  b->use++;
  b->state = IDLE; /* before anything is dropped, which may run Python code */
  Py_XDECREF(mapping);
  Py_XDECREF(path);
  Py_XDECREF(asked);
  Py_XDECREF(kept);
  Py_XDECREF(shm);
  if (b->over) b->over(b, b->with);
}

/* Call the exporter's end, before the fence ends. What it raises, as an object; NULL: nothing. A write that the exporter could not complete
 * is torn. */
PyObject *block_end_bracket(Block *b) {
  PyObject *backing = b->asked, *kept = b->kept;
  b->asked = b->kept = NULL;
  b->told = false;
  PyObject *result = NULL, *failed = NULL;
  for (int calls = 0; !result && !b->told && calls < MOST_CALLS; calls++) { /* again if a signal handler raised before the op */
    PyErr_Clear();
    result = rule(RULE_END, (PyObject *)b, backing, kept ? kept : Py_None);
    if (!result) Py_XSETREF(failed, take_exception());
  }
  Py_XDECREF(result);
  Py_DECREF(backing);
  Py_XDECREF(kept);
  if (failed && b->write && !b->error) b->error = -ECANCELED;
  return failed;
}

/* End the exporter's bracket, and the fence. What the former raised, as an object, or NULL. */
PyObject *block_end_use(Block *b) {
  PyObject *failed = NULL;
  uint32_t use = b->use;
  if (b->asked && block_is_ours(b)) failed = block_end_bracket(b);
  if (b->use != use) return failed; /* the exporter's code has ended it, and perhaps entered the block again */
  uint64_t fence = b->fence;
  if (fence && block_is_ours(b)) access_finish(b->shm, fence, b->rec, b->write, b->error);
  use_over(b);
  return failed;
}

void block_end(Block *b) {
  Py_INCREF(b);
  PyObject *failed = block_end_use(b);
  if (failed && !PyErr_GivenExceptionMatches(failed, PyExc_Exception) && raise_later(failed))
    failed = NULL; /* of a signal handler, as Ctrl-C is */
  if (failed) {    /* what was kept outlived the block, so that nobody can catch it */
    PyObject *result = rule(RULE_REPORT, (PyObject *)b, failed, NULL);
    if (!result) report_later((PyObject *)b);
    Py_XDECREF(result);
    Py_DECREF(failed);
  }
  Py_DECREF(b);
}

void block_abandon(Block *b) {
  if (b->state == IDLE) return;
  PyObject *kind, *value, *trace;
  PyErr_Fetch(&kind, &value, &trace);
  uint32_t use = b->use;
  if (b->asked && block_is_ours(b)) {
    PyObject *failed = block_end_bracket(b); /* the error to report is the one that made the access give up */
    Py_XDECREF(failed);
  }
  if (b->use == use) {
    uint64_t fence = b->fence;
    b->fence = 0;
    if (fence && block_is_ours(b)) fence_end(b->shm, fence, 0); /* nobody has seen the view, so nothing was written */
    use_over(b);
  }
  PyErr_Restore(kind, value, trace);
}

bool block_is_described(Block *b) {
  db_rec *x = block_is_ours(b) ? rec_at(b->shm, b->rec) : NULL;
  return x && atomic_load(&x->layout);
}

/* ---- the rules ---- */

static PyObject *set_access_rules(PyObject *module, PyObject *args) {
  PyObject *rules, *open;
  if (!PyArg_ParseTuple(args, "OO!", &rules, &PySet_Type, &open)) return NULL;
  Py_XSETREF(block_rules, Py_NewRef(rules));
  Py_XSETREF(sections, Py_NewRef(open));
  Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    METHOD(set_access_rules, METH_VARARGS, "($module, rules, sections, /)",
           "Set the object whose methods are those rules of accesses that are Python code, and the set of open signalling sections."),
    {0}};

int block_register(PyObject *module) {
  for (int i = 0; i < RULES; i++)
    if (!rule_names[i] && !(rule_names[i] = PyUnicode_InternFromString(rule_texts[i]))) return -1;
  return PyModule_AddFunctions(module, functions) ? -1 : 0;
}
