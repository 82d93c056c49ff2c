"""``DmaFence``: an object that says when work is done (semantics 3).

A fence is pending until it is signaled, once, with or without an error. It never becomes pending again. It belongs to a timeline (a fence
context), and the timeline to the process that made it: only that process signals the fence, and any process waits for it. Every fence is
signaled in the end: with ``-EOWNERDEAD`` when its owner dies, with ``-ENOENT`` when its timeline is closed, and with ``-EDEADLK`` (and a
``ResourceWarning``) when its owner drops it while others wait for it.

Any thread may call anything here, with or without a reservation lock. Waits release the GIL. Only an exception that a signal handler
raises ends them early. They never raise the fence's own error, which is in ``status``.

Callbacks of this process's fences run in the thread that signals, in the order in which they were added. Callbacks of another process's
fences run in the dispatcher's thread. A callback must not block.
"""

from __future__ import annotations

import errno
import operator
import os
import warnings
import weakref
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias

from dmabuf._native import FF_ACCESS, FF_ANYBODY, FF_CONTAINER, FF_SEQNO64, Fence, Shm, TimelineSlot, WeakValues
from dmabuf.core.task.waiting import pause
from dmabuf.domain.dispatcher import DISPATCHER, dispatcher, unwatch
from dmabuf.domain.domain import Domain
from dmabuf.domain.local import Local
from dmabuf.errors import contract_warning, fail

if TYPE_CHECKING:
    from dmabuf.answers import FenceInfo

MAX_ERRNO = 4095  # include/linux/err.h
MAX_TIME = (1 << 63) - 1  # ns, include/linux/ktime.h
_NOT_OURS = "another process owns its timeline"
_OWNER_SIGNALS = "signal it in the process that made its timeline"

flagged = Fence.is_signaled  # the flag alone; a fence with operations of its own may know more when it is asked (semantics 3.6)


class Origin(Protocol):
    """Where a fence comes from: the timeline that it keeps alive, and whose names it has."""

    driver: str
    name: str


@dataclass(frozen=True)
class FenceStatistics:
    """A snapshot of a fence. ``since``: CLOCK_MONOTONIC ns at which it was made, 0 when its slot is in use by another fence."""

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

    ``context``, ``seqno``: its timeline, and its number there. ``status``: 0 pending, 1 signaled, or the negative errno that it was
    signaled with. ``error``: that errno, or 0. ``timestamp``: CLOCK_MONOTONIC ns of the signal. It is 0 while the fence is pending, and for
    a fence of another process whose slot was reused before this process looked. Fences are equal if they are the same fence of the domain
    (semantics 3).

    Kernel: dma_fence (context, seqno, error, timestamp), dma_fence_signal as signal, dma_fence_is_signaled as is_signaled,
    dma_fence_get_status as status, dma_fence_timestamp as timestamp, dma_fence_wait as wait, dma_fence_wait_timeout as wait,
    dma_fence_default_wait as wait.
    """

    __slots__ = ("__weakref__", "_names", "_timeline", "domain")

    domain: Domain
    _timeline: Origin | None
    _names: tuple[str, str, int] | None

    def __repr__(self) -> str:
        state = {0: "pending", 1: "signaled"}.get(self.status, str(self.status))
        kind = "DmaFence" if type(self).__name__ == "CustomFence" else type(self).__name__
        return f"<dmabuf.{kind} {self.driver_name} {self.timeline_name} {self.context}:{self.seqno} {state}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DmaFence) and (self.shm, self.handle) == (other.shm, other.handle)

    def __hash__(self) -> int:
        return hash((id(self.shm), self.handle))

    def _look_up(self) -> tuple[str, str, int]:
        if self._names is None:
            # Fences of one timeline come many at a time, and have the same names.
            known: dict[tuple[int, int, int], tuple[str, str, int]] = self.domain.local.get(_ORIGINS) or _ORIGINS.of(self.domain)
            origin = self.shm.fence_origin(self.handle)
            found = None if origin is None or self._timeline is not None else known.get(origin)
            if found is None or origin is None or not self.shm.life_current(origin[2]):
                info, line = self.shm.fence_info(self.handle), self._timeline
                pid = self.domain.pid_of(info["life"]) if info else 0
                driver, name = (line.driver, line.name) if line is not None else names_of(self.shm, info) if info else ("", "")
                found = driver, name, pid
                if (
                    origin is not None and origin[1] and pid and driver and self.shm.fence_origin(self.handle) == origin
                ):  # all of it was the same fence's
                    if len(known) >= _MOST_ORIGINS:
                        known.clear()
                    known[origin] = found
            self._names = found
        return self._names

    @property
    def driver_name(self) -> str:
        """The driver's name of its timeline; "" when the slot of the fence or the timeline was reused before this process looked.

        Kernel: dma_fence_ops.get_driver_name.
        """
        return self._look_up()[0]

    @property
    def timeline_name(self) -> str:
        """The timeline's name; "" as for :attr:`driver_name`.

        Kernel: dma_fence_ops.get_timeline_name.
        """
        return self._look_up()[1]

    @property
    def pid(self) -> int:
        """The process that owns it, 0 when that process is gone."""
        return self._look_up()[2]

    # ---- signaling it ----

    def set_error(self, error: int) -> None:
        """Set the negative errno that the fence will be signaled with (semantics 3.5). Call it before ``signal``.

        A ``ContractWarning`` tells of a signaled fence, which keeps its status, and of an ``error`` outside of -4095…-1, which is stored as
        the kernel does.

        Raises:
            NotPermittedError: Another process owns the timeline (EPERM).

        Kernel: dma_fence_set_error.
        """
        error = operator.index(error)
        if not self.owned:
            raise fail(errno.EPERM, "set_error", self, _OWNER_SIGNALS, what=_NOT_OURS)
        if flagged(self):
            contract_warning(f"set_error: {self!r}: it is already signaled; set the error before signal()", 2)
            return
        if not -MAX_ERRNO <= error < 0:
            contract_warning(f"set_error: {self!r}: {error} is not a negative errno; pass -errno.EIO or the like", 2)
        self.shm.fence_set_error(self.handle, error)

    def signal_timestamp(self, timestamp: int, error: int = 0) -> None:
        """Signal the fence with the time at which its work was done (semantics 3.4).

        Args:
            timestamp: CLOCK_MONOTONIC ns.
            error: A negative errno, or 0.

        Raises:
            InvalidError: The fence is already signaled, the time is not positive or above 2⁶³-1, or ``error`` is positive or below -4095
                (EINVAL).
            NotPermittedError: Another process owns the timeline (EPERM).

        Kernel: dma_fence_signal_timestamp.
        """
        if not self.owned:
            raise fail(errno.EPERM, "signal_timestamp", self, _OWNER_SIGNALS, what=_NOT_OURS)
        if not 0 < timestamp <= MAX_TIME:
            what = f"the time {timestamp} is {'not positive' if timestamp <= 0 else 'out of range'}"
            raise fail(errno.EINVAL, "signal_timestamp", self, "pass CLOCK_MONOTONIC ns", what=what)
        if not -MAX_ERRNO <= error <= 0:
            raise fail(errno.EINVAL, "signal_timestamp", self, "pass a negative errno, or 0", what=f"{error} is not a negative errno")
        if not self.shm.fence_signal(self.handle, error, False, timestamp):
            raise fail(errno.EINVAL, "signal_timestamp", self, "signal a fence once", what="it is already signaled")

    # ---- callbacks ----

    def add_callback(self, fn: Callable[[DmaFence], object]) -> int:
        """Call ``fn(fence)`` once, when the fence is signaled (semantics 3.7).

        If a signal handler raises in the middle of ``fn``, it is called again: it may not have begun.

        Returns:
            A number for :meth:`remove_callback`.

        Raises:
            NotFoundError: The fence is already signaled; ``fn`` is not called (ENOENT).

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
            raise fail(errno.ENOENT, "add_callback", self, "read its status instead", what="it is already signaled")
        return token

    def listen(self, call: Callable[[int], object]) -> int | None:
        """Add a callback for the package's own use, which gets the handle. Return None when the fence is already signaled."""
        if flagged(self):
            return None
        self.enable_signaling()
        # Where another process may signal it, our dispatcher is woken.
        foreign = not self.owned or bool(self.flags & FF_ANYBODY)
        return dispatcher(self.domain).watch(self.handle, call, foreign=foreign)

    def remove_callback(self, handle: int) -> bool:
        """Remove a callback (semantics 3.7).

        Returns:
            False if it has already run.

        Kernel: dma_fence_remove_callback.
        """
        return unwatch(self.domain, self.handle, handle)

    def enable_signaling(self) -> None:
        """Ask that the fence be signaled by itself. A fence without operations of its own always is (semantics 3.8).

        Kernel: dma_fence_enable_sw_signaling.
        """

    def publish(self) -> None:
        """Prepare for other processes, before the fence is on a reservation object or in a message.

        They wait for its slot and can't call its operations, so signaling is enabled now.
        """
        self.enable_signaling()

    # ---- numbers (semantics 3.10) ----

    def is_later(self, other: DmaFence) -> bool:
        """Return True if this fence comes after the other on their timeline. Numbers of 32 bits wrap, and equal ones are not later.

        Fences of different contexts get a ``ContractWarning`` and False.

        Kernel: dma_fence_is_later.
        """
        if self.context != other.context:
            contract_warning(f"is_later: {self!r} and {other!r} are of different contexts, which have no order", 2)
            return False
        if self.flags & FF_SEQNO64:
            return self.seqno > other.seqno
        return 0 < (self.seqno - other.seqno) & 0xFFFFFFFF < 0x80000000

    def is_later_or_same(self, other: DmaFence) -> bool:
        """Return True for the same fence, and where :meth:`is_later` does. Two fences with equal numbers are neither.

        Kernel: dma_fence_is_later_or_same.
        """
        return self == other or self.is_later(other)

    def later(self, other: DmaFence) -> DmaFence | None:
        """Return the later of two fences (``other`` on a tie), or None when that one is signaled: a context's fences complete in order.

        Fences of different contexts get a ``ContractWarning`` and None.

        Kernel: dma_fence_later.
        """
        if self.context != other.context:
            contract_warning(f"later: {self!r} and {other!r} are of different contexts, which have no order", 2)
            return None
        found = self if self.is_later(other) else other
        return None if found.is_signaled() else found

    def match_context(self, context: int) -> bool:
        """Return True if the fence is of this context; for an array, if every member is (semantics 3.15).

        Kernel: dma_fence_match_context.
        """
        return self.context == context

    # ---- hints ----

    def set_deadline(self, ns: int) -> None:
        """Hint that the fence is wanted by a time, in CLOCK_MONOTONIC ns. The earliest of all hints counts (semantics 3.12).

        Raises:
            InvalidError: The time is negative (EINVAL).

        Kernel: dma_fence_set_deadline.
        """
        if ns < 0:
            raise fail(errno.EINVAL, "set_deadline", self, "pass CLOCK_MONOTONIC ns", what=f"the time {ns} is negative")
        if not self.is_signaled():
            self.shm.fence_set_deadline(self.handle, min(max(ns, 1), MAX_TIME))

    @property
    def deadline(self) -> int | None:
        """The earliest deadline that anybody set, in CLOCK_MONOTONIC ns, or None."""
        info = self.shm.fence_info(self.handle)
        return info["deadline"] or None if info else None

    def __await__(self) -> Generator[Any, None, int]:
        """Wait in a task of asyncio or trio. The result is ``status``. Canceling leaves nothing registered."""
        if not self.is_signaled():
            stop = pause()
            token = self.listen(lambda _: stop.end())
            if token is not None:
                try:
                    yield from stop.__await__()
                finally:
                    self.remove_callback(token)
        return self.status

    def describe(self) -> str:
        """Return one line of text as the kernel's debugfs prints a fence (semantics 3.14).

        Kernel: dma_fence_describe.
        """
        state = "signalled" if self.is_signaled() else "unsignalled"
        return f"{self.driver_name} {self.timeline_name} seq {self.seqno} {state}\n"

    def statistics(self) -> FenceStatistics:
        """Return a snapshot for programs."""
        info = self.shm.fence_info(self.handle)
        local = DISPATCHER.peek(self.domain)
        count = local.watches(self.handle) if local else 0
        return FenceStatistics(*self._look_up()[:2], self.context, self.seqno, self.status, self.pid, info["created"] if info else 0, count)

    def __reduce__(self) -> Any:
        raise TypeError("a DmaFence can't be pickled: send it with dmabuf.send(), or add it to a buffer's reservation object")

    def drop(self) -> None:
        """Signal the fence, whose object goes, if it is this process's and pending.

        The object's finalizer, which is in C, makes this call for a pending fence that others may know.
        """
        if self.owned and not flagged(self):
            domain = getattr(self, "domain", None)  # None: a signal handler raised before it was complete
            local = DISPATCHER.peek(domain) if domain is not None else None
            shared = self.shm.fence_shared(self.handle) or (local is not None and local.watches(self.handle))
            if shared:
                warnings.warn(
                    f"{self!r} was dropped unsignaled while others wait for it: it is signaled with -EDEADLK",
                    ResourceWarning,
                    stacklevel=2,
                    source=self,
                )
            # A failure is kept for processes that look late. No process looks for a fence that none knew.
            self.shm.fence_signal(self.handle, -errno.EDEADLK if shared else 0, False)


# ---- for the package ----

# The fences that this process knows, by handle.
_Known: TypeAlias = WeakValues[int, DmaFence]
KNOWN: Local[_Known] = Local(lambda _: WeakValues())

# Names of a timeline and pid of its process, by what `Shm.fence_origin` says: a context is never used again.
_ORIGINS: Local[dict[tuple[int, int, int], tuple[str, str, int]]] = Local(lambda _: {})
_MOST_ORIGINS: Final = 1024

# The timelines of this process for fences that belong to none, by their driver's names.
_UNBOUND: Local[dict[str, TimelineSlot]] = Local(lambda _: {})


def register(fence: DmaFence, domain: Domain, timeline: Origin | None) -> None:
    """Complete a new fence object, and let :func:`wrap` find it."""
    fence.domain, fence._timeline, fence._names = domain, timeline, None
    known: _Known | None = domain.local.get(KNOWN)  # not of() alone: each new fence makes this call
    (KNOWN.of(domain) if known is None else known)[fence.handle] = fence


def names_of(shm: Shm, info: FenceInfo) -> tuple[str, str]:
    """Return the names of driver and timeline for an answer of ``Shm.fence_info``; "" when the timeline's slot was reused since.

    A timeline has the context of its fences. Accesses, containers and stubs have a context each, or none, and share a timeline of their
    process.
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
    known: dict[str, TimelineSlot] = domain.local.get(_UNBOUND) or _UNBOUND.of(domain)
    found = known.get(kind)
    if found is None:
        # Two threads may both open one: the one that is known first serves both.
        found = known.setdefault(kind, domain.timeline_open(kind.encode(), b"stub" if kind == "stub" else b"unbound"))
    return found.index + 1


def wrap(domain: Domain, handle: int, past: tuple[int, ...] = (0, 0, 0), names: tuple[str, str] | None = None) -> DmaFence:
    """Return the fence with this handle: the object that this process already has, or a new one.

    Args:
        domain: The fence's domain.
        handle: Its slot and generation.
        past: Its context, seqno and timeline_index, and if known its status and timestamp, in case its slot was reused.
        names: The names of its driver and timeline, in the same case.
    """
    known: _Known | None = domain.local.get(KNOWN)
    fence = (KNOWN.of(domain) if known is None else known).get(handle)
    if fence is None:
        fence = DmaFence(domain.shm, handle, False, *past)
        register(fence, domain, None)
        if not fence.is_signaled():
            fence._look_up()  # its names are gone once its slot is reused
    if names is not None:
        driver, name, pid = fence._look_up()
        if not driver and not name:  # the slot no longer has them
            fence._names = *names, pid
    return fence
