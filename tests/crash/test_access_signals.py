"""Signals at random moments of every kind of access, each with a handler that raises: no access is held, though the exception is kept."""

from __future__ import annotations

import gc
import os
import random
import re
import signal
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType

import pytest

import dmabuf
from dmabuf import Domain
from dmabuf.sharing.client import IDLE_CONNECTIONS
from tests.crash.test_interrupts import Alarm
from tests.support.access_kinds import ASYNC, BACKINGS, KINDS, Bench, in_task, memory_kept, with_trio
from tests.support.budget import times
from tests.support.children import Parent, Spawn
from tests.support.every_stop import Raised, holdings, left, nothing_unraisable

pytestmark = pytest.mark.crash
LONGEST_S = 2e-4  # until the signal; an access takes 2 to 200 µs here, and a task of asyncio 1 ms
AUDIT_EVERY = 500


class PoliteAlarm(Alarm):
    """One whose handler raises in a task, or while asyncio sleeps: asyncio's and trio's own code would not survive it elsewhere."""

    polite = False

    def _handler(self, *given: object) -> None:
        frame = given[1]
        if self.polite and isinstance(frame, FrameType) and not _is_ours(frame):
            signal.setitimer(signal.ITIMER_REAL, 2e-5)
            return
        signal.setitimer(signal.ITIMER_REAL, 1)  # again, if it is lost in somebody's finalizer: the access may wait for ever
        super()._handler()


def _is_ours(frame: FrameType) -> bool:
    if frame.f_code.co_name == "select" and frame.f_code.co_filename.endswith("selectors.py"):
        return True
    found: FrameType | None = frame
    while found is not None and found.f_code is not in_task.__code__:
        if "/dmabuf/" not in found.f_code.co_filename:  # a finalizer of theirs, in which it would be lost
            return False
        found = found.f_back
    return found is not None


def spin() -> None:
    for _ in range(100):  # what a finalizer has put off comes at the next call or jump
        pass


def repeat(kind: Callable[[Bench], None], on: Bench, alarm: Alarm, seen: int) -> None:
    """Until a signal arrives. Not in the caller's ``try``: some compilers leave the jump of such a loop out of it."""
    while alarm.handled == seen:
        kind(on)


@contextmanager
def held_by_a_thread(on: Bench) -> Iterator[None]:
    """Another thread is inside a block of both buffers."""
    inside, over = threading.Event(), threading.Event()

    def hold() -> None:
        with dmabuf.access(write=[on.a, on.b]):
            inside.set()
            over.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait()
    try:
        yield
    finally:
        over.set()
        thread.join()


def holds(parent: Parent) -> None:
    """The process that is inside a block of both buffers whenever it is told so."""
    a, b = dmabuf.recv(parent.sock)
    with a, b:
        while parent.recv():
            with dmabuf.access(write=[a, b]):
                parent.send("inside")
                parent.recv()
            parent.send("left")


class HeldByAProcess:
    """``with held:`` another process is inside a block of both buffers."""

    def __init__(self, child: Spawn, on: Bench) -> None:
        self.other = child(holds)
        dmabuf.send(self.other.sock, on.a, on.b)

    def __enter__(self) -> None:
        self.other.send(True)
        self.other.recv()

    def __exit__(self, *_: object) -> None:
        self.other.send(True)
        self.other.recv()

    def close(self) -> None:
        self.other.send(None)
        self.other.result()


def grown(lost: list[str]) -> list[str]:
    """Leave out what only a few things of a kind can be: connections that are kept for later, and owners of threads and tasks."""
    sockets = [one for one in lost if "socket:" in one]
    contexts = [one for one in lost if re.fullmatch(r"contexts: free \([1-4]\)", one)]
    threads = [one for one in lost if "Trio thread" in one]  # it waits a while for work
    few = threads + contexts + (sockets if len(sockets) <= IDLE_CONNECTIONS + 1 else [])
    return [one for one in lost if one not in few]


Wait = Callable[[], object]
FOREIGN = re.compile(r"Raised\(\) in <function (WeakSet|Nursery)\.")  # finalizers in Python, which lose what is raised in them


class Soak:
    """Signals at random moments. ``faults``: what went wrong; ``counts``: signals by kind."""

    def __init__(self, on: Bench, seed: int) -> None:
        self.on, self.choose, self.alarm = on, random.Random(seed), PoliteAlarm()
        self.faults: list[str] = []
        self.counts: Counter[str] = Counter()
        self.lost: list[str] = []  # exceptions that did not arrive

    def one(self, kind: Callable[[Bench], None], wait: str, blocked: Wait) -> None:
        """One signal in one kind of access. The exception is kept until the end of this method, with all frames of its traceback."""
        alarm, caught = self.alarm, None
        longest = LONGEST_S * (1 + 9 * (kind in ASYNC))
        alarm.polite = kind in ASYNC
        with blocked():  # type: ignore[attr-defined]
            seen = alarm.handled
            try:
                signal.setitimer(signal.ITIMER_REAL, self.choose.uniform(1e-6, longest))
                repeat(kind, self.on, alarm, seen)
                spin()
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Raised as e:
                signal.setitimer(signal.ITIMER_REAL, 0)
                caught = e
            except BaseException as e:
                self.faults.append(f"{kind.__name__} {wait}: {type(e).__name__}: {e}")
        if kind is memory_kept:
            self.settle()  # the handler may run after the block: what was left gives way to this thread's next access
        held = self.on.held()
        self.counts[f"{kind.__name__}{wait}"] += 1
        if held:
            self.faults.append(f"{kind.__name__}{wait}, signal {alarm.handled}: {held}")
        if caught is None:
            self.lost.append(f"{kind.__name__}{wait}: the exception was lost")
        del caught

    def settle(self) -> None:
        try:
            self.on.settle()
        except OSError as e:
            self.faults.append(f"settle: {e}")


def soak(on: Bench, child: Spawn, count: int, seed: int) -> Counter[str]:
    """Interrupt random kinds of access ``count`` times, a fifth of them while somebody else is inside a block of the buffers."""
    domain, it = Domain.default(), Soak(on, seed)
    process = HeldByAProcess(child, on)
    ways: dict[str, Wait] = {
        "": nullcontext,
        ", waiting for a thread": lambda: held_by_a_thread(on),
        ", waiting for a process": lambda: process,
    }
    with warnings.catch_warnings(), nothing_unraisable() as unraisable:
        warnings.simplefilter("ignore")  # of coroutines that were never awaited
        for kind in (*KINDS, *ASYNC):
            kind(on)
        for way in ways.values():
            with way():  # type: ignore[attr-defined]
                pass
        it.settle()
        gc.collect()
        before = holdings(domain)
        with it.alarm.armed():
            while it.alarm.handled < count and len(it.faults) < 10:
                kind = it.choose.choices([*KINDS, *ASYNC], [3] * len(KINDS) + [1] * len(ASYNC))[0]
                wait = "" if kind is with_trio else it.choose.choices(list(ways), [8, 1, 1])[0]
                it.one(kind, wait, ways[wait])
                it.settle()
                if it.alarm.handled % AUDIT_EVERY == 0 or it.alarm.handled >= count:
                    gc.collect()
                    # trio and asyncio close the socket for signals before they take it back from Python: "... in None".
                    foreign = [one for one in unraisable if one.endswith("in None") or FOREIGN.match(one)]
                    it.faults += [one for one in unraisable if one not in foreign]
                    it.faults += it.lost[sum(one.startswith("Raised") for one in foreign) :]
                    if lost := grown(left(before, holdings(domain))):
                        it.faults.append(f"after {it.alarm.handled} signals: left {lost}")
    process.close()
    assert not it.faults, f"seed {seed}:\n" + "\n".join(it.faults)
    return it.counts


@pytest.mark.parametrize("backing", BACKINGS)
def test_signals_at_random_moments_of_an_access_leave_none_held(backing: str, child: Spawn) -> None:
    seed = int(os.environ.get("DMABUF_TEST_SEED", random.randrange(1 << 32)))
    with BACKINGS[backing](child) as on:
        soak(on, child, times(quick=75, full=1000), seed)


@pytest.mark.long
@pytest.mark.timeout(7_000)
@pytest.mark.parametrize("backing", BACKINGS)
def test_hundred_thousand_signals_of_accesses_leave_none_held(backing: str, child: Spawn) -> None:
    seed = int(os.environ.get("DMABUF_TEST_SEED", random.randrange(1 << 32)))
    with BACKINGS[backing](child) as on:
        counts = soak(on, child, 25_000, seed)
    print(f"{backing}, seed {seed}: {sum(counts.values())} signals, none held: {dict(counts)}")
