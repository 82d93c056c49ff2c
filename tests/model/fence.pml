/* A fence, those who wait for it, and the content of the buffer that it guards: native/domain/fence.c, access.c, reap.c.
 *
 * The owner makes fence 1 in a slot, enters a write() block with it, writes both halves of a buffer and ends it. Then the slot is used
 * again. A waiter sleeps on the fence, asks how it ended, and reads the buffer. The dispatcher of another process registers for the
 * fence. A third process makes a sync file wait for it.
 *
 * What is checked. The fence failed if and only if it did not end well, also for a waiter that looks when the slot has been used again. No
 * half-written content is read without an error, and a write that ended well leaves no mark. The callback runs, the sync file becomes
 * readable, and every wait ends: else there is an invalid end state, or the last assertion fails. Without a death there are no ticks, so
 * a lost wake-up is found. After a death a sleeper ticks whenever it would find something.
 *
 * The owner, and the process that reaps it, can be killed at each of their statements.
 */
#ifndef KILLS
#define KILLS 1
#endif
#ifndef REAPER_KILLS
#define REAPER_KILLS 1
#endif
#ifndef TORN
#define TORN 0     /* 1: the buffer is torn at the beginning, by an earlier writer */
#endif
#ifndef REUSE
#define REUSE 1    /* the owner uses the slot again, for a fence that is not an access */
#endif
#ifndef WAITER
#define WAITER 1
#endif
#ifndef DISPATCHER
#define DISPATCHER 1
#endif
#ifndef SYNC
#define SYNC 1
#endif
#ifndef BUG
#define BUG 0      /* a negative control: the step with this number is left out or swapped */
#endif

#define SIGNALED 16
#define WAITERS  32
#define SYNC_BIT 64
#define GEN(w)   ((w) & 15)
#define DECIDED  16
#define FAILED   32

byte word = SIGNALED, end_;                  /* [generation 4 | bits], as in db_fence; end_: [generation | decided | failed] */
bit granted, mask;                           /* FF_GRANTED of the slot; the bit of the dispatcher in wake_mask */
byte past;                                   /* the generation of the last failed use that the slot remembers */
byte shared;                                 /* the handle that the reservation object lists, 0: none yet */
bit torn = TORN; byte half0 = TORN, half1;   /* the mark on the record; the two halves of the content */
bit asleep; byte doorbell; bit called;       /* the waiter; the dispatcher */
bit readable; bit asked;                     /* the descriptor of the sync file; does it wait for the fence? */
bit dead, reaper_dead, reaped; byte deaths;
/* For the assertions */
byte well;                                   /* generations that ended without an error, a bit each */
bit writing;                                 /* GRANTED, and not yet ended well */

#define PENDING(h) (GEN(word) == h && GEN(end_) == h && !(word & SIGNALED))

inline wake() { atomic { if :: w & WAITERS -> asleep = 0 :: else fi } }
inline wake_dispatcher() { atomic { if :: mask -> doorbell++ :: else fi } }

/* fence_wake_sync_files(): the bit stays until the descriptor is readable */
inline wake_sync_file(g) {
  if
  :: asked -> readable = 1
  :: else
  fi;
  atomic { if :: GEN(word) == g -> word = word & ~SYNC_BIT :: else fi }
}

/* fence_finish(), by the owner or its reaper */
inline finish(g, failed) {
#if BUG == 3 /* reads who waits before the state is stored */
  b = mask;
#endif
#if BUG == 1 /* wakes before the state is stored */
  w = word;
  wake();
#endif
  end_ = g | DECIDED | (failed -> FAILED : 0);
#if BUG == 11 /* a store in place of the compare-and-swap */
  w = word;
  atomic { word = w | SIGNALED; if :: failed :: else -> well = well | (1 << g); writing = 0 fi };
#else
  atomic { w = word; assert(GEN(w) == g); word = w | SIGNALED; if :: failed :: else -> well = well | (1 << g); writing = 0 fi };
#endif
#if BUG != 1
  wake();
#endif
#if BUG == 3
  atomic { if :: b -> doorbell++ :: else fi; b = 0 };
#else
  wake_dispatcher();
#endif
  if :: w & SYNC_BIT -> wake_sync_file(g) :: else fi;
  w = 0
}

/* fence_make(): the slot is free until the word is stored, last */
inline make(g) {
#if BUG == 9 /* the word first */
  word = g;
#endif
#if BUG != 10 /* keep_error(): a waiter that looks late still finds the failure */
  atomic { if :: end_ & FAILED -> past = GEN(end_) :: else fi };
#endif
  end_ = g;
  mask = 0;
  granted = 0;
#if BUG != 9
  word = g;
#endif
}

proctype Owner() {
  byte w; bit b;
  { make(1);
    shared = 1;                                       /* put() */
#if BUG == 6 /* clears the mark before the content is whole */
    torn = 0;
#endif
#if BUG != 5 /* else it writes before it is marked as granted */
    atomic { granted = 1; writing = 1 };              /* access_let_in() */
    half0 = 2;
#else
    atomic { half0 = 2; writing = 1 };
    granted = 1;
#endif
    half1 = 2;
#if BUG == 7 /* ends the fence before the content counts as whole */
    finish(1, 0);
    if :: torn -> torn = 0 :: else fi;
#else
    if :: torn -> torn = 0 :: else fi;                /* access_finish() */
    finish(1, 0);
#endif
#if REUSE
    make(2);
    finish(2, 0);
#endif
    skip
  } unless { dead }
}

/* reap_fences(). Then the slot is the next owner's. */
proctype Reaper() {
  byte w, g; bit b;
end:
  dead;
again:
  { skip;
    if
    :: !reaped ->
       if
       :: word & SIGNALED ->
#if BUG != 8 /* the owner died between ending the fence and waking the sync file */
          if :: word & SYNC_BIT -> g = GEN(word); wake_sync_file(g) :: else fi
#else
          skip
#endif
       :: else ->
          g = GEN(end_);
#if BUG == 4 /* the mark after the fence */
          b = granted;
          finish(g, 1);
          if :: b -> torn = 1 :: else fi;
#else
          if :: granted -> atomic { assert(writing); torn = 1 } :: else fi;
          finish(g, 1);
#endif
       fi;
       reaped = 1
    :: else
    fi;
    g = GEN(end_) + 1;
    make(g);
    finish(g, 0)
  } unless { reaper_dead };
  if
  :: atomic { reaper_dead && !reaped -> reaper_dead = 0; w = 0; g = 0; b = 0 }; goto again
  :: else
  fi
}

/* fence_wait_for(), then the error, then a read() block */
proctype Waiter() {
  byte w, h; bit failed;
end:
  atomic { shared -> h = shared };
  do
  :: true ->
     w = word;
     if :: !PENDING(h) -> break :: else fi;
     if
     :: !(w & WAITERS) -> atomic { if :: word == w -> word = w | WAITERS :: else -> goto next_look fi }
     :: else
     fi;
#if BUG == 12 /* sleeps without comparing the word */
     asleep = 1;
#else
     atomic { if :: word == (w | WAITERS) -> asleep = 1 :: else -> goto next_look fi };
#endif
     if
     :: !asleep
     :: atomic { deaths && !PENDING(h) -> asleep = 0 }
     fi;
next_look:
     w = 0
  od;
  w = 0;
  do
  :: true ->
     w = end_;
     if
     :: GEN(w) == h && GEN(word) == h -> failed = (w & FAILED) != 0;
        if :: GEN(end_) == h -> break :: else fi
     :: else -> failed = (past == h); break
     fi
  od;
  assert(failed == !(well & (1 << h)));               /* only a dead owner's fence has failed */
  if
  :: torn -> assert(failed || TORN)                   /* a write that ended well left no mark */
  :: else -> assert(half0 == half1)                   /* no half-written content without an error */
  fi;
  if :: !failed -> assert(!torn) :: else fi
}

/* Dispatcher.watch() in another process: the bit, and then a look at the fence */
proctype Dispatcher() {
  byte h, seen;
end:
  atomic { shared -> h = shared };
#if BUG == 2 /* the look first */
  seen = doorbell;
  if :: !PENDING(h) -> goto done :: else fi;
  mask = 1;
#else
  if :: GEN(word) == h -> mask = 1 :: else -> goto done fi;
#endif
  do
  :: true ->
#if BUG != 2
     seen = doorbell;
     if :: !PENDING(h) -> break :: else fi;
#endif
     if
     :: atomic { doorbell != seen -> seen = 0 }
     :: atomic { deaths && !PENDING(h) -> seen = 0 }
     fi;
#if BUG == 2
     break
#endif
  od;
done:
  called = 1
}

/* A sync file: the bit, and then a look at the fence */
proctype SyncFile() {
  byte h;
end:
  atomic { shared -> h = shared };
  asked = 1;
  atomic { if :: GEN(word) == h -> word = word | SYNC_BIT :: else -> goto ended fi };
  if
  :: PENDING(h) -> skip
  :: else ->
ended: readable = 1
  fi
}

proctype Killer() {
end:
  do
  :: atomic { deaths < KILLS && !dead -> dead = 1; deaths++ }
  :: atomic { dead && deaths < KILLS + REAPER_KILLS && !reaper_dead && !reaped -> reaper_dead = 1; deaths++ }
  od
}

proctype Last() {
  timeout ->
  assert((!shared || !DISPATCHER || called) && (!asked || readable))
}

init { atomic {
  run Owner();
  if :: KILLS -> run Killer(); run Reaper() :: else fi;
  if :: WAITER -> run Waiter() :: else fi;
  if :: DISPATCHER -> run Dispatcher() :: else fi;
  if :: SYNC -> run SyncFile() :: else fi;
  run Last() } }
