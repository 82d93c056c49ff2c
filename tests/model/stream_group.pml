/* A group of two readers that share a stream's frames, or, with DROP, an in-order reader of a stream that drops frames.
 *
 * A producer publishes some frames and closes the stream. The members join at any time. Each frame from the group's first one on is handed
 * to one member: whoever moves the group's cursor past it. With REDELIVER, the frames of a member that died are handed out again. A foreign
 * writer may write one slot.
 *
 * What is checked. A member has the frame that it took, whole, for as long as it holds it. By default no frame is handed out twice, and none is
 * left out without a death. With REDELIVER every frame is finished by some member if one is left at the end. Nothing of a dead process is
 * left once it is reaped. Every wait ends.
 *
 * Every process can be killed at each of its statements, and the reaper too.
 */
#ifndef FRAMES
#define FRAMES 3
#endif
#ifndef JOIN
#define JOIN 0     /* 1: the members join, and find any cursor; 0: they are there from the beginning */
#endif
#ifndef REDELIVER
#define REDELIVER 0
#endif
#ifndef DROP
#define DROP 0     /* 1: the stream drops frames, and member A is an in-order reader instead */
#endif
#ifndef KILL_JOINING
#define KILL_JOINING 0 /* 1: member A dies while it joins */
#endif
#ifndef KILL_USING
#define KILL_USING 0 /* 1: it dies while it uses a frame */
#endif
#ifndef FOREIGN
#define FOREIGN 0  /* 1: a foreign writer */
#endif

#define PR 0
#define A  1
#define B  2
#define FW 3
#define PROCESSES 4
#define MOVE_NEWS  moved[A] = 1; moved[B] = 1
#define MOVE_SPACE moved[PR] = 1
#define MOVE_ASK   moved[FW] = 1
#include "stream_words.pml"

byte seq[N]; bit writing[N];                 /* state of a slot: [frame | W] */
byte head, head_slot; byte order[M];         /* head: [frame | slot] */
bit over;                                    /* no producer, and none will come */
byte cursor = (JOIN -> NONE : 1);                             /* the group's: the next frame to hand out */
bit place[3];                                /* the bits of `readers` */
bit claim[3 * N];                            /* the claims of each member, one word each */
byte join_lock;
bit again[N]; byte hops;                     /* the slots to hand out again, one word; counts frames that pass to or from it */
bit foreign[N]; byte foreign_fence;          /* a foreign writer; 1: waits, 2: granted */
bit torn[N];
/* For the assertions */
byte first = 1;                              /* where the group began */
byte taken[FRAMES + 1]; bit done[FRAMES + 1];
byte lost;

#define CLAIM(m, k) claim[(m) * N + (k)]
#define MEMBERS     (place[A] || place[B])
#define PROMISED(k) (!DROP && MEMBERS && seq[k] && cursor <= seq[k])
#define KEPT(k)     (CLAIM(A, k) || CLAIM(B, k) || (MEMBERS && again[k]))
#define FREE(k)     (!(head && k == head_slot) && !PROMISED(k) && !KEPT(k) && !foreign[k])
#define USED(k)     (inuse[A] == k + 1 || inuse[B] == k + 1)
#define AGAIN       (again[0] || again[1] || again[N - 1])
#define OTHER       (A + B - me)
#define OTHER_HOLDS (CLAIM(OTHER, 0) || CLAIM(OTHER, 1) || CLAIM(OTHER, N - 1))
#if REDELIVER && BUG != 16
#define RELEASED    (SPACE | ASK | NEWS)
#else
#define RELEASED    (SPACE | ASK)
#endif

/* Is the slot promised, claimed or to be handed out again? Without redelivery, cursors before claims; with it, also the same count of hops. */
inline kept(k, frame) {
  do
  :: true ->
     kept_ = 0;
#if REDELIVER
     hops_ = hops;
#endif
#if BUG == 1 /* claims before cursors */
     kept_ = CLAIM(A, k);
     kept_ = kept_ || CLAIM(B, k);
#endif
     if
     :: MEMBERS -> if :: !DROP && frame && cursor <= frame -> kept_ = 1; break :: else fi
     :: else
     fi;
#if BUG != 1
     if :: CLAIM(A, k) -> kept_ = 1; break :: else fi;
     if :: CLAIM(B, k) -> kept_ = 1; break :: else fi;
#endif
#if REDELIVER
     if :: again[k] && MEMBERS -> kept_ = 1; break :: else fi;
     if :: hops == hops_ || BUG == 12 -> break :: else fi
#else
     break
#endif
  od;
  hops_ = 0
}

proctype Producer() {
  byte n = 1, k, old, w, left = FRAMES, me = PR, hops_; bit kept_;
  { skip;
acquire:
    LISTEN(SPACE);
    do
    :: atomic { k == N -> k = 0; break }
    :: atomic { k < N && head && k == head_slot -> k++ }
    :: atomic { k < N && !(head && k == head_slot) -> old = seq[k] };
       kept(k, old);
       if
       :: atomic { kept_ -> kept_ = 0; k++; old = 0 }
       :: else ->
          if
          :: atomic { foreign[k] -> k++; old = 0 }
          :: else ->
             writing[k] = 1;                                      /* the mark; then the second look */
             if
             :: DROP && (CLAIM(A, k) || CLAIM(B, k)) && BUG != 5  /* for groups the first look is enough */
             :: else -> if :: foreign[k] :: else -> goto granted fi
             fi;
             atomic { writing[k] = 0; old = 0 };
             wake(ASK);
             k++
          fi
       fi
    od;
    SLEEP(FREE(0) || FREE(1) || FREE(N - 1));
    goto acquire;
granted:
    seq[k] = n;
    atomic { assert(!USED(k)); content[k] = GARBAGE; old = 0; moved[PR] = 1 };
    atomic { assert(!USED(k)); content[k] = n; order[n % M] = k };
    if :: torn[k] -> torn[k] = 0 :: else fi;
    atomic { head = n; head_slot = k };
    writing[k] = 0;
    wake(NEWS | ASK);
    atomic { n++; left--; k = 0; if :: left -> goto acquire :: else fi };
    over = 1;
    wake(NEWS);
    finished[PR] = 1
  } unless { dead[PR] }
}

proctype Member(byte me) {
  byte k, q, w, hops_; bit kept_;
  { skip;
#if JOIN && !DROP
#if BUG != 6 /* no lock */
    atomic { join_lock == 0 -> join_lock = me };
#endif
#if BUG != 7 /* its place after the look for others */
    place[me] = 1;
#endif
    if
    :: place[OTHER]
    :: else ->
#if REDELIVER && BUG != 19
       atomic { again[0] = 0; again[1] = 0; again[N - 1] = 0 };   /* one word */
#endif
       do
       :: atomic { q = head; k = head_slot };
          atomic { cursor = (q -> q : 1); first = cursor; if :: cursor <= FRAMES -> taken[cursor] = 0 :: else fi };
          if
          :: head == q || BUG == 9 -> break
          :: else
          fi
       od;
       if
       :: q ->
          if
          :: foreign[k] || torn[k] -> atomic { cursor = q + 1; first = q + 1 }; wake(ASK)
          :: else
          fi
       :: else
       fi
    fi;
#if BUG == 7
    place[me] = 1;
#endif
    atomic { if :: join_lock == me -> join_lock = 0 :: else fi; q = 0; k = 0 };
#endif
look:
    LISTEN(NEWS);
next:
#if REDELIVER
    k = (again[0] -> 1 : (again[1] -> 2 : (again[N - 1] -> N : 0)));
    if
    :: k ->
       k--;
#if BUG == 11 /* takes the bit before its claim */
       hops++;
       if
       :: atomic { again[k] -> again[k] = 0 }
       :: else -> k = 0; goto next
       fi;
       CLAIM(me, k) = 1;
#else
       CLAIM(me, k) = 1;
#if BUG != 13
       hops++;
#endif
       if
       :: atomic { again[k] -> again[k] = 0 }                     /* one takes the bit away */
       :: else -> atomic { CLAIM(me, k) = 0; k = 0 }; wake(RELEASED); goto next
       fi;
#endif
       q = seq[k];
       if
       :: q && q < cursor -> goto use
       :: else -> atomic { CLAIM(me, k) = 0; k = 0; q = 0 }; wake(RELEASED); goto next /* it comes by the cursor */
       fi
    :: else
    fi;
#endif
    q = cursor;
    if
    :: head >= q ->
       k = order[q % M];
#if BUG == 2 /* the claim after the cursor has moved */
       if
       :: atomic { cursor == q -> cursor = q + 1 }; CLAIM(me, k) = 1
       :: else -> goto next
       fi;
#else
       CLAIM(me, k) = 1;
       if
       :: atomic { cursor == q -> cursor = q + 1 }
       :: else -> atomic { CLAIM(me, k) = 0; k = 0; q = 0 }; wake(RELEASED); goto next
       fi;
#endif
#if DROP
       if
       :: (seq[k] == q && !writing[k]) || BUG == 4
       :: else -> goto dropped
       fi;
       if
       :: foreign[k] && BUG != 20 -> goto dropped
       :: else
       fi;
       if
       :: torn[k] ->
dropped:  atomic { lost++; CLAIM(me, k) = 0; k = 0; q = 0 };
          wake(RELEASED);
          goto look
       :: else
       fi;
#endif
use:
       atomic { assert(content[k] == q && q <= FRAMES); assert(REDELIVER || !taken[q]); taken[q] = 1; inuse[me] = k + 1; moved[me] = 1 };
       atomic { assert(content[k] == q); inuse[me] = 0; done[q] = 1; CLAIM(me, k) = 0; k = 0; q = 0 };
       wake(RELEASED);
       goto look
    :: else ->
       q = 0;
       if
       :: over ->
          if
          :: head >= cursor -> goto next
          :: else
          fi;
#if REDELIVER
          hops_ = hops;
          if
          :: OTHER_HOLDS && BUG != 14 -> goto sleep
          :: else
          fi;
          if
          :: atomic { AGAIN -> hops_ = 0 }; goto next
          :: else
          fi;
          if
          :: atomic { hops != hops_ -> hops_ = 0 }; goto next
          :: else
          fi;
#endif
          atomic { hops_ = 0; moved[me] = 1 }
       :: else ->
sleep:    hops_ = 0;
          SLEEP(head >= cursor || AGAIN || (over && !(REDELIVER && OTHER_HOLDS)));
          goto look
       fi
    fi;
    place[me] = 0;
    wake(RELEASED);
    finished[me] = 1
  } unless { dead[me] }
}

proctype Foreign() {
  byte k, q, w, hops_, me = FW; bit kept_;
  { if :: k = 0 :: k = 1 fi;
    atomic { foreign_fence = 1; foreign[k] = 1 };                 /* stream.pml has the list and its lock */
look:
    LISTEN(ASK);
    q = seq[k];
    if
    :: writing[k] -> goto sleep
    :: else
    fi;
    q = seq[k];
    kept(k, q);
    if
    :: atomic { kept_ -> kept_ = 0 }; goto sleep
    :: else
    fi;
    foreign_fence = 2;
    atomic { assert(!USED(k)); content[k] = GARBAGE; moved[FW] = 1 };
    atomic { assert(!USED(k)); content[k] = q };
    if :: torn[k] -> torn[k] = 0 :: else fi;
    atomic { foreign_fence = 0; foreign[k] = 0; q = 0; k = 0 };
    wake(SPACE | NEWS);
    goto ended;
sleep:
    SLEEP(!writing[k] && !PROMISED(k) && !KEPT(k));
    goto look;
ended:
    finished[FW] = 1
  } unless { dead[FW] }
}

#define TODO(i) (dead[i] && !finished[i])
proctype Reaper() {
  byte i, k, w;
again_:
  { skip;
end:
    if
    :: atomic { TODO(PR) -> i = PR }
    :: atomic { TODO(A) -> i = A }
    :: atomic { TODO(B) -> i = B }
    :: atomic { TODO(FW) -> i = FW }
    fi;
    if
    :: i == PR ->
       do
       :: atomic { k < N && !writing[k] -> k++ }
       :: atomic { k < N && writing[k] && seq[k] <= head -> writing[k] = 0; k++ } /* published, or only marked */
       :: atomic { k < N && writing[k] && seq[k] > head };
          torn[k] = 1;
          atomic { seq[k] = 0; writing[k] = 0; k++ }
       :: atomic { k == N -> k = 0; break }
       od;
       over = 1;
       wake(NEWS | ASK)
    :: i == FW ->
       do
       :: atomic { k < N && foreign[k] -> break }
       :: atomic { k < N && !foreign[k] -> k++ }
       :: k == N -> break
       od;
       if
       :: k < N ->
          if :: foreign_fence == 2 -> torn[k] = 1 :: else fi;
          atomic { foreign_fence = 0; foreign[k] = 0 }
       :: else
       fi;
       k = 0;
       wake(SPACE | NEWS)
    :: i == A || i == B ->
#if BUG == 8 /* the join lock before the place */
       atomic { if :: join_lock == i -> join_lock = 0 :: else fi };
#endif
#if REDELIVER && BUG == 10 /* claims are dropped before their frames are kept otherwise */
       atomic { w = CLAIM(i, 0) + 2 * CLAIM(i, 1) + (N > 2 -> 4 * CLAIM(i, N - 1) : 0) };
       atomic { CLAIM(i, 0) = 0; CLAIM(i, 1) = 0; CLAIM(i, N - 1) = 0 };
       atomic { again[0] = again[0] || (w & 1); again[1] = again[1] || (w & 2); if :: N > 2 -> again[N - 1] = again[N - 1] || (w & 4) :: else fi; w = 0 };
       hops++;
#else
#if REDELIVER
       atomic { again[0] = again[0] || CLAIM(i, 0); again[1] = again[1] || CLAIM(i, 1);
                if :: N > 2 -> again[N - 1] = again[N - 1] || CLAIM(i, N - 1) :: else fi };   /* one word */
       hops++;
#endif
       atomic { CLAIM(i, 0) = 0; CLAIM(i, 1) = 0; CLAIM(i, N - 1) = 0 };
#endif
       if :: BUG != 3 -> place[i] = 0 :: else fi;
       atomic { if :: join_lock == i -> join_lock = 0 :: else fi };
       wake(NEWS | SPACE | ASK)
    fi;
    atomic { finished[i] = 1; i = 0; goto end }
  } unless { reaper_dead };
  atomic { reaper_dead = 0; i = 0; k = 0; w = 0; goto again_ }
}

proctype Killer() {
end:
  do
  :: KILL(PR, 1)
  :: KILL(A, (!KILL_JOINING || join_lock == A) && (!KILL_USING || inuse[A]))
  :: KILL(B, !DROP)
  :: KILL(FW, FOREIGN)
  :: KILL_REAPER
  od
}

proctype Last() {
  byte k;
  timeout -> /* a process that is not at its end waits for ever */
  finished[PR] && finished[A] && (DROP || finished[B]) && (!FOREIGN || finished[FW]);
  do
  :: k < N -> assert(!writing[k] && !CLAIM(A, k) && !CLAIM(B, k) && !foreign[k] && (content[k] != GARBAGE || torn[k])); k++
  :: else -> break
  od;
  assert(over && !MEMBERS && !join_lock);
  k = first;
  do
  :: k <= head ->
     if
     :: DROP
     :: !DROP && REDELIVER -> assert(done[k] || (dead[A] && dead[B]))
     :: !DROP && !REDELIVER -> assert(done[k] || dead[A] || dead[B])
     fi;
     k++
  :: else -> break
  od
}

init { atomic {
  run Producer();
  if :: !JOIN -> place[A] = 1; place[B] = !DROP :: else -> place[A] = DROP fi;
  run Member(A);
  if :: !DROP -> run Member(B) :: else -> finished[B] = 1 fi;
  if :: FOREIGN -> run Foreign() :: else fi;
  if :: KILLS -> run Killer(); run Reaper() :: else fi;
  run Last() } }
