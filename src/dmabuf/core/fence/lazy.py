"""``FenceOps``: fences with behaviour of their own, and what containers share with them (spec 3.1, 3.6-3.9).

``Timeline.fence(ops=…)`` makes one. Every operation is optional, and belongs to the process that made the fence:

====================  ========================================================================================================
``enable_signaling``  called once, before the first wait, callback or await, and when the fence becomes known elsewhere (added to a
                      reservation object, sent): see to it that it will be signalled. False: it is done already, or can't be
                      enabled; the fence is signalled at once, with the error that ``set_error`` has set
``signaled``          is it done, though nobody signalled it? Asked by ``is_signaled``, ``status`` and ``describe``; once True, always
                      True. It never enables anything, so a fence may report only after it was enabled
``wait``              a wait of its own instead of the futex
``set_deadline``      a hint that somebody wants it by then; any number of times. Of other processes' hints it hears the earliest,
                      in the dispatcher's thread, once the fence is known to them
``release``           the last reference is gone
====================  ========================================================================================================

So there are two notions of "signalled": ``add_callback`` and waits go by the flag alone, ``is_signaled`` and ``status`` also ask
``signaled`` and, on True, signal the fence. Other processes see the flag: they wait for the fence's slot, and nothing of this calls
across. Operations are called without any lock of the package held; they may be called by any thread. In a forked child a fence made
before is another process's: its operations are not called.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from dmabuf import _native
from dmabuf._native import Shm
from dmabuf.core.fence.fence import DmaFence, flagged, monotonic_deadline
from dmabuf.domain.dispatcher import DISPATCHER, dispatcher, report
from dmabuf.domain.domain import Domain
from dmabuf.domain.forks import fork_lock

_twinning = fork_lock()


class FenceOps:
    """The operations of a custom fence; override those that it needs. Kernel: dma_fence_ops."""

    def enable_signaling(self, fence: DmaFence) -> bool:
        """Optional. See to it that the fence will be signalled; False: it is done, or can't be. Called at most once, and must not wait.

        Kernel: dma_fence_ops.enable_signaling.
        """
        return True

    def signaled(self, fence: DmaFence) -> bool:
        """Optional. Is it done? May set the error just before the first True. Kernel: dma_fence_ops.signaled."""
        raise NotImplementedError

    def wait(self, fence: DmaFence, interruptible: bool, timeout: float | None) -> float:
        """Optional. Wait at most ``timeout`` seconds (None: for ever); the seconds left (> 0), or 0.0 when the time is over.

        Kernel: dma_fence_ops.wait.
        """
        raise NotImplementedError

    def set_deadline(self, fence: DmaFence, ns: int) -> None:
        """Optional. Somebody would like the fence to be signalled by this CLOCK_MONOTONIC time, in ns.

        Kernel: dma_fence_ops.set_deadline.
        """

    def release(self, fence: DmaFence) -> None:
        """Optional. Nobody here has the fence any more. Called in whichever thread let go of it last: take no lock.

        Kernel: dma_fence_ops.release.
        """


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


class Container(LazyFence):
    """What arrays and chains share: a fork's child, which can't end its parent's slot, has a twin over the same members."""

    __slots__ = ("_twin",)

    _twin: Container | None

    def _copy(self) -> Container:
        """One like it with a slot of this process."""
        raise NotImplementedError

    def _here(self) -> DmaFence | None:
        """The twin; None while the fence is this process's own, or has ended."""
        if self.owned or flagged(self):
            return None
        with _twinning:
            if self._twin is None or not self._twin.owned:
                self._twin = self._copy()
            return self._twin

    def enable_signaling(self) -> None:
        """Ask that it will signal when its members have (spec 3.8)."""
        here = self._here()
        super().enable_signaling() if here is None else here.enable_signaling()

    def is_signaled(self) -> bool:
        """True once it has ended. Members are looked at only after signalling was enabled (up to Linux 6.12)."""
        here = self._here()
        return super().is_signaled() if here is None else here.is_signaled()

    @property
    def status(self) -> int:
        """0 pending, 1 signalled, or the negative errno it ended with (spec 3.5)."""
        here = self._here()
        return super().status if here is None else here.status

    def wait(self, timeout: float | None = None, *, interruptible: bool = False) -> float:
        """Enable signalling, then wait until signalled; as :meth:`DmaFence.wait`."""
        here = self._here()
        return (super().wait if here is None else here.wait)(timeout, interruptible=interruptible)

    def listen(self, call: Callable[[int], object]) -> int | None:
        here = self._here()
        return super().listen(call) if here is None else here.listen(call)

    def remove_callback(self, handle: int) -> bool:
        """Take a callback back; False when it ran already (spec 3.7)."""
        if self.owned or self._twin is None:
            return super().remove_callback(handle)
        return self._twin.remove_callback(handle)


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
        if self.owned and self.flags & _native.FF_HASTY and not flagged(self):
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
            if self.flags & _native.FF_HASTY and (local := DISPATCHER.peek(self.domain)) is not None:
                local.hurry(self.handle, None)
            try:
                self.ops.release(self)
            except Exception as e:  # a finaliser has nobody to raise to
                report(e, self.ops.release)


def custom(ops: Any, domain: Domain) -> tuple[Callable[[Shm, int, bool], CustomFence], int]:
    """(what makes fences with these operations, flags for their slot). Errors: TypeError no :class:`FenceOps`."""
    if not isinstance(ops, FenceOps):
        raise TypeError(f"fence: ops is a dmabuf.FenceOps, not {type(ops).__name__}")

    def make(shm: Shm, handle: int, owned: bool) -> CustomFence:
        fence = CustomFence(shm, handle, owned)
        fence.ops, fence._unasked, fence._told = ops, True, 0
        domain.local["lazy"] = True
        return fence

    return make, 0 if type(ops).set_deadline is FenceOps.set_deadline else _native.FF_HASTY


def ask(domain: Domain, handles: Iterable[int]) -> None:
    """Poll those of the fences that are this process's own and have operations: they may be done though nobody signalled them.

    Cheap where there are none, so every place that looks at slots alone may ask first.
    """
    if "lazy" in domain.local:
        known = domain.local["fences"]
        for handle in handles:
            fence = known.get(handle)
            if isinstance(fence, LazyFence):
                fence.is_signaled()


def with_own_wait(domain: Domain, handle: int) -> CustomFence | None:
    """The fence with this handle, if it is this process's own and waits by itself."""
    fence = domain.local["fences"].get(handle)
    return fence if isinstance(fence, CustomFence) and fence.waits_itself else None
