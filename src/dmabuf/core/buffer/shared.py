"""``SharedBuffer``: one buffer in this process, behind all its handles (the kernel's ``struct dma_buf``).

It is the buffer's record in the domain (``domain.records.Record``: who the buffer is, and this process's reference to the record) and what
the handles of this process share. There is one object for each buffer of a process. It is found by the buffer's ``(st_dev, st_ino)`` and
goes with the last handle, mapping, attachment or reservation object that uses it; a few are kept longer, because a buffer that went to
another process often comes back.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Final, Protocol

from dmabuf.core.base.registry import Registry
from dmabuf.core.buffer.backing import SERVERS, Backing
from dmabuf.core.buffer.identity import is_kernel_home
from dmabuf.domain import records
from dmabuf.domain.domain import Domain
from dmabuf.domain.peers import barred
from dmabuf.domain.records import KIND_BUFFER, Record
from dmabuf.layout.stored import Layout

MEMFD: Final = b"memfd"
EXPORTED: Final = b"exported"


class ArmedPoll(Protocol):
    """A direction of ``poll()`` that was found busy (core/access/poll.py)."""

    fence: int
    life: int

    def ended(self, _: int = 0) -> None:
        """Disarm it."""


class SharedBuffer(Record):
    """One buffer in this process.

    ``backing``: whose ops every access asks; None for plain memory, which needs none. ``armed``: the directions of ``poll()`` that were
    found busy, by event. ``message``: what ``send()`` prepared, which names the buffer. ``described``: its layout, once it was asked for.
    """

    def __init__(self, domain: Domain, dev: int, ino: int, size: int, nonce: bytes, exp_name: bytes, home: bytes, kind: int) -> None:
        super().__init__(domain, dev, ino, size, nonce, exp_name, home, kind)
        self.backing: Backing | None = None
        self.armed: dict[int, ArmedPoll] = {}
        self.message: bytes | None = None
        self.described: Layout | None = None
        self._plain: Backing | None = None

    def referenced(self) -> None:
        """See ``Record``. A process whose descriptors others can't reach through /proc answers them from its first buffer on."""
        if self.kind == KIND_BUFFER and barred(self.domain):
            with suppress(OSError, RuntimeError):  # then it can't be asked, and the buffer is none the worse
                SERVERS.find("memfd")(self.domain)

    def find_backing(self, fd: int) -> None:
        """Find the backing that this buffer's accesses must ask, if its home says that there is one. ``fd``: a descriptor of the buffer.

        Two threads that come at once get the same one, which knows all that this process has of the buffer.
        """
        name = "remote" if self.home == EXPORTED else "kernel" if is_kernel_home(self.home) else None
        if self.kind != KIND_BUFFER or name is None:
            return
        make = BACKINGS.find(name)  # before the lock: it may import a module
        with self.lock:
            if self.backing is None:
                made = make(self, fd)
                if self.backing is None:  # looked at again: a signal handler may have found one meanwhile
                    self.backing = made

    def any_backing(self) -> Backing | None:
        """Return the backing, if there is one; plain memory has one from the first attachment or vmap on."""
        return self._plain if self.backing is None else self.backing

    def ensure_backing(self) -> Backing:
        """Return the backing; of plain memory it is made now if it isn't there."""
        found = self.any_backing()
        if found is None:
            with self.lock:
                made = self._plain or BACKINGS.find("memfd")(self, -1)
                found = self._plain = self._plain or made  # looked at again: a signal handler may have made one meanwhile
        return found


BACKINGS: Final[Registry[Callable[[SharedBuffer, int], Backing]]] = Registry(
    "backing",
    {
        "memfd": "dmabuf.core.buffer.backing_memfd",
        "kernel": "dmabuf.core.buffer.backing_kernel",
        "remote": "dmabuf.sharing.remote_backing",
    },
)
"""Functions that make the backing of a buffer which doesn't have one yet in this process, from its record and a descriptor of it."""


def adopt(domain: Domain, dev: int, ino: int, size: int, nonce: bytes, exp_name: bytes, home: bytes) -> SharedBuffer:
    """Return the buffer of this inode, whose descriptor this process has; see ``records.adopt``."""
    return records.adopt(SharedBuffer, domain, dev, ino, size, nonce, exp_name, home)


def confirmed(domain: Domain, dev: int, ino: int, size: int, nonce: bytes) -> SharedBuffer | None:
    """Return the buffer of this inode if the domain has a record of it with this nonce; see ``records.confirmed``."""
    return records.confirmed(SharedBuffer, domain, dev, ino, size, nonce)


def known(domain: Domain, dev: int, ino: int) -> SharedBuffer | None:
    """Return the buffer of this inode if this process has it. Takes no lock."""
    found = records.known(domain, dev, ino)
    return found if isinstance(found, SharedBuffer) else None


def devices_of(domain: Domain, dev: int, ino: int) -> list[str]:
    """Return the names of the devices that this process has attached to a buffer, the newest first. Takes no lock."""
    shared = known(domain, dev, ino)
    found = None if shared is None else shared.any_backing()
    return [attachment.dev.name for attachment in list(found.attachments)] if found is not None else []
