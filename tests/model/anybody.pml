/* A fence that every process may end (FF_ANYBODY), ended by several of them at once: fence_finish() in native/domain/fence.c.
 *
 * The owner and two other processes end fence 1 of a slot, each in its own way. Then the owner uses the slot again. Or it dies, is reaped,
 * and the next owner uses the slot.
 *
 * What is checked. How a fence ends is decided once. A process that was slow ends or stamps no later fence of the slot.
 *
 * The owner, its reaper, and one of the others can be killed at each of their statements.
 */
#ifndef KILLS
#define KILLS 1
#endif
#ifndef BUG
#define BUG 0      /* a negative control: the step with this number is left out or swapped */
#endif

#define SIGNALED 16
#define GEN(w)   ((w) & 15)
#define DECIDED  16
#define HOW(e)   ((e) >> 5)        /* how it ended: 1 by the owner, 2 and 3 by others, 4 by the reaper */
#define MAKE_END(g, how) ((g) | DECIDED | ((how) << 5))
#define OWNER    1
#define REAPER   4

byte word = SIGNALED, end_; byte stamp;      /* stamp: [generation | set 16] */
bit dead[5], reaped; byte deaths;
byte decided[4];                             /* for the assertions: how the fence of each generation ended */

/* fence_finish(..., anybody = 1) */
inline finish(g, how) {
  if
  :: word & SIGNALED -> goto over
  :: else
  fi;
#if BUG == 1 /* a store in place of the compare-and-swap */
  if :: GEN(end_) == g && !(end_ & DECIDED) -> skip :: else -> goto helps fi;
  atomic { end_ = MAKE_END(g, how); decide(g, how) };
#elif BUG == 4 /* the reaper decides again */
  atomic { if :: end_ == g || (how == REAPER && GEN(end_) == g) -> end_ = MAKE_END(g, how); decide(g, how) :: else -> goto helps fi };
#else
  atomic { if :: end_ == g -> end_ = MAKE_END(g, how); decide(g, how) :: else -> goto helps fi };
#endif
helps:
  atomic { e = end_; if :: GEN(e) != g -> e = 0; goto over :: else fi };
#if BUG == 2 /* stores of a slow process: the time */
  stamp = GEN(stamp) | 16;
#else
  atomic { if :: stamp == g -> stamp = g | 16 :: else fi };
#endif
#if BUG == 3 /* and the word */
  atomic { word = word | SIGNALED; e = 0 };
#else
  atomic {
    if
    :: GEN(word) == g && !(word & SIGNALED) -> word = word | SIGNALED; assert(end_ & DECIDED && HOW(end_) == decided[g])
    :: else
    fi; e = 0 };
#endif
over:
  skip
}

inline decide(g, how) { assert(decided[g] == 0); decided[g] = how }

inline make(g) {
  end_ = g;
  stamp = g;
  word = g;
  assert(end_ == g || decided[g]); assert(!(word & SIGNALED) || decided[g]); assert(!(stamp & 16) || decided[g])
}

proctype Owner() {
  byte e;
  { finish(1, OWNER);
    make(2);
    finish(2, OWNER)
  } unless { dead[OWNER] }
}

proctype Other(byte me) { /* fence_end_any() */
  byte e;
  { if
    :: GEN(word) == 1 && GEN(end_) == 1 && !(word & SIGNALED) -> finish(1, me)
    :: else
    fi
  } unless { dead[me] }
}

proctype Reaper() {
  byte e, g;
end:
  dead[OWNER];
again:
  { skip;
    if
    :: !reaped ->
       g = GEN(end_);
       finish(g, REAPER);
       reaped = 1
    :: else
    fi;
    g = GEN(end_) + 1;
    make(g);
    finish(g, OWNER)
  } unless { dead[REAPER] };
  if
  :: atomic { dead[REAPER] && !reaped -> dead[REAPER] = 0; e = 0; g = 0 }; goto again
  :: else
  fi
}

#define KILL(i) atomic { deaths < KILLS && !dead[i] -> dead[i] = 1; deaths++ }
proctype Killer() {
end:
  do
  :: KILL(OWNER)
  :: KILL(2)
  :: atomic { dead[OWNER] && deaths < KILLS && !dead[REAPER] && !reaped -> dead[REAPER] = 1; deaths++ }
  od
}

proctype Last() {
  timeout ->
  assert(word & SIGNALED || dead[REAPER]);
  assert(!(word & SIGNALED) || HOW(end_) == decided[GEN(end_)])
}

init { atomic { word = 1; end_ = 1; stamp = 1; run Owner(); run Other(2); run Other(3); run Reaper(); run Killer(); run Last() } }
