/* How a process joins a domain, how others notice its death, and how one of them reaps it: life.c and reap.c of the domain.
 *
 * A process slot has a state, a generation, and a byte of the file on which the process holds a lock. The kernel frees that lock with the
 * process. A dead process leaves a chunk that names its life, a pending fence in it, and perhaps the table lock. The generation wraps after
 * GENS lives, so whatever relied on a life id never coming back would be found.
 *
 * What is checked. Nobody ends what a living process owns. Nothing a dead process owned is left in the end. The table has one owner at a
 * time, and nobody sees it half changed. Every wait ends: a process that has not come to its end is an invalid end state.
 *
 * Nothing here needs the lifecycle lock: joining and reaping exclude each other by the byte. Every process, a reaper too, can be killed at
 * each of its statements. A process that waits reaps at its ticks.
 */
#ifndef N
#define N 3        /* processes */
#endif
#ifndef S
#define S 2        /* process slots */
#endif
#ifndef ROUNDS
#define ROUNDS 1   /* lives of each process */
#endif
#ifndef KILLS
#define KILLS 1
#endif
#ifndef GENS
#define GENS 2     /* generations before they wrap */
#endif
#ifndef BUG
#define BUG 0      /* a negative control: the step with this number is left out or swapped */
#endif

#define CLEAN 0
#define ALIVE 1
#define NOBODY 99          /* a life id that no slot ever has: its generation is 0 */
#define ID(s)     (1 + (s) + S * gen[s])
#define SLOT(id)  (((id) - 1) % S)
#define CURRENT(id) ((id) != NOBODY && state[SLOT(id)] == ALIVE && ID(SLOT(id)) == (id)) /* life_current() */
#define LOCKED(s)   (byte_of[s] != 0)                                                   /* Shm.locked() */
#define ORPHANED(s) (state[s] == ALIVE && !LOCKED(s))

bit state[S]; byte gen[S]; byte byte_of[S];  /* byte_of: the process that holds the slot's lock */
byte owner;                                  /* of the chunk: a life id, 0: none */
byte pending;                                /* the process whose fence is pending in the chunk, 0: none */
byte table;                                  /* the table lock: a life id, 0: free, NOBODY: to be repaired by the next owner */
bit repaired = 1;                            /* is what the table derives whole? */
byte inside;                                 /* the process that changes the table */
byte who[S];                                 /* the process that stored ALIVE */
bit dead[N + 2]; byte deaths;

/* life_end(), life_clean(): everything of a life ends. `me` is the process that does it, `s` the slot, `id` the life. */
inline end_life(s, id) {
#if BUG == 1 /* CLEAN first */
  atomic { assert(who[s] == me || dead[who[s]]); state[s] = CLEAN };
#endif
  if
  :: owner == id ->
     atomic { if :: owner == id && pending -> assert(pending == who[s] && (who[s] == me || dead[who[s]])); pending = 0 :: else fi };
     atomic { if :: owner == id -> owner = 0 :: else fi }
  :: else
  fi;
#if BUG == 2 /* a reaper without a life leaves the table lock as it is */
  if :: mine -> atomic { if :: table == id -> table = NOBODY :: else fi } :: else fi;
#else
  atomic { if :: table == id -> table = NOBODY :: else fi };
#endif
#if BUG != 1
  atomic { assert(who[s] == me || dead[who[s]]); state[s] = CLEAN };
#endif
}

/* life_reap() */
inline reap(s) {
#if BUG == 3 /* the generation is read before the byte is locked */
  r_id = ID(s);
#endif
#if BUG == 4 /* asks whether the byte is locked, instead of locking it */
  if :: LOCKED(s) -> goto reaped :: else fi;
#else
  atomic { if :: byte_of[s] == 0 -> byte_of[s] = me :: else -> goto reaped fi };
#endif
#if BUG != 5 /* looks at the state again under the lock */
  if :: state[s] != ALIVE -> goto unlock :: else fi;
#endif
#if BUG != 3
  r_id = ID(s);
#endif
  end_life(s, r_id);
unlock:
  atomic { if :: byte_of[s] == me -> byte_of[s] = 0 :: else fi };
reaped:
  r_id = 0
}

/* table_lock(): waits while its owner is current */
inline table_lock() {
  do
  :: true ->
     v = table;
     if
     :: v == 0 -> atomic { if :: table == 0 -> table = mine; v = 0; break :: else fi }
     :: v != 0 && (v == mine || !CURRENT(v)) -> atomic { if :: table == v -> table = mine; break :: else fi }
     :: else ->
        if
        :: atomic { table != v || !CURRENT(v) -> v = 0 }
        :: atomic { ORPHANED(0) -> v = 0 }; reap(0)
#if S > 1
        :: atomic { ORPHANED(1) -> v = 0 }; reap(1)
#endif
        fi
     fi
  od;
  if
  :: atomic { v != 0 -> v = 0; assert(inside == 0 || dead[inside]); inside = me }; repaired = 1
  :: atomic { else -> assert(repaired && (inside == 0 || dead[inside])); inside = me }
  fi
}

inline table_change() {
  repaired = 0;
  repaired = 1;
  atomic { inside = 0; assert(table == mine); table = 0 }
}

proctype Process(byte me) {
  byte s, r_id, v, mine, round;
  { do
    :: round == ROUNDS -> break
    :: else ->
       /* Domain._join_here(): a newcomer reaps first */
       if :: ORPHANED(0) -> reap(0) :: else fi;
#if S > 1
       if :: ORPHANED(1) -> reap(1) :: else fi;
#endif
       /* life_begin() */
       s = 0;
       do
       :: s == S -> goto left
       :: else ->
          if
          :: state[s] != CLEAN -> s++
          :: else ->
#if BUG == 6 /* ALIVE before the byte is locked */
             atomic { gen[s] = (gen[s] + 1) % GENS; state[s] = ALIVE; who[s] = me };
#endif
             atomic { if :: byte_of[s] == 0 -> byte_of[s] = me :: else -> s++; goto next fi };
#if BUG != 7 && BUG != 6 /* looks at the state again under the lock */
             if
             :: state[s] != CLEAN -> atomic { byte_of[s] = 0; s++ }; goto next
             :: else
             fi;
#endif
             break
          fi;
next:     skip
       od;
#if BUG != 8 /* a new life has a new generation */
       gen[s] = (gen[s] + 1) % GENS;
#endif
       atomic { state[s] = ALIVE; who[s] = me; mine = ID(s) };
       /* Shm.chunk_claim(): one compare-and-swap that names the owner; fence_make() */
       atomic { if :: owner == 0 -> owner = mine :: else -> goto other fi };
       assert(pending == 0);
       pending = me;
       goto claimed;
other: /* fence_wait_for(): the fence of another life */
       v = pending;
       do
       :: atomic { v == 0 || pending != v -> v = 0 }; break
       :: atomic { ORPHANED(0) -> skip }; reap(0)
#if S > 1
       :: atomic { ORPHANED(1) -> skip }; reap(1)
#endif
       od;
claimed:
       table_lock();
       table_change();
       /* life_leave(): the life ends as if the process had died, and the byte is freed last */
       end_life(s, mine);
       atomic { if :: byte_of[s] == me -> byte_of[s] = 0 :: else fi };
left:  atomic { s = 0; mine = 0; round++ }
    od
  } unless { dead[me] }
}

#define KILL(i) atomic { deaths < KILLS && !dead[i] -> dead[i] = 1; deaths++; \
                         byte_of[0] = (byte_of[0] == i -> 0 : byte_of[0]); byte_of[S - 1] = (byte_of[S - 1] == i -> 0 : byte_of[S - 1]) }
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

/* Comes when no other process moves. Whatever is left is whole, or one more reaper makes it so. */
proctype Last() {
  byte me = N + 1, r_id, mine = 0;
  timeout ->
  if :: ORPHANED(0) -> reap(0) :: else fi;
#if S > 1
  if :: ORPHANED(1) -> reap(1) :: else fi;
#endif
  assert(state[0] == CLEAN && state[S - 1] == CLEAN && byte_of[0] == 0 && byte_of[S - 1] == 0);
  assert(owner == 0 && pending == 0);
  assert(table == 0 || table == NOBODY)
}

init { atomic { run Process(1); run Process(2);
#if N > 2
  run Process(3);
#endif
  if :: KILLS -> run Killer() :: else fi;
  run Last() } }
