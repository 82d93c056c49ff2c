"""Check the models of the domain's protocol with Spin: each must hold, and each must fail with a step left out.

    python -m tests.model.run [--long] [--jobs N] [MODEL ...]

A run is one search of all states of one model. A *control* is a run with one step left out or swapped (``-DBUG=n``), in which the error
must be found. The README beside this file says what each model stands for.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

HERE = Path(__file__).parent
TOOLS = ("spin", "gcc")
JOBS = 2
MEMORY_MB = 1024  # of one search, at most; two run at a time
DEPTH = 20_000  # steps of one path; the deepest has about 1,500
RUN_S = 600  # of one search, on a machine that is busy with something else
LONG_MEMORY_MB, LONG_RUN_S = 6_000, 7_200

ASSERTION, BLOCKED, CYCLE = "assertion violated", "invalid end state", "non-progress cycle"


@dataclass(frozen=True)
class Run:
    """One search. ``finds``: the error of a control, else empty. ``cycles``: search for runs without an end, too."""

    model: str
    name: str
    defines: str = ""
    finds: str = ""
    cycles: bool = False
    long: bool = False


@dataclass(frozen=True)
class Outcome:
    """What a search found: an error of Spin's, or nothing. ``trouble``: why it proves nothing."""

    run: Run
    found: str
    states: int
    seconds: float
    trouble: str = ""

    @property
    def as_expected(self) -> bool:
        if self.trouble:
            return False
        return self.found.startswith(self.run.finds) if self.run.finds else not self.found

    def __str__(self) -> str:
        verdict = "ok  " if self.as_expected else "FAIL"
        what = self.trouble or self.found or "nothing found"
        kind = "control: " if self.run.finds else ""
        name = f"{self.run.model}: {kind}{self.run.name}"
        return f"{verdict} {name:<86} {self.states:>10,} states {self.seconds:6.1f} s  {what[:60]}"


def _models() -> Iterator[Run]:
    lock = "lock"
    yield Run(lock, "three processes, one dies", "N=3 KILLS=1")
    yield Run(lock, "three processes, one gives up", "N=3 TIMEOUTS=1")
    yield Run(lock, "three processes, one stops", "N=3 STOPS=1")
    yield Run(lock, "two locks in both orders, two die", "N=2 L=2 KILLS=2", cycles=True)
    yield Run(lock, "three processes, no run without an end", "N=3", cycles=True)
    yield Run(lock, "three processes, one dies, no run without an end", "N=3 KILLS=1", cycles=True, long=True)
    yield Run(lock, "three processes, one dies, one gives up", "N=3 KILLS=1 TIMEOUTS=1", long=True)
    yield Run(lock, "three processes, one stops, one dies", "N=3 STOPS=1 KILLS=1", long=True)
    yield Run(lock, "three processes, one stops, one gives up", "N=3 STOPS=1 TIMEOUTS=1", long=True)
    yield Run(lock, "three processes, two rounds", "N=3 ROUNDS=2", long=True)
    yield Run(lock, "three processes, two locks", "N=3 L=2", long=True)
    yield Run(lock, "two processes, three rounds, one dies", "N=2 ROUNDS=3 KILLS=1", long=True)

    life = "life"
    yield Run(life, "one slot, three processes, two die", "N=3 S=1 KILLS=2")
    yield Run(life, "one slot, two rounds, two die, no run without an end", "N=2 S=1 ROUNDS=2 KILLS=2", cycles=True)
    yield Run(life, "two slots, three processes, one dies", "N=3 S=2 KILLS=1")
    yield Run(life, "two slots, three processes, two die", "N=3 S=2 KILLS=2", long=True)

    fence = "fence"
    yield Run(fence, "nobody dies, no wake-up is lost", "KILLS=0")
    yield Run(fence, "waiter; owner and reaper die", "DISPATCHER=0 SYNC=0", cycles=True)
    yield Run(fence, "waiter of a buffer that was torn before", "DISPATCHER=0 SYNC=0 TORN=1")
    yield Run(fence, "dispatcher; owner and reaper die", "WAITER=0 SYNC=0", cycles=True)
    yield Run(fence, "sync file; owner and reaper die", "WAITER=0 DISPATCHER=0", cycles=True)
    yield Run(fence, "waiter and dispatcher", "SYNC=0", long=True)
    yield Run(fence, "waiter and sync file", "DISPATCHER=0", long=True)
    yield Run(fence, "all of them", "", long=True)

    anybody = "anybody"
    yield Run(anybody, "three end it at once, two die", "KILLS=2")
    yield Run(anybody, "three end it at once, one dies, no run without an end", "KILLS=1", cycles=True)
    yield Run(anybody, "three end it at once, three die", "KILLS=3", long=True)

    facts = "facts"
    yield Run(facts, "one joins, two die", "KILLS=2 FORK=0 TWO=0")
    yield Run(facts, "one joins, one dies, no run without an end", "KILLS=1 FORK=0 TWO=0", cycles=True)
    yield Run(facts, "one leaves without a descriptor, one dies", "KILLS=1 FORK=0 TWO=0 NO_FD=1")
    yield Run(facts, "other buffers come and go, one dies", "KILLS=1 FORK=0 TWO=0 OWN=1")
    yield Run(facts, "a raw fork that looks, joins or leaves", "KILLS=0 FORK=2 TWO=0")
    yield Run(facts, "two join", "KILLS=0 FORK=0 TWO=1")
    yield Run(facts, "a raw fork that looks, one dies", "KILLS=1 FORK=1 TWO=0", long=True)
    yield Run(facts, "a raw fork that looks, joins or leaves, one dies", "KILLS=1 FORK=2 TWO=0", long=True)
    yield Run(facts, "two join, one dies", "KILLS=1 FORK=0 TWO=1", long=True)
    yield Run(facts, "other buffers come and go, two die", "KILLS=2 FORK=0 TWO=0 OWN=1", long=True)

    yield from _stream_models()

    proc_locks = "proc_locks"
    yield Run(proc_locks, "six locks, three changes", "")
    yield Run(proc_locks, "six locks, four changes", "CHANGES=4", long=True)


def _stream_models() -> Iterator[Run]:
    stream = "stream"
    yield Run(stream, "queue reader, three frames", "QUEUE=1 FRAMES=3", cycles=True)
    yield Run(stream, "queue reader, three slots, four frames", "QUEUE=1 FRAMES=4 N=3")
    yield Run(stream, "latest reader, three frames", "LATEST=1 FRAMES=3", cycles=True)
    yield Run(stream, "queue and latest reader", "QUEUE=1 LATEST=1")
    yield Run(stream, "queue and latest reader, no run without an end", "QUEUE=1 LATEST=1 FRAMES=1", cycles=True)
    yield Run(stream, "queue reader; one dies, no run without an end", "QUEUE=1 KILLS=1", cycles=True)
    yield Run(stream, "latest reader; one dies, no run without an end", "LATEST=1 KILLS=1", cycles=True)
    yield Run(stream, "queue reader; one dies, and the reaper", "QUEUE=1 KILLS=1 REAPER_KILLS=1")
    yield Run(stream, "latest reader; one dies, and the reaper", "LATEST=1 KILLS=1 REAPER_KILLS=1")
    yield Run(stream, "queue reader, two producers; one dies", "QUEUE=1 FRAMES=1 FRAMES2=1 KILLS=1")
    yield Run(stream, "latest reader, two producers; one dies", "LATEST=1 FRAMES=1 FRAMES2=1 KILLS=1")
    yield Run(stream, "two producers; both die, and the reaper", "FRAMES=1 FRAMES2=1 KILLS=2 REAPER_KILLS=1")
    yield Run(stream, "queue reader and a foreign program", "QUEUE=1 FOREIGN=1")
    yield Run(stream, "latest reader and a foreign program", "LATEST=1 FOREIGN=1")
    yield Run(stream, "latest reader and a foreign program, no run without an end", "LATEST=1 FOREIGN=1 FRAMES=1", cycles=True)
    yield Run(stream, "a foreign program, the producer raises; one dies", "FOREIGN=1 ABORT=1 KILLS=1")
    yield Run(stream, "two foreign programs", "FOREIGN=2")
    yield Run(stream, "two foreign programs, no run without an end", "FOREIGN=2 FRAMES=1", cycles=True, long=True)
    yield Run(stream, "two foreign programs without a producer; both die", "FOREIGN=2 FRAMES=0 KILLS=2")
    yield Run(stream, "a foreign program; two die, and the reaper", "FOREIGN=1 KILLS=2 REAPER_KILLS=1", long=True)
    yield Run(stream, "queue reader and a foreign program; one dies", "QUEUE=1 FOREIGN=1 FRAMES=1 KILLS=1", long=True)
    yield Run(stream, "latest reader and a foreign program; one dies", "LATEST=1 FOREIGN=1 FRAMES=1 KILLS=1", long=True)
    yield Run(stream, "queue and latest reader; one dies", "QUEUE=1 LATEST=1 KILLS=1", long=True)
    yield Run(stream, "queue and latest reader, two producers", "QUEUE=1 LATEST=1 FRAMES=1 FRAMES2=1", long=True)
    yield Run(stream, "queue and latest reader and a foreign program", "QUEUE=1 LATEST=1 FOREIGN=1 FRAMES=1", long=True)
    yield Run(stream, "queue reader and two foreign programs", "QUEUE=1 FOREIGN=2 FRAMES=1", long=True)
    yield Run(stream, "queue reader, two producers; two die", "QUEUE=1 FRAMES=1 FRAMES2=1 KILLS=2", long=True)

    history = "QUEUE=1 HISTORY=2"
    yield Run(stream, "joining at an older frame", f"{history} N=3 FRAMES=4", cycles=True)
    yield Run(stream, "joining at an older frame; one dies", f"{history} KILLS=1")
    yield Run(stream, "joining at an older frame, a foreign program", f"{history} FOREIGN=1")
    yield Run(stream, "joining at an older frame, a latest reader", f"{history} FRAMES=3 LATEST=1")
    yield Run(stream, "joining at any frame, a latest reader", "QUEUE=1 HISTORY=4 N=3 FRAMES=4 LATEST=1", long=True)
    yield Run(stream, "joining at an older frame, two producers; one dies", f"{history} FRAMES=3 FRAMES2=1 KILLS=1", long=True)
    keep = "QUEUE=1 KEEP=1 N=3"
    yield Run(stream, "keeping a frame", f"{keep} FRAMES=4", cycles=True)
    yield Run(stream, "keeping a frame; one dies", f"{keep} KILLS=1")
    yield Run(stream, "keeping a frame, a foreign writer", f"{keep} FOREIGN=1 FOREIGN_READ=0")
    yield Run(stream, "keeping a frame, a latest reader", f"{keep} FRAMES=3 LATEST=1", long=True)
    yield Run(stream, "frames with fences, queue reader", "QUEUE=1 FENCES=1", cycles=True)
    yield Run(stream, "frames with fences, latest reader", "LATEST=1 FENCES=1", cycles=True)
    yield Run(stream, "frames with fences, queue reader; one dies", "QUEUE=1 FENCES=1 FRAMES=1 KILLS=1")
    yield Run(stream, "frames with fences, latest reader; one dies", "LATEST=1 FENCES=1 FRAMES=1 KILLS=1")
    yield Run(stream, "frames with fences, a foreign program", "FOREIGN=1 FENCES=1", cycles=True)
    yield Run(stream, "frames with fences, a foreign program; one dies", "FOREIGN=1 FENCES=1 FRAMES=1 KILLS=1")
    yield Run(stream, "frames with fences, queue reader; one dies, two frames", "QUEUE=1 FENCES=1 KILLS=1", long=True)
    yield Run(stream, "frames with fences, latest reader; one dies, two frames", "LATEST=1 FENCES=1 KILLS=1", long=True)
    yield Run(stream, "frames with fences, queue reader and a foreign program", "QUEUE=1 FENCES=1 FOREIGN=1", long=True)

    group = "stream_group"
    yield Run(group, "two members, three frames", "FRAMES=3")
    yield Run(group, "two members, no run without an end", "FRAMES=2", cycles=True)
    yield Run(group, "two members and a foreign writer", "FRAMES=1 FOREIGN=1", long=True)
    yield Run(group, "two members and a foreign writer, two frames", "FRAMES=2 FOREIGN=1", long=True)
    yield Run(group, "two members join", "JOIN=1 FRAMES=3")
    yield Run(group, "an in-order reader of a stream that drops, no run without an end", "DROP=1 FRAMES=3", cycles=True)
    yield Run(group, "an in-order reader, three slots, five frames", "DROP=1 N=3 FRAMES=5")
    yield Run(group, "an in-order reader and a foreign writer", "DROP=1 FRAMES=2 FOREIGN=1")
    yield Run(group, "an in-order reader; one dies", "DROP=1 FRAMES=2 KILLS=1")
    yield Run(group, "a group in a stream that drops", "DROP=2 FRAMES=2")
    again = "REDELIVER=1 KILLS=1 MORTAL=2"
    yield Run(group, "redelivery", "REDELIVER=1 FRAMES=2")
    yield Run(group, "redelivery, no run without an end", "REDELIVER=1 FRAMES=1", cycles=True)
    yield Run(group, "redelivery; a member dies with a frame", f"{again} FRAMES=1 KILL_USING=1")
    yield Run(group, "redelivery; a member that joins dies with a frame", f"JOIN=1 {again} FRAMES=1 KILL_USING=1")
    yield Run(group, "redelivery; a member dies with a frame, the other one leaves", f"{again} LEAVE=1 FRAMES=1 KILL_USING=1")
    yield Run(group, "redelivery; both members die", "REDELIVER=1 FRAMES=1 KILLS=2 MORTAL=6", long=True)
    yield Run(group, "redelivery; a member dies with a frame, two frames", f"{again} FRAMES=2 KILL_USING=1", long=True)
    yield Run(group, "redelivery; a member dies with a frame, three frames", f"{again} FRAMES=3 KILL_USING=1", long=True)
    yield Run(group, "redelivery; a member dies while it takes a frame", f"{again} FRAMES=2 KILL_TRYING=1", long=True)
    yield Run(group, "redelivery; a member dies", f"{again} FRAMES=2", long=True)
    yield Run(group, "redelivery; a member dies, and the reaper", f"{again} FRAMES=1 REAPER_KILLS=1", long=True)
    yield Run(group, "redelivery; a member of three dies with a frame", f"THREE=1 {again} FRAMES=1 KILL_USING=1", long=True)
    yield Run(group, "redelivery and a foreign writer; a member dies with a frame", f"{again} FRAMES=1 FOREIGN=1 KILL_USING=1", long=True)
    yield Run(group, "redelivery in a stream that drops; a member dies", f"DROP=2 {again} FRAMES=1 KILL_TRYING=1")
    drops = f"DROP=2 {again} FRAMES=1 FOREIGN=1 KILL_TRYING=1"
    yield Run(group, "redelivery in a stream that drops, a foreign writer; a member dies", drops, long=True)
    yield Run(group, "redelivery; the producer dies", "REDELIVER=1 FRAMES=2 KILLS=1 MORTAL=1", long=True)
    yield Run(group, "two members join; one dies, and the reaper", "JOIN=1 FRAMES=2 KILLS=1 MORTAL=2 REAPER_KILLS=1", long=True)
    yield Run(group, "redelivery; a member dies while it joins", f"JOIN=1 {again} FRAMES=1 KILL_JOINING=1", long=True)
    yield Run(group, "two members join, redelivery; one dies", f"JOIN=1 {again} FRAMES=1", long=True)
    yield Run(group, "two members; one dies", "FRAMES=2 KILLS=1", long=True)
    yield Run(group, "an in-order reader and a foreign writer; one dies", "DROP=1 FRAMES=2 FOREIGN=1 KILLS=1", long=True)

    asked = "stream_asked"
    yield Run(asked, "one asks, one awaits", "ASKERS=1 FRAMES=1")
    yield Run(asked, "two ask, no run without an end", "AWAIT=0 TURNS=0", cycles=True)
    yield Run(asked, "two ask, another user wakes", "AWAIT=0")
    yield Run(asked, "two ask; one dies", "AWAIT=0 TURNS=0 FRAMES=1 KILLS=1")
    yield Run(asked, "one asks, one awaits; one dies", "ASKERS=1 FRAMES=1 KILLS=1", long=True)
    yield Run(asked, "two ask, one awaits", "FRAMES=1", long=True)
    yield Run(asked, "two ask; two die", "AWAIT=0 TURNS=0 FRAMES=2 KILLS=2", long=True)


def _control(model: str, number: int, name: str, defines: str, finds: str, cycles: bool = False, long: bool = False) -> Run:
    return Run(model, f"{number:2} {name}", f"{defines} BUG={number}", finds, cycles, long)


def _stream_controls() -> Iterator[Run]:
    control = partial(_control, "stream")
    foreign_writer = "FOREIGN=1 FOREIGN_READ=0"
    writer_dies = f"{foreign_writer} FOREIGN_SLOT=0 KILLS=1 MORTAL=32 KILL_GRANTED=1 FRAMES=1"
    yield control(1, "the newest frame's slot may be chosen", "LATEST=1", ASSERTION)
    yield control(2, "the producer doesn't look at cursors", "QUEUE=1 FRAMES=3", ASSERTION)
    yield control(3, "the producer doesn't look at claims", "LATEST=1 FRAMES=3", ASSERTION)
    yield control(4, "the wake bit is set before the count is read", "QUEUE=1", BLOCKED)
    yield control(5, "the producer doesn't look for foreign accesses", "FOREIGN=1", ASSERTION)
    yield control(6, "a producer that gives way wakes nobody", "FOREIGN=1", BLOCKED)
    yield control(7, "the head before the frame is whole", "QUEUE=1", ASSERTION)
    yield control(8, "joining doesn't look at the head again", "QUEUE=1 FRAMES=3", ASSERTION)
    yield control(9, "joining doesn't look for a foreign writer", f"QUEUE=1 {foreign_writer}", ASSERTION)
    yield control(10, "a latest reader doesn't look at the head again", "LATEST=1 FRAMES=3", ASSERTION)
    yield control(11, "a latest reader doesn't look for a foreign writer", f"LATEST=1 {foreign_writer}", ASSERTION)
    yield control(12, "a foreign program doesn't wait for the producer", "FOREIGN=1", ASSERTION)
    yield control(13, "a foreign writer doesn't wait for cursors", f"QUEUE=1 {foreign_writer}", ASSERTION)
    yield control(14, "a foreign writer doesn't wait for claims", f"LATEST=1 {foreign_writer}", ASSERTION)
    yield control(15, "the reaper leaves a dead producer's mark", "KILLS=1", ASSERTION)
    yield control(16, "the reaper leaves the cursor", "QUEUE=1 KILLS=1", ASSERTION)
    yield control(17, "the reaper leaves claims", "LATEST=1 KILLS=1", ASSERTION)
    yield control(18, "the reaper doesn't mark what a foreign writer left", "FOREIGN=1 KILLS=1 FRAMES=1", ASSERTION)
    yield control(19, "the state says written before the head does", f"QUEUE=1 {foreign_writer}", ASSERTION)
    yield control(20, "the foreign bits are cleared without the reservation lock", "FOREIGN=2 FRAMES=1", ASSERTION)
    yield control(21, "the foreign bits are cleared whatever is pending", "FOREIGN=1", ASSERTION)
    yield control(22, "a producer that raises leaves no torn mark", "FOREIGN=1 ABORT=1 FOREIGN_WRITE=0", ASSERTION)
    yield control(23, "joining doesn't look at the torn mark", f"QUEUE=1 {writer_dies}", ASSERTION)
    yield control(24, "at the end a reader doesn't look at the head again", "QUEUE=1", ASSERTION)
    yield control(25, "a latest reader doesn't look at the torn mark", f"LATEST=1 {writer_dies}", ASSERTION)
    yield control(26, "the foreign bit before the fence is in the list", "FOREIGN=1", ASSERTION)
    yield control(27, "making room in the list drops the stream's entry", "FOREIGN=1", ASSERTION)
    yield control(28, "the reaper doesn't mark what a producer left", "KILLS=1", ASSERTION)
    yield control(29, "the foreign writer's fence ends before the torn mark", "FOREIGN=2 FRAMES=0 KILLS=1", ASSERTION)
    history, keep = "QUEUE=1 HISTORY=2", "QUEUE=1 KEEP=1 N=3"
    taken_over = f"{history} FRAMES=3 FRAMES2=1 KILLS=1 MORTAL=2 KILL_FROM=2"
    yield control(30, "the producer looks at cursors only before its mark", f"{history} N=3 FRAMES=4", ASSERTION)
    yield control(31, "joining at an older frame doesn't look at its state", f"{history} N=3 FRAMES=4", ASSERTION)
    yield control(32, "joining checks the oldest frame alone", "QUEUE=1 HISTORY=4 N=3 FRAMES=4 LATEST=1", ASSERTION, long=True)
    yield control(33, "joining at an older frame doesn't look for a foreign writer", f"{history} N=3 {foreign_writer}", ASSERTION)
    yield control(34, "joining checks up to the head that it saw first", f"{history} FRAMES=5", ASSERTION)
    yield control(35, "keeping moves the cursor before the claim", f"{keep} FRAMES=4", ASSERTION)
    yield control(36, "a foreign writer looks at claims before cursors", f"{keep} {foreign_writer}", ASSERTION)
    yield control(37, "the state doesn't say when writing begins", "KILLS=1", ASSERTION)
    yield control(38, "the mark has the new frame's number", taken_over, ASSERTION, long=True)
    yield control(39, "a foreign writer doesn't wait for a frame that is kept", f"{keep} {foreign_writer}", ASSERTION)
    yield control(40, "the producer doesn't wait for a frame's fence", "FENCES=1 FRAMES=3", ASSERTION)
    yield control(41, "the fence is stored after the head", "QUEUE=1 FENCES=1", ASSERTION)
    yield control(42, "a foreign program doesn't wait for a frame's fence", "FOREIGN=1 FENCES=1", ASSERTION)
    yield control(43, "a queue reader doesn't wait for a frame's fence", "QUEUE=1 FENCES=1", ASSERTION)
    yield control(44, "a latest reader doesn't wait for a frame's fence", "LATEST=1 FENCES=1", ASSERTION)

    control = partial(_control, "stream_group")
    dies = "REDELIVER=1 KILLS=1 MORTAL=2"
    uses, tries = f"{dies} KILL_USING=1", f"{dies} KILL_TRYING=1 FRAMES=2"
    joins = f"JOIN=1 {uses} FRAMES=1"
    yield control(1, "the producer looks at claims before cursors", "FRAMES=4", ASSERTION)
    yield control(2, "the claim after the cursor has moved", "FRAMES=4", ASSERTION)
    yield control(3, "the reaper leaves a member's place", "KILLS=1 FRAMES=1", ASSERTION)
    yield control(4, "an in-order reader doesn't look at the state", "DROP=1 N=3 FRAMES=5", ASSERTION)
    yield control(5, "the producer doesn't look at claims after its mark", "DROP=1 N=3 FRAMES=5", ASSERTION)
    yield control(6, "joining without the lock", "JOIN=1 FRAMES=2", ASSERTION)
    yield control(7, "joining looks at the head again, and then makes its promise", "JOIN=1 FRAMES=3", ASSERTION)
    yield control(8, "the reaper unlocks before it clears the place", f"JOIN=1 FRAMES=1 {dies} KILL_JOINING=1", ASSERTION)
    yield control(9, "joining doesn't look at the head again", "JOIN=1 FRAMES=3", ASSERTION)
    yield control(10, "the reaper frees a place that has frames", f"{uses} FRAMES=2", ASSERTION)
    yield control(11, "what a member tried to take counts as taken", tries, ASSERTION)
    yield control(12, "a member doesn't say what it tries to take", f"{dies} FRAMES=2", ASSERTION, long=True)
    yield control(13, "the cursor moves on without a note of who had moved it", tries, ASSERTION, long=True)
    yield control(14, "a member ends while another one holds a frame", f"{uses} FRAMES=2", ASSERTION)
    yield control(15, "what is about to be freed counts as a member", joins, ASSERTION)
    yield control(16, "releasing doesn't wake members that wait for the end", "REDELIVER=1 FRAMES=2", BLOCKED)
    yield control(17, "a member that leaves doesn't free what dead ones left", f"{uses} LEAVE=1 FRAMES=1", ASSERTION)
    yield control(18, "the reaper doesn't free what dead ones left", "REDELIVER=1 FRAMES=1 KILLS=2 MORTAL=6", ASSERTION)
    yield control(19, "a new group hands out what an old one left", joins, ASSERTION)
    yield control(21, "the reaper doesn't look who has moved the cursor", tries, ASSERTION)
    yield control(22, "the reaper doesn't look for a note again", tries, ASSERTION, long=True)
    yield control(23, "who makes an orphan of it again doesn't look at it again", joins, ASSERTION)
    yield control(24, "a first member relies on what it sees of a place", joins, ASSERTION)
    yield control(20, "an in-order reader doesn't look for a foreign writer", "DROP=1 FOREIGN=1 FRAMES=3", ASSERTION)

    control = partial(_control, "stream_asked")
    yield control(1, "the bit isn't set again for a fence that stays pending", "ASKERS=1 AWAIT=0", BLOCKED)
    yield control(2, "the bit is set again, without another look", "ASKERS=1 AWAIT=0", BLOCKED)
    yield control(3, "an asker doesn't look again", "ASKERS=1 AWAIT=0", BLOCKED)
    yield control(4, "an asker sets the bit before its fence can be found", "ASKERS=1 AWAIT=0", BLOCKED)
    yield control(5, "the dispatcher's bit after the wake word's", "ASKERS=0", BLOCKED)
    yield control(6, "the doorbell is read after the bits are set", "ASKERS=0", BLOCKED)
    yield control(7, "a fence is stored over one that is pending", "AWAIT=0 TURNS=0", BLOCKED)
    yield control(8, "a fence for another frame is shared", "AWAIT=0 TURNS=0", ASSERTION)
    yield control(9, "nobody asks again when the owner has died", "AWAIT=0 TURNS=0 FRAMES=1 KILLS=1", ASSERTION)
    yield control(10, "a tick doesn't look at the slot", "ASKERS=1 AWAIT=0 TURNS=0 FRAMES=1 KILLS=1", BLOCKED)
    yield control(11, "the reaper leaves a dead asker's fence", "AWAIT=0 TURNS=0 FRAMES=1 KILLS=1", ASSERTION)


def _controls() -> Iterator[Run]:
    control = _control
    yield from _stream_controls()

    yield control("lock", 1, "unlocking wakes nobody", "N=3", BLOCKED)
    yield control("lock", 2, "unlocking looks for waiters first", "N=3", BLOCKED)
    yield control("lock", 3, "locking drops the bit for waiters", "N=3", BLOCKED)
    yield control("lock", 4, "a waiter doesn't set the bit", "N=3", CYCLE, cycles=True)
    yield control("lock", 5, "the reaper leaves the context's generation", "N=2 KILLS=1", BLOCKED)
    yield control("lock", 6, "locking is a store, not a compare-and-swap", "N=3", ASSERTION)
    yield control("lock", 7, "no wait-die", "N=2 L=2", BLOCKED)
    yield control("lock", 8, "a waiter that gives up stays named as the next", "N=3 TIMEOUTS=1", BLOCKED)
    yield control("lock", 9, "nobody overtakes a next waiter that is stopped", "N=3 STOPS=1", BLOCKED)
    yield control("lock", 10, "a waiter sleeps without comparing the word", "N=3", BLOCKED)
    yield control("lock", 11, "a waiter on a free lock doesn't look at next again", "N=3", BLOCKED)
    yield control("lock", 12, "a waiter that gives up leaves a free lock's bit", "N=3 TIMEOUTS=1", BLOCKED)

    yield control("life", 1, "CLEAN before what was owned has ended", "N=2 S=1 ROUNDS=2 KILLS=2", ASSERTION)
    yield control("life", 2, "a reaper without a life leaves the table lock", "N=2 S=1 ROUNDS=2 KILLS=2", ASSERTION)
    yield control("life", 3, "the generation is read before the byte is locked", "N=3 S=1 KILLS=2", ASSERTION)
    yield control("life", 4, "the reaper asks for the byte's lock, and doesn't take it", "N=3 S=1 KILLS=2", ASSERTION)
    yield control("life", 5, "the reaper doesn't look at the state again", "N=3 S=1 KILLS=2", ASSERTION)
    yield control("life", 6, "ALIVE before the byte is locked", "N=3 S=2 KILLS=1", ASSERTION)
    yield control("life", 7, "a newcomer doesn't look at the state again", "N=3 S=1 KILLS=2", ASSERTION)
    yield control("life", 8, "a new life keeps the generation", "N=3 S=2 KILLS=1", ASSERTION)

    yield control("fence", 1, "sleepers are woken before the state is stored", "KILLS=0 SYNC=0", BLOCKED)
    yield control("fence", 2, "the dispatcher looks, and then sets its bit", "KILLS=0 SYNC=0", ASSERTION)
    yield control("fence", 3, "the bits are read before the state is stored", "KILLS=0 SYNC=0", ASSERTION)
    yield control("fence", 4, "the torn mark after the fence has ended", "DISPATCHER=0 SYNC=0", ASSERTION)
    yield control("fence", 5, "a writer writes before it is marked as granted", "DISPATCHER=0 SYNC=0", ASSERTION)
    yield control("fence", 6, "the mark is cleared before the content is whole", "DISPATCHER=0 SYNC=0 TORN=1", ASSERTION)
    yield control("fence", 7, "the mark is cleared after the fence has ended", "DISPATCHER=0 SYNC=0 TORN=1", ASSERTION)
    yield control("fence", 8, "the reaper forgets sync files of ended fences", "DISPATCHER=0 WAITER=0", ASSERTION)
    yield control("fence", 9, "the word is published before its fields", "DISPATCHER=0 SYNC=0", ASSERTION)
    yield control("fence", 10, "the slot's last failure isn't kept", "DISPATCHER=0 SYNC=0", ASSERTION)
    yield control("fence", 11, "signaling is a store, not a compare-and-swap", "KILLS=0 SYNC=0", BLOCKED)
    yield control("fence", 12, "a waiter sleeps without comparing the word", "KILLS=0 SYNC=0", BLOCKED)

    yield control("anybody", 1, "how it ends is a store", "KILLS=1", ASSERTION)
    yield control("anybody", 2, "the time is a store", "KILLS=1", ASSERTION)
    yield control("anybody", 3, "signaling doesn't compare the generation", "KILLS=1", ASSERTION)
    yield control("anybody", 4, "the reaper decides again", "KILLS=2", ASSERTION)

    alone = "FORK=0 TWO=0"
    yield control("facts", 1, "a reset doesn't ask who is present", f"KILLS=0 {alone}", ASSERTION)
    yield control("facts", 2, "presence ends before the private copy is made", "KILLS=0 FORK=2 TWO=0", ASSERTION)
    yield control("facts", 3, "a process that looks on isn't present", f"KILLS=0 {alone}", ASSERTION)
    yield control("facts", 4, "floors are raised after the chunks have gone", f"KILLS=1 {alone}", ASSERTION)
    yield control("facts", 5, "pages go before their chunk says so", f"KILLS=1 {alone}", ASSERTION)
    yield control("facts", 6, "a chunk is used again without allocating it", f"KILLS=1 {alone}", ASSERTION)
    yield control("facts", 7, "a reset leaves the table lock free", f"KILLS=1 {alone}", ASSERTION)
    yield control("facts", 8, "a reset doesn't reap first", f"KILLS=1 {alone}", ASSERTION)
    yield control("facts", 9, "a held buffer is judged gone", f"KILLS=1 {alone}", ASSERTION)
    yield control("facts", 10, "a new fence may lie below the floor", f"KILLS=1 {alone}", ASSERTION)
    yield control("facts", 11, "what nobody knows counts as ended well", f"KILLS=1 {alone}", ASSERTION)
    yield control("facts", 12, "a process that ends stays present", f"KILLS=0 {alone}", ASSERTION)
    yield control("facts", 13, "the file is cut before fewer chunks are counted", f"KILLS=1 {alone}", ASSERTION)
    yield control("facts", 14, "a file in which nobody lives is replaced", f"KILLS=1 {alone}", ASSERTION)
    yield control("facts", 15, "a reset trusts the locks alone", f"KILLS=1 {alone}", ASSERTION)
    yield control("facts", 16, "a new chunk starts its generations again", f"KILLS=0 {alone} OWN=1", ASSERTION)

    yield control("proc_locks", 1, "nothing is compared", "", ASSERTION)
    yield control("proc_locks", 2, "an empty page counts as the end", "CHANGES=4", ASSERTION)
    yield control("proc_locks", 3, "two locks have the same line", "", ASSERTION)


RUNS = [*_models(), *_controls()]
MODELS = list(dict.fromkeys(run.model for run in RUNS))


def missing() -> list[str]:
    """The tools that are not installed."""
    return [tool for tool in TOOLS if shutil.which(tool) is None]


def check(run: Run) -> Outcome:
    """Run one search, in a directory that goes with it."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="dmabuf-model-") as where:
        found, states, trouble = _search(run, Path(where))
    return Outcome(run, found, states, time.monotonic() - begin, trouble)


def check_all(runs: Iterable[Run], jobs: int = JOBS) -> Iterator[Outcome]:
    """Run searches, ``jobs`` at a time, in their order."""
    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(check, runs)


def _search(run: Run, where: Path) -> tuple[str, int, str]:
    """The error that Spin found, the number of states, and what went wrong otherwise."""
    for source in HERE.glob("*.pml"):
        shutil.copy(source, where)
    spin = ["spin", *(f"-D{define}" for define in run.defines.split()), "-a", f"{run.model}.pml"]
    made = _output(spin, where)
    if not (where / "pan.c").exists():
        return "", 0, f"spin: {made}"
    memory, seconds = (LONG_MEMORY_MB, LONG_RUN_S) if run.long else (MEMORY_MB, RUN_S)
    # Optimizing costs more than it saves in a search that ends at its first error, and more than a little does in a short one.
    flags = [f"-DMEMLIM={memory}", "-DNOFAIR", "-DVECTORSZ=1024", "-DCOLLAPSE", "-O2" if run.long else "-O0" if run.finds else "-Og"]
    made = _output(["gcc", *flags, "-w", "-DNP" if run.cycles else "-DSAFETY", "-o", "pan", "pan.c"], where)
    if not (where / "pan").exists():
        return "", 0, f"gcc: {made}"
    try:
        text = _output(["./pan", "-n", f"-m{DEPTH}", "-w20", *(["-l"] if run.cycles else [])], where, seconds)
    except subprocess.TimeoutExpired:
        return "", 0, f"no end after {seconds} s"
    error = re.search(r"^pan:1: (.*?) \(at depth", text, re.MULTILINE)
    states = re.search(r"(\d+) states, stored", text)
    trouble = ""
    for sign in ("max search depth too small", "memory limit", "out of memory", "hash table is full"):
        if sign in text:
            trouble = sign
    if not error and not re.search(r"errors: 0$", text, re.MULTILINE):
        trouble = trouble or f"pan: {text.strip()[-200:]}"
    return error[1] if error else "", int(states[1]) if states else 0, trouble


def _output(command: Sequence[str], where: Path, seconds: float = RUN_S) -> str:
    done = subprocess.run(command, cwd=where, capture_output=True, text=True, timeout=seconds, check=False, stdin=subprocess.DEVNULL)
    return done.stdout + done.stderr


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.model.run", description="Check the models of the domain's protocol with Spin.")
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"only these, of {', '.join(MODELS)}")
    parser.add_argument("--long", action="store_true", help="the larger searches too, which take about half an hour more")
    parser.add_argument("--jobs", type=int, default=JOBS, metavar="N", help="searches at a time")
    options = parser.parse_args()
    if unknown := set(options.models) - set(MODELS):
        parser.error(f"no such model: {', '.join(sorted(unknown))}")
    if lacking := missing():
        print(f"dmabuf: no {lacking[0]} found: apt-get install {lacking[0]}", file=sys.stderr)
        return 1
    runs = [run for run in RUNS if (options.long or not run.long) and (not options.models or run.model in options.models)]
    failed = 0
    for outcome in check_all(runs, options.jobs):
        print(outcome, flush=True)
        failed += not outcome.as_expected
    print(f"{len(runs) - failed} of {len(runs)} as expected")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
