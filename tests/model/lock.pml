/* The lock of a reservation object: native/domain/resv_lock.c.
 *
 * The words. lock: [waiters 1 | generation 4 | context 2], 0 is free. next: the oldest waiter, in the same form without the bit. ctx: the
 * word of the context that is open at each index, 0 after it was closed or reaped. The futex compares the lock without the generation.
 *
 * What is checked. No two processes are inside the lock, and nobody takes it from a living process: assertions. Every wait ends: a process
 * that has not come to its end is an invalid end state. Without a death there are no ticks, so a wake-up that only a tick would make up for
 * is found as well. After a death or a stop, a sleeper ticks whenever it would find something to do; a tick that finds nothing changes
 * nothing.
 *
 * Process 1 has the oldest stamp. Every process can be killed at each of its statements.
 */
#ifndef N
#define N 3        /* processes */
#endif
#ifndef L
#define L 1        /* locks that each process takes; odd processes begin with the first one, even ones with the last one */
#endif
#ifndef ROUNDS
#define ROUNDS 1
#endif
#ifndef KILLS
#define KILLS 0
#endif
#ifndef TIMEOUTS
#define TIMEOUTS 0 /* waits that give up, by a timeout or a signal */
#endif
#ifndef STOPS
#define STOPS 0    /* processes that stop forever (SIGSTOP) while they wait */
#endif
#ifndef BUG
#define BUG 0      /* a negative control: the step with this number is left out or swapped */
#endif

#define WAITERS   64
#define CTX(w)    ((w) & 63)
#define INDEX(w)  ((w) & 3)
#define FUTEX(w)  ((w) & 67) /* the half that the kernel compares: without the generation */
#define ALIVE(w)  (ctx[INDEX(w)] == CTX(w) && CTX(w) != 0) /* ctx_open_at() */
#define OLDER(a, b) (INDEX(a) < INDEX(b))

byte lock[L], next[L];
byte ctx[N + 1];           /* the word of the context that is open at each index, 0: closed or reaped */
byte asleep[N + 1];        /* 1 + the lock on whose futex the process sleeps */
bit dead[N + 1], reaped[N + 1], halted[N + 1];
byte deaths, stops, given_up;
byte inside[L];            /* for the assertions: the process in the critical section */

#define UNREAPED(q) (dead[q] && !reaped[q])
#if N == 2
#define ANY_UNREAPED (UNREAPED(1) || UNREAPED(2))
#else
#define ANY_UNREAPED (UNREAPED(1) || UNREAPED(2) || UNREAPED(3))
#endif

inline wake(l) {
  d_step { asleep[1] = (asleep[1] == l + 1 -> 0 : asleep[1]); asleep[2] = (asleep[2] == l + 1 -> 0 : asleep[2]);
#if N > 2
    asleep[3] = (asleep[3] == l + 1 -> 0 : asleep[3]);
#endif
  }
}

/* What lives.reap() does to a lock: reap_life_chunk() moves the generation of the dead process's context. */
inline reap() {
  d_step { k = 1;
    do
    :: k <= N -> if
       :: UNREAPED(k) -> reaped[k] = 1;
#if BUG != 5 /* the generation stays */
          ctx[k] = 0
#endif
       :: else
       fi; k++
    :: else -> break
    od; k = 0 }
}

/* Would resv_take() sleep again if the process looked now? */
#define HELD(l)     ALIVE(lock[l])
#define FIRST(l)    (next[l] != me && ALIVE(next[l]))
#define MUST_DIE(l) (acquired && HELD(l) && ((ALIVE(lock[l]) && OLDER(lock[l], me)) || (FIRST(l) && OLDER(next[l], me))))
#define RESTS(l)    ((lock[l] & WAITERS) && (HELD(l) || (FIRST(l) && OLDER(next[l], me) && BUG == 9)) && \
                     !MUST_DIE(l) && !(next[l] != me && (!FIRST(l) || OLDER(me, next[l]))))

/* resv_take(). result: 0 locked, 1 EDEADLK, 2 timed out */
inline take(l) {
  atomic { result = 9; waited = 0; overtakes = 0; late = 0 };
  nx = next[l];
  if
  :: nx == 0 ->
     atomic { if
       :: lock[l] == 0 -> lock[l] = me; result = 0; enter(l)
       :: else
       fi }
  :: else
  fi;
  do
  :: result != 9 -> break
  :: else ->
     w = lock[l];
     nx = next[l];
     /* holder: the lock's owner is alive. first: another waiter is named as next, and is alive. */
     if
     :: !ALIVE(w) && (nx == 0 || nx == me || !ALIVE(nx) || OLDER(me, nx) || overtakes) ->
        atomic { if
#if BUG == 6 /* a store in place of the compare-and-swap */
          :: true -> lock[l] = me | (w & WAITERS); result = 0; enter(l)
#else
          :: lock[l] == w ->
#if BUG == 3 /* the bit for waiters is lost */
             lock[l] = me; w = 0;
#else
             lock[l] = me | (w & WAITERS);
#endif
             result = 0; enter(l)
          :: else -> goto again
#endif
          fi };
        /* a name that is stale, or that was overtaken, goes */
        atomic { if :: nx && (nx == me || !ALIVE(nx) || overtakes) && next[l] == nx -> next[l] = 0 :: else fi };
        if :: w & WAITERS -> wake(l) :: else fi;
        goto out
     :: else
     fi;
     if /* wait-die; control 7 waits for an older context while it holds a lock */
     :: acquired && ALIVE(w) && BUG != 7 ->
        if
        :: OLDER(w, me) || (nx && nx != me && ALIVE(nx) && OLDER(nx, me)) ->
           /* The tick of TICK_CHECK: a dead process is not an older context. */
           k = (OLDER(w, me) -> INDEX(w) : INDEX(nx));
           if
           :: atomic { UNREAPED(k) -> k = 0; reap() }; goto again
           :: atomic { else -> k = 0 }
           fi;
           if
           :: ALIVE(w) && (OLDER(w, me) || ALIVE(nx)) -> result = 1; goto out
           :: else -> goto again
           fi
        :: else
        fi
     :: else
     fi;
     if :: late -> result = 2; goto out :: else fi;
     if
     :: nx != me && (nx == 0 || !ALIVE(nx) || OLDER(me, nx)) ->
        atomic { if :: next[l] == nx -> next[l] = me :: else -> goto again fi };
        if :: w & WAITERS -> wake(l) :: else fi;
        waited = 1;
        goto again
     :: else
     fi;
#if BUG != 4 /* else it never says that it waits */
     if
     :: !(w & WAITERS) -> atomic { if :: lock[l] == w -> lock[l] = w | WAITERS :: else -> goto again fi }
     :: else
     fi;
#endif
     waited = 1;
     /* On a free lock the sleeper relies on the process that `next` names. It may have come and gone before the bit was set. */
#if BUG != 11
     if
     :: CTX(w) == 0 -> atomic { if :: next[l] != nx -> goto again :: else fi }
     :: else
     fi;
#endif
     /* shm_sleep(). idle: the lock is free, so that a tick finds that it was left alone. */
     atomic { idle = !ALIVE(w); if
#if BUG == 10 /* sleeps without comparing the word */
       :: true -> asleep[me & 3] = l + 1
#else
       :: FUTEX(lock[l]) == FUTEX(w | WAITERS) -> asleep[me & 3] = l + 1
       :: else -> goto again
#endif
       fi };
     if
     :: atomic { asleep[me & 3] == 0 -> overtakes = 0 }
     :: atomic { ANY_UNREAPED -> asleep[me & 3] = 0; reap(); overtakes = (idle && BUG != 9) }
     :: atomic { (deaths || stops) && !ANY_UNREAPED && !RESTS(l) -> asleep[me & 3] = 0; overtakes = (idle && BUG != 9) }
     :: atomic { given_up < TIMEOUTS -> given_up++; asleep[me & 3] = 0; result = 2; goto out } /* a signal */
     :: atomic { given_up < TIMEOUTS -> given_up++; asleep[me & 3] = 0; late = 1; overtakes = 1 } /* it looks once more */
     :: atomic { stops < STOPS -> stops++; halted[me & 3] = 1; asleep[me & 3] = 0 }
     fi;
again: atomic { w = 0; nx = 0; idle = 0 }
  od;
out:
  if
  :: waited ->
#if BUG != 8 /* else who gives up stays named */
     atomic { if :: next[l] == me -> next[l] = 0 :: else -> goto left fi };
#if BUG != 12 /* a process that is about to sleep on a free lock finds another word */
     atomic { if :: lock[l] == WAITERS -> lock[l] = 0 :: else fi };
#endif
     wake(l);
left:
#endif
     skip
  :: else
  fi;
  atomic { w = 0; nx = 0; waited = 0; overtakes = 0; late = 0; idle = 0 }
}

inline enter(l) {
  assert(inside[l] == 0 || reaped[inside[l]]); /* no two owners */
  inside[l] = INDEX(me)
}

/* resv_release() */
inline give(l) {
  w = lock[l];
  assert(CTX(w) == me); /* nobody takes a lock from the living */
  atomic { inside[l] = 0;
#if BUG == 1 /* wakes nobody */
    w = 0;
#elif BUG != 2 /* else it looks for waiters before it unlocks */
    w = lock[l]; /* the exchange sees the bit of a waiter that came since */
#endif
    lock[l] = 0 };
#if BUG != 1 && BUG != 2
  nx = next[l];
#endif
  if :: (w & WAITERS) || nx -> wake(l) :: else fi;
  atomic { w = 0; nx = 0 }
}

proctype Process(byte id) {
  byte me, w, nx, result, k, round, a, b;
  bit waited, acquired, overtakes, late, idle;
  { do
    :: round == ROUNDS -> break
    :: else ->
       atomic { me = id + 4 * (round + 1); ctx[id] = me; a = (id & 1 -> 0 : L - 1); b = L - 1 - a };
#if L == 1
       take(0);
       if
       :: result == 0 -> give(0)
       :: else
       fi;
#else
       do
       :: true ->
          acquired = 0;
          take(a);
          if :: result -> break :: else fi;
          acquired = 1;
          take(b);
          if
          :: result == 0 -> give(b); give(a); break
          :: result == 1 -> give(a); atomic { k = a; a = b; b = k; k = 0 } /* the one that was in the way comes first */
          :: else -> give(a); break
          fi
       od;
#endif
       atomic { ctx[id] = 0; round++; acquired = 0; a = 0; b = 0; result = 0; me = 0 }
    od
  } unless { dead[id] || halted[id] }
}

#define KILL(i) atomic { deaths < KILLS && ctx[i] && !dead[i] -> dead[i] = 1; deaths++; asleep[i] = 0 }
proctype Killer() {
end:
  do
  :: KILL(1)
  :: KILL(2)
#if N > 2
  :: KILL(3)
#endif
  od
}

init { atomic { run Process(1); run Process(2);
#if N > 2
  run Process(3);
#endif
  if :: KILLS -> run Killer() :: else fi } }
