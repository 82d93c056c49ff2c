/* What the models of streams have in common: waking and sleeping, kills, and ghosts that are looked at in assertions only.
 *
 * A process listens to a wake word: it reads the count of the word, sets the word's bit in `want`, checks what it waits for, and sleeps
 * while the count is still the same. A process that has changed something takes the bits away and counts up. Only whether a count has
 * moved since a process read it matters, so `moved[p]` stands for both. A process sleeps on one word only, see MOVE_NEWS and so on.
 */
#ifndef BUG
#define BUG 0      /* a negative control: the step with this number is left out or swapped */
#endif
#ifndef N
#define N 2        /* slots */
#endif
#ifndef KILLS
#define KILLS 0
#endif
#ifndef MORTAL
#define MORTAL 255 /* who may die: bit i stands for process i */
#endif
#ifndef REAPER_KILLS
#define REAPER_KILLS 0
#endif

#define M       4  /* entries of `order`, at least N */
#define NONE    99 /* a cursor that keeps nothing */
#define GARBAGE 77 /* content that is half written */
#define NEWS    1
#define SPACE   2
#define ASK     4

byte want = 0;
bit moved[PROCESSES] = 1;
bit dead[PROCESSES], finished[PROCESSES];    /* killed; at its end, or reaped */
byte deaths; bit reaper_dead, reaper_died;
byte content[N];                             /* ghost: the frame whose content the slot has, or GARBAGE */
byte inuse[PROCESSES];                       /* ghost: the slot that a reader looks at, + 1 */

/* After a change: wake the processes that listen. A process that dies between taking the bits and counting loses a wake-up. */
inline wake(bits) {
  if
  :: !(want & (bits))
  :: atomic { want & (bits) -> w = want & (bits); want = want & ~(bits) };
     if
     :: atomic { w & NEWS -> w = w & ~NEWS; MOVE_NEWS }
     :: else
     fi;
     if
     :: atomic { w & SPACE -> w = w & ~SPACE; MOVE_SPACE }
     :: else
     fi;
     if
     :: atomic { w & ASK -> w = w & ~ASK; MOVE_ASK }
     :: else
     fi
  fi
}

#ifndef KILLED
#define KILLED(i) skip
#endif
#ifndef SWAPPED_LISTEN
#define SWAPPED_LISTEN 0
#endif
#if SWAPPED_LISTEN
#define LISTEN(bit_) want = want | (bit_); moved[me] = 0
#else
#define LISTEN(bit_) moved[me] = 0; want = want | (bit_)
#endif

/* The tick comes after a death only, and only if the process would then go on. */
#define SLEEP(found) if :: atomic { moved[me] } :: atomic { deaths && (found) -> moved[me] = 1 } fi

#define KILL(i, is) atomic { (is) && (MORTAL & (1 << (i))) && deaths < KILLS && !dead[i] && !finished[i] -> dead[i] = 1; inuse[i] = 0; KILLED(i); deaths++ }
#define KILL_REAPER atomic { REAPER_KILLS && deaths && !reaper_died -> reaper_dead = 1; reaper_died = 1 }
