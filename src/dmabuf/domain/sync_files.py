"""The descriptors of sync files: what they are, how a process recognizes one, and what makes them readable.

A sync file's descriptor is a listening socket (unix(7)) bound in the domain's directory. A connection that waits in its queue makes the
descriptor readable in every process that has it, for good, and nothing else does. Like the kernel's sync_file it is never writable and
never hung up. Any process of the domain can therefore make it readable, even if its maker is dead, and ``getsockname`` tells a process that
received the bare descriptor which sync file it is. A socket that no process has open refuses connections, which shows that the last
descriptor is closed.

In the directory a sync file has up to three names:

====================  =====================================================================================
``STEM.sock``         the socket
``STEM.HANDLE``       its record (`SyncFileRecord`); the sync file waits for the fence with this handle
``STEM.done``         its record with the results: all fences are signaled
====================  =====================================================================================

A sync file waits for one pending fence at a time, as the kernel does with chains. The fence's slot has the mark "sync". The process that
signals the fence (its owner, or the reaper of the owner) finds ``*.HANDLE``. It marks the next pending fence and renames the record, or
makes the descriptor readable. It clears the mark last, so if it dies in the middle, the next reaper, which checks every name, does the
rest. ``STEM.sock`` is made first and removed last.

A private domain has no directory. There the socket has an abstract name, the record travels with the sync file, and a living process that
has the ``SyncFile`` makes it readable. Every user of the machine can connect to an abstract name and so make such a descriptor readable
early. ``wait`` and ``status`` check the fences and are not deceived.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import socket
import struct
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from dmabuf._native import Fence, Shm, step
from dmabuf.domain.directory import bind_socket, is_socket, new_file, read_file, remove_file, socket_address
from dmabuf.errors import fail

PREFIX: Final = "sync-"
MAX_LEAVES: Final = 1 << 16
NAME_BYTES: Final = 32  # with its NUL (SYNC_IOC_MERGE, semantics 5.1)
_HEAD: Final = struct.Struct("=8s32sI")
_LEAF: Final = struct.Struct("=QQQIiQ64s64s")
_OURS: Final = re.compile(PREFIX + r"[0-9a-f]{16}-[0-9a-f]{16}\.(sock|done|[0-9a-f]{16}|new[0-9a-f]{8})")
_MAGIC: Final = b"dmabufS\1"  # the last byte is the version


class Leaf(NamedTuple):
    """A fence of a sync file. ``status``: 0 unless the fence is known to be signaled."""

    handle: int
    context: int
    seqno: int
    timeline: int
    status: int = 0
    timestamp: int = 0
    driver: bytes = b""
    name: bytes = b""


class SyncFileRecord(NamedTuple):
    """What every process knows of a sync file: its name and its fences."""

    name: bytes
    leaves: tuple[Leaf, ...]

    def pack(self) -> bytes:
        """Return the record as bytes."""
        head = _HEAD.pack(_MAGIC, self.name[: NAME_BYTES - 1], len(self.leaves))
        return head + b"".join(_LEAF.pack(*leaf) for leaf in self.leaves)

    @classmethod
    def unpack(cls, data: bytes) -> SyncFileRecord:
        """Return the record in some bytes. Errors: EUCLEAN they are not a record."""
        if len(data) < _HEAD.size or not data.startswith(_MAGIC):
            raise _nonsense(f"{len(data)} bytes that don't begin like a record")
        _, name, count = _HEAD.unpack_from(data)
        if not 1 <= count <= MAX_LEAVES or len(data) != _HEAD.size + count * _LEAF.size:
            raise _nonsense(f"{len(data)} bytes for {count} fences")
        leaves = (Leaf(*found[:6], *(text.rstrip(b"\0") for text in found[6:])) for found in _LEAF.iter_unpack(data[_HEAD.size :]))
        return cls(name.rstrip(b"\0"), tuple(leaves))

    @property
    def ended(self) -> bool:
        """Whether the results of all fences are known."""
        return all(leaf.status for leaf in self.leaves)


def _nonsense(what: str) -> OSError:
    remedy = "make a new one; another program wrote into the domain's directory"
    return fail(errno.EUCLEAN, "look up", "a sync file", remedy, what=f"its record has {what}")


def with_results(shm: Shm, record: SyncFileRecord) -> SyncFileRecord:
    """Return the record with the result of every fence that is signaled."""

    def result(leaf: Leaf) -> Leaf:
        fence = None if leaf.status else Fence(shm, leaf.handle, False, leaf.context, leaf.seqno, leaf.timeline)
        if fence is None or not fence.is_signaled():
            return leaf
        return Leaf(leaf.handle, leaf.context, leaf.seqno, leaf.timeline, fence.status, fence.timestamp, leaf.driver, leaf.name)

    return SyncFileRecord(record.name, tuple(map(result, record.leaves)))


# ---- the socket ----


def new_stem(identity: str) -> str:
    """Return a new stem for the names of a sync file of this domain."""
    return f"{PREFIX}{identity}-{secrets.token_hex(8)}"


def stem_of(fd: int) -> tuple[str, bool] | None:
    """Return (stem, whether the domain is private) of a sync file's descriptor, None of any other. Errors: EBADF it is not open."""
    if not os.fstat(fd).st_mode & 0o170000 == 0o140000:  # S_IFSOCK
        return None
    own = os.dup(fd)
    try:
        sock = socket.socket(fileno=own)  # if this raises, the descriptor still has to be closed
    except BaseException:
        os.close(own)
        raise
    with sock:
        if sock.family != socket.AF_UNIX or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return None
        address: str | bytes = sock.getsockname()
    private = isinstance(address, bytes)
    text = os.fsdecode(address).lstrip("\0")
    stem, dot, kind = text.rpartition("/")[2].rpartition(".")
    parts = stem.split("-")
    if not dot or kind != "sock" or len(parts) != 3 or f"{parts[0]}-" != PREFIX:
        return None
    if any(len(part) != 16 or part.strip("0123456789abcdef") for part in parts[1:]):
        return None
    return stem, private


def identity_of(stem: str) -> str:
    """Return the id of the domain that a sync file belongs to."""
    return stem.split("-")[1]


def _abstract(stem: str) -> str:
    return f"\0dmabuf/{stem}.sock"


def listen(stem: str, directory: int | None) -> int:
    """Make the socket and return its descriptor, which the caller owns. Errors: EMFILE, ENOSPC, … of the system."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC) as sock:
            if directory is None:
                sock.bind(_abstract(stem))
            else:
                bind_socket(sock, directory, f"{stem}.sock")
            step("sync_bound")  # if this process dies here, the name of a socket is left that refuses: tidy() removes it
            sock.listen(0)
            return sock.detach()
    except OSError as e:
        raise fail(e.errno or errno.EIO, "fileno", "a sync file", "raise RLIMIT_NOFILE, or close descriptors", what=e.strerror) from None


def make_readable(stem: str, directory: int | None) -> bool:
    """Make the descriptor readable. Return False if no process has it open."""
    return _connect(stem, directory, socket.SOCK_STREAM)


def is_open(stem: str, directory: int | None) -> bool:
    """Return True if a process has the descriptor open, or it is in flight. A socket of another type is refused, so this wakes nobody."""
    return _connect(stem, directory, socket.SOCK_DGRAM)


def _connect(stem: str, directory: int | None, kind: int) -> bool:
    name = f"{stem}.sock"
    if directory is not None and not is_socket(directory, name):
        return False
    with socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC) as sock:
        answer = sock.connect_ex(_abstract(stem) if directory is None else socket_address(directory, name))
    if answer in (0, errno.EAGAIN, errno.EPROTOTYPE):  # EAGAIN: a connection is waiting already
        return True
    if answer in (errno.ECONNREFUSED, errno.ENOENT):
        return False
    raise OSError(answer, os.strerror(answer))


# ---- the directory ----


def register(shm: Shm, stem: str, directory: int, record: SyncFileRecord) -> None:
    """Enter a sync file whose socket exists, and mark its first pending fence, or make the descriptor readable at once."""
    temporary = f"{stem}.new{secrets.token_hex(4)}"
    first = next((leaf.handle for leaf in record.leaves if not leaf.status), 0)
    _write(temporary, directory, record)
    step("sync_written")  # a record without a name that counts: removed with the socket
    name = f"{stem}.{first:016x}" if first else f"{stem}.done"
    os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
    step("sync_registered")  # no other process has the descriptor yet: removed with the socket
    if first:
        advance(shm, name, directory)
    else:
        make_readable(stem, directory)


def _write(name: str, directory: int, record: SyncFileRecord) -> None:
    fd = new_file(directory, name)
    try:
        data = memoryview(record.pack())
        while data:
            data = data[os.write(fd, data) :]
    except BaseException:
        os.unlink(name, dir_fd=directory)
        raise
    finally:
        os.close(fd)


def _read(name: str, directory: int) -> SyncFileRecord:
    return SyncFileRecord.unpack(read_file(directory, name, _HEAD.size + MAX_LEAVES * _LEAF.size + 1))


def advance(shm: Shm, name: str, directory: int) -> None:
    """Mark the next pending fence of a sync file, or make the descriptor readable. Any number of processes may do so at once.

    Args:
        shm: The domain.
        name: ``STEM.HANDLE``.
        directory: The descriptor of the domain's directory.
    """
    stem, _, waited = name.rpartition(".")
    try:
        record = _read(name, directory)
        while pending := next((leaf.handle for leaf in record.leaves if not leaf.status and shm.fence_pending(leaf.handle)), 0):
            shm.fence_watch_sync(pending)
            step("sync_marked")  # the mark alone has no effect, and the name still says the fence before
            if f"{pending:016x}" != waited:
                waited = f"{pending:016x}"
                os.rename(name, f"{stem}.{waited}", src_dir_fd=directory, dst_dir_fd=directory)
                name = f"{stem}.{waited}"
                step("sync_moved")  # the fence may have been signaled in between: this process, or its reaper, checks again
            if shm.fence_watch_sync(pending):
                return
        _finish(shm, stem, name, directory, record)
    except FileNotFoundError:
        pass  # another process advanced it, or no process has it open
    except OSError as e:
        if e.errno != errno.EUCLEAN:
            raise
        make_readable(stem, directory)  # the record makes no sense: waiters check the fences
        remove_file(directory, name)


def _finish(shm: Shm, stem: str, name: str, directory: int, record: SyncFileRecord) -> None:
    temporary = f"{stem}.new{secrets.token_hex(4)}"
    _write(temporary, directory, with_results(shm, record))
    try:
        os.rename(temporary, f"{stem}.done", src_dir_fd=directory, dst_dir_fd=directory)
    except IsADirectoryError:
        remove_file(directory, temporary)  # another program's: the results are lost, and the descriptor becomes readable all the same
    step("sync_done")  # both the results and the name that waits are there: done again
    if make_readable(stem, directory):
        step("sync_rung")
        os.unlink(name, dir_fd=directory)
        step("sync_over")
    else:
        remove(stem, directory)


def find(stem: str, directory: int) -> SyncFileRecord | None:
    """Return the record of a sync file, None if all processes have left its domain since."""
    for _ in range(100):  # it may be advanced meanwhile, each time because one more fence is signaled
        for name in _names(directory, f"{stem}."):
            kind = name.rpartition(".")[2]
            if kind != "sock" and not kind.startswith("new"):
                with contextlib.suppress(FileNotFoundError):
                    return _read(name, directory)
        if f"{stem}.sock" not in os.listdir(directory):
            return None
    return None


def waiting_for(handle: int, directory: int) -> list[str]:
    """Return the names that wait for a fence."""
    return [name for name in _names(directory, PREFIX) if name.endswith(f".{handle:016x}")]


def waiting(directory: int, stem: str = PREFIX) -> list[str]:
    """Return the names that wait for any fence. With ``stem``, only those of one sync file."""
    return [name for name in _names(directory, stem) if len(name.rpartition(".")[2]) == 16]


def _names(directory: int, prefix: str) -> Iterator[str]:
    return (name for name in sorted(os.listdir(directory)) if name.startswith(prefix) and _OURS.fullmatch(name))


def remove(stem: str, directory: int) -> None:
    """Remove the names of a sync file that no process has open, the socket's last."""
    found = [name for name in _names(directory, f"{stem}.") if not name.endswith(".sock")]
    for name in [*found, f"{stem}.sock"]:
        remove_file(directory, name)


def _stems(directory: int) -> Iterable[str]:
    return dict.fromkeys(name.rpartition(".")[0] for name in _names(directory, PREFIX))


def tidy(directory: int) -> int:
    """Remove the sync files that no process has open. Return how many are left."""
    left = 0
    for stem in _stems(directory):
        if is_open(stem, directory):
            left += 1
        else:
            remove(stem, directory)
    return left


def make_all_readable(directory: int) -> None:
    """Make every sync file readable and remove it. No process lives in the domain, so every fence is signaled."""
    for stem in _stems(directory):
        with contextlib.suppress(OSError):
            make_readable(stem, directory)
        remove(stem, directory)
