"""``Pool``: buffers that are used again, instead of fresh memory for each."""

from __future__ import annotations

import errno
import os
import time
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from dmabuf._native import Mapping
from dmabuf.core.base.usage import Usage
from dmabuf.core.buffer.handle import handle_of
from dmabuf.core.buffer.identity import put_reference_lock
from dmabuf.core.dma_buf import DmaBuf, new_handle
from dmabuf.domain import lives, naming
from dmabuf.domain.auto_reset_event import AutoResetEvent
from dmabuf.domain.domain import Domain
from dmabuf.domain.forks import fork_lock
from dmabuf.domain.ofd import ofd_locked, reopen_owned
from dmabuf.domain.slow_waits import Wait
from dmabuf.errors import fail, needing_descriptors
from dmabuf.heap.recommended import allocate
from dmabuf.layout.image import ImageLayout
from dmabuf.layout.stored import Layout
from dmabuf.layout.tensor import TensorLayout

if TYPE_CHECKING:
    from types import TracebackType

LOOK_S: Final = 0.002  # how often take() looks at first whether others have given a buffer back, which nobody tells it
LOOK_MOST_S: Final = 0.25
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")
_ZEROS: Final = bytes(1 << 20)


@dataclass(frozen=True)
class PoolStatistics:
    """A pool at one moment. ``leased``: taken and not given back. ``in_use``: given back, and others still use them. ``free``: the rest."""

    count: int
    leased: int
    in_use: int
    free: int


class _Entry:
    """One buffer of a pool. ``lease``: who has it; one that is gone has nothing. ``used``: since it was last zeroed."""

    __slots__ = ("buf", "lease", "used")

    def __init__(self, buf: DmaBuf) -> None:
        self.buf, self.used = buf, False
        self.lease: weakref.ref[Lease] | None = None

    def is_lent(self) -> bool:
        """Return True while a lease has it."""
        return self.lease is not None and self.lease() is not None

    def is_free(self) -> bool:
        """Return True if nobody else has a descriptor of it, in flight or open, or a mapping, and all its fences have ended."""
        handle = handle_of(self.buf)
        return not self.is_lent() and not ofd_locked(handle.descriptor("take"), 0) and self.buf.resv.test_signaled(Usage.BOOKKEEP)


class Lease:
    """A buffer that was taken from a pool: ``with pool.take() as buf``. At the end of the block it goes back."""

    def __init__(self, pool: Pool, timeout: float | None) -> None:
        self._pool, self._timeout, self._entered = pool, timeout, False
        self._buf: DmaBuf | None = None
        self._mapping: weakref.ref[Mapping] | None = None

    def __enter__(self) -> DmaBuf:
        if self._entered:
            raise ValueError("the block was entered already: call take() for each buffer")
        self._entered = True
        try:
            own = self._pool.lend(self, self._timeout)
            self._mapping = weakref.ref(handle_of(own).view_source(True))  # made anew if the last lease has lost it
            self._buf = _handle_of_its_own(own)
        except BaseException:
            self.give_back()
            raise
        return self._buf

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.give_back()

    def give_back(self) -> None:
        """Close the lease's handle, and let the buffer be taken again once nobody uses it. Twice has no effect."""
        buf = self._buf
        if buf is not None and not buf.closed:
            handle = handle_of(buf)
            path = handle.path
            if path is not None and not handle.accesses:
                # A mapping that was made since belongs to the lease's descriptor, and would keep the buffer in use for ever.
                if self._mapping is None or path.mapping is not self._mapping():
                    path.mapping = None
                handle.path = None  # it is the pool's, and stays mapped
            buf.close()  # EBUSY while a block of it is open: then nothing has changed
        self._buf = None
        self._pool.take_back(self)


class Pool:
    """Buffers of one kind that are taken, passed on and used again, without the cost of fresh memory.

        pool = dmabuf.Pool(dmabuf.TensorLayout("uint8", (1080, 1920, 4)), count=8)
        with pool.take() as buf:
            with buf.write() as view:
                ...
            dmabuf.send(sock, buf)        the block may end: the buffer is free again once the receiver has closed it

    A buffer is taken again only when the block is over, nobody else has it open, mapped or in flight, and all its fences have ended. Its
    memory is there, and mapped, before it is taken first.

    Args:
        what: The bytes of a buffer, or its layout.
        count: How many buffers.
        zero: Whether to zero a buffer before it is taken again: for pools whose receivers must not see what others wrote.
        domain: The domain; None for the user's default domain.

    Raises:
        InvalidError: The count is below 1, or ``what`` is (EINVAL).
        DmaBufError: As ``dmabuf.allocate``. Nothing is left.
    """

    def __init__(self, what: int | Layout, count: int = 4, *, zero: bool = False, domain: Domain | None = None) -> None:
        if count < 1:
            raise fail(errno.EINVAL, "pool", "a pool", "ask for at least 1 buffer", what=f"count is {count}")
        layout = what if isinstance(what, ImageLayout | TensorLayout) else None
        self.zero, self.closed = zero, False
        self._lock, self._given = fork_lock(), AutoResetEvent()
        self._entries: list[_Entry] = []
        self._pid = os.getpid()
        try:
            for _ in range(count):
                size = None if layout is not None else what
                self._entries.append(_Entry(allocate(size, layout=layout, domain=domain)))  # type: ignore[arg-type]  # checked there
                with self._entries[-1].buf.write() as view:
                    view[::_PAGE] = bytes(-(-len(view) // _PAGE))  # the pages are mapped from now on
        except BaseException:
            self.close()
            raise
        self.domain = self._entries[0].buf.domain

    def __repr__(self) -> str:
        size = self._entries[0].buf if self._entries else "closed"
        return f"<dmabuf.Pool of {len(self._entries)}: {size}>"

    def take(self, timeout: float | None = None) -> Lease:
        """Return the block of a buffer: ``with pool.take() as buf``. The buffer has a handle of its own there.

        Args:
            timeout: Seconds to wait for a buffer that is free; None without limit. The wait begins with the block.

        Raises:
            DmaBufTimeout: None became free in time (ETIMEDOUT). The message says who has them.
            ClosedError: The pool is closed, or belongs to the parent of this process (EBADF).
            InvalidError: The timeout is negative (EINVAL).
        """
        if timeout is not None and not timeout >= 0:
            raise fail(errno.EINVAL, "take", self, "pass seconds >= 0, or None to wait forever", what=f"timeout is {timeout}")
        return Lease(self, timeout)

    def lend(self, lease: Lease, timeout: float | None) -> DmaBuf:
        """Let a lease have a buffer that is free, and return the pool's handle of it.

        To lend it is one assignment: wherever a signal handler raises, the lease has the buffer or it hasn't.
        """
        until = None if timeout is None else time.monotonic() + timeout
        look, waited = LOOK_S, Wait()
        while True:
            if self.closed or self._pid != os.getpid():
                what = "it is closed" if self.closed else "it belongs to the parent of this process"
                raise fail(errno.EBADF, "take", self, "make a pool in this process", what=what)
            with self._lock:
                entry = next((entry for entry in self._entries if entry.is_free()), None)
                if entry is not None:
                    entry.lease = weakref.ref(lease)
            if entry is not None:
                break
            left = look if until is None else min(look, until - time.monotonic())
            if left <= 0:
                what = f"no buffer became free in time: {self._who()}"
                raise fail(errno.ETIMEDOUT, "take", self, "give buffers back sooner, or make a larger pool", what=what)
            self._given.wait(left)
            look = min(2 * look, LOOK_MOST_S)
            waited.look(self.domain, lambda: f"a buffer of a pool: {self._who()}")
        if self.zero and entry.used:
            with entry.buf.write() as view:
                for at in range(0, len(view), len(_ZEROS)):
                    part = view[at : at + len(_ZEROS)]
                    part[:] = _ZEROS[: len(part)]
        entry.used = True
        return entry.buf

    def take_back(self, lease: Lease) -> None:
        """Let a lease have nothing any more."""
        for entry in self._entries:
            if entry.lease is not None and entry.lease() is lease:
                entry.lease = None
        self._given.set()

    def _who(self) -> str:
        """Return who has the buffers, in words."""
        shm = self.domain.shm
        leased = sum(entry.is_lent() for entry in self._entries)
        found = [f"{leased} of {len(self._entries)} are taken in this process"] if leased else []
        others = {i for entry in self._entries for i in shm.rec_holders(handle_of(entry.buf).shared.index)}
        others.discard(lives.index_of(shm.life))
        found += [f"{naming.process(self.domain, lives.life_at(shm, i))} has some" for i in sorted(others)[:3]]
        return "; ".join(found) or "they are in messages, or fences of them have not ended"

    def statistics(self) -> PoolStatistics:
        """Return how many buffers are taken, in use, and free."""
        with self._lock:
            leased = sum(entry.is_lent() for entry in self._entries)
            free = sum(entry.is_free() for entry in self._entries)
        return PoolStatistics(len(self._entries), leased, len(self._entries) - leased - free, free)

    def close(self) -> None:
        """Close the pool's buffers. Those that are taken, or that others have, stay as long as they are."""
        self.closed = True
        entries, self._entries = self._entries, []
        for entry in entries:
            entry.buf.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _handle_of_its_own(buf: DmaBuf) -> DmaBuf:
    """Return a handle with an open file description of its own, whose lock shows who has the buffer, and with the mapping of ``buf``."""
    handle = handle_of(buf)
    with needing_descriptors("take", buf):
        fd = reopen_owned(handle.descriptor("take"))
    try:
        put_reference_lock(fd.number)
    except BaseException:
        fd.close()
        raise
    made = new_handle(fd, handle.shared)
    handle_of(made).path = handle.access_path()
    return made
