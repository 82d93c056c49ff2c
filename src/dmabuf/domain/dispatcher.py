"""Callbacks, awaits and pollable fds: one dispatcher a process and domain, with a thread only while others' fences are watched.

Who registers sets this life's bit in the fence and then looks at its state again; who signals stores the state and then reads the
bits. So one of the two sees the other. Fences of this process run their callbacks in the signaller, as in the kernel; fences of other
processes run them in the dispatcher's thread, which their signaller rings. A signaller that dies between storing and ringing is made
up for at the next tick.
"""

from __future__ import annotations

import atexit
import itertools
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from dmabuf import _native
from dmabuf.domain import lives
from dmabuf.domain.domain import Domain
from dmabuf.domain.local import Local

_tokens = itertools.count(1)
_here = threading.local()  # running: is this thread inside of a callback?


class Dispatcher:
    """Who waits for which fence without sleeping on it."""

    def __init__(self, domain: Domain) -> None:
        self.domain = domain
        self.shm = domain.join()
        self.life = self.shm.life
        # Re-entered by a signal handler, or by a fence that the garbage collector takes, in the middle of what it guards.
        self._lock = threading.RLock()
        self._watched: dict[int, dict[int, Callable[[int], object]]] = {}
        self._foreign: dict[int, int] = {}  # slot -> the handle watched there; a slot has one pending fence at a time
        self._past: list[int] = []
        self._hasty: dict[int, Callable[[], None]] = {}  # slot -> what to call when another process has set a deadline
        self._thread: threading.Thread | None = None
        self._running = True
        self._doorbell = lives.slot_offset(lives.index_of(self.life)) + _native.LIFE_BELL
        self._served = lives.slot_offset(lives.index_of(self.life)) + _native.LIFE_SERVED
        me = weakref.ref(self)

        def on_local(handle: int) -> None:
            dispatcher = me()
            if dispatcher is not None:
                dispatcher.run(handle)

        self.shm.on_local = on_local
        atexit.register(_stop, me)

    def watch(self, handle: int, call: Callable[[int], object], *, foreign: bool) -> int | None:
        """Call ``call(handle)`` once when the fence is signalled; a token to take that back, None when it is signalled already."""
        token = next(_tokens)
        idle = False
        with self._lock:
            self._watched.setdefault(handle, {})[token] = call
            if foreign:
                idle = not self._foreign
                before = self._foreign.setdefault(handle & _native.SLOT_MASK, handle)
                if before != handle:  # its slot was used again: it has ended, whatever else happens
                    self._past.append(before)
                    self._foreign[handle & _native.SLOT_MASK] = handle
                if self._thread is None and self._running:
                    try:
                        self._start()
                    except RuntimeError:
                        self.unwatch(handle, token)
                        raise
        if self.shm.fence_mark(handle, "bell", 1):
            if idle:
                self._wake()  # watching nothing, it sleeps without a bound; while it watches anything it looks at every tick
            return token
        # Signalled before the bit: nobody will ring. If somebody ran it all the same, it was registered in time.
        return None if self.unwatch(handle, token) else token

    def unwatch(self, handle: int, token: int) -> bool:
        """Take a registration back; False when it ran already (or never was)."""
        with self._lock:
            calls = self._watched.get(handle)
            if calls is None or calls.pop(token, None) is None:
                return False
            if not calls:
                del self._watched[handle]
                self._forget(handle)
            return True

    def hurry(self, handle: int, call: Callable[[], None] | None) -> None:
        """Call ``call()`` whenever another process may have set a deadline for this fence of ours; None: no more."""
        with self._lock:
            if call is None:
                self._hasty.pop(handle & _native.SLOT_MASK, None)
                return
            self._hasty[handle & _native.SLOT_MASK] = call
            if self._thread is None and self._running:
                self._start()

    def _forget(self, handle: int) -> None:
        """The lock is held: nobody watches it any more."""
        if self._foreign.get(handle & _native.SLOT_MASK) == handle:
            del self._foreign[handle & _native.SLOT_MASK]

    def run(self, handle: int) -> None:
        """The fence is signalled: run its callbacks in the order of registration."""
        with self._lock:
            self._forget(handle)
            left = iter(self._watched.pop(handle, {}).values())
        before = getattr(_here, "running", 0)
        try:
            _here.running = 1
            self._run(left, handle)
        finally:  # whatever a signal handler raises between two of them, the others are called
            try:
                self._run(left, handle)
                if not before:
                    _work_off()
            finally:
                _here.running = before

    def _run(self, calls: Iterator[Callable[[int], object]], handle: int) -> None:
        for call in calls:
            try:
                call(handle)
            except BaseException as e:
                report(e, call)

    def watches(self, handle: int) -> int:
        """How many registrations there are for one fence."""
        return len(self._watched.get(handle, ()))

    @property
    def watching(self) -> int:
        """How many registrations there are."""
        with self._lock:
            return sum(map(len, self._watched.values()))

    def _start(self) -> None:
        self.shm.store32(self._served, 1)
        self._thread = threading.Thread(target=self._serve, name="dmabuf-dispatcher", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # none can be started: whoever watches next tries again
            self._thread = None
            raise

    def _wake(self) -> None:
        self.shm.add32(self._doorbell, _native.SLOT_MASK + 1)
        self.shm.wake(self._doorbell)

    def _serve(self) -> None:
        shm = self.shm
        one, last, ticked = _native.SLOT_MASK + 1, 0, True
        while self._running and shm.life == self.life:
            seen = shm.load32(self._doorbell)
            with self._lock:
                if not ticked and not self._past and (seen // one - last // one) % 1024 == 1:
                    # Rung once: that slot, or none. A count that came round in between is caught at the next tick.
                    hinted = self._foreign.get(seen % one)
                    handles = [] if hinted is None else [hinted]
                    hasty = [self._hasty[seen % one]] if seen % one in self._hasty else []
                else:
                    handles, self._past = [*self._foreign.values(), *self._past], []
                    hasty = list(self._hasty.values())
            for handle in shm.fences_done(handles):
                self.run(handle)
            for call in hasty:
                try:
                    call()
                except BaseException as e:
                    report(e, call)
            last, ticked = seen, False
            try:
                if self._foreign:
                    ticked = shm.wait(self._doorbell, seen, None) != 0
                else:
                    shm.idle(self._doorbell, seen)
            except Exception as e:  # a tick's error belongs to no wait of ours; the thread must go on
                report(e, self._serve)
                ticked = True

    def stop(self) -> None:
        """End the thread; what is still watched stays unserved."""
        self._running = False
        thread, self._thread = self._thread, None
        if thread is not None and self.shm.life == self.life and thread is not threading.current_thread():
            self._wake()
            thread.join()
            self.shm.store32(self._served, 0)


def in_callback() -> bool:
    """Does the running thread run a fence's callback?"""
    return bool(getattr(_here, "running", 0))


def defer(work: Callable[[], object]) -> None:
    """Do this when the callbacks that run in this thread are over; at once when there are none."""
    if in_callback():
        _deferred().append(work)
        return
    _deferred().append(work)
    try:
        _here.running = 1
        _work_off()
    finally:
        _here.running = 0


def _deferred() -> deque[Callable[[], object]]:
    found: deque[Callable[[], object]] | None = getattr(_here, "deferred", None)
    if found is None:
        found = _here.deferred = deque()
    return found


def _work_off() -> None:
    waiting: deque[Callable[[], object]] | None = getattr(_here, "deferred", None)
    while waiting:
        work = waiting.popleft()
        try:
            work()
        except BaseException as e:
            report(e, work)


def report(error: BaseException, where: Any) -> None:
    """An exception that nobody is there to catch, for sys.unraisablehook. Raises nothing, whatever the hook does."""
    _native.unraisable(error, where)


def _stop(ref: weakref.ref[Dispatcher]) -> None:
    dispatcher = ref()
    if dispatcher is not None:
        dispatcher.stop()


DISPATCHER: Local[Dispatcher] = Local(Dispatcher)


def dispatcher(domain: Domain) -> Dispatcher:
    """Return the dispatcher of this process in a domain, made at first use and again after a fork."""
    domain.join()
    found = DISPATCHER.of(domain)
    return found if found.life == domain.shm.life else DISPATCHER.renew(domain, found)
