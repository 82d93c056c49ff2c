"""Duplicates of kernel dma-bufs for ``dmabuf.open`` in another process of the domain.

A kernel dma-buf can't be reopened through ``/proc`` (ENXIO). So a process that has one open serves calls from its first one on, and sends a
duplicate to the process that opens it by name.
"""

from __future__ import annotations

import errno
import os

from dmabuf._native import LIFE_GEN, dup_same
from dmabuf.core.buffer.backing import SERVERS
from dmabuf.core.buffer.identity import identify
from dmabuf.core.dma_buf import DmaBuf
from dmabuf.core.get import from_fd
from dmabuf.domain import lives
from dmabuf.domain.domain import Domain
from dmabuf.domain.records import known
from dmabuf.errors import fail
from dmabuf.sharing.client import client_of
from dmabuf.sharing.messages import THERE, Body, no_room, number
from dmabuf.sharing.server import Answer, Session, register, serve
from dmabuf.uapi.call import OwnedFd

_NOT_HERE = (errno.ENODEV, errno.ENOENT, errno.EPERM)


def _duplicate(session: Session, body: Body, fds: list[OwnedFd]) -> Answer:
    """Return a duplicate of one of this process's descriptors of the buffer. If it has none any more, it fails with ENOENT."""
    key = (number(body, "dev"), number(body, "ino"))
    record = known(session.domain, *key)
    try:
        names = os.listdir("/proc/self/fd") if record is not None and record.handles else ()
    except OSError as e:
        raise no_room("open", f"buffer ino {key[1]}", THERE, e.errno or errno.EMFILE) from None
    for name in names:
        try:
            st = os.stat(f"/proc/self/fd/{name}")
            if (st.st_dev, st.st_ino) != key:
                continue
            return Answer(fds=list(map(OwnedFd, map(dup_same, (int(name),), key[:1], key[1:], (True,)))))
        except OSError as e:
            if e.errno in (errno.EMFILE, errno.ENFILE):
                raise no_room("open", f"buffer ino {key[1]}", THERE, e.errno) from None
            continue  # closed meanwhile, and the number perhaps used again
    raise fail(errno.ENOENT, "open", f"buffer ino {key[1]}", "open it again", what=f"process {os.getpid()} has closed it")


def ask(domain: Domain, index: int, dev: int, ino: int, nonce: bytes) -> DmaBuf | None:
    """Return the buffer from the process with this slot, None if it doesn't send it. Without a free descriptor it fails with EMFILE."""
    peer = lives.life_id(index, domain.shm.load32(lives.slot_offset(index) + LIFE_GEN))
    client = client_of(domain, peer, ask)
    try:
        _, came = client.call("duplicate", {"dev": dev, "ino": ino}, operation="open", obj=f"buffer ino {ino}")
    except OSError as e:
        if e.errno in _NOT_HERE:
            return None
        raise
    finally:
        client.leave(ask)
    for fd in came:
        found = identify(fd.number, domain, "open")
        if found.kernel and found.nonce == nonce:
            return from_fd(fd, domain)
    return None


register("duplicate", _duplicate)
SERVERS.register("kernel", serve)
