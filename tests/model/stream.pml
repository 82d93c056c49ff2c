/* A stream: producers, a queue reader, a latest reader, and programs that know nothing of the stream (foreign programs).
 *
 * A producer publishes some frames and closes the stream; a second one takes over after it has closed or died. The queue reader joins at
 * the newest frame, at any time, and has every frame from there on, in order. The latest reader has the newest frame whenever it looks.
 * Each foreign program has one read() or write() of the buffer of any slot, by way of the buffer's reservation object.
 *
 * What is checked. No reader, of the stream or foreign, has content that is being written or half written without being told. The queue
 * reader misses no frame; the latest reader never goes back. Nothing of a dead process is left once it is reaped. Every wait ends: without a
 * death there are no ticks, so a lost wake-up is an invalid end state.
 *
 * Every process can be killed at each of its statements, and the reaper too.
 */
#ifndef FRAMES
#define FRAMES 2   /* of the first producer; 0: there is none */
#endif
#ifndef FRAMES2
#define FRAMES2 0  /* of the second; 0: there is none */
#endif
#ifndef QUEUE
#define QUEUE 0
#endif
#ifndef LATEST
#define LATEST 0
#endif
#ifndef FOREIGN
#define FOREIGN 0  /* foreign programs, at most 2 */
#endif
#ifndef FOREIGN_READ
#define FOREIGN_READ 1 /* they may read */
#endif
#ifndef FOREIGN_WRITE
#define FOREIGN_WRITE 1
#endif
#ifndef FOREIGN_SLOT
#define FOREIGN_SLOT 9 /* 0 or 1: the slot whose buffer they use; 9: either */
#endif
#ifndef ABORT
#define ABORT 0    /* 1: a producer may raise in its block once */
#endif

#define P1 1
#define P2 2
#define QR 3
#define LR 4
#define F1 5
#define F2 6
#define PROCESSES 7
#define MOVE_NEWS  moved[QR] = 1; moved[LR] = 1
#define MOVE_SPACE moved[P1] = 1; moved[P2] = 1
#define MOVE_ASK   moved[F1] = 1; moved[F2] = 1
#define SWAPPED_LISTEN (BUG == 4)
#include "stream_words.pml"

#define GONE 9     /* `producer` after close or death */
#define READS   1  /* the bits of `foreign`; the fence of a foreign program is pending */
#define WRITES  2
#define GRANTED 3  /* a foreign write that is inside its block */

byte seq[N]; bit writing[N];                 /* state of a slot: [frame | W] */
byte foreign[N];                             /* READS, WRITES: such an access may be in the reservation list */
bit torn[N];
byte lock[N];                                /* the reservation lock of the slot's buffer */
bit entry[N] = 1;                            /* the permanent entry in the reservation list */
byte fence[2], fence_at[2];                  /* the fence of each foreign program, 0: none or ended; the list that has it */
byte head, head_slot; byte order[M];         /* head: [frame | slot] */
byte producer; bit closed;                   /* closed: nobody will take over */
byte cursor = NONE; bit claim[N];            /* of the queue reader; of the latest reader */
bit aborted;
byte from;                                   /* ghost: the next frame that the queue reader must get */

#define FENCE_AT(i, k, kinds) (fence[i] && fence_at[i] == (k) && ((kinds) == (READS | WRITES) || fence[i] >= WRITES))
#define PENDING_AT(k, kinds)  (FENCE_AT(0, k, kinds) || FENCE_AT(1, k, kinds))
#define USED(k)    (inuse[QR] == k + 1 || inuse[LR] == k + 1 || inuse[F1] == k + 1 || inuse[F2] == k + 1)
#define OVER       (producer == GONE && closed)
#define PROMISED(k) (seq[k] && cursor <= seq[k])
#define FREE(k)    (!(head && k == head_slot) && !PROMISED(k) && !claim[k] && !PENDING_AT(k, READS | WRITES))
#define UNDISTURBED (foreign[head_slot] < WRITES || !PENDING_AT(head_slot, WRITES))
/* What a foreign program waits for: the permanent entry */
#define BLOCKED_READ(k)  (entry[k] && writing[k])
#define BLOCKED_WRITE(k) (entry[k] && (writing[k] || PROMISED(k) || claim[k]))

/* A process that holds nothing finds bits of ended accesses, and clears them under the reservation lock. */
inline clear_foreign(k, kinds) {
#if BUG == 20 /* without the lock */
  if
  :: foreign[k] & (kinds) -> if :: PENDING_AT(k, kinds) -> skip :: else -> foreign[k] = foreign[k] & ~(kinds) fi
  :: else
  fi
#else
  if
  :: foreign[k] & (kinds) ->
     atomic { lock[k] == 0 -> lock[k] = me };
     if
     :: PENDING_AT(k, kinds) && BUG != 21
     :: else -> foreign[k] = foreign[k] & ~(kinds)
     fi;
     lock[k] = 0
  :: else
  fi
#endif
}

proctype Producer(byte me; byte left) {
  byte n, k, old, w;
  { if
    :: atomic { me == P1 && producer == 0 -> producer = P1; n = head + 1 }
    :: atomic { me == P2 && producer == GONE -> producer = P2; n = head + 1 }
    fi;
acquire:
    LISTEN(SPACE);
    do
    :: atomic { k == N -> k = 0; break }
    :: atomic { k < N && head && k == head_slot && BUG != 1 -> k++ }         /* the newest frame stays */
    :: atomic { k < N && (!head || k != head_slot || BUG == 1) && PROMISED(k) && BUG != 2 -> k++ }
    :: atomic { k < N && (!head || k != head_slot || BUG == 1) && (!PROMISED(k) || BUG == 2) -> old = seq[k] };
       if
       :: atomic { claim[k] && BUG != 3 -> k++; old = 0 }
       :: else ->
          clear_foreign(k, READS | WRITES);
          if
          :: atomic { foreign[k] && BUG != 5 -> k++; old = 0 }
          :: else ->
             atomic { seq[k] = n; writing[k] = 1 };                          /* the mark; then the second look */
             if
             :: claim[k] && BUG != 3
             :: else ->
                if
                :: foreign[k] && BUG != 5
                :: else -> goto granted
                fi
             fi;
             atomic { seq[k] = old; writing[k] = 0; old = 0 };               /* nothing was written */
#if BUG != 6
             wake(ASK);
#endif
             k++
          fi
       fi
    od;
    SLEEP(FREE(0) || FREE(1) || (N > 2 && FREE(N - 1)));
    goto acquire;
granted:
    atomic { assert(!USED(k)); content[k] = GARBAGE; old = 0; moved[me] = 1 };
    if
    :: atomic { ABORT && !aborted -> aborted = 1 };
#if BUG != 22
       torn[k] = 1;
#endif
       atomic { seq[k] = 0; writing[k] = 0 };
       wake(ASK);
       k = 0;
       goto acquire
    :: true
    fi;
#if BUG == 7 /* published before it is whole */
    atomic { head = n; head_slot = k };
    atomic { content[k] = n; order[n % M] = k };
    torn[k] = 0;
    writing[k] = 0;
#else
    atomic { assert(!USED(k)); content[k] = n; order[n % M] = k };
    if :: torn[k] -> torn[k] = 0 :: else fi;
#if BUG == 19 /* the state before the head */
    writing[k] = 0;
    atomic { head = n; head_slot = k };
#else
    atomic { head = n; head_slot = k };
    writing[k] = 0;
#endif
#endif
    wake(NEWS | ASK);
    atomic { n++; left--; k = 0; if :: left -> goto acquire :: else -> n = 0 fi };
    atomic { producer = GONE; if :: me == P2 || !FRAMES2 -> closed = 1 :: else fi };
    wake(NEWS);
    finished[me] = 1
  } unless { dead[me] }
}

proctype Queue() {
  byte h, k, w, me = QR;
  { skip;
join:
    atomic { h = head; k = head_slot };
    if
    :: h -> clear_foreign(k, WRITES)
    :: else
    fi;
    atomic { cursor = (h -> h : 1); from = cursor };
    if
    :: head == h || BUG == 8
    :: else -> goto join
    fi;
    if
    :: h ->
       if
       :: (foreign[k] & WRITES) && BUG != 9 -> goto next_frame                /* a foreign writer may have it */
       :: else ->
          if
          :: torn[k] && BUG != 23 ->
next_frame:  atomic { cursor = h + 1; from = cursor };
             wake(ASK)
          :: else
          fi
       fi
    :: else
    fi;
    atomic { h = 0; k = 0 };
look:
    LISTEN(NEWS);
    if
    :: atomic { head >= cursor -> k = order[cursor % M]; inuse[QR] = k + 1; moved[QR] = 1 };
       atomic { assert(cursor == from && content[k] == cursor); from++; inuse[QR] = 0; cursor++; k = 0 };
       wake(SPACE | ASK);
       goto look
    :: else ->
       if
       :: OVER ->                                                            /* what was published before the end comes first */
          if
          :: head >= cursor && BUG != 24 -> goto look
          :: else -> moved[QR] = 1; assert(head < cursor)
          fi
       :: else -> SLEEP(head >= cursor || OVER); goto look
       fi
    fi;
    cursor = NONE;                                                           /* leave */
    wake(SPACE | ASK);
    finished[QR] = 1
  } unless { dead[QR] }
}

proctype Latest() {
  byte h, k, last, w, me = LR;
  { skip;
look:
    LISTEN(NEWS);
    atomic { h = head; k = head_slot };
    if
    :: h > last ->
       clear_foreign(k, WRITES);
       if
       :: foreign[k] & WRITES -> goto wait
       :: else
       fi;
       claim[k] = 1;                                                         /* the claim; then the second look */
       if
       :: head != h && BUG != 10 -> goto unclaim
       :: else
       fi;
       if
       :: (foreign[k] & WRITES) && BUG != 11 -> goto unclaim
       :: else
       fi;
       if
       :: torn[k] && BUG != 25 ->
          claim[k] = 0;
          wake(SPACE | ASK);
wait:     if
          :: OVER ->
             if
             :: atomic { head == h && torn[k] -> moved[LR] = 1; goto over }    /* the last frame is torn */
             :: else
             fi
          :: else
          fi;
          atomic { h = 0; k = 0 };
          SLEEP(head && (head > last) && (UNDISTURBED || OVER));
          goto look
       :: else
       fi;
       atomic { assert(content[k] == h && h > last); inuse[LR] = k + 1; last = h; moved[LR] = 1 };
       atomic { assert(content[k] == h); inuse[LR] = 0; claim[k] = 0; h = 0; k = 0 };
       wake(SPACE | ASK);
       goto look;
unclaim:
       atomic { claim[k] = 0; h = 0; k = 0 };
       wake(SPACE | ASK);
       goto look
    :: else ->
       atomic { h = 0; k = 0 };
       if
       :: OVER -> if :: head > last -> goto look :: else -> moved[LR] = 1 fi
       :: else -> SLEEP(head > last || OVER); goto look
       fi
    fi;
over:
    finished[LR] = 1
  } unless { dead[LR] }
}

/* read() or write() of a buffer that happens to be a slot's */
proctype Foreign(byte me) {
  byte k, q, kind, w; bit snap;
  { if :: FOREIGN_SLOT != 1 -> k = 0 :: FOREIGN_SLOT != 0 -> k = 1 fi;
    if :: FOREIGN_READ -> kind = READS :: FOREIGN_WRITE -> kind = WRITES fi;
#if BUG == 26 /* the bit before the fence is in the list */
    atomic { foreign[k] = foreign[k] | kind };
#endif
    atomic { lock[k] == 0 -> lock[k] = me };
#if BUG == 27 /* making room in the list takes the permanent entry for an ended fence */
    if :: atomic { !BLOCKED_WRITE(k) -> entry[k] = 0 } :: else fi;
#endif
    snap = FENCE_AT(F2 - me, k, (kind == READS -> WRITES : READS | WRITES)); /* the other program's */
    atomic { fence[me - F1] = kind; fence_at[me - F1] = k };
#if BUG != 26
    foreign[k] = foreign[k] | kind;
#endif
    lock[k] = 0;
    if
    :: snap -> atomic { fence[F2 - me] == 0 -> snap = 0 }
    :: else
    fi;
look:
    LISTEN(ASK);
    atomic { q = seq[k]; if :: BLOCKED_READ(k) && BUG != 12 -> w = 1 :: else fi };
    if
    :: w -> atomic { w = 0; q = 0 }; goto sleep
    :: else
    fi;
    if
    :: kind == READS ->
       if
       :: torn[k] -> moved[me] = 1                                           /* an error */
       :: else ->
          atomic { assert(content[k] != GARBAGE); inuse[me] = k + 1; moved[me] = 1 }
       fi
    :: else ->
       if
       :: atomic { q && cursor <= q && entry[k] && BUG != 13 -> q = 0 }; goto sleep
       :: else
       fi;
       if
       :: atomic { claim[k] && entry[k] && BUG != 14 -> q = 0 }; goto sleep
       :: else
       fi;
       atomic { fence[me - F1] = GRANTED; moved[me] = 1 };
       atomic { assert(!USED(k) && (content[k] != GARBAGE || torn[k])); content[k] = GARBAGE };
       atomic { assert(!USED(k) && content[k] == GARBAGE); content[k] = q };
       if :: torn[k] -> torn[k] = 0 :: else fi
    fi;
    atomic { fence[me - F1] = 0; inuse[me] = 0; kind = 0; k = 0; q = 0 };
    wake(SPACE | NEWS);
    goto over;
sleep:
    SLEEP((kind == READS -> !BLOCKED_READ(k) : !BLOCKED_WRITE(k)));
    goto look;
over:
    finished[me] = 1
  } unless { dead[me] }
}

#define TODO(i) (dead[i] && !finished[i])
proctype Reaper() {
  byte i, k, w;
again:
  { skip;
end:
    if
    :: atomic { TODO(P1) -> i = P1 }
    :: atomic { TODO(P2) -> i = P2 }
    :: atomic { TODO(QR) -> i = QR }
    :: atomic { TODO(LR) -> i = LR }
    :: atomic { TODO(F1) -> i = F1 }
    :: atomic { TODO(F2) -> i = F2 }
    fi;
    if
    :: i <= P2 ->
       if
       :: producer == i ->
          do
          :: atomic { k < N && writing[k] && BUG != 15 };
             if
             :: head == seq[k] && head_slot == k -> writing[k] = 0            /* published */
             :: else ->
#if BUG != 28
                torn[k] = 1;
#endif
                atomic { seq[k] = 0; writing[k] = 0 }
             fi;
             k++
          :: atomic { k < N && (!writing[k] || BUG == 15) -> k++ }
          :: atomic { k == N -> k = 0; break }
          od
       :: else
       fi;
       atomic { if :: producer == i || (i == P1 && producer == 0) -> producer = GONE :: else fi;
                if :: i == P2 || !FRAMES2 -> closed = 1 :: else fi };
       wake(NEWS | ASK)
    :: i == QR ->
       if :: BUG != 16 -> cursor = NONE :: else fi;
       wake(SPACE | ASK)
    :: i == LR ->
       do
       :: atomic { k < N && BUG != 17 -> claim[k] = 0; k++ }                  /* one word */
       :: atomic { k == N || BUG == 17 -> k = 0; break }
       od;
       wake(SPACE | ASK)
    :: i >= F1 ->
#if BUG == 29 /* the fence before the mark */
       w = (fence[i - F1] == GRANTED);
       fence[i - F1] = 0;
       if :: w -> w = 0; torn[fence_at[i - F1]] = 1 :: else fi;
#else
       if
       :: fence[i - F1] == GRANTED && BUG != 18 -> torn[fence_at[i - F1]] = 1
       :: else
       fi;
       fence[i - F1] = 0;
#endif
       wake(SPACE | NEWS)
    fi;
    do
    :: atomic { k < N && lock[k] == i -> lock[k] = 0; k++ }
    :: atomic { k < N && lock[k] != i -> k++ }
    :: atomic { k == N -> k = 0; break }
    od;
    atomic { finished[i] = 1; i = 0; goto end }
  } unless { reaper_dead };
  atomic { reaper_dead = 0; i = 0; k = 0; w = 0; goto again }
}

proctype Killer() {
end:
  do
  :: KILL(P1, 1)
  :: KILL(P2, FRAMES2)
  :: KILL(QR, QUEUE)
  :: KILL(LR, LATEST)
  :: KILL(F1, FOREIGN)
  :: KILL(F2, FOREIGN > 1)
  :: KILL_REAPER
  od
}

proctype Last() {
  byte k;
  timeout -> /* a process that is not at its end waits for ever */
  finished[P1] && (!FRAMES2 || finished[P2]) && (!QUEUE || finished[QR]) && (!LATEST || finished[LR]) && (!FOREIGN || finished[F1]) && (FOREIGN < 2 || finished[F2]);
  do
  :: k < N -> assert(!writing[k] && !claim[k] && !lock[k] && (content[k] != GARBAGE || torn[k])); k++
  :: else -> break
  od;
  assert(producer == GONE && closed && cursor == NONE && !fence[0] && !fence[1])
}

init { atomic {
  if :: FRAMES -> run Producer(P1, FRAMES) :: else -> producer = GONE; closed = 1; finished[P1] = 1 fi;
  if :: FRAMES2 -> run Producer(P2, FRAMES2) :: else fi;
  if :: QUEUE -> run Queue() :: else fi;
  if :: LATEST -> run Latest() :: else fi;
  if :: FOREIGN -> run Foreign(F1) :: else fi;
  if :: FOREIGN > 1 -> run Foreign(F2) :: else fi;
  if :: KILLS -> run Killer(); run Reaper() :: else fi;
  run Last() } }
