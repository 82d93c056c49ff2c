"""``DmaFence`` and ``Timeline``: a fence says when somebody is done (spec 3).

A fence is pending until it is signalled, once, with or without an error; it never goes back. It belongs to a timeline (a fence
context), and a timeline to the process that made it: only that process signals, everybody waits. A fence always ends: when its owner
dies with ``-EOWNERDEAD``, when its timeline is closed with ``-ENOENT``, when the owner drops it while somebody still holds it with
``-EDEADLK`` (and a ``ResourceWarning``).

Any thread may call anything here, with or without a reservation lock. Waits release the GIL, end early only by an exception that a
signal handler raises, and never raise the fence's own error: that is what ``status`` says.

Callbacks of a fence of this process run in the thread that signals it, in the order they were added; callbacks of another process's
fence run in the dispatcher's thread. A callback must not block.
"""

from __future__ import annotations

import errno
import operator
import os
import warnings
import weakref
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Protocol

from dmabuf._native import FF_ACCESS, FF_ANYBODY, FF_CONTAINER, FF_SEQNO64, Fence, Shm
from dmabuf.core.task import waiting as awaiting
from dmabuf.domain.dispatcher import DISPATCHER, dispatcher
from dmabuf.domain.domain import Domain
from dmabuf.domain.local import Local
from dmabuf.errors import contract_warning, fail

MAX_ERRNO = 4095  # include/linux/err.h

flagged = Fence.is_signaled  # the flag alone; a fence with operations of its own may know more when it is asked (spec 3.6)


class Origin(Protocol):
    """What a fence comes from: the timeline that it keeps alive, whose names it bears."""

    driver: str
    name: str


@dataclass(frozen=True)
class FenceStatistics:
    """What a fence says of itself. ``since``: CLOCK_MONOTONIC ns of its making, 0 when its slot was used again."""

    driver: str
    timeline: str
    context: int
    seqno: int
    status: int
    pid: int
    since: int
    callbacks: int


class DmaFence(Fence):
    """A fence. Made by :meth:`Timeline.fence`, or found on a reservation object; not constructed by hand.

    ``context``, ``seqno``: which timeline, which number on it. ``status``: 0 pending, 1 signalled, or the negative errno it ended with;
    ``error``: that errno or 0. ``timestamp``: CLOCK_MONOTONIC ns of signalling, 0 while pending (and for a fence of another process whose
    slot was used again before anybody here looked). Equal and hashed by identity in the domain. Spec 3.

    Kernel: dma_fence (context, seqno, error, timestamp), dma_fence_signal as signal, dma_fence_is_signaled as is_signaled,
    dma_fence_get_status as status, dma_fence_timestamp as timestamp, dma_fence_wait as wait, dma_fence_wait_timeout as wait,
    dma_fence_default_wait as wait.
    """

    __slots__ = ("__weakref__", "_names", "_timeline", "domain")

    domain: Domain
    _timeline: Origin | None
    _names: tuple[str, str, int] | None

    def __repr__(self) -> str:
        state = {0: "pending", 1: "signalled"}.get(self.status, str(self.status))
        kind = "DmaFence" if type(self).__name__ == "CustomFence" else type(self).__name__
        return f"<dmabuf.{kind} {self.driver_name} {self.timeline_name} {self.context}:{self.seqno} {state}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DmaFence) and (self.shm, self.handle) == (other.shm, other.handle)

    def __hash__(self) -> int:
        return hash((id(self.shm), self.handle))

    def _look_up(self) -> tuple[str, str, int]:
        if self._names is None:
            info, line = self.shm.fence_info(self.handle), self._timeline
            pid = self.domain.pid_of(info["life"]) if info else 0
            driver, name = (line.driver, line.name) if line is not None else names_of(self.shm, info) if info else ("", "")
            self._names = driver, name, pid
        return self._names

    @property
    def driver_name(self) -> str:
        """Who made the timeline ("" when its slot, or the fence's, was used again before anybody here looked).

        Kernel: dma_fence_ops.get_driver_name.
        """
        return self._look_up()[0]

    @property
    def timeline_name(self) -> str:
        """The timeline's name. Kernel: dma_fence_ops.get_timeline_name."""
        return self._look_up()[1]

    @property
    def pid(self) -> int:
        """The process that owns it, 0 when that is gone."""
        return self._look_up()[2]

    # ---- ending it ----

    def set_error(self, error: int) -> None:
        """The negative errno that the fence will end with, to be set before it is signalled (spec 3.5).

        Errors: EPERM from another process. ``ContractWarning`` when signalled already, or when ``error`` is not in -4095…-1; the kernel
        stores it regardless, and so do we while the fence is pending. Kernel: dma_fence_set_error.
        """
        error = operator.index(error)
        if not self.owned:
            raise fail(errno.EPERM, "set_error", self, "only the process that owns the timeline ends its fences")
        if flagged(self):
            contract_warning(f"set_error: {self!r} is signalled already: set the error before signalling", 2)
            return
        if not -MAX_ERRNO <= error < 0:
            contract_warning(f"set_error: {error} is no negative errno", 2)
        self.shm.fence_mark(self.handle, "error", error)

    def signal_timestamp(self, timestamp: int, error: int = 0) -> None:
        """:meth:`signal` with the time at which it happened, CLOCK_MONOTONIC ns (spec 3.4). Kernel: dma_fence_signal_timestamp.

        Errors: EINVAL signalled already, a time that is not positive, or an error that is no negative errno; EPERM from another process.
        """
        if not self.owned:
            raise fail(errno.EPERM, "signal_timestamp", self, "only the process that owns the timeline signals its fences")
        if timestamp <= 0 or not -MAX_ERRNO <= error <= 0:
            raise fail(errno.EINVAL, "signal_timestamp", self, "a time is > 0 ns, an error a negative errno or 0")
        if not self.shm.fence_signal(self.handle, error, False, timestamp):
            raise fail(errno.EINVAL, "signal_timestamp", self, "a fence is signalled once")

    # ---- callbacks ----

    def add_callback(self, fn: Callable[[DmaFence], object]) -> int:
        """Call ``fn(fence)`` once when the fence is signalled; returns a handle for :meth:`remove_callback` (spec 3.7).

        Errors: ENOENT when it is signalled already (``fn`` is not called). TypeError when ``fn`` can't be called.

        Kernel: dma_fence_add_callback, dma_fence_func_t as fn, dma_fence_cb.func as fn.
        """
        if not callable(fn):
            raise TypeError("add_callback: fn is a function of one argument, the fence")
        me, domain = weakref.ref(self), self.domain

        def call(handle: int) -> None:
            # A queued callback must not keep a fence alive that its owner drops.
            fn(me() or wrap(domain, handle))

        token = self.listen(call)
        if token is None:
            raise fail(errno.ENOENT, "add_callback", self, "it is signalled: look at its status", what="already signalled")
        return token

    def listen(self, call: Callable[[int], object]) -> int | None:
        """:meth:`add_callback` for the package's own use: the call gets the handle; None when the fence is signalled already."""
        if flagged(self):
            return None
        self.enable_signaling()
        foreign = not self.owned or bool(self.flags & FF_ANYBODY)  # ended elsewhere, it is our dispatcher that is rung
        return dispatcher(self.domain).watch(self.handle, call, foreign=foreign)

    def remove_callback(self, handle: int) -> bool:
        """Take a callback back; False when it ran already (spec 3.7). Kernel: dma_fence_remove_callback."""
        return dispatcher(self.domain).unwatch(self.handle, handle)

    def enable_signaling(self) -> None:
        """Ask that the fence will signal by itself. One without operations of its own always does (spec 3.8).

        Kernel: dma_fence_enable_sw_signaling.
        """

    def publish(self) -> None:
        """The fence is about to be known elsewhere: on a reservation object, in a message.

        Others wait for its slot and can't call its operations, so signalling is enabled now.
        """
        self.enable_signaling()

    # ---- numbers (spec 3.10) ----

    def is_later(self, other: DmaFence) -> bool:
        """Does this fence come after the other on their timeline? Numbers of 32 bits wrap; equal ones are not later.

        ``ContractWarning`` and False when they are of different contexts. Kernel: dma_fence_is_later.
        """
        if self.context != other.context:
            contract_warning(f"is_later: {self!r} and {other!r} are of different contexts, which have no order", 2)
            return False
        if self.flags & FF_SEQNO64:
            return self.seqno > other.seqno
        return 0 < (self.seqno - other.seqno) & 0xFFFFFFFF < 0x80000000

    def is_later_or_same(self, other: DmaFence) -> bool:
        """The same fence, or :meth:`is_later`. Two fences with equal numbers are neither.

        Kernel: dma_fence_is_later_or_same.
        """
        return self == other or self.is_later(other)

    def later(self, other: DmaFence) -> DmaFence | None:
        """The later of the two (``other`` on a tie), None when that one is signalled: a context's fences complete in order.

        ``ContractWarning`` and None when they are of different contexts. Kernel: dma_fence_later.
        """
        if self.context != other.context:
            contract_warning(f"later: {self!r} and {other!r} are of different contexts, which have no order", 2)
            return None
        found = self if self.is_later(other) else other
        return None if found.is_signaled() else found

    def match_context(self, context: int) -> bool:
        """Is the fence, or every member of the array, of this context? (Spec 3.15.) Kernel: dma_fence_match_context."""
        return self.context == context

    # ---- hints ----

    def set_deadline(self, ns: int) -> None:
        """Hint that somebody wants the fence by this CLOCK_MONOTONIC time, in ns; the earliest of all hints counts (spec 3.12).

        Errors: EINVAL for a negative time. Kernel: dma_fence_set_deadline.
        """
        if ns < 0:
            raise fail(errno.EINVAL, "set_deadline", self, "a deadline is CLOCK_MONOTONIC nanoseconds")
        if not self.is_signaled():
            self.shm.fence_mark(self.handle, "deadline", max(ns, 1))

    @property
    def deadline(self) -> int | None:
        """The earliest deadline anybody set, CLOCK_MONOTONIC ns, or None."""
        info = self.shm.fence_info(self.handle)
        return info["deadline"] or None if info else None

    def __await__(self) -> Generator[Any, None, int]:
        """Wait in a coroutine, of asyncio or trio; the result is ``status``. Cancelling leaves nothing registered."""
        if not self.is_signaled():
            pause = awaiting.pause()
            token = self.listen(lambda _: pause.end())
            if token is not None:
                try:
                    yield from pause.__await__()
                finally:
                    self.remove_callback(token)
        return self.status

    def describe(self) -> str:
        """One line of text as the kernel's debugfs prints a fence (spec 3.14). Kernel: dma_fence_describe."""
        state = "signalled" if self.is_signaled() else "unsignalled"
        return f"{self.driver_name} {self.timeline_name} seq {self.seqno} {state}\n"

    def statistics(self) -> FenceStatistics:
        """A snapshot for programs."""
        info = self.shm.fence_info(self.handle)
        local = DISPATCHER.peek(self.domain)
        count = local.watches(self.handle) if local else 0
        return FenceStatistics(*self._look_up()[:2], self.context, self.seqno, self.status, self.pid, info["created"] if info else 0, count)

    def __reduce__(self) -> Any:
        raise TypeError("a DmaFence is not pickled: send it with dmabuf.send(), or add it to a buffer's reservation object")

    def __del__(self) -> None:
        if self.owned and not flagged(self):
            local = DISPATCHER.peek(self.domain)
            shared = self.shm.fence_shared(self.handle) or (local is not None and local.watches(self.handle))
            if shared:
                warnings.warn(
                    f"{self!r} was dropped unsignalled while others wait for it: it ends with -EDEADLK",
                    ResourceWarning,
                    stacklevel=2,
                    source=self,
                )
            # A failure is remembered for those who look late: there is nobody to remember one of a fence that nobody knew.
            self.shm.fence_signal(self.handle, -errno.EDEADLK if shared else 0, False)


# The fences that this process knows, by handle.
KNOWN: Local[weakref.WeakValueDictionary[int, DmaFence]] = Local(lambda _: weakref.WeakValueDictionary())

# The slot number + 1 of each timeline of this process for fences that belong to none, by its driver's name.
_UNBOUND: Local[dict[str, int]] = Local(lambda _: {})


def register(fence: DmaFence, domain: Domain, timeline: Origin | None) -> None:
    fence.domain, fence._timeline, fence._names = domain, timeline, None
    KNOWN.of(domain)[fence.handle] = fence


def _make(domain: Domain, shm: Shm, handle: int, past: tuple[int, ...]) -> DmaFence:
    fence = DmaFence(shm, handle, False, *past)
    register(fence, domain, None)
    return fence


def names_of(shm: Shm, info: dict[str, Any]) -> tuple[str, str]:
    """The names of driver and timeline of what :meth:`Shm.fence_info` told; "" when the timeline's slot was used again since.

    A timeline has the context of its fences. Accesses, containers and stubs have one each, or none, and share a timeline of their process.
    """
    found = shm.timeline_info(info["timeline"] - 1) if info["timeline"] else None
    if found is None:
        return "", ""
    shares = not info["context"] or info["flags"] & (FF_ACCESS | FF_CONTAINER)
    if found[2] != info["context"] and not (shares and found[3] == info["life"]):
        return "", ""
    return os.fsdecode(found[4]), os.fsdecode(found[5])


def unbound_timeline(domain: Domain, kind: str) -> int:
    """Return the slot number + 1 of this process's timeline for fences that belong to none, such as containers and stubs."""
    domain.join()
    known = _UNBOUND.of(domain)
    found = known.get(kind)
    if found is None:
        found = known[kind] = domain.timeline_open(kind.encode(), b"stub" if kind == "stub" else b"unbound")[0] + 1
    return found


def wrap(domain: Domain, handle: int, past: tuple[int, ...] = (0, 0, 0), names: tuple[str, str] | None = None) -> DmaFence:
    """The fence with this handle; the object that is already known in this process, if there is one.

    ``past``: its context, seqno and timeline_index, for the case that its slot was used again; where they are known, its status and
    timestamp too. ``names``: of its driver and its timeline, for the same case.
    """
    fence = KNOWN.of(domain).get(handle)
    if fence is None:
        fence = _make(domain, domain.shm, handle, past)
        if not fence.is_signaled():
            fence._look_up()  # its names are gone once its slot is used again
    if names is not None:
        driver, name, pid = fence._look_up()
        if not driver and not name:  # nobody else remembers them
            fence._names = *names, pid
    return fence
