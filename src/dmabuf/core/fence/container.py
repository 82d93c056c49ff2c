"""What the fences that stand for other fences share (spec 3.15, 3.16)."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from typing import Any

from dmabuf._native import FF_CONTAINER
from dmabuf.core.fence.fence import DmaFence, flagged
from dmabuf.core.fence.lazy import LazyFence
from dmabuf.domain.domain import Domain
from dmabuf.domain.forks import fork_lock
from dmabuf.errors import contract_warning, fail

_twinning = fork_lock()


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


def one_domain(members: Sequence[Any], operation: str) -> Domain:
    """The domain of all of them. Errors: EINVAL none, with a ContractWarning; TypeError no fence; EXDEV several domains."""
    if not members:
        contract_warning(f"{operation}: no fences", 3)
        raise fail(errno.EINVAL, operation, "no fences", "name at least one")
    for member in members:
        if not isinstance(member, DmaFence):
            raise TypeError(f"{operation}: a DmaFence is expected, not {type(member).__name__}")
    domain: Domain = members[0].domain
    if any(member.domain is not domain for member in members):
        raise fail(errno.EXDEV, operation, "fences of several domains", "combine the fences of each domain by themselves")
    return domain


def is_container(fence: DmaFence) -> bool:
    """Is it an array or a chain, of this process or another? Kernel: dma_fence_is_container."""
    return bool(fence.flags & FF_CONTAINER)
