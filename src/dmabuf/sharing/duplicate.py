"""Duplicates of a process's descriptors, which it sends to the process of the domain that opens a buffer by name.

A kernel dma-buf can't be reopened through ``/proc`` (ENXIO), so a process that has one answers from its first one on. Any other buffer is
asked for where ``/proc`` doesn't lead to its holders: in another PID namespace, or if a holder's ``/proc/PID/fd`` belongs to root. There
too a process answers from its first buffer on, as far as it can know (``domain.peers.barred``). :func:`serve` is for the rest.
"""

from __future__ import annotations

import errno
import os

from dmabuf._native import dup_same
from dmabuf.core.buffer.backing import SERVERS
from dmabuf.core.buffer.identity import identify
from dmabuf.core.dma_buf import DmaBuf
from dmabuf.core.get import from_fd
from dmabuf.domain import lives
from dmabuf.domain.domain import Domain
from dmabuf.domain.limits import listed
from dmabuf.domain.records import in_words, known
from dmabuf.errors import DmaBufError, fail, needing_descriptors
from dmabuf.sharing.client import client_of
from dmabuf.sharing.messages import THERE, Body, close_all, no_room, number
from dmabuf.sharing.server import Answer, Session, register
from dmabuf.sharing.server import serve as answer_calls
from dmabuf.uapi.call import OwnedFd

ANSWER_S = 10.0  # seconds that a process has to answer; one that is stopped doesn't
_NOT_HERE = (errno.ENODEV, errno.ENOENT, errno.EPERM, errno.ETIMEDOUT)


def serve(*, domain: Domain | None = None) -> None:
    """Let processes of the domain open this process's buffers by name also where they can't reach it through /proc.

    A thread of this process then sends duplicates of its descriptors to processes of the same user, until it leaves the domain. A process
    in a container whose domain was named on purpose, and one that has changed its user, do this by themselves. It is for a process of the
    host whose buffers containers open. A forked child calls it again.

    Args:
        domain: The domain; None means the user's default domain.

    Raises:
        NoSpaceError: There is no room for the socket in the domain's directory (ENOSPC).
        DmaBufError: No descriptor is free (EMFILE).
    """
    domain = domain or Domain.default()
    domain.join()
    with needing_descriptors("serve", domain):
        answer_calls(domain)


def _duplicate(session: Session, body: Body, fds: list[OwnedFd]) -> Answer:
    """Return a duplicate of one of this process's descriptors of the buffer. If it has none any more, it fails with ENOENT."""
    key = (number(body, "dev"), number(body, "ino"))
    record = known(session.domain, *key)
    try:
        names = listed("open", "/proc/self/fd") if record is not None and record.handles else ()
    except DmaBufError:
        raise
    except OSError as e:
        raise no_room("open", in_words(session.domain, *key), THERE, e.errno or errno.EMFILE) from None
    for name in names:
        try:
            st = os.stat(f"/proc/self/fd/{name}")
            if (st.st_dev, st.st_ino) != key:
                continue
            return Answer(fds=list(map(OwnedFd, map(dup_same, (int(name),), key[:1], key[1:], (True,)))))
        except OSError as e:
            if e.errno in (errno.EMFILE, errno.ENFILE):
                raise no_room("open", in_words(session.domain, *key), THERE, e.errno) from None
            continue  # closed meanwhile, and the number perhaps used again
    raise fail(errno.ENOENT, "open", in_words(session.domain, *key), "open it again", what=f"process {os.getpid()} has closed it")


def ask(domain: Domain, index: int, dev: int, ino: int, nonce: bytes) -> DmaBuf | None:
    """Return the buffer from the process with this slot, None if it doesn't send it. Without a free descriptor it fails with EMFILE."""
    user = object()
    client = client_of(domain, lives.life_at(domain.shm, index), user)
    try:
        _, came = client.call("duplicate", {"dev": dev, "ino": ino}, operation="open", obj=in_words(domain, dev, ino), limit=ANSWER_S)
    except OSError as e:
        if e.errno in _NOT_HERE:
            return None
        raise
    finally:
        client.leave(user)
    try:
        return _first_of(domain, came, nonce)
    finally:
        close_all(came)


def _first_of(domain: Domain, came: list[OwnedFd], nonce: bytes) -> DmaBuf | None:
    """Return the buffer with this nonce from the first descriptor of it, which is taken from the list, as are those before it."""
    while came:
        fd = came.pop(0)
        try:
            same = identify(fd.number, domain, "open").nonce == nonce
        except DmaBufError:
            same = False  # something else
        if same:
            return from_fd(fd, domain)
        fd.close()
    return None


register("duplicate", _duplicate)
SERVERS.register("kernel", answer_calls)
SERVERS.register("memfd", answer_calls)
