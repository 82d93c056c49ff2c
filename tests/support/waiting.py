"""To know that somebody waits, without a sleep.

A wait is shown by what the kernel says of the thread: it sleeps, and goes on sleeping. One that waits for the interpreter's lock wakes at
every switch interval, so it is not taken for asleep, however long the lock's holder is kept from running. A thread may sleep for another
reason for a while (a page that is read in), so this only makes a test sharp; what it asserts must be true wherever the other side
happens to be.
"""

import contextlib
import itertools
import os
import select
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Generic, Self, TypeVar

T = TypeVar("T")

# So long, in ns, between two looks with no switch in between: more than a lock that is passed on takes, and than two of Python's switch
# intervals; and within one tick of a wait of ours (40 ms), after which there was a switch.
_CALM_NS = 12_000_000
# On a machine so loaded that each look comes after a tick: asleep in so many of them, with so much time between, is asleep.
_LOOKS = 20
# For what others do, in s: less than the watchdog of a test (pyproject.toml), which ends the whole run.
_LIMIT_S = 100.0


# Looks between which others only get a turn, and the time in s between later ones: who looks all the time takes the core of those it
# waits for.
_TURNS = 20
_PAUSE_S = 0.0005


def _give_way(looks: int) -> None:
    """Between two looks, after so many of them."""
    if looks < _TURNS:
        os.sched_yield()
    else:
        select.select([], [], [], _PAUSE_S)


def _never() -> bool:
    return False


def thread_state(fd: int) -> tuple[bytes, bytes] | None:
    """(letter of the state, voluntary switches so far) from an open /proc/…/status; None when the thread is gone."""
    try:
        text = os.pread(fd, 4096, 0)
    except ProcessLookupError:
        return None
    fields = dict(line.split(b":\t", 1) for line in text.splitlines() if b":\t" in line)
    return fields[b"State"][:1], fields[b"voluntary_ctxt_switches"]


def until_asleep(pid: int, tid: int | None = None, over: Callable[[], bool] = _never) -> None:
    """Until thread `tid` of a process (its main thread) sleeps, has ended, or `over()` is true."""
    _until_calm([f"/proc/{pid}/task/{pid if tid is None else tid}/status"], over)


def until_others_sleep(over: Callable[[], bool] = _never) -> None:
    """Until every other thread of this process sleeps, so that what one of them is in the middle of has come to its end."""
    me = threading.get_native_id()
    _until_calm([f"/proc/self/task/{tid}/status" for tid in os.listdir("/proc/self/task") if int(tid) != me], over)


class _Seen:
    """What the looks at one thread have shown so far."""

    def __init__(self) -> None:
        self.state: tuple[bytes, bytes] | None = None
        self.since = self.asleep_since = self.looks = 0  # ns: the same state, and asleep in every look; how many those were

    def again(self, now: tuple[bytes, bytes], before: int) -> bool:
        """One more look, begun at ``before``: is it at rest?"""
        if now[0] != b"S":
            self.state, self.looks = now, 0
            return False
        if not self.looks:
            self.asleep_since = time.monotonic_ns()
        self.looks += 1
        if now != self.state:
            self.state, self.since = now, time.monotonic_ns()
        elif before - self.since >= _CALM_NS:
            return True
        return self.looks > _LOOKS and before - self.asleep_since > _LOOKS * _CALM_NS


def _until_calm(paths: list[str], over: Callable[[], bool]) -> None:
    fds = []
    try:
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                fds.append(os.open(path, os.O_RDONLY))
        # Each by itself: several that tick don't rest at once.
        waited = {fd: _Seen() for fd in fds}
        for looks in itertools.count():
            if not waited or over():
                break
            asleep = True
            for fd, seen in list(waited.items()):
                before, now = time.monotonic_ns(), thread_state(fd)
                if now is None or now[0] in b"ZX" or seen.again(now, before):
                    del waited[fd]
                else:
                    asleep = asleep and now[0] == b"S"
            if waited and asleep:
                # Not by giving way: on a loaded machine the turn comes back after the tick, each time anew.
                select.select([], [], [], _CALM_NS / 1e9)
            else:
                _give_way(looks)
    finally:
        for fd in fds:
            os.close(fd)


def until(condition: Callable[[], object], *, left: Callable[[], object] = lambda: "unknown", limit_s: float = _LIMIT_S) -> None:
    """Until the condition is true; for what another process does, and only the shared state tells.

    Args:
        condition: Asked again and again.
        left: What is in the way, for the error.
        limit_s: After so long it is an error, an AssertionError. A failed test's traceback keeps objects, and a teardown that waits until
            they are gone would wait forever.
    """
    end = time.monotonic() + limit_s
    for looks in itertools.count():
        if condition():
            break
        if time.monotonic() > end:
            raise AssertionError(f"waited for {limit_s:g} s in vain; left: {left()}")
        _give_way(looks)


@contextlib.contextmanager
def held_by_another_thread(lock: AbstractContextManager[object]) -> Iterator[None]:
    """For the block another thread has entered it."""
    taken, done = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            taken.set()
            done.wait()

    with Background(hold):
        taken.wait()
        try:
            yield
        finally:
            done.set()


class Background(Generic[T]):
    """A function in a thread of its own, where it may wait.

    with Background(lambda: fence.wait()) as job:
        job.until_blocked()
        assert not job.done
        fence.signal()
        assert job.result() == math.inf
    """

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._value: T
        self._error: BaseException | None = None
        self._asked = False
        self._started = threading.Event()
        self._over = threading.Event()
        # A daemon, so that a failed test doesn't wait for what will never end.
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        self._started.set()
        try:
            self._value = self._function()
        except BaseException as error:
            self._error = error
        self._over.set()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._thread.join()
            if self._error is not None and not self._asked:
                raise self._error
        # A closure over a fence must not outlive the test.
        del self._function

    @property
    def done(self) -> bool:
        return self._over.is_set()

    def until_blocked(self) -> None:
        """Until the function waits, or is over."""
        self._started.wait()
        tid = self._thread.native_id
        assert tid is not None
        until_asleep(os.getpid(), tid, over=self._over.is_set)

    def result(self) -> T:
        """What the function returns, or raises; waits for it."""
        self._thread.join()
        self._asked = True
        if self._error is not None:
            raise self._error
        return self._value
