"""Fences that have to be asked: what custom fences and containers are built on (spec 3.1, 3.6-3.9)."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from dmabuf._native import FF_HASTY, Shm
from dmabuf.core.base.clock import monotonic_deadline
from dmabuf.core.fence.fence import DmaFence, flagged
from dmabuf.core.fence.ops import FenceOps
from dmabuf.domain.dispatcher import DISPATCHER, dispatcher, report
from dmabuf.domain.domain import Domain
from dmabuf.domain.local import Local


class LazyFence(DmaFence):
    """A fence that has to be asked: what custom fences and containers are built on."""

    # Its presence says that nobody has asked yet; deleting it is one step, so one asker enables. No lock: a signal handler or a finaliser
    # may come to the same fence in the middle of this.
    __slots__ = ("_unasked",)

    _unasked: bool

    def _enable(self) -> bool:
        """Begin to watch; False: done already."""
        raise NotImplementedError

    def _polled(self) -> bool:
        """Done, whatever the flag says?"""
        raise NotImplementedError

    def _error(self) -> int:
        """What it ends with, when it ends by itself."""
        return 0

    def _finish(self) -> None:
        """End it, if nobody else did."""
        self.shm.fence_signal(self.handle, self._error(), False)

    def enable_signaling(self) -> None:
        """Ask that the fence will signal by itself: once, and without effect afterwards or in a forked child (spec 3.8)."""
        if self.enabled or not self.owned or flagged(self):
            return
        try:
            del self._unasked
        except AttributeError:
            return
        try:
            going = self._enable()
        except BaseException:
            self._unasked = True
            raise
        if not going:
            self._finish()

    @property
    def enabled(self) -> bool:
        """Was signalling asked for?"""
        return not hasattr(self, "_unasked")

    def is_signaled(self) -> bool:
        """True once the fence has ended, or says that it is done; then it is signalled here (spec 3.6). Never enables signalling."""
        if flagged(self):
            return True
        if self.owned and self._polled():
            self._finish()
            return True
        return False

    @property
    def status(self) -> int:
        """0 pending, 1 signalled, or the negative errno it ended with; asks as :meth:`is_signaled` does (spec 3.5)."""
        self.is_signaled()
        return super().status

    def wait(self, timeout: float | None = None, *, interruptible: bool = False) -> float:
        """Enable signalling, then wait until signalled; the seconds left (> 0; inf for None), 0.0 when timed out (spec 3.9).

        Errors: EINVAL a negative timeout; EINTR a signal, if ``interruptible``.
        """
        monotonic_deadline(timeout, "wait", self)
        self.enable_signaling()
        return super().wait(timeout, interruptible=interruptible)


class CustomFence(LazyFence):
    """A fence with :class:`FenceOps`; made by ``Timeline.fence(ops=…)``."""

    __slots__ = ("_told", "ops")

    ops: FenceOps
    _told: int  # the earliest deadline that the operations know of; 0: none

    def _enable(self) -> bool:
        return self.ops.enable_signaling(self)

    def _polled(self) -> bool:
        return type(self.ops).signaled is not FenceOps.signaled and self.ops.signaled(self)

    def wait(self, timeout: float | None = None, *, interruptible: bool = False) -> float:
        """:meth:`LazyFence.wait`, or the fence's own."""
        if not self.waits_itself:
            return super().wait(timeout, interruptible=interruptible)
        monotonic_deadline(timeout, "wait", self)
        self.enable_signaling()
        left = self.ops.wait(self, interruptible, timeout)
        return math.inf if timeout is None and left > 0 else float(left)

    @property
    def waits_itself(self) -> bool:
        """Has it, in this process, a wait of its own?"""
        return self.owned and type(self.ops).wait is not FenceOps.wait

    def set_deadline(self, ns: int) -> None:
        """:meth:`DmaFence.set_deadline`, told to the fence's operations too while it is pending."""
        told = self.owned and ns >= 0 and not self.is_signaled()
        if told:  # noted first: what others' deadlines make `heard` look at meanwhile is not this one once more
            self._told = min(self._told or ns, ns)
        super().set_deadline(ns)
        if told and not flagged(self):
            self.ops.set_deadline(self, ns)

    def publish(self) -> None:
        """Known elsewhere, so signalling is enabled, and deadlines that other processes set are heard of from now on."""
        super().publish()
        if self.owned and self.flags & FF_HASTY and not flagged(self):
            me = weakref.ref(self)

            def heard() -> None:
                fence = me()
                if fence is not None and not flagged(fence):
                    earliest = fence.deadline
                    if earliest is not None and (not fence._told or earliest < fence._told):
                        fence._told = earliest
                        fence.ops.set_deadline(fence, earliest)

            dispatcher(self.domain).hurry(self.handle, heard)

    def __del__(self) -> None:
        super().__del__()
        if self.owned:
            if self.flags & FF_HASTY and (local := DISPATCHER.peek(self.domain)) is not None:
                local.hurry(self.handle, None)
            try:
                self.ops.release(self)
            except Exception as e:  # a finaliser has nobody to raise to
                report(e, self.ops.release)


# The fences of this process that have operations, by handle.
CUSTOM: Local[weakref.WeakValueDictionary[int, CustomFence]] = Local(lambda _: weakref.WeakValueDictionary())


def custom(ops: Any, domain: Domain) -> tuple[Callable[[Shm, int, bool], CustomFence], int]:
    """(what makes fences with these operations, flags for their slot). Errors: TypeError no :class:`FenceOps`."""
    if not isinstance(ops, FenceOps):
        raise TypeError(f"fence: ops is a dmabuf.FenceOps, not {type(ops).__name__}")

    def make(shm: Shm, handle: int, owned: bool) -> CustomFence:
        fence = CustomFence(shm, handle, owned)
        fence.ops, fence._unasked, fence._told = ops, True, 0
        CUSTOM.of(domain)[handle] = fence
        return fence

    return make, 0 if type(ops).set_deadline is FenceOps.set_deadline else FF_HASTY


def asks(domain: Domain) -> bool:
    """Return True if this process has fences with operations, so that :func:`ask` may find one that is done."""
    return bool(CUSTOM.peek(domain))


def ask(domain: Domain, handles: Iterable[int]) -> None:
    """Poll those of the fences that are this process's own and have operations: they may be done though nobody signaled them.

    Cheap where there are none. Every place that reads slots alone may ask first.
    """
    known = CUSTOM.peek(domain)
    if known:
        for handle in handles:
            fence = known.get(handle)
            if fence is not None:
                fence.is_signaled()


def with_own_wait(domain: Domain, handle: int) -> CustomFence | None:
    """Return the fence with this handle if it is this process's own and waits by itself, else None."""
    known = CUSTOM.peek(domain)
    fence = known.get(handle) if known else None
    return fence if fence is not None and fence.waits_itself else None
