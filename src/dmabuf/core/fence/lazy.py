"""Fences that have to be asked, the base of custom fences and containers (semantics 3.1, 3.6-3.9)."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable

from dmabuf._native import FF_WATCH_DEADLINE, WeakValues
from dmabuf.core.base.clock import monotonic_deadline
from dmabuf.core.fence.fence import DmaFence, flagged
from dmabuf.core.fence.ops import FenceOps
from dmabuf.domain.dispatcher import DISPATCHER, dispatcher, report
from dmabuf.domain.domain import Domain
from dmabuf.domain.guards import finalizer
from dmabuf.domain.local import Local


class LazyFence(DmaFence):
    """A fence that watches nothing until it is enabled, and that may be done before anybody signals it."""

    # The attribute is there until the fence is enabled. Deleting it is one step, so only one thread enables. It needs no lock, which
    # a signal handler or a finalizer that comes to the same fence in the middle would wait for.
    __slots__ = ("_not_enabled",)

    _not_enabled: bool

    def _enable(self) -> bool:
        """Begin to watch. Return False if the work is already done."""
        raise NotImplementedError

    def _polled(self) -> bool:
        """Return True if the work is done, whatever the flag says."""
        raise NotImplementedError

    def _error(self) -> int:
        """Return the error to signal the fence with, when it signals itself."""
        return 0

    def _finish(self) -> None:
        """Signal the fence, unless it is already signaled."""
        self.shm.fence_signal(self.handle, self._error(), False)

    def enable_signaling(self) -> None:
        """Ask that the fence be signaled by itself (semantics 3.8). The first call counts; in a forked child it has no effect."""
        if self.enabled or not self.owned or flagged(self):
            return
        try:
            del self._not_enabled
        except AttributeError:
            return
        try:
            going = self._enable()
        except BaseException:
            self._not_enabled = True
            raise
        if not going:
            self._finish()

    @property
    def enabled(self) -> bool:
        """Whether signaling was asked for."""
        return not hasattr(self, "_not_enabled")

    def is_signaled(self) -> bool:
        """Return True if the fence is signaled, or says that its work is done; this call then signals it (semantics 3.6).

        Never enables signaling.
        """
        if flagged(self):
            return True
        if self.owned and self._polled():
            self._finish()
            return True
        return False

    @property
    def status(self) -> int:
        """0 pending, 1 signaled, or the negative errno that it was signaled with. Asks as :meth:`is_signaled` does (semantics 3.5)."""
        self.is_signaled()
        return super().status

    def wait(self, timeout: float | None = None, *, interruptible: bool = False) -> float:
        """Enable signaling, then wait until the fence is signaled (semantics 3.9).

        Args:
            timeout: Seconds; None waits without a limit.
            interruptible: Let a signal end the wait.

        Returns:
            The seconds left: more than 0 (inf without a timeout), or 0.0 when the time is over.

        Raises:
            InvalidError: The timeout is negative (EINVAL).
            InterruptedWaitError: A signal arrived (EINTR).
        """
        monotonic_deadline(timeout, "wait", self)
        self.enable_signaling()
        return super().wait(timeout, interruptible=interruptible)


class CustomFence(LazyFence):
    """A fence with :class:`FenceOps`; made by ``Timeline.fence(ops=…)``."""

    __slots__ = ("_earliest", "ops")

    ops: FenceOps
    _earliest: int  # the earliest deadline that the operations know of; 0: none

    def _enable(self) -> bool:
        return self.ops.enable_signaling(self)

    def _polled(self) -> bool:
        return type(self.ops).signaled is not FenceOps.signaled and self.ops.signaled(self)

    def wait(self, timeout: float | None = None, *, interruptible: bool = False) -> float:
        """Wait as :meth:`LazyFence.wait` does, or by the operation ``wait``."""
        if not self.waits_itself:
            return super().wait(timeout, interruptible=interruptible)
        monotonic_deadline(timeout, "wait", self)
        self.enable_signaling()
        left = self.ops.wait(self, interruptible, timeout)
        return math.inf if timeout is None and left > 0 else float(left)

    @property
    def waits_itself(self) -> bool:
        """Whether it has, in this process, a wait of its own."""
        return self.owned and type(self.ops).wait is not FenceOps.wait

    def set_deadline(self, ns: int) -> None:
        """Set a deadline as :meth:`DmaFence.set_deadline` does, and tell the operations while the fence is pending."""
        pending = self.owned and ns >= 0 and not self.is_signaled()
        if pending:  # noted first, so that `pass_on`, which another process's deadline may call now, doesn't tell this one again
            self._earliest = min(self._earliest or ns, ns)
        super().set_deadline(ns)
        if pending and not flagged(self):
            self.ops.set_deadline(self, ns)

    def publish(self) -> None:
        """Enable signaling, and from now on pass on deadlines that other processes set."""
        super().publish()
        if self.owned and self.flags & FF_WATCH_DEADLINE and not flagged(self):
            me = weakref.ref(self)

            def pass_on() -> None:
                fence = me()
                if fence is not None and not flagged(fence):
                    earliest = fence.deadline
                    if earliest is not None and (not fence._earliest or earliest < fence._earliest):
                        fence._earliest = earliest
                        fence.ops.set_deadline(fence, earliest)

            dispatcher(self.domain).watch_deadline(self.handle, pass_on)

    @finalizer
    def __del__(self) -> None:
        self.drop()
        if self.owned and hasattr(self, "_earliest"):
            if self.flags & FF_WATCH_DEADLINE and (local := DISPATCHER.peek(self.domain)) is not None:
                local.watch_deadline(self.handle, None)
            try:
                self.ops.release(self)
            except Exception as e:  # a finalizer has no caller to raise to
                report(e, self.ops.release)


# The fences of this process that have operations, by handle.
CUSTOM: Local[WeakValues[int, CustomFence]] = Local(lambda _: WeakValues())


def flags_for(ops: object) -> int:
    """Return the flags of a fence with these operations. Raises TypeError if ``ops`` isn't a FenceOps."""
    if not isinstance(ops, FenceOps):
        raise TypeError(f"fence: ops is a dmabuf.FenceOps, not {type(ops).__name__}")
    return 0 if type(ops).set_deadline is FenceOps.set_deadline else FF_WATCH_DEADLINE


def customize(fence: DmaFence, ops: FenceOps) -> None:
    """Give a new fence, a CustomFence, its operations."""
    assert isinstance(fence, CustomFence)
    fence.ops, fence._not_enabled, fence._earliest = ops, True, 0
    CUSTOM.of(fence.domain)[fence.handle] = fence


def asks(domain: Domain) -> bool:
    """Return True if this process has fences with operations, so that :func:`ask` may find one that is done."""
    return bool(domain.local.get(CUSTOM))  # not peek(): each add() makes this call


def ask(domain: Domain, handles: Iterable[int]) -> None:
    """Poll the fences among ``handles`` that this process made with operations: their work may be done though they aren't signaled.

    Cheap where there are none. Every place that reads slots alone may ask first.
    """
    known: WeakValues[int, CustomFence] | None = domain.local.get(CUSTOM)
    if known:
        for handle in handles:
            fence = known.get(handle)
            if fence is not None:
                fence.is_signaled()


def with_own_wait(domain: Domain, handle: int) -> CustomFence | None:
    """Return the fence with this handle if this process made it with a wait of its own, else None."""
    known = CUSTOM.peek(domain)
    fence = known.get(handle) if known else None
    return fence if fence is not None and fence.waits_itself else None
