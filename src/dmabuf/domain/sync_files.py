"""The descriptors of sync files: how they are recognised, and how they ring whoever is left.

A sync file's descriptor is a listening socket, unix(7), bound in the domain's directory: a connection that waits in its queue makes it
readable, for good, in every process that holds it, and nothing else does (it is never writable and never hung up, as the kernel's
sync_file). So anybody of the domain can ring it, the maker may be dead, and ``getsockname`` tells whoever received the bare descriptor
which sync file it is. A socket that nobody holds any more refuses connections, which is how its last holder's end is seen.

In the directory a sync file has up to three names:

====================  =====================================================================================
``STEM.sock``         the socket
``STEM.HANDLE``       its record (:class:`SyncFileRecord`); the fence of this handle is the one that is being waited for
``STEM.done``         its record with the results: all fences have ended
====================  =====================================================================================

One pending fence at a time is waited for, as the kernel does with chains: its slot has the mark "sync", and who ends it (its owner, or
who reaps the owner) finds ``*.HANDLE``, marks the next pending fence and renames, or rings. The mark is cleared last, so a death in
the middle leaves the duty to the next reaper, who looks at every name. ``STEM.sock`` is made first and removed last.

In a private domain, which has no directory, the socket has an abstract name and the record travel with the sync file alone; there the
living who have the ``SyncFile`` ring. Abstract names are open to every user of the machine: one who connects makes such a descriptor
readable early (``wait`` and ``status`` look at the fences and are not deceived).
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import socket
import struct
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from dmabuf import _native
from dmabuf._native import Shm
from dmabuf.errors import fail

PREFIX: Final = "sync-"
MAX_LEAVES: Final = 1 << 16
NAME_BYTES: Final = 32  # with its NUL (SYNC_IOC_MERGE, spec 5.1)
_HEAD: Final = struct.Struct("=8s32sI")
_LEAF: Final = struct.Struct("=QQQIiQ64s64s")
_MAGIC: Final = b"dmabufS\1"  # the last byte is the version


class Leaf(NamedTuple):
    """A fence that a sync file waits for. ``status``: 0 unless it is known to have ended."""

    handle: int
    context: int
    seqno: int
    timeline: int
    status: int = 0
    timestamp: int = 0
    driver: bytes = b""
    name: bytes = b""


class SyncFileRecord(NamedTuple):
    """What a sync file is, in every process."""

    name: bytes
    leaves: tuple[Leaf, ...]

    def pack(self) -> bytes:
        head = _HEAD.pack(_MAGIC, self.name[: NAME_BYTES - 1], len(self.leaves))
        return head + b"".join(_LEAF.pack(*leaf) for leaf in self.leaves)

    @classmethod
    def unpack(cls, data: bytes) -> SyncFileRecord:
        """Errors: EUCLEAN what is no record."""
        if len(data) < _HEAD.size or not data.startswith(_MAGIC):
            raise _nonsense(f"{len(data)} bytes that do not begin like one")
        _, name, count = _HEAD.unpack_from(data)
        if not 1 <= count <= MAX_LEAVES or len(data) != _HEAD.size + count * _LEAF.size:
            raise _nonsense(f"{len(data)} bytes that count {count} fences")
        leaves = (Leaf(*found[:6], *(text.rstrip(b"\0") for text in found[6:])) for found in _LEAF.iter_unpack(data[_HEAD.size :]))
        return cls(name.rstrip(b"\0"), tuple(leaves))

    @property
    def ended(self) -> bool:
        """Are the results of all fences known?"""
        return all(leaf.status for leaf in self.leaves)


def _nonsense(what: str) -> OSError:
    return fail(errno.EUCLEAN, "look up", "a sync file", "the domain's directory was changed from outside", what=f"its record is {what}")


def with_results(shm: Shm, record: SyncFileRecord) -> SyncFileRecord:
    """The record with what every ended fence ended with."""

    def look(leaf: Leaf) -> Leaf:
        fence = None if leaf.status else _native.Fence(shm, leaf.handle, False, leaf.context, leaf.seqno, leaf.timeline)
        if fence is None or not fence.is_signaled():
            return leaf
        return leaf._replace(status=fence.status, timestamp=fence.timestamp)

    return SyncFileRecord(record.name, tuple(map(look, record.leaves)))


# ---- the socket ----


def new_stem(identity: str) -> str:
    return f"{PREFIX}{identity}-{secrets.token_hex(8)}"


def stem_of(fd: int) -> tuple[str, bool] | None:
    """(stem, in a private domain?) of a sync file's descriptor; None for anything else. Errors: EBADF no open descriptor."""
    if not os.fstat(fd).st_mode & 0o170000 == 0o140000:  # S_IFSOCK
        return None
    own = os.dup(fd)
    try:
        sock = socket.socket(fileno=own)  # which may raise: then the number is still ours
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
    """The id of the domain that a sync file belongs to."""
    return stem.split("-")[1]


def _address(stem: str, directory: int | None) -> str:
    # Through the directory's descriptor: a path of a socket has 107 bytes at most.
    return f"\0dmabuf/{stem}.sock" if directory is None else f"/proc/self/fd/{directory}/{stem}.sock"


def listen(stem: str, directory: int | None) -> int:
    """Make the socket; its descriptor belongs to the caller. Errors: EMFILE, ENOSPC, … as the kernel's, in our words."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC) as sock:
            sock.bind(_address(stem, directory))
            _native.step("sync_bound")  # a socket file without a socket when we die: whoever tidies removes it
            sock.listen(0)
            return sock.detach()
    except OSError as e:
        raise fail(e.errno or errno.EIO, "fileno", "a sync file", "raise RLIMIT_NOFILE, or close descriptors", what=e.strerror) from None


def make_readable(stem: str, directory: int | None) -> bool:
    """Make it readable; False when nobody holds it any more."""
    return _knock(stem, directory, socket.SOCK_STREAM)


def is_open(stem: str, directory: int | None) -> bool:
    """Does anybody hold the descriptor, in flight too? Rings nothing: a socket of another type is refused as one of that type."""
    return _knock(stem, directory, socket.SOCK_DGRAM)


def _knock(stem: str, directory: int | None, kind: int) -> bool:
    with socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC) as sock:
        answer = sock.connect_ex(_address(stem, directory))
    if answer in (0, errno.EAGAIN, errno.EPROTOTYPE):  # EAGAIN: a connection is waiting already
        return True
    if answer in (errno.ECONNREFUSED, errno.ENOENT):
        return False
    raise OSError(answer, os.strerror(answer))


# ---- the directory ----


def register(shm: Shm, stem: str, directory: int, record: SyncFileRecord) -> None:
    """Enter a sync file whose socket is there, and see to it that it will be rung, or ring it."""
    temporary = f"{stem}.new{secrets.token_hex(4)}"
    first = next((leaf.handle for leaf in record.leaves if not leaf.status), 0)
    _write(temporary, directory, record)
    _native.step("sync_written")  # record under no name that counts: removed with the socket
    name = f"{stem}.{first:016x}" if first else f"{stem}.done"
    os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
    _native.step("sync_registered")  # nobody has the descriptor yet: removed with the socket
    if first:
        advance(shm, name, directory)
    else:
        make_readable(stem, directory)


def _write(name: str, directory: int, record: SyncFileRecord) -> None:
    fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600, dir_fd=directory)
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
    with open(os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=directory), "rb") as f:
        return SyncFileRecord.unpack(f.read(_HEAD.size + MAX_LEAVES * _LEAF.size + 1))


def advance(shm: Shm, name: str, directory: int) -> None:
    """Wait for the next pending fence of a sync file, or ring it. ``name``: ``STEM.HANDLE``. Any process, any number at once."""
    stem, _, waited = name.rpartition(".")
    try:
        record = _read(name, directory)
        while pending := next((leaf.handle for leaf in record.leaves if not leaf.status and shm.fence_pending(leaf.handle)), 0):
            shm.fence_mark(pending, "sync", 1)
            _native.step("sync_marked")  # the mark alone rings nothing; the name still says the one before
            if f"{pending:016x}" != waited:
                waited = f"{pending:016x}"
                os.rename(name, f"{stem}.{waited}", src_dir_fd=directory, dst_dir_fd=directory)
                name = f"{stem}.{waited}"
                _native.step("sync_moved")  # it may have ended between mark and name: we look again, or our reaper does
            if shm.fence_mark(pending, "sync", 1):
                return
        _finish(shm, stem, name, directory, record)
    except FileNotFoundError:
        pass  # somebody else moved it on, or nobody holds it any more
    except OSError as e:
        if e.errno != errno.EUCLEAN:
            raise
        make_readable(stem, directory)  # nonsense: whoever waits shall look
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=directory)


def _finish(shm: Shm, stem: str, name: str, directory: int, record: SyncFileRecord) -> None:
    temporary = f"{stem}.new{secrets.token_hex(4)}"
    _write(temporary, directory, with_results(shm, record))
    os.rename(temporary, f"{stem}.done", src_dir_fd=directory, dst_dir_fd=directory)
    _native.step("sync_done")  # the results are known, the name that waits is still there: done again
    if make_readable(stem, directory):
        _native.step("sync_rung")
        os.unlink(name, dir_fd=directory)
        _native.step("sync_over")
    else:
        remove(stem, directory)


def find(stem: str, directory: int) -> SyncFileRecord | None:
    """The record of a sync file; None when its domain began anew since."""
    for _ in range(100):  # it may be moved on while we look; each time one fence more has ended
        for name in _names(directory, f"{stem}."):
            kind = name.rpartition(".")[2]
            if kind != "sock" and not kind.startswith("new"):
                with contextlib.suppress(FileNotFoundError):
                    return _read(name, directory)
        if f"{stem}.sock" not in os.listdir(directory):
            return None
    return None


def waiting_for(handle: int, directory: int) -> list[str]:
    """The names that wait for a fence."""
    return [name for name in _names(directory, PREFIX) if name.endswith(f".{handle:016x}")]


def waiting(directory: int, stem: str = PREFIX) -> list[str]:
    """The names that wait for any fence; ``stem``: of one sync file."""
    return [name for name in _names(directory, stem) if len(name.rpartition(".")[2]) == 16]


def _names(directory: int, prefix: str) -> Iterator[str]:
    return (name for name in sorted(os.listdir(directory)) if name.startswith(prefix))


def remove(stem: str, directory: int) -> None:
    """Remove the names of a sync file that nobody holds; the socket's last."""
    found = [name for name in _names(directory, f"{stem}.") if not name.endswith(".sock")]
    for name in [*found, f"{stem}.sock"]:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=directory)


def _stems(directory: int) -> Iterable[str]:
    return dict.fromkeys(name.rpartition(".")[0] for name in _names(directory, PREFIX))


def tidy(directory: int) -> int:
    """Remove what nobody holds; how many sync files are left."""
    left = 0
    for stem in _stems(directory):
        if is_open(stem, directory):
            left += 1
        else:
            remove(stem, directory)
    return left


def make_all_readable(directory: int) -> None:
    """Ring and remove every sync file: nobody lives in the domain, so every fence has ended."""
    for stem in _stems(directory):
        with contextlib.suppress(OSError):
            make_readable(stem, directory)
        remove(stem, directory)
