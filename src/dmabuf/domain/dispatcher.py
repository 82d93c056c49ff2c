"""``Dispatcher``: callbacks, awaits and pollable descriptors of one process in one domain.

A process that registers sets this life's bit in the fence and then checks the fence's state. A process that signals stores the state and
then reads the bits. So at least one of the two notices the other. A fence of this process runs its callbacks in the thread that signals, as
in the kernel. A fence of another process runs them in the dispatcher's thread, which the signaling process wakes. If that process dies
before it wakes the thread, the thread notices at the next tick. The thread exists only while fences of other processes are watched.

Nobody wakes a process that has left. There the thread looks at every tick until nothing is watched, or until the process has joined again:
then the new life's dispatcher takes over what is watched.
"""

from __future__ import annotations

import atexit
import itertools
import select
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

from dmabuf._native import LIFE_DOORBELL, LIFE_SERVED, SLOT_MASK, TICK_POLL, finish, raise_later, unraisable
from dmabuf.domain import lives
from dmabuf.domain.domain import TICK_NS, Domain
from dmabuf.domain.forks import fork_lock
from dmabuf.domain.guards import finished
from dmabuf.domain.local import Local
from dmabuf.domain.native_thread import NativeThread

_tokens = itertools.count(1)
_here = threading.local()  # running: whether this thread is inside a callback


class Dispatcher:
    """The callbacks that are registered with fences."""

    def __init__(self, domain: Domain) -> None:
        self.domain = domain
        self.shm = domain.join()
        self.life = self.shm.life
        # Re-entrant, because a signal handler or the finalizer of a fence may run in the middle of what it guards.
        self._lock = fork_lock()
        self._watched: dict[int, dict[int, Callable[[int], object]]] = {}
        self._foreign: dict[int, int] = {}  # slot -> the handle watched there; a slot has one pending fence at a time
        self._past: list[int] = []
        self._deadlines: dict[int, Callable[[], None]] = {}  # slot -> what to call when another process has set a deadline
        self._thread: NativeThread | None = None
        self._running = True
        # Whether the thread sleeps, or is about to, until a process rings. Only the thread changes it, under the lock, after it has looked
        # whether anything is watched. Every watcher that finds it set rings, so none relies on what another was about to do.
        self._tickless = False
        self._doorbell = lives.slot_offset(lives.index_of(self.life)) + LIFE_DOORBELL
        self._served = lives.slot_offset(lives.index_of(self.life)) + LIFE_SERVED
        me, of = weakref.ref(self), weakref.ref(domain)

        def on_local(handle: int) -> None:
            # The one that the domain has now: a signal handler may have made another in the middle of this one's making.
            domain = of()
            dispatcher: Dispatcher | None = domain.local.get(DISPATCHER) if domain is not None else None  # each call less is worth it here
            if dispatcher is not None:
                dispatcher.run(handle)

        self.shm.on_local = finished(on_local)  # what is left after a signal handler's exception is called again
        atexit.register(_stop, me)

    def watch(self, handle: int, call: Callable[[int], object], *, foreign: bool) -> int | None:
        """Call ``call(handle)`` once the fence is signaled. Return a token for :meth:`unwatch`, None if the fence is signaled already."""
        token = next(_tokens)
        try:
            with self._lock:
                self._watched.setdefault(handle, {})[token] = call
                if foreign:
                    self._look_for(handle)
            pending = self.shm.fence_watch(handle)
        except BaseException:
            self.unwatch(handle, token)  # the caller gets no token to do it with
            raise
        if pending:
            return token
        # The fence was signaled before the bit was set, so no process will wake this one. If the callback ran, it was registered in time.
        return None if self.unwatch(handle, token) else token

    def _look_for(self, handle: int) -> None:
        """Have the thread look at a fence that another process may signal. The lock is held."""
        before = self._foreign.setdefault(handle & SLOT_MASK, handle)
        if before != handle:  # the slot was used again, so the fence before is signaled
            self._past.append(before)
            self._foreign[handle & SLOT_MASK] = handle
        if self._thread is None and self._running:
            self._start()
        if self._tickless:
            self._wake()  # from now on it looks at every tick

    def unwatch(self, handle: int, token: int) -> bool:
        """Remove a registration. Return False if its callback ran already, or there was none."""
        with self._lock:
            calls = self._watched.get(handle)
            if calls is None or calls.pop(token, None) is None:
                return False
            if not calls:
                del self._watched[handle]
                self._forget(handle)
            return True

    def watch_deadline(self, handle: int, call: Callable[[], None] | None) -> None:
        """Call ``call()`` whenever another process may have set a deadline for this fence of this process; None ends that."""
        with self._lock:
            if call is None:
                self._deadlines.pop(handle & SLOT_MASK, None)
                return
            self._deadlines[handle & SLOT_MASK] = call
            if self._thread is None and self._running:
                self._start()

    def _forget(self, handle: int) -> None:
        """Stop watching a fence. The lock is held."""
        if self._foreign.get(handle & SLOT_MASK) == handle:
            del self._foreign[handle & SLOT_MASK]

    def run(self, handle: int) -> None:
        """Run the callbacks of a signaled fence in the order of registration."""
        with self._lock:
            if self._foreign:
                self._forget(handle)
            calls = self._watched.get(handle)
        before = getattr(_here, "running", 0)
        try:
            _here.running = 1
            if calls:
                _call_all(calls, handle)
            if not before:
                _work_off()
        finally:
            _here.running = before
        if calls is not None:
            with self._lock:
                if not calls and self._watched.get(handle) is calls:
                    del self._watched[handle]

    def is_here(self) -> bool:
        """Return True if the running thread is the one that calls the callbacks of other processes' fences."""
        return self._thread is not None and self._thread.is_here()

    def watches(self, handle: int) -> int:
        """Return how many callbacks are registered with one fence."""
        return len(self._watched.get(handle, ()))

    @property
    def watching(self) -> int:
        """The number of registered callbacks."""
        with self._lock:
            return sum(map(len, self._watched.values()))

    def _start(self) -> None:
        self.shm.store32(self._served, 1)
        self._thread = NativeThread(self._serve, "dmabuf-dispatcher")
        try:
            self._thread.start()
        except BaseException as e:  # no thread can be started: the next watch() tries again
            # If a signal handler raised, the thread may be about to run.
            if isinstance(e, RuntimeError) or not alive_soon(self._thread):
                self._thread = None
            raise

    def _wake(self) -> None:
        self.shm.add32(self._doorbell, SLOT_MASK + 1)
        self.shm.wake(self._doorbell)

    def _serve(self) -> None:
        shm = self.shm
        one, last, ticked = SLOT_MASK + 1, 0, True
        while True:
            seen = shm.load32(self._doorbell)  # before each look, so that who rings after the look changes it
            if not self._running:
                return
            if shm.life != self.life:
                self._look_on()
                return
            with self._lock:
                if not ticked and not self._past and (seen // one - last // one) % 1024 == 1:
                    # After one wake-up check that slot. If the count wrapped meanwhile, the next tick checks the others.
                    hinted = self._foreign.get(seen % one)
                    handles = [] if hinted is None else [hinted]
                    deadlines = [self._deadlines[seen % one]] if seen % one in self._deadlines else []
                else:
                    handles, self._past = [*self._foreign.values(), *self._past], []
                    deadlines = list(self._deadlines.values())
            for handle in shm.fences_done(handles):
                self.run(handle)
            for call in deadlines:
                try:
                    call()
                except BaseException as e:
                    report(e, call)
            last, ticked = seen, False
            with self._lock:
                self._tickless = not self._foreign and not self._past
            try:
                if self._tickless:  # a watcher that comes from here on rings, and then the doorbell isn't what was seen
                    shm.idle(self._doorbell, seen)
                else:
                    ticked = shm.wait(self._doorbell, seen, None) != 0
            except Exception as e:  # the error of a hook at a tick: the thread must go on
                report(e, self._serve)
                ticked = True

    def _look_on(self) -> None:
        """Look at what is watched at every tick, after this process has left."""
        while self._running:
            with self._lock:
                handles, self._past = [*self._foreign.values(), *self._past], []
                if not handles:
                    self._thread = None
                    return
            self.domain.tick(TICK_POLL, 0)  # the owners may be dead
            for handle in self.shm.fences_done(handles):
                self.run(handle)
            select.select([], [], [], TICK_NS / 1e9)

    def take_over(self, old: Dispatcher) -> None:
        """Watch what the dispatcher of an earlier life watches. A second call has no effect."""
        with old._lock:
            moved = [(handle, old._watched.pop(handle, {})) for handle in [*old._foreign.values(), *old._past]]
            old._foreign, old._past = {}, []
        for handle, calls in moved:
            with self._lock:
                mine = self._watched.setdefault(handle, calls)
                if mine is not calls:
                    _move(calls, mine)
                self._look_for(handle)
            self.shm.fence_watch(handle)  # if it is signaled already, the thread sees that

    def stop(self) -> None:
        """End the thread. Callbacks that are still registered don't run."""
        self._running = False
        thread, self._thread = self._thread, None
        if thread is not None and self.shm.life == self.life and not thread.is_here():
            self._wake()
            thread.join()
            self.shm.store32(self._served, 0)


def alive_soon(thread: threading.Thread) -> bool:
    """Return True if a thread runs whose start() was interrupted."""
    for _ in range(20):
        if thread.is_alive():
            return True
        select.select([], [], [], 0.005)
    return False


def in_callback() -> bool:
    """Return True if the running thread runs a fence's callback."""
    return bool(getattr(_here, "running", 0))


def defer(work: Callable[[], object]) -> None:
    """Call ``work`` after the callbacks that run in this thread, or at once if none run."""
    if in_callback():
        _deferred().append(work)
        return
    _deferred().append(work)
    try:
        _here.running = 1
        _work_off()
    finally:
        _here.running = 0


def _move(calls: dict[int, Callable[[int], object]], into: dict[int, Callable[[int], object]]) -> None:
    """Move callbacks one by one: the thread of an earlier life may be about to call them."""
    while calls:
        token = next(iter(calls))
        into[token] = calls.pop(token)


def _call_all(calls: dict[int, Callable[[int], object]], handle: int) -> None:
    """Take the callbacks out, oldest first, and call them."""
    while calls:
        try:
            token = next(iter(calls))
            # No signal handler runs between these two lines and the call: a callback is neither lost nor called twice.
            call = calls[token]
            del calls[token]
        except (KeyError, RuntimeError, StopIteration):
            continue  # another thread took it
        try:
            finish(call, handle)
        except BaseException as e:
            report(e, call)


def _deferred() -> deque[Callable[[], object]]:
    found: deque[Callable[[], object]] | None = getattr(_here, "deferred", None)
    if found is None:
        found = _here.deferred = deque()
    return found


def _work_off() -> None:
    waiting: deque[Callable[[], object]] | None = getattr(_here, "deferred", None)
    while waiting:
        work = waiting[0]
        del waiting[0]
        try:
            finish(work)
        except BaseException as e:
            report(e, work)


def report(error: BaseException, where: Any) -> None:
    """Pass an exception that no caller can catch to ``sys.unraisablehook``. What the hook raises is dropped.

    KeyboardInterrupt and its like come from a signal handler, and not from a callback: the main thread raises them a moment later.
    """
    if isinstance(error, Exception) or not raise_later(error):
        unraisable(error, where)


def _stop(ref: weakref.ref[Dispatcher]) -> None:
    dispatcher = ref()
    if dispatcher is not None:
        dispatcher.stop()


DISPATCHER: Local[Dispatcher] = Local(Dispatcher)


def unwatch(domain: Domain, handle: int, token: int) -> bool:
    """Remove a registration as :meth:`Dispatcher.unwatch` does. The process joins nothing for it, and a forked child has none."""
    found = DISPATCHER.peek(domain)
    return found is not None and not domain.shm.forked and found.unwatch(handle, token)


def dispatcher(domain: Domain) -> Dispatcher:
    """Return the dispatcher of this process in a domain, made at first use and again after a fork."""
    life = domain.shm.life
    found: Dispatcher | None = domain.local.get(DISPATCHER)  # not of() alone: each await makes this call twice
    if found is not None and life and found.life == life:
        return found
    domain.join()
    found = DISPATCHER.of(domain)
    if found.life == domain.shm.life:
        return found
    made = DISPATCHER.renew(domain, found)
    made.take_over(found)
    return made
