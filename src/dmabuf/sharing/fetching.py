"""The receiver's side of a pickled descriptor: it asks the sender for it (``kept``), and says so when it has it.

What the sender's token says is not believed: the answer counts if the kernel says that it comes from a process of this user, and the
descriptor shows what it is.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeVar

from dmabuf._native import OwnedFd, owned_rights
from dmabuf.domain.limits import descriptor_limit
from dmabuf.errors import DmaBufError, fail, needing_descriptors
from dmabuf.sharing import kept
from dmabuf.sharing.put_back import put_back, recall, remember

PATIENCE_S: Final = 30.0  # for a sender that lives and doesn't answer: it is stopped, or one thread of it keeps the others from running
_AGAIN_S: Final = 0.2  # until the question is asked again: the answer was lost if this end was full
# An error after which it may go well, or what a signal handler raised, which need not have an errno.
FOR_NOW: Final = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ETIMEDOUT, errno.EINTR, None)

T = TypeVar("T")


def fetch(place: Any, what: str, make: Callable[[OwnedFd], T]) -> T:
    """Return what ``make`` makes of the descriptor that is there. Until it is made, the sender keeps it.

    Args:
        place: Where it is, from the token.
        what: What it is, for messages.
        make: Takes the descriptor over.

    Raises:
        OwnerDeadError: The sender has ended (EOWNERDEAD).
        NotFoundError: It isn't there any more (ENOENT).
        DmaBufTimeout: The sender doesn't answer (ETIMEDOUT).
        DmaBufError: This process has no descriptor left (EMFILE), or the token makes no sense (EBADMSG). After EMFILE and ETIMEDOUT, and
            if a signal handler raises, the object is back in the queue or pipe that it came from.
    """
    name, key, sender = checked(place)
    found = recall(key)
    if found is not None:
        return found  # type: ignore[no-any-return]
    with or_put_back(key, what), needing_descriptors("unpickle", what), _asking() as sock:
        fd = _asked(sock, name, key, what, sender)
        made = make(fd)
        with contextlib.suppress(OSError):  # the sender has ended since, and keeps nothing
            sock.sendto(kept.MESSAGE.pack(kept.MAGIC, kept.DONE, key), name)
    remember(key, made)
    return made


@contextlib.contextmanager
def or_put_back(key: bytes, what: str) -> Iterator[None]:
    """Put the message that is being unpickled back if the block fails for now. ``key``: something that is in it and in no other."""
    try:
        yield
    except BaseException as e:
        if isinstance(e, OSError) and e.errno not in FOR_NOW:
            raise
        if put_back(key) and isinstance(e, DmaBufError):
            remedy = f"{e.remedy}; the next get() or recv() gives it again"
            raise fail(e.errno or errno.EIO, "unpickle", what, remedy, what=said(e)) from None
        raise


def said(error: DmaBufError) -> str:
    """Return what happened, without the operation, the object, the errno and the remedy."""
    text = str(error).removesuffix(f"; {error.remedy}")
    return text.split(": ", 2)[-1].rpartition(" (")[0]


def checked(place: Any) -> tuple[bytes, bytes, str]:
    """Return (name of the socket, key, name of the sender in messages) of a token, which may be anything (EBADMSG)."""
    match place:
        case (bytes(name), bytes(key), int(pid), str(label)) if name.startswith(b"\0dmabuf-kept-") and len(name) < 100:
            if len(key) == kept.KEY_BYTES:
                return name, key, sender_name(pid, label)
    remedy = "unpickle what this version of dmabuf pickled"
    raise fail(errno.EBADMSG, "unpickle", "a token", remedy, what="it doesn't say where the descriptor is")


def sender_name(pid: int, label: str) -> str:
    """Return the name of a process in messages."""
    label = "".join(c if c.isprintable() else "?" for c in label[:40])
    return f"process {pid} ({label})"


def _asking() -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        sock.bind("")  # a free abstract name
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


def _asked(sock: socket.socket, name: bytes, key: bytes, what: str, sender: str) -> OwnedFd:
    """Ask for a descriptor until there is an answer."""
    end = time.monotonic() + PATIENCE_S
    waiting = select.poll()
    waiting.register(sock, select.POLLIN)
    question = kept.MESSAGE.pack(kept.MAGIC, kept.FETCH, key)
    while True:
        try:
            sock.sendto(question, name)
        except BlockingIOError:
            pass  # the sender has many questions: ask again
        except (ConnectionRefusedError, FileNotFoundError):
            remedy = "make it again, or have its sender end in order: put(buf.give()) then leaves it to a keeper"
            raise fail(errno.EOWNERDEAD, "unpickle", what, remedy, what=f"{sender}, which sent it, ended before it was received") from None
        until = min(end, time.monotonic() + _AGAIN_S)
        while waiting.poll(max(0.0, until - time.monotonic()) * 1000):
            found = _answer(sock, key, what, sender)
            if found is not None:
                return found
        if time.monotonic() >= end:
            remedy = "look whether it is stopped, or one of its threads never lets others run"
            raise fail(errno.ETIMEDOUT, "unpickle", what, remedy, what=f"{sender}, which sent it, did not answer within {PATIENCE_S:.0f} s")


def _answer(sock: socket.socket, key: bytes, what: str, sender: str) -> OwnedFd | None:
    """Return the descriptor of an answer, None if what was received is none."""
    room = socket.CMSG_SPACE(kept.UCRED.size) + socket.CMSG_SPACE(4)
    try:
        # From the system call to the owners of the descriptors, all of this is C.
        data, fds, control, flags = next(
            map(owned_rights, map(sock.recvmsg, (kept.MESSAGE.size + 1,), (room,), (int(socket.MSG_CMSG_CLOEXEC),)))
        )
    except BlockingIOError:
        return None
    try:
        if len(data) != kept.MESSAGE.size or kept.credentials(control)[1] != os.geteuid():
            return None
        magic, kind, of = kept.MESSAGE.unpack(data)
        if magic != kept.MAGIC or of != key:
            return None
        if kind == kept.GONE:
            what_happened = f"{sender} doesn't have it any more: it was received already"
            raise fail(errno.ENOENT, "unpickle", what, "unpickle it once, and pass it on from there", what=what_happened)
        if kind != kept.HERE:
            return None
        if not fds:
            if not flags & socket.MSG_CTRUNC:
                return None
            remedy = "raise RLIMIT_NOFILE (ulimit -n) or close descriptors"
            lost = f"no descriptor is left in this process, RLIMIT_NOFILE is {descriptor_limit()}"
            raise fail(errno.EMFILE, "unpickle", what, remedy, what=lost)
        return fds.pop(0)
    finally:
        for fd in fds:
            fd.close()
