/* A pass over /proc/locks that can be believed: native/fds/locks.c, by which is judged whether a buffer is gone.
 *
 * The kernel prints the list of locks a page at a time, and finds its place again by counting. If locks go in the meantime, the rest moves
 * forward, and a lock that is held all the time can be in no page at all. So here two descriptors read in turn, half a page apart, and a
 * page counts only if it repeats a line of the page before. Otherwise the pass is refused, and nothing is judged.
 *
 * What is checked. A pass that is not refused has seen HELD, which is there all the time. Other locks come and go anywhere in the list, as
 * it has a part for each CPU. Each has a line of its own. Control 3 shows that this matters.
 */
#ifndef LENGTH
#define LENGTH 6   /* locks at the beginning */
#endif
#ifndef CHANGES
#define CHANGES 3
#endif
#ifndef BUG
#define BUG 0      /* a negative control */
#endif
#define HELD 1
#define PAGE  4    /* lines */
#define MAX   10

byte list[MAX], n = LENGTH, changes, fresh = LENGTH + 2;
bit over;

/* Lines 0-3, 2-5, 4-7 and so on, by the two descriptors in turn */
proctype Pass() {
  byte at, i, k, anchor, page[PAGE], before[PAGE];
  bit seen, more = 1;
  do
  :: more ->
     d_step { /* one read(): the kernel holds its own lock meanwhile */
       i = 0;
       do
       :: i < PAGE -> page[i] = (at + i < n -> list[at + i] : 0); seen = seen || (page[i] == HELD); i++
       :: else -> break
       od;
       more = (page[PAGE - 1] != 0);
       /* does the page repeat a line of the one before? */
       anchor = (at == 0); i = 0;
       do
       :: i < PAGE -> k = 0;
          do
          :: k < PAGE -> anchor = anchor || (page[i] && page[i] == before[k]); k++
          :: else -> break
          od; i++
       :: else -> break
       od;
       i = 0;
       do :: i < PAGE -> before[i] = page[i]; i++ :: else -> break od;
       i = 0; k = 0
     }
#if BUG == 1 /* page after page, and nothing is compared: as the code did once */
     at = at + PAGE
#else
     if
#if BUG == 2 /* an empty page is taken for the end */
     :: !anchor && page[0] != 0 -> goto refused
#else
     :: !anchor -> goto refused
#endif
     :: else -> at = at + PAGE / 2
     fi
#endif
  :: else -> break
  od;
  assert(seen);
refused:
  over = 1
}

/* A lock goes or comes. Control 3: it comes with the line of one that went, as a lock that is taken again and again does. */
proctype Others() {
  byte i, k, old;
end:
  do
  :: !over && changes < CHANGES ->
     i = 0;
     do :: i < n - 1 -> i++ :: break od;
     if
     :: list[i] != HELD ->
        d_step { old = list[i]; k = i; do :: k < n - 1 -> list[k] = list[k + 1]; k++ :: else -> break od;
                 n--; list[n] = 0; changes++; i = 0; k = 0 }
     :: n < MAX ->
        d_step { k = n; do :: k > i -> list[k] = list[k - 1]; k-- :: else -> break od; list[i] = fresh; n++; changes++; i = 0; k = 0;
                 if :: BUG == 3 && old -> list[i] = old :: else -> fresh++ fi; old = 0 }
     :: else -> i = 0
     fi
  od
}

init { byte i;
  d_step { i = 0; do :: i < LENGTH -> list[i] = i + 2; i++ :: else -> break od; i = 0 };
  do :: i < LENGTH - 1 -> i++ :: break od;
  atomic { list[i] = HELD; i = 0; run Pass(); run Others() } }
