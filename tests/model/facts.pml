/* The facts of a domain outlive its processes: life.c, reset.c and ending.c of the domain.
 *
 * A (1) has joined. It is in a write() block of a buffer, with its fence in chunk 0 and the buffer's record in chunk 1. A message in flight
 * holds the buffer, and other processes know the fence. F (2) is a child that A forks at any moment, unseen by the library. J (3) and
 * K (4) join at any moment, look, make fences of their own, and leave. LAST (5) joins when all have ended, and leaves. The file is never
 * replaced. The last process to leave a domain to which nobody is present gives its chunks back, and that is called a reset.
 *
 * Every process but LAST can be killed at each of its statements. A process that waits reaps at its ticks, in another thread (TICK).
 *
 * What is checked:
 * - A process that has received the buffer reads no half-written content without an error.
 * - A fence is pending only while its owner has not ended it; it ends well only if it did. "Nobody knows" is said only after a reset.
 * - No generation of a slot is used twice.
 * - Nobody touches a chunk whose pages are gone or not there yet, and the file is as long as its header counts.
 * - After LAST has left, the file has nothing but the records of buffers that are still held, and those are found.
 * - Every wait ends: a process that has not come to its end is an invalid end state.
 *
 * A chunk has one slot here. Its type and its owner stand in the chunk table. All else is in its pages, and goes with them.
 */
#ifndef KILLS
#define KILLS 1
#endif
#ifndef FORK
#define FORK 1     /* F comes and waits for A's fence. 2: it may then join, or leave without having joined */
#endif
#ifndef TWO
#define TWO 1      /* K comes */
#endif
#ifndef NO_FD
#define NO_FD 0    /* J may leave without a free descriptor, and so without the lifecycle lock */
#endif
#ifndef OWN
#define OWN 0      /* J and LAST allocate buffers of their own */
#endif
#ifndef BUG
#define BUG 0      /* a negative control: the step with this number is left out or swapped */
#endif

#define A 1
#define F 2
#define J 3
#define K 4
#define LAST 5
#define TICK 6
#define NOBODY 9   /* a life id that no slot ever has: its generation is 0 */
#if OWN            /* chunks that there can be */
#define NC 5
#else
#define NC 4
#endif

#define NONE 0     /* types of a chunk */
#define FENCE 1
#define REC 2
#define FREE 0     /* states of a record */
#define LIVE 1
#define DYING 2
#define FILE 1     /* what a process maps: the file, or a private copy at the same addresses */
#define COPY 2

/* The file */
byte nchunks = 2, size = 2;        /* the chunks that the header counts, and those up to the end of the file */
byte ctype[NC], owner[NC];         /* the chunk table */
bit pages[NC];                     /* is there memory behind the chunk? */
byte gen[NC], past[NC]; bit pending[NC], failed[NC];    /* a fence. past: the generation of the slot's last failed use */
byte rstate[NC]; bit torn[NC], listed[NC], other[NC];   /* a record. listed: it lists A's fence. other: of another buffer */
byte floor_[3];                    /* by type: no generation at or below it is used again */
byte hash, table;                  /* 1 + the chunk in which the buffer's record is found; the table lock */
bit alive[7];                      /* the states of the process slots */
/* What the kernel knows */
byte lifecycle;                    /* the process with the lifecycle lock, 0: none */
bit life[7]; byte reaping[7];      /* the locks on the bytes of lives: held by the process itself, or by the one that reaps it */
bit presence[7]; byte maps[7]; bit holds[7], flight = 1;
bit dead[7], ended[7], waits[7]; byte deaths, tick_of;
/* For the assertions */
bit half = 1;                      /* the content is half written */
byte end_a, end_j;                 /* how the fences of A and J really ended: 0 not yet, 1 well, 2 failed */
byte chunk_j = 99, gen_j;          /* the handle of J's fence */
byte highest[NC], used[NC];        /* the highest generation of a fence in each slot, and of a record */
bit reset_a, reset_j;              /* has a reset begun since the fence was made? */
bit judged;                        /* was the buffer held when it was last judged? */

#define ORPHAN(i)   (alive[i] && !life[i] && reaping[i] == 0)
#define ORPHANS     (ORPHAN(A) || ORPHAN(F) || ORPHAN(J) || ORPHAN(K))
#define LOCKED      (life[A] || life[F] || life[J] || life[K] || life[LAST] || reaping[A] || reaping[F] || reaping[J] || reaping[K])
#define USED        (alive[A] || alive[F] || alive[J] || alive[K])
#define PRESENT     (presence[A] || presence[F] || presence[J] || presence[K] || presence[LAST])
#define HELD        (flight || holds[A] || holds[F] || holds[J] || holds[K] || holds[LAST])
#define TOUCH(c)    assert(pages[c] && (c) < size)
#define OWNED(c, i) (ctype[c] == FENCE && owner[c] == i)
#define KEPT(c)     (ctype[c] == REC && rstate[c] == LIVE)

inline gone(p) { /* the kernel unlocks, closes and unmaps everything of a process */
  d_step {
    lifecycle = (lifecycle == p -> 0 : lifecycle); life[p] = 0; presence[p] = 0; maps[p] = 0; holds[p] = 0; waits[p] = 0; ended[p] = 1;
    reaping[A] = (reaping[A] == p -> 0 : reaping[A]); reaping[F] = (reaping[F] == p -> 0 : reaping[F]);
    reaping[J] = (reaping[J] == p -> 0 : reaping[J]); reaping[K] = (reaping[K] == p -> 0 : reaping[K]);
    if
    :: tick_of == p -> dead[TICK] = 1; tick_of = 0;
       reaping[A] = (reaping[A] == TICK -> 0 : reaping[A]); reaping[F] = (reaping[F] == TICK -> 0 : reaping[F]);
       reaping[J] = (reaping[J] == TICK -> 0 : reaping[J]); reaping[K] = (reaping[K] == TICK -> 0 : reaping[K])
    :: else
    fi }
}

inline wipe(c) { gen[c] = 0; past[c] = 0; pending[c] = 0; failed[c] = 0; rstate[c] = FREE; torn[c] = 0; listed[c] = 0; other[c] = 0 }

/* ---- The end of a life: reap_fences(), chunk_return(), reap_table_lock(), CLEAN ---- */
inline end_fence(c, bad) { /* fence_finish() */
  atomic {
    failed[c] = bad; pending[c] = 0;
    if
    :: c == 0 && gen[c] == 1 -> assert(!end_a); end_a = 1 + bad
    :: c == chunk_j && gen[c] == gen_j -> end_j = 1 + bad
    :: else
    fi }
}

inline end_life(i) {
  do
  :: true ->
     d_step { do :: c < NC && !OWNED(c, i) -> c++ :: else -> break od; skip };
     if
     :: c < NC ->
        TOUCH(c);
        if
        :: pending[c] ->
           if
           :: c == 0 && gen[c] == 1 -> /* the fence of the write() block: the mark first */
              atomic { assert(ctype[1] == REC); TOUCH(1); if :: rstate[1] == LIVE -> torn[1] = 1 :: else fi }
           :: else
           fi;
           end_fence(c, 1)
        :: else
        fi;
        owner[c] = 0
     :: else -> break
     fi
  od;
  atomic { c = 0; if :: table == i -> table = NOBODY :: else fi };
  alive[i] = 0
}

inline reap_dead() { /* the lock on the byte proves the death, and keeps other reapers out */
  do
  :: atomic {
       if
       :: ORPHAN(A) -> i = A
       :: else -> if
          :: ORPHAN(F) -> i = F
          :: else -> if
             :: ORPHAN(J) -> i = J
             :: else -> if :: ORPHAN(K) -> i = K :: else -> break fi
             fi
          fi
       fi;
       reaping[i] = me };
     end_life(i);
     atomic { reaping[i] = 0; i = 0 }
  od
}

/* ---- The table ---- */
inline rebuild() { /* table_rebuild(): the hash is made from the states of the records */
  hash = 0;
  d_step { c = 0;
    do
    :: c < NC ->
       if
       :: ctype[c] == REC && c < nchunks ->
          TOUCH(c);
          if :: rstate[c] == DYING -> rstate[c] = FREE; torn[c] = 0; listed[c] = 0; other[c] = 0; gen[c]++ :: else fi;
          if :: rstate[c] == LIVE && !other[c] -> hash = c + 1 :: else fi
       :: else
       fi; c++
    :: else -> break
    od; c = 0 }
}

inline table_lock() {
  waits[me] = 1;
  do
  :: atomic { table == 0 -> table = me }; break
  :: atomic { table == NOBODY -> table = me }; rebuild(); break
  od;
  waits[me] = 0
}

inline table_unlock() { table = 0 }

inline grow(t, who) { /* chunk_grow() of chunk x, the first that was given back, else one more */
  d_step { x = 0; do :: x < nchunks && ctype[x] != NONE -> x++ :: else -> break od; assert(x < NC) };
  atomic { if :: BUG != 6 || x >= size -> pages[x] = 1; size = (x + 1 > size -> x + 1 : size) :: else fi }; /* fallocate() */
  TOUCH(x);
  d_step { wipe(x); gen[x] = (BUG == 16 -> 0 : floor_[t]) + (t == REC) }; /* a record has its first generation already */
  atomic { ctype[x] = t; owner[x] = who };
  atomic { if :: x == nchunks -> nchunks++ :: else fi }
}

/* ---- Two fences of our own in one slot, which end well ---- */
inline make() { /* fence_make(): above what the slot had, and above the floor */
  TOUCH(x);
  atomic {
    if :: failed[x] -> past[x] = gen[x] :: else fi;
    gen[x] = 1 + (floor_[FENCE] > gen[x] && BUG != 10 -> floor_[FENCE] : gen[x]);
    assert(gen[x] > highest[x]);
    highest[x] = gen[x]; failed[x] = 0; pending[x] = 1 }
}

inline own_fences() {
  /* chunk_claim(): a chunk without an owner, else a new one */
  d_step { x = 0; do :: x < nchunks && !OWNED(x, 0) -> x++ :: else -> break od; skip };
  atomic { if :: x < nchunks && OWNED(x, 0) -> owner[x] = me :: else -> x = 99 fi };
  if
  :: x == 99 -> table_lock(); grow(FENCE, me); table_unlock()
  :: else
  fi;
  make();
  atomic { g = gen[x]; if :: me == J -> chunk_j = x; gen_j = g; reset_j = 0; end_j = 0 :: else fi };
  end_fence(x, 0);
  make();
  atomic { pending[x] = 0; assert(g > floor_[FENCE]); g = 0; x = 0 } /* so the first one is not one that nobody knows */
}

/* ---- A look at a fence whose handle somebody told us: fence_pending(), fence_past_error() ---- */
/* r: 0 pending, 1 ended well, 2 failed, 3 nobody knows any more (also a failure), 4 impossible */
inline look(h, g) {
  atomic { r = 5; if :: ctype[h] != FENCE -> r = (g <= floor_[FENCE] -> 3 : 4); check(h, g) :: else fi };
  if
  :: r == 5 ->
     TOUCH(h);
     atomic {
       if
       :: ctype[h] != FENCE || gen[h] < g -> r = (g <= floor_[FENCE] -> 3 : 4)
       :: ctype[h] == FENCE && gen[h] == g -> r = (pending[h] -> 0 : 1 + failed[h])
       :: ctype[h] == FENCE && gen[h] > g -> r = (past[h] == g -> 2 : (g <= floor_[FENCE] -> 3 : 1))
       fi;
       check(h, g) }
  :: else
  fi
}

inline check(h, g) {
  if :: BUG == 11 && r == 3 -> r = 1 :: else fi; /* what nobody knows counts as ended well */
  assert(r != 4);
  if
  :: h == 0 && g == 1 -> assert(r == end_a || (r == 3 && end_a && reset_a))
  :: else -> assert(r == end_j || (r == 3 && end_j && reset_j))
  fi
}

inline wait(h, g) { /* fence_wait_for() */
  do
  :: true ->
     look(h, g);
     if
     :: r -> r = 0; break
     :: else -> waits[me] = 1; !(ctype[h] == FENCE && gen[h] == g && pending[h]); waits[me] = 0
     fi
  od
}

/* ---- The record of a buffer that we have received ---- */
inline find_record() { /* x: 1 + the chunk of its record, which is made if there is none. h: 99 if it lists no fence */
  holds[me] = 1;
  x = hash;
  if
  :: x && ctype[x - 1] == REC -> TOUCH(x - 1); if :: rstate[x - 1] != LIVE -> x = 0 :: else fi
  :: else -> x = 0
  fi;
  if
  :: x == 0 -> /* rec_create() looks again under the lock */
     table_lock();
     x = hash;
     if
     :: x == 0 ->
        d_step { x = 0; do :: x < nchunks && !(ctype[x] == REC && rstate[x] == FREE) -> x++ :: else -> break od; skip };
        if :: x == nchunks -> grow(REC, 0) :: else fi;
        TOUCH(x);
        rstate[x] = LIVE;
        hash = x + 1; x++
     :: else
     fi;
     table_unlock()
  :: else
  fi;
  if :: !listed[x - 1] -> h = 99 :: else fi
}

inline own_record() { /* rec_create() of a buffer that goes with this process */
  table_lock();
  d_step { x = 0; do :: x < nchunks && !(ctype[x] == REC && rstate[x] == FREE) -> x++ :: else -> break od; skip };
  if :: x == nchunks -> grow(REC, 0) :: else fi;
  TOUCH(x);
  other[x] = 1;
  atomic { rstate[x] = LIVE; assert(gen[x] > used[x]); used[x] = gen[x]; x = 0 };
  table_unlock()
}

/* ---- Joining: by the file that the process has, not by a path ---- */
inline join() {
  atomic { lifecycle == 0 -> lifecycle = me };
  assert(nchunks <= size);                                      /* read_header() */
#if BUG == 14 /* the code as it was: a file in which nobody lives is replaced by an empty one */
  d_step { if :: !LOCKED -> c = 0; do :: c < NC -> wipe(c); ctype[c] = NONE; owner[c] = 0; c++ :: else -> break od; c = 0;
                 nchunks = 0; hash = 0; table = 0; alive[A] = 0; alive[J] = 0; alive[K] = 0; alive[F] = 0 :: else fi };
#endif
  atomic { presence[me] = 1; maps[me] = FILE };                 /* the presence lock first */
  reap_dead();
  atomic { life[me] = 1; alive[me] = 1 };                       /* life.pml has the steps */
  lifecycle = 0
}

/* ---- Leaving. final: the process ends, and looks at nothing of the domain any more ---- */
inline leave() {
  if
  :: atomic { lifecycle == 0 -> lifecycle = me }
  :: NO_FD && me == J && final -> skip
  fi;
  if :: alive[me] -> end_life(me); life[me] = 0 :: else fi;
  if :: lifecycle != me -> goto left :: else fi;                /* it stays present until the kernel ends that */
#if BUG != 8
  if :: !LOCKED -> reap_dead() :: else fi;
#endif
  if
#if BUG == 8 || BUG == 15 /* looks at the locks alone: a thread of ours may be reaping */
  :: LOCKED ->
#else
  :: LOCKED || USED ->
#endif
     if
     :: final && BUG != 12 -> maps[me] = COPY; presence[me] = 0
     :: !final -> if :: BUG == 3 -> presence[me] = 0 :: else fi /* it looks on, and stays present */
     :: else
     fi
  :: else ->
#if BUG == 2 /* presence ends before the copy is made: a child forked between them maps the file, and nobody knows */
     presence[me] = 0;
     maps[me] = COPY;
#else
     maps[me] = COPY;
     presence[me] = 0;
#endif
     if
     :: PRESENT && BUG != 1 -> /* a child that has not joined, or a process that looks on */
        if
        :: final
        :: else -> presence[me] = 1; maps[me] = FILE
        fi
     :: else -> reset()
     fi
  fi;
  lifecycle = 0;
left:
  skip
}

inline reset() {
#if BUG != 7
  table = NOBODY;                                               /* if this process dies, the next owner rebuilds the table */
#endif
  if :: flight = 0 :: skip fi;                                  /* the message is dropped at any moment, and only this step sees it */
  d_step { judged = HELD; c = 0;
    do
    :: c < NC -> if :: KEPT(c) && c < nchunks && (!judged || other[c] || BUG == 9) -> rstate[c] = DYING :: else fi; c++
    :: else -> break
    od; c = 0 };
  rebuild();
  raise_floors();
  d_step { c = 0; do :: c < NC -> if :: KEPT(c) -> listed[c] = 0 :: else fi; c++ :: else -> break od; c = 0 };
#if BUG == 5 /* the pages go before the chunk says so */
  d_step { c = 0; do :: c < nchunks -> if :: !KEPT(c) -> pages[c] = 0; wipe(c) :: else fi; c++ :: else -> break od; c = 0 };
#endif
#if BUG == 13 /* the file is cut before fewer chunks are counted */
  d_step { c = NC; do :: c > 0 && !KEPT(c - 1) -> c--; pages[c] = 0; wipe(c) :: else -> break od; size = c; c = 0 };
#endif
  c = NC;
  do                                                            /* each chunk that is given back says so */
  :: true ->
     d_step { do :: c > 0 && (ctype[c - 1] == NONE || KEPT(c - 1)) -> c-- :: else -> break od; skip };
     if
     :: c > 0 -> atomic { c--; ctype[c] = NONE; owner[c] = 0 }
     :: else -> break
     fi
  od;
#if BUG == 4 /* the floors are raised when the chunks have gone */
  atomic { floor_[FENCE] = late[FENCE]; floor_[REC] = late[REC] };
#endif
  skip;
  d_step { c = NC; do :: c > 0 && ctype[c - 1] == NONE -> c-- :: else -> break od; skip };
  atomic { nchunks = c; c = 0 };
  rebuild();
  table = 0;
  d_step { c = nchunks; do :: c < NC -> pages[c] = 0; wipe(c); c++ :: else -> break od; c = 0; size = nchunks }; /* ftruncate() */
  do                                                            /* punch holes */
  :: true ->
     d_step { do :: c < nchunks && !(ctype[c] == NONE && pages[c]) -> c++ :: else -> break od; skip };
     if
     :: c < nchunks -> d_step { pages[c] = 0; wipe(c) }
     :: else -> break
     fi
  od;
  c = 0
}

#if BUG == 4
byte late[3];
#define FLOOR late
#else
#define FLOOR floor_
#endif
inline raise_floors() { /* over all slots of all chunks */
  d_step { c = 0; reset_a = 1; reset_j = 1;
    do
    :: c < nchunks -> if :: ctype[c] != NONE -> FLOOR[ctype[c]] = (gen[c] > FLOOR[ctype[c]] -> gen[c] : FLOOR[ctype[c]]) :: else fi; c++
    :: else -> break
    od; c = 0 }
}

/* ---- The processes ---- */
proctype Process(byte me) {
  byte c, i, x, r, h, g;
  bit reads, final;
  { if
    :: me == A -> half = 0; end_fence(0, 0); goto leaving
    :: me == F ->
       if
       :: atomic { !ended[A] && maps[A] -> maps[F] = maps[A]; presence[F] = presence[A] }
       :: ended[A] -> goto over
       fi;
       if
       :: maps[F] == FILE -> g = 1; goto looking
       :: else
       fi
    :: me == LAST ->
       ended[A] && ended[J] && (ended[F] || !FORK) && (ended[K] || !TWO);
       assert(!PRESENT && lifecycle == 0);
       if /* in order, the last one leaves nothing behind */
       :: KILLS == 0 && !FORK && !NO_FD -> assert((nchunks == 0 && size == 0) || judged)
       :: else
       fi
    :: else
    fi;
joining:
    join();
    if
    :: flight -> reads = 1; g = 1; find_record(); if :: h == 99 -> goto looked :: else fi
    :: g = 1
    :: chunk_j != 99 -> h = chunk_j; g = gen_j
    fi;
looking:
    wait(h, g);
looked:
    if
    :: reads -> atomic { TOUCH(x - 1); assert(torn[x - 1] || !half); x = 0; reads = 0; holds[me] = 0 }
    :: else
    fi;
    atomic { h = 0; g = 0 };
    if
    :: me == F && !alive[F] ->
       if
       :: goto over                                             /* os._exit() */
       :: FORK == 2 -> goto joining
       :: FORK == 2 -> goto leaving
       fi
    :: me != F && alive[me] -> own_fences(); if :: OWN && me != K -> own_record() :: else fi
    :: else
    fi;
leaving:
    if
    :: final = 1
    :: me == J && alive[J] -> final = 0
    fi;
    leave();
    if
    :: !final && maps[me] == FILE -> g = 1; goto looking        /* it looks on */
    :: else
    fi;
over:
    skip
  } unless { me != LAST && dead[me] };
  atomic { c = 0; i = 0; x = 0; r = 0; h = 0; g = 0; reads = 0; final = 0; gone(me) }
}

/* A tick of a process that waits: one of its threads reaps. */
#define TICKS(p) atomic { waits[p] && ORPHANS -> tick_of = p }
proctype Ticker() {
  byte me = TICK, c, i;
end:
  if
  :: TICKS(F)
  :: TICKS(J)
  :: TICKS(K)
  :: TICKS(LAST)
  fi;
  { reap_dead(); tick_of = 0 } unless { dead[TICK] };
  d_step { dead[TICK] = 0; c = 0; i = 0 };
  goto end
}

#define KILL(i) atomic { deaths < KILLS && !dead[i] && !ended[i] && maps[i] -> dead[i] = 1; deaths++ }
proctype Killer() {
end:
  do
  :: KILL(A)
  :: KILL(J)
#if FORK
  :: KILL(F)
#endif
#if TWO
  :: KILL(K)
#endif
  od
}

proctype Check() {
  byte c;
  ended[LAST];
  do
  :: c < NC ->
     assert(ctype[c] == NONE || (KEPT(c) && judged && hash == c + 1));
     assert(ctype[c] != NONE || !pages[c]);
     c++
  :: else -> break
  od;
  assert(table == 0 && nchunks <= size)
}

init {
  atomic {
    ctype[0] = FENCE; owner[0] = A; pages[0] = 1; gen[0] = 1; pending[0] = 1; highest[0] = 1;
    ctype[1] = REC; pages[1] = 1; gen[1] = 1; used[1] = 1; rstate[1] = LIVE; listed[1] = 1; hash = 2;
    life[A] = 1; alive[A] = 1; presence[A] = 1; maps[A] = FILE; holds[A] = 1;
    run Process(A); run Process(J); run Ticker();
    if :: TWO -> run Process(K) :: else fi;
    if :: FORK -> run Process(F) :: else fi;
    if :: KILLS -> run Killer() :: else fi;
    run Process(LAST); run Check() }
}
