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

#ifndef KILL_GRANTED
#define KILL_GRANTED 0 /* 1: the first foreign program dies while it writes */
#endif
#ifndef KILL_FROM
#define KILL_FROM 0 /* the first producer dies after so many frames */
#endif
#ifndef HISTORY
#define HISTORY 0  /* more than 0: the queue reader starts at the oldest of so many frames */
#endif
#ifndef KEEP
#define KEEP 0     /* 1: the queue reader may keep a frame while it reads others */
#endif
#ifndef FENCES
#define FENCES 0   /* 1: frames may be published with a fence, which another process signals */
#endif

#define P1 1
#define P2 2
#define QR 3
#define LR 4
#define F1 5
#define F2 6
#define WK 7       /* signals the fences of frames */
#define KEPT 8     /* no process: the frame that the queue reader keeps, in `inuse` */
#define PROCESSES 9
#define MOVE_NEWS  moved[QR] = 1; moved[LR] = 1
#define MOVE_SPACE moved[P1] = 1; moved[P2] = 1
#define MOVE_ASK   moved[F1] = 1; moved[F2] = 1
#define SWAPPED_LISTEN (BUG == 4)
#define KILLED(i) if :: i == QR -> inuse[KEPT] = 0 :: else fi
#include "stream_words.pml"

#define PENDING 1  /* a frame's fence; 0: none */
#define SIGNALED 2
#define FAILED 3
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
byte cursor = NONE; bit kept[N]; bit claim[N]; /* cursor and claims of the queue reader; claims of the latest reader */
byte job[N];                                 /* the slot's fence */
bit aborted;
byte from;                                   /* ghost: the next frame that the queue reader must get */

#define FENCE_AT(i, k, kinds) (fence[i] && fence_at[i] == (k) && ((kinds) == (READS | WRITES) || fence[i] >= WRITES))
#define PENDING_AT(k, kinds)  (FENCE_AT(0, k, kinds) || FENCE_AT(1, k, kinds))
#define USED(k)    (inuse[QR] == k + 1 || inuse[LR] == k + 1 || inuse[F1] == k + 1 || inuse[F2] == k + 1 || inuse[KEPT] == k + 1)
#define OVER       (producer == GONE && closed)
#define PROMISED_AT(k, frame) ((frame) && cursor <= (frame))
#define PROMISED(k) PROMISED_AT(k, seq[k])
#define FREE(k)    (!(head && k == head_slot) && !PROMISED(k) && !claim[k] && !kept[k] && !PENDING_AT(k, READS | WRITES))
#define UNDISTURBED (foreign[head_slot] < WRITES || !PENDING_AT(head_slot, WRITES))
/* What a foreign program waits for: the permanent entry */
#define BLOCKED_READ(k)  (entry[k] && writing[k])
#define BLOCKED_WRITE(k) (entry[k] && (writing[k] || PROMISED(k) || claim[k] || kept[k]))

#if BUG == 38 /* the mark has the new frame's number */
#define MARK atomic { seq[k] = n; writing[k] = 1 }
#else
#define MARK writing[k] = 1
#endif
#if FENCES
#define BUSY_0 busy = 0
#else
#define BUSY_0 skip
#endif

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
#if FENCES
  byte busy;
#endif
  { if
    :: atomic { me == P1 && producer == 0 -> producer = P1; n = head + 1 }
    :: atomic { me == P2 && producer == GONE -> producer = P2; n = head + 1 }
    fi;
acquire:
    LISTEN(SPACE);
next_slot:
    do
    :: atomic { k == N -> k = 0; break }
    :: atomic { k < N && head && k == head_slot && BUG != 1 -> k++ }         /* the newest frame stays */
    :: atomic { k < N && (!head || k != head_slot || BUG == 1) && PROMISED(k) && BUG != 2 -> k++ }
    :: atomic { k < N && (!head || k != head_slot || BUG == 1) && (!PROMISED(k) || BUG == 2) -> old = seq[k] };
       if
       :: atomic { claim[k] && BUG != 3 -> k++; old = 0 }
       :: else ->
#if KEEP
          if
          :: atomic { kept[k] -> k++; old = 0; goto next_slot }
          :: else
          fi;
#endif
#if FENCES
          if
          :: atomic { job[k] == PENDING && BUG != 40 -> busy = k + 1; k++; old = 0; goto next_slot }
          :: else
          fi;
#endif
          clear_foreign(k, READS | WRITES);
          if
          :: atomic { foreign[k] && BUG != 5 -> k++; old = 0 }
          :: else ->
             MARK;                                                           /* the mark; then the second look */
#if HISTORY
             if
             :: PROMISED_AT(k, old) && BUG != 30 -> goto give_way
             :: else
             fi;
#endif
             if
             :: claim[k] && BUG != 3 -> goto give_way
             :: else
             fi;
#if KEEP
             if
             :: kept[k] -> goto give_way
             :: else
             fi;
#endif
             if
             :: !foreign[k] || BUG == 5 -> goto granted
             :: else
             fi;
give_way:    atomic { seq[k] = old; writing[k] = 0; old = 0 };               /* nothing was written */
#if BUG != 6
             wake(ASK);
#endif
             k++
          fi
       fi
    od;
#if FENCES
    if
    :: busy -> atomic { job[busy - 1] != PENDING -> busy = 0; moved[me] = 1 }; goto acquire
    :: else
    fi;
#endif
    SLEEP(FREE(0) || FREE(1) || (N > 2 && FREE(N - 1)));
    goto acquire;
granted:
#if BUG != 37
    seq[k] = n;
#endif
    atomic { assert(!USED(k) && job[k] != PENDING); content[k] = GARBAGE; old = 0; BUSY_0; moved[me] = 1 };
#if BUG == 37 /* the state doesn't say when writing begins */
    seq[k] = n;
#endif
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
#if FENCES
#if BUG == 41 /* the fence after the head */
    atomic { order[n % M] = k; job[k] = 0 };
#else
    if :: job[k] = (dead[WK] -> FAILED : PENDING) :: atomic { job[k] = 0; content[k] = n } fi;      /* with a fence, or without */
    order[n % M] = k;
#endif
#else
    atomic { assert(!USED(k)); content[k] = n; order[n % M] = k };
#endif
    if :: torn[k] -> torn[k] = 0 :: else fi;
#if BUG == 19 /* the state before the head */
    writing[k] = 0;
    atomic { head = n; head_slot = k };
#else
    atomic { head = n; head_slot = k };
#if BUG == 41
    job[k] = PENDING;
#endif
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

#include "stream_readers.pml"

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
#if FENCES
    if
    :: job[k] == PENDING && BUG != 42 -> q = 0; job[k] != PENDING; moved[me] = 1; goto look
    :: else
    fi;
#endif
    if
    :: kind == READS ->
       if
       :: torn[k] || job[k] == FAILED -> moved[me] = 1                                           /* an error */
       :: else ->
          atomic { assert(content[k] != GARBAGE); inuse[me] = k + 1; moved[me] = 1 }
       fi
    :: else ->
#if BUG == 36 /* claims before cursors */
       if
       :: atomic { kept[k] -> q = 0 }; goto sleep
       :: else
       fi;
#endif
       if
       :: atomic { q && cursor <= q && entry[k] && BUG != 13 -> q = 0 }; goto sleep
       :: else
       fi;
#if KEEP && BUG != 36
       if
       :: atomic { kept[k] && BUG != 39 -> q = 0 }; goto sleep
       :: else
       fi;
#endif
       if
       :: atomic { claim[k] && entry[k] && BUG != 14 -> q = 0 }; goto sleep
       :: else
       fi;
       atomic { fence[me - F1] = GRANTED; moved[me] = 1 };
       atomic { assert(!USED(k) && (content[k] != GARBAGE || torn[k] || job[k] == FAILED)); content[k] = GARBAGE };
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

/* Does the work of a frame, and signals its fence. Once it has died, later fences fail from the start. */
#define DO_JOB(k) atomic { k < N && job[k] == PENDING -> content[k] = seq[k]; assert(!USED(k)); job[k] = SIGNALED }
proctype Worker() {
  { skip;
end:
    do
    :: DO_JOB(0)
    :: DO_JOB(1)
    od
  } unless { dead[WK] }
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
    :: atomic { TODO(WK) -> i = WK }
    fi;
    if
    :: i <= P2 ->
       if
       :: producer == i ->
          do
          :: atomic { k < N && writing[k] && BUG != 15 };
             if
             :: (seq[k] <= head && BUG != 38) || (head == seq[k] && head_slot == k) -> writing[k] = 0 /* published, or only marked */
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
#if KEEP
       atomic { kept[0] = 0; kept[1] = 0; kept[N - 1] = 0 };                  /* one word */
#endif
       if :: BUG != 16 -> cursor = NONE :: else fi;
       wake(SPACE | ASK)
    :: i == LR ->
       do
       :: atomic { k < N && BUG != 17 -> claim[k] = 0; k++ }                  /* one word */
       :: atomic { k == N || BUG == 17 -> k = 0; break }
       od;
       wake(SPACE | ASK)
    :: i == WK ->
       do
       :: atomic { k < N && job[k] == PENDING -> job[k] = FAILED; k++ }
       :: atomic { k < N && job[k] != PENDING -> k++ }
       :: atomic { k == N -> k = 0; break }
       od
    :: i == F1 || i == F2 ->
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
  :: KILL(P1, head >= KILL_FROM)
  :: KILL(P2, FRAMES2)
  :: KILL(QR, QUEUE)
  :: KILL(LR, LATEST)
  :: KILL(F1, FOREIGN && (!KILL_GRANTED || fence[0] == GRANTED))
  :: KILL(F2, FOREIGN > 1)
  :: KILL(WK, FENCES)
  :: KILL_REAPER
  od
}

proctype Last() {
  byte k;
  timeout -> /* a process that is not at its end waits for ever */
  finished[P1] && (!FRAMES2 || finished[P2]) && (!QUEUE || finished[QR]) && (!LATEST || finished[LR]) && (!FOREIGN || finished[F1]) && (FOREIGN < 2 || finished[F2]);
  do
  :: k < N -> assert(!writing[k] && !claim[k] && !lock[k] && !kept[k] && job[k] != PENDING && (content[k] != GARBAGE || torn[k] || job[k] == FAILED)); k++
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
  if :: FENCES -> run Worker() :: else fi;
  if :: KILLS -> run Killer(); run Reaper() :: else fi;
  run Last() } }
