"""``Container``: what the fences that stand for other fences share (semantics 3.15, 3.16).

A container belongs to the process that made it: callbacks of its members, which run there, signal its slot. A forked child can't signal
that slot. So it makes a copy of the container over the same members, and asks the copy.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Sequence

from dmabuf._native import FF_ANYBODY, FF_CONTAINER
from dmabuf.core.fence.fence import DmaFence, flagged
from dmabuf.core.fence.lazy import LazyFence
from dmabuf.domain.dispatcher import dispatcher
from dmabuf.domain.domain import Domain
from dmabuf.domain.forks import fork_lock
from dmabuf.errors import contract_warning, fail

_copying = fork_lock()


class Container(LazyFence):
    """The base of arrays and chains."""

    __slots__ = ("_copied",)

    _copied: Container | None  # in a forked child

    def members(self) -> Sequence[DmaFence]:
        """Return the fences that it stands for, which may be containers."""
        raise NotImplementedError

    def _copy(self) -> Container:
        """Return a container of this process over the same members."""
        raise NotImplementedError

    def _local_copy(self) -> DmaFence | None:
        """Return the copy that a forked child asks. None while the container is this process's own, or signaled."""
        if self.owned or flagged(self):
            return None
        with _copying:
            if self._copied is None or not self._copied.owned:
                self._copied = self._copy()
            return self._copied

    def enable_signaling(self) -> None:
        """Ask that the container be signaled when its members are (semantics 3.8)."""
        copy = self._local_copy()
        super().enable_signaling() if copy is None else copy.enable_signaling()

    def is_signaled(self) -> bool:
        """Return True if the container is signaled. It looks at its members only when it is enabled (as up to Linux 6.12)."""
        copy = self._local_copy()
        return super().is_signaled() if copy is None else copy.is_signaled()

    @property
    def status(self) -> int:
        """0 pending, 1 signaled, or the negative errno that it was signaled with (semantics 3.5)."""
        copy = self._local_copy()
        return super().status if copy is None else copy.status

    def wait(self, timeout: float | None = None, *, interruptible: bool = False) -> float:
        """Enable signaling, then wait until the container is signaled, as :meth:`DmaFence.wait` does."""
        copy = self._local_copy()
        if timeout != 0:
            check_callbacks((self,), self.domain, "wait", self)
        return (super().wait if copy is None else copy.wait)(timeout, interruptible=interruptible)

    def listen(self, call: Callable[[int], object]) -> int | None:
        copy = self._local_copy()
        return super().listen(call) if copy is None else copy.listen(call)

    def remove_callback(self, handle: int) -> bool:
        """Remove a callback. Return False if it has already run (semantics 3.7)."""
        if self.owned or self._copied is None:
            return super().remove_callback(handle)
        return self._copied.remove_callback(handle)


def check_callbacks(fences: Iterable[DmaFence], domain: Domain, operation: str, obj: object) -> None:
    """Refuse a wait, in a callback, for what other callbacks of the same thread signal: those of other processes' fences.

    Raises:
        DeadlockError: The dispatcher's thread would wait for itself (EDEADLK).
    """
    if not dispatcher(domain).is_here():
        return
    inside = list(fences)
    while inside:
        fence = inside.pop()
        if flagged(fence):
            continue
        if isinstance(fence, Container) and fence.owned:
            inside += fence.members()
        elif not fence.owned or fence.flags & FF_ANYBODY:
            remedy = "wait in another thread, or add a callback to what you wait for"
            raise fail(errno.EDEADLK, operation, obj, remedy, what="a callback would wait for other callbacks of its thread")


def one_domain(members: Sequence[object], operation: str) -> Domain:
    """Return the domain that all fences belong to.

    Raises:
        InvalidError: There are none, with a ``ContractWarning`` (EINVAL).
        CrossDomainError: They belong to several domains (EXDEV).
    """
    if not members:
        contract_warning(f"{operation}: no fences; pass at least one", 3)
        raise fail(errno.EINVAL, operation, "fences", "pass at least one", what="there are none")
    domains: list[Domain] = []
    for member in members:
        if not isinstance(member, DmaFence):
            raise TypeError(f"{operation}: a DmaFence is expected, not {type(member).__name__}")
        domains.append(member.domain)
    if any(domain is not domains[0] for domain in domains):
        raise fail(errno.EXDEV, operation, "fences", "combine the fences of each domain separately", what="they belong to several domains")
    return domains[0]


def is_container(fence: DmaFence) -> bool:
    """Return True for an array or a chain, of this process or another.

    Kernel: dma_fence_is_container.
    """
    return bool(fence.flags & FF_CONTAINER)
