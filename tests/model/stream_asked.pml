/* Fences that are made because a process asks for one, and processes that await: the slow half of a stream's wake-ups.
 *
 * A producer writes some frames into one slot. Two processes ask for a fence of the slot: they want to know when the frame has been written
 * that they found there. A third process awaits the same in its dispatcher. Another user of the stream wakes ASK now and then, though the slot has
 * not changed.
 *
 * What is checked. An asked fence ends without an error only when its frame is no longer being written, and every wait ends. Without a death
 * there are no ticks, so a lost wake-up is an invalid end state.
 *
 * Every process can be killed at each of its statements.
 */
#define PR 0
#define OT 1
#define A1 2
#define A2 3
#define DC 4
#define PROCESSES 5
#ifndef FRAMES
#define FRAMES 2
#endif
#ifndef TURNS
#define TURNS 1    /* of the other user */
#endif
#ifndef ASKERS
#define ASKERS 2
#endif
#ifndef AWAIT
#define AWAIT 1
#endif
#define MOVE_NEWS  skip
#define MOVE_SPACE skip
#define MOVE_ASK   skip
#include "stream_words.pml"

#define PENDING 1
#define SIGNALED 2
#define FAILED 3

byte frame = 1; bit writing_ = 1;            /* the state of the slot, one word */
byte asked;                                  /* the fence that somebody has asked for, + 1 */
byte fence[2], fence_frame[2];               /* the two askers' fences, and the frame that each is for */
bit mask;                                    /* the wake mask of dispatchers: the one of DC */

#define WRITING(q) (frame == (q) && writing_)
#define FENCE_PENDING(i) (fence[i] == PENDING)

/* Any process may end the fence. */
inline end_fence(i) {
  atomic {
    if
    :: FENCE_PENDING(i) -> assert(!WRITING(fence_frame[i])); fence[i] = SIGNALED
    :: else
    fi
  }
}

/* Whoever takes the ASK bit */
inline wake_ask() {
  if
  :: !(want & ASK)
  :: atomic { want & ASK -> want = want & ~ASK };
     atomic { w = mask; mask = 0 };
     if :: atomic { w -> w = 0; moved[DC] = 1 } :: else fi;
     a = asked;
     if
     :: a && FENCE_PENDING(a - 1) ->
        a--;
        if
        :: WRITING(fence_frame[a]) && BUG != 1 ->
           want = want | ASK;                /* it stays to be ended by whoever changes the slot */
           if
           :: !WRITING(fence_frame[a]) && BUG != 2 -> end_fence(a)
           :: else
           fi
        :: WRITING(fence_frame[a]) && BUG == 1
        :: !WRITING(fence_frame[a]) -> end_fence(a)
        fi
     :: else
     fi;
     a = 0
  fi
}

proctype Producer() {
  byte w, a, left = FRAMES;
  { skip;
    do
    :: left ->
       writing_ = 0;                         /* published */
       wake_ask();
       left--;
       if
       :: left -> atomic { frame++; writing_ = 1 }
       :: else
       fi
    :: else -> break
    od;
    finished[PR] = 1
  } unless { dead[PR] }
}

proctype Other() {
  byte w, a, left = TURNS;
  { skip;
    do
    :: left -> wake_ask(); left--
    :: else -> break
    od;
    finished[OT] = 1
  } unless { dead[OT] }
}

proctype Asker(byte me; byte own) {
  byte q, a, f; bit shares;
  { skip;
ask:
    atomic { shares = 0; f = own; q = frame; if :: !writing_ -> goto over :: else fi };
    atomic { fence[own] = PENDING; fence_frame[own] = q };
#if BUG == 4 /* the bit before the fence can be found */
    want = want | ASK;
#endif
store:
    a = asked;
    if
    :: a && a != own + 1 && FENCE_PENDING(a - 1) && BUG != 7 ->
       if
       :: fence_frame[a - 1] == q || BUG == 8 -> atomic { f = a - 1; fence[own] = SIGNALED; shares = 1; a = 0 }
       :: else -> if :: WRITING(fence_frame[a - 1]) -> a = 0; goto again :: else -> end_fence(a - 1); a = 0; goto store fi
       fi
    :: else ->
#if BUG == 7 /* a store */
       asked = own + 1;
#else
       atomic { if :: asked == a -> asked = own + 1 :: else -> a = 0; goto store fi };
#endif
       a = 0
    fi;
#if BUG != 4
    want = want | ASK;
#endif
    if
    :: !WRITING(fence_frame[f]) && BUG != 3 -> end_fence(f)
    :: else
    fi;
    if
    :: !FENCE_PENDING(f)
    :: atomic { deaths && FENCE_PENDING(f) && !WRITING(fence_frame[f]) && BUG != 10 }; end_fence(f) /* a tick of the dispatcher */
    fi;
    if
    :: fence[f] == FAILED && BUG != 9 -> goto ask                  /* its owner has died */
    :: else -> assert(!WRITING(q)); goto over
    fi;
again:
    fence[own] = SIGNALED;                                         /* the frame has changed since */
    goto ask;
over:
    finished[me] = 1
  } unless { dead[me] }
}

/* await: the dispatcher of the process sleeps, on its own doorbell */
proctype Dispatcher() {
  byte q, me = DC;
  { q = frame;
    do
    :: true ->
#if BUG == 6 /* the doorbell is read last */
       mask = 1; want = want | ASK; moved[DC] = 0;
#elif BUG == 5 /* the bit of the wake word, and then the one of the mask */
       moved[DC] = 0; want = want | ASK; mask = 1;
#else
       moved[DC] = 0; mask = 1; want = want | ASK;
#endif
       if
       :: !WRITING(q) -> break
       :: else
       fi;
       SLEEP(!WRITING(q))
    od;
    finished[DC] = 1
  } unless { dead[DC] }
}

#define TODO(i) (dead[i] && !finished[i])
proctype Reaper() {
  byte i, w, a;
end:
  do
  :: atomic { TODO(PR) -> i = PR };
     writing_ = 0;
     wake_ask();
     atomic { finished[PR] = 1; i = 0 }
  :: atomic { TODO(OT) -> finished[OT] = 1 }
  :: atomic { TODO(DC) -> finished[DC] = 1 }
  :: atomic { (TODO(A1) || TODO(A2)) -> i = (TODO(A1) -> A1 : A2) };
     atomic { if :: FENCE_PENDING(i - A1) && BUG != 11 -> fence[i - A1] = FAILED :: else fi };
     atomic { finished[i] = 1; i = 0 }
  od
}

proctype Killer() {
end:
  do
  :: KILL(PR, 1)
  :: KILL(OT, TURNS)
  :: KILL(A1, ASKERS)
  :: KILL(A2, ASKERS > 1)
  :: KILL(DC, AWAIT)
  od
}

proctype Last() {
  timeout -> /* a process that is not at its end waits for ever */
  finished[PR] && finished[OT] && finished[A1] && finished[A2] && (!AWAIT || finished[DC]);
  assert(!FENCE_PENDING(0) && !FENCE_PENDING(1))
}

init { atomic {
  run Producer();
  if :: TURNS -> run Other() :: else -> finished[OT] = 1 fi;
  if :: ASKERS -> run Asker(A1, 0) :: else -> finished[A1] = 1 fi;
  if :: ASKERS > 1 -> run Asker(A2, 1) :: else -> finished[A2] = 1 fi;
  if :: AWAIT -> run Dispatcher() :: else fi;
  if :: KILLS -> run Killer(); run Reaper() :: else fi;
  run Last() } }
