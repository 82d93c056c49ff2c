/* A group of two readers that share a stream's frames, or, with DROP, an in-order reader of a stream that drops frames.
 *
 * A producer publishes some frames and closes the stream. The members join at any time. Each frame from the group's first one on is handed
 * to one member: whoever moves the group's cursor past it. With REDELIVER, the frames that a member had when it died are handed out again: its
 * place becomes an orphan, which another member adopts with all that it holds. A foreign writer may write one slot.
 *
 * What is checked. A member has the frame that it took, whole, for as long as it holds it. By default no frame is handed out twice, and none is
 * left out without a death. With REDELIVER every frame is released by some member if one is left at the end, and none is handed out again after
 * that. Nothing of a dead process is left once it is reaped. Every wait ends.
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
#define DROP 0     /* 1: the stream drops frames, and member A is an in-order reader instead; 2: it drops, and has a group */
#endif
#ifndef THREE
#define THREE 0    /* 1: a third member */
#endif
#ifndef LEAVE
#define LEAVE 0    /* 1: member B may leave at any time */
#endif
#ifndef KILL_JOINING
#define KILL_JOINING 0 /* 1: member A dies while it joins */
#endif
#ifndef KILL_USING
#define KILL_USING 0 /* 1: it dies while it uses a frame */
#endif
#ifndef KILL_TRYING
#define KILL_TRYING 0 /* 1: it dies while it takes one */
#endif
#ifndef FOREIGN
#define FOREIGN 0  /* 1: a foreign writer */
#endif

#define PR 0
#define A  1
#define B  2
#define C  3
#define FW 4
#define PROCESSES 5
#define ORPHAN 9
#define IN_ORDER (DROP == 1)
#define MOVE_NEWS  moved[A] = 1; moved[B] = 1; moved[C] = 1
#define MOVE_SPACE moved[PR] = 1
#define MOVE_ASK   moved[FW] = 1
#include "stream_words.pml"

byte seq[N]; bit writing[N];                 /* state of a slot: [frame | W] */
byte head, head_slot; byte order[M];         /* head: [frame | slot] */
bit over;                                    /* no producer, and none will come */
byte cursor = (JOIN -> NONE : 1), mover;     /* the group's: [the next frame to hand out | who moved it there last, 0: nobody], one word */
bit place[4];                                /* the bits of `readers` */
bit ready[4];                                /* the cursor of its place says that the group's counts for it */
bit claim[4 * N];                            /* the claims of each place, one word each */
byte join_lock;
bit leftover[4];                                 /* its role: what a dead member left, and somebody has adopted */
bit gone[4];                                 /* it is of no group any more */
byte owner[4];                               /* of each place: who has it; ORPHAN: its owner died and it holds frames */
byte trying[4], try_slot[4];                 /* [the frame that the owner is about to take | its slot], one word; 0: none */
byte got[4];                                 /* the newest frame of which another member has seen that this one took it */
bit foreign[N]; byte foreign_fence;          /* a foreign writer; 1: waits, 2: granted */
bit torn[N];
/* For the assertions */
byte first = 1;                              /* where the group began */
byte taken[FRAMES + 1]; bit done[FRAMES + 1], back[FRAMES + 1]; /* handed out; released; since the group began */
byte lost;

#define CLAIM(m, k) claim[(m) * N + (k)]
#define HOLDS(m)    (CLAIM(m, 0) || CLAIM(m, 1) || CLAIM(m, N - 1))
#define READY       (ready[A] || ready[B] || ready[C])
#define LIVES(m)    (place[m] && owner[m] != ORPHAN && !leftover[m]) /* counts as a member: it is one, or a dead one that isn't reaped */
#define ADOPTABLE(m) (owner[m] == ORPHAN && !gone[m])
#define MEMBERS     (LIVES(A) || LIVES(B) || LIVES(C))
#define PROMISED(k) (!DROP && READY && seq[k] && cursor <= seq[k])
#define KEPT(k)     (CLAIM(A, k) || CLAIM(B, k) || CLAIM(C, k))
#define FREE(k)     (!(head && k == head_slot) && !PROMISED(k) && !KEPT(k) && !foreign[k])
#define USED(k)     (inuse[A] == k + 1 || inuse[B] == k + 1 || inuse[C] == k + 1)
#define IS_ORPHAN   (ADOPTABLE(A) || ADOPTABLE(B) || ADOPTABLE(C))
#define OTHERS(m)   ((m) != me && owner[m] != me && !gone[m] && HOLDS(m))
#define OTHERS_HOLD (OTHERS(A) || OTHERS(B) || OTHERS(C))

/* A claim was dropped. At the end of the stream members wait for the frames of others, too. */
inline released() {
  wake(SPACE | ASK);
#if REDELIVER && BUG != 16
  if :: over -> wake(NEWS) :: else fi
#endif
}

/* Is the slot promised or claimed? Cursors before claims. A claim stays in its place's word until it is released, whoever owns the place. */
inline kept(k, frame) {
  kept_ = 0;
#if BUG == 1 /* claims before cursors */
  if :: CLAIM(A, k) -> kept_ = 1 :: else fi;
  if :: CLAIM(B, k) -> kept_ = 1 :: else fi;
#endif
  if
  :: READY -> if :: !DROP && frame && cursor <= frame -> kept_ = 1 :: else fi
  :: else
  fi;
#if BUG != 1
  if :: !kept_ && CLAIM(A, k) -> kept_ = 1 :: else fi;
  if :: !kept_ && CLAIM(B, k) -> kept_ = 1 :: else fi;
#if THREE
  if :: !kept_ && CLAIM(C, k) -> kept_ = 1 :: else fi
#endif
#endif
}

#if REDELIVER
/* Whoever moves the cursor on, or ends a member, leaves no orphan to a group without members. */
inline sweep(o, adopter) {
  o = A;
  do
  :: atomic { o > C -> o = 0; break }
  :: atomic { o <= C && (owner[o] != ORPHAN || (MEMBERS && !gone[o])) -> o++ }
  :: atomic { o <= C && owner[o] == ORPHAN && (!MEMBERS || gone[o]) };
     if
     :: atomic { owner[o] == ORPHAN -> owner[o] = adopter };
#if BUG != 15 /* the place that is to be freed counts as a member */
        leftover[o] = 1;
#endif
        if
        :: !gone[o] && (LIVES(A) && A != o || LIVES(B) && B != o || LIVES(C) && C != o) -> owner[o] = ORPHAN; if :: BUG == 23 -> o++ :: else fi /* one has come since; it may leave now, so look again */
        :: else -> free_place(o); o++
        fi
     :: else
     fi
  od
}

inline free_place(o) {
  atomic { CLAIM(o, 0) = 0; CLAIM(o, 1) = 0; CLAIM(o, N - 1) = 0 };
  ready[o] = 0;
  place[o] = 0;
  atomic { owner[o] = 0; leftover[o] = 0; gone[o] = 0 } /* role and group mean nothing without an owner */
}
#endif

proctype Producer() {
  byte n = 1, k, old, w, left = FRAMES, me = PR; bit kept_;
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
             :: (DROP || REDELIVER) && BUG != 5 -> kept(k, old)      /* for groups that don't redeliver the first look is enough */
             :: else
             fi;
             if
             :: atomic { kept_ -> kept_ = 0 }
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
  byte k, q, w, p, h = me; bit kept_;
  { skip;
#if JOIN && !IN_ORDER
#if BUG != 6 /* no lock */
    atomic { join_lock == 0 -> join_lock = me };
#endif
    owner[me] = me;
    place[me] = 1;
    if
    :: A != me && LIVES(A) || B != me && LIVES(B) || C != me && LIVES(C) -> ready[me] = 1
    :: else ->
#if REDELIVER && BUG != 19
       h = A;
       do
       :: atomic { h < 4 && (h == me || !place[h] || (BUG == 24 && LIVES(h))) -> h++ } /* 24: one that is being adopted isn't left yet */
       :: atomic { h < 4 && h != me && place[h] -> gone[h] = 1 };
          if
          :: atomic { owner[h] == ORPHAN -> owner[h] = me }; leftover[h] = 1; free_place(h)
          :: else
          fi;
          h++
       :: atomic { h == 4 -> h = me; break }
       od;
#endif
       do
       :: atomic { q = head; k = head_slot };
          atomic { cursor = (q -> q : 1); mover = 0; first = cursor; if :: cursor <= FRAMES -> taken[cursor] = 0; back[cursor] = 0 :: else fi };
#if BUG != 7 /* its promise after the second look at the head */
          ready[me] = 1;
#endif
          if
          :: head == q || BUG == 9 -> break
          :: else
          fi
       od;
       if
       :: q ->
          if
          :: foreign[k] || torn[k] -> atomic { cursor = q + 1; mover = 0; first = q + 1 }; wake(ASK)
          :: else
          fi
       :: else
       fi
    fi;
#if BUG == 7
    ready[me] = 1;
#endif
    atomic { if :: join_lock == me -> join_lock = 0 :: else fi; q = 0; k = 0 };
#endif
look:
    LISTEN(NEWS);
next:
#if LEAVE
    if
    :: me == B -> moved[me] = 1; goto leave
    :: true
    fi;
#endif
#if REDELIVER
    /* What it has adopted comes first. All claims of an adopted place are frames. */
    h = (A != me && owner[A] == me && HOLDS(A) -> A : (B != me && owner[B] == me && HOLDS(B) -> B : (C != me && owner[C] == me && HOLDS(C) -> C : 0)));
    if
    :: h ->
       k = (CLAIM(h, 0) -> 0 : (CLAIM(h, 1) -> 1 : N - 1));
       q = seq[k];
       goto use
    :: else -> h = me
    fi;
    if
    :: atomic { ADOPTABLE(A) -> owner[A] = me }; leftover[A] = 1; goto next
    :: atomic { ADOPTABLE(B) -> owner[B] = me }; leftover[B] = 1; goto next
    :: atomic { ADOPTABLE(C) -> owner[C] = me }; leftover[C] = 1; goto next
    :: else
    fi;
#endif
    atomic { q = cursor; p = mover };
    if
    :: head >= q ->
       k = order[q % M];
#if REDELIVER
#if BUG != 13 /* the cursor moves on without a note of who had moved it */
       if
       :: p && got[p] < q - 1 -> atomic { if :: got[p] < q - 1 -> got[p] = q - 1 :: else fi }
       :: else
       fi;
#endif
#if BUG != 12 /* it doesn't say what it tries */
       atomic { trying[me] = q; try_slot[me] = k };
#endif
#endif
#if BUG == 2 /* the claim after the cursor has moved */
       if
       :: atomic { cursor == q -> cursor = q + 1 }; CLAIM(me, k) = 1
       :: else -> goto next
       fi;
#else
       CLAIM(me, k) = 1;
       if
       :: atomic { cursor == q && mover == p -> cursor = q + 1; mover = (REDELIVER -> me : 0); p = 0 }
       :: else ->
          atomic { CLAIM(me, k) = 0; k = 0; q = 0; p = 0 };
#if REDELIVER
          atomic { trying[me] = 0; try_slot[me] = 0 };
#endif
          released();
          goto next
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
#if REDELIVER
          atomic { trying[me] = 0; try_slot[me] = 0 };
#endif
          released();
          goto look
       :: else
       fi;
#endif
#if REDELIVER
       atomic { trying[me] = 0; try_slot[me] = 0 };
#endif
use:
       atomic { assert(content[k] == q && q <= FRAMES); assert((REDELIVER -> !back[q] : !taken[q])); taken[q] = 1; inuse[me] = k + 1; moved[me] = 1 };
       atomic { assert(content[k] == q); inuse[me] = 0; done[q] = 1; back[q] = 1; CLAIM(h, k) = 0; k = 0; q = 0 };
#if REDELIVER
       if
       :: h != me && !HOLDS(h) -> free_place(h)
       :: else
       fi;
       h = me;
#endif
       released();
       goto look
    :: else ->
       atomic { q = 0; p = 0 };
       if
       :: over ->
          if
          :: head >= cursor -> goto next
          :: else
          fi;
#if REDELIVER && BUG != 14
          /* One word after the other: a frame is in one word from its taking to its release. */
          if :: OTHERS(A) -> goto sleep :: else fi;
          if :: OTHERS(B) -> goto sleep :: else fi;
#if THREE
          if :: OTHERS(C) -> goto sleep :: else fi;
#endif
#endif
          moved[me] = 1
       :: else ->
sleep:    SLEEP(head >= cursor || IS_ORPHAN || (over && !(REDELIVER && OTHERS_HOLD)));
          goto look
       fi
    fi;
leave:
#if REDELIVER
    /* What it has adopted and not released is for others. */
    if :: A != me && owner[A] == me -> owner[A] = ORPHAN :: else fi;
    if :: B != me && owner[B] == me -> owner[B] = ORPHAN :: else fi;
    if :: C != me && owner[C] == me -> owner[C] = ORPHAN :: else fi;
    free_place(me);
    if :: BUG != 17 -> sweep(k, me) :: else fi;
#else
    ready[me] = 0;
    place[me] = 0;
    owner[me] = 0;
#endif
    wake((BUG == 16 -> SPACE | ASK : NEWS | SPACE | ASK));
    finished[me] = 1
  } unless { dead[me] }
}

proctype Foreign() {
  byte k, q, w, me = FW; bit kept_;
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
  byte i, k, w, o, q; bit won;
again_:
  { skip;
end:
    if
    :: atomic { TODO(PR) -> i = PR }
    :: atomic { TODO(A) -> i = A }
    :: atomic { TODO(B) -> i = B }
    :: atomic { TODO(C) -> i = C }
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
    :: i == A || i == B || i == C ->
#if BUG == 8 /* the join lock before the place */
       atomic { if :: join_lock == i -> join_lock = 0 :: else fi };
#endif
#if REDELIVER
       o = A;
       do
       :: atomic { o > C -> o = 0; break }
       :: atomic { o <= C && owner[o] != i -> o++ }
       :: atomic { o <= C && owner[o] == i };
          /* Had it taken what it tried? Either nobody has moved the cursor since, or whoever did made a note of it before. */
          if
          :: trying[o] ->
             q = trying[o];
             won = got[o] >= q;
             if :: !won && BUG != 21 && cursor == q + 1 && mover == o -> won = 1 :: else fi;
             if :: !won && BUG != 22 && got[o] >= q -> won = 1 :: else fi;
             if
             :: won && DROP && (seq[try_slot[o]] != q || writing[try_slot[o]] || foreign[try_slot[o]]) -> won = 0
             :: else
             fi;
             if
             :: won || BUG == 11 /* what it tried counts as taken */
             :: else -> CLAIM(o, try_slot[o]) = 0
             fi;
             atomic { trying[o] = 0; try_slot[o] = 0; won = 0; q = 0 }
          :: else
          fi;
          if
          :: HOLDS(o) && BUG != 10 -> /* an orphan; 10: it is freed with its frames */
             ready[o] = 0;
             owner[o] = ORPHAN
          :: else -> free_place(o)
          fi;
          o++
       od;
       if :: BUG != 18 -> sweep(o, i) :: else fi;
#else
       atomic { CLAIM(i, 0) = 0; CLAIM(i, 1) = 0; CLAIM(i, N - 1) = 0 };
       ready[i] = 0;
       if :: BUG != 3 -> place[i] = 0; owner[i] = 0 :: else fi;
#endif
       atomic { if :: join_lock == i -> join_lock = 0 :: else fi };
       wake(NEWS | SPACE | ASK)
    fi;
    atomic { finished[i] = 1; i = 0; goto end }
  } unless { reaper_dead };
  atomic { reaper_dead = 0; i = 0; k = 0; w = 0; o = 0; q = 0; won = 0; goto again_ }
}

proctype Killer() {
end:
  do
  :: KILL(PR, 1)
  :: KILL(A, (!KILL_JOINING || join_lock == A) && (!KILL_USING || inuse[A]) && (!KILL_TRYING || trying[A]))
  :: KILL(B, !IN_ORDER)
  :: KILL(C, THREE)
  :: KILL(FW, FOREIGN)
  :: KILL_REAPER
  od
}

proctype Last() {
  byte k;
  timeout -> /* a process that is not at its end waits for ever */
  finished[PR] && finished[A] && (IN_ORDER || finished[B]) && (!THREE || finished[C]) && (!FOREIGN || finished[FW]);
  do
  :: k < N -> assert(!writing[k] && !KEPT(k) && !foreign[k] && (content[k] != GARBAGE || torn[k])); k++
  :: else -> break
  od;
  assert(over && !place[A] && !place[B] && !place[C] && !owner[A] && !owner[B] && !owner[C] && !READY && !join_lock);
  k = first;
  do
  :: k <= head ->
     if
     :: DROP
     :: !DROP && REDELIVER -> assert(done[k] || (dead[A] && (dead[B] || LEAVE) && (!THREE || dead[C])))
     :: !DROP && !REDELIVER -> assert(done[k] || dead[A] || dead[B])
     fi;
     k++
  :: else -> break
  od
}

init { atomic {
  run Producer();
  if
  :: !JOIN -> place[A] = 1; ready[A] = 1; owner[A] = A; if :: !IN_ORDER -> place[B] = 1; ready[B] = 1; owner[B] = B :: else fi
  :: else -> place[A] = IN_ORDER; ready[A] = IN_ORDER; owner[A] = (IN_ORDER -> A : 0)
  fi;
  if :: THREE -> place[C] = !JOIN; ready[C] = !JOIN; owner[C] = (JOIN -> 0 : C); run Member(C) :: else -> finished[C] = 1 fi;
  run Member(A);
  if :: !IN_ORDER -> run Member(B) :: else -> finished[B] = 1 fi;
  if :: FOREIGN -> run Foreign() :: else fi;
  if :: KILLS -> run Killer(); run Reaper() :: else fi;
  run Last() } }
