"""Where a domain's file lives, how it is opened, made, set aside and emptied.

A domain is a directory of mode 0700 that belongs to the effective user, with one file in it; the layout's version is part of the
file's name. The directory is ``$DMABUF_DOMAIN`` (ignored when the kernel set AT_SECURE), else ``/run/user/UID/dmabuf`` if
``/run/user/UID`` exists and is ours, else ``/dev/shm/dmabuf-UID``.

Whoever opens, leaves or empties a domain holds a write lock on one byte of the file while doing so (the door), so those three never
overlap; the kernel frees it if the holder dies. A domain in which no life's byte is locked has no living process: the next opener
replaces its file by a fresh one of the same id (a rename, so that a forked child which still maps the old file keeps it), and a file
that makes no sense is renamed to ``….corrupt``, of which at most one is kept.

A process that answers requests of others has a socket in the directory while it lives (sharing/server.py). It unlinks it as it leaves;
who reaps a dead one unlinks the dead one's.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import stat
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dmabuf import _native
from dmabuf.domain import sync_files
from dmabuf.errors import DmaBufError, fail, needing_descriptors

FILE = f"domain-{_native.VERSION}"
SOCKET = "server-"  # and the life's id, 8 hexadecimal digits: where that process answers requests
OFD_GETLK, OFD_SETLK, OFD_SETLKW = 36, 37, 38  # fcntl(2); Python 3.11 has no names for them
LIFE_BYTE = 1 << 40  # byte of the first life's lock, far behind any data
LIFECYCLE_BYTE = 1 << 41
_FLOCK = "hhqqi4x"  # struct flock of 64-bit Linux


def ofd_lock(fd: int, kind: int, start: int, length: int = 1, *, wait: bool = False) -> bool:
    """Set an open-file-description lock; False when somebody else's is in the way (fcntl(2))."""
    try:
        fcntl.fcntl(fd, OFD_SETLKW if wait else OFD_SETLK, struct.pack(_FLOCK, kind, os.SEEK_SET, start, length, 0))
    except OSError as e:
        if e.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def ofd_locked(fd: int, start: int, length: int = 1, *, kind: int = fcntl.F_WRLCK) -> bool:
    """Does another open file description hold a lock on the bytes? ``kind``: F_RDLCK asks for write locks alone."""
    answer = fcntl.fcntl(fd, OFD_GETLK, struct.pack(_FLOCK, kind, os.SEEK_SET, start, length, 0))
    return bool(struct.unpack(_FLOCK, answer)[0] != fcntl.F_UNLCK)


def comm() -> bytes:
    """What this process is called, as the kernel has it: at most 15 bytes (proc_pid_comm(5))."""
    with needing_descriptors("read", "/proc/self/comm"), open("/proc/self/comm", "rb") as f:
        return f.read().strip()[:15]


def reopen(fd: int) -> int:
    """A new open file description of the same file."""
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        raise fail(errno.ENOSYS, "open domain", "/proc", "dmabuf needs /proc: mount it") from None


@contextmanager
def lifecycle_lock(fd: int) -> Iterator[int]:
    """Hold the door lock of the domain file behind fd; yields the description that holds it."""
    # A description of its own: the domain's fd is shared with forked children, and so would its locks be.
    own = reopen(fd)
    try:
        if not ofd_lock(own, fcntl.F_WRLCK, LIFECYCLE_BYTE):
            _native.step("~door")
            ofd_lock(own, fcntl.F_WRLCK, LIFECYCLE_BYTE, wait=True)
        yield own
    finally:
        try:
            # A child forked meanwhile shares the description, and so the lock: closing ours would not end it.
            ofd_lock(own, fcntl.F_UNLCK, LIFECYCLE_BYTE)
        finally:
            os.close(own)


def _secure() -> bool:
    """AT_SECURE: the program has more rights than its caller, so its environment is not to be trusted (getauxval(3))."""
    try:
        words = memoryview(Path("/proc/self/auxv").read_bytes()).cast("L")
    except OSError:
        return os.geteuid() != os.getuid()
    return any(words[i] == 23 and words[i + 1] for i in range(0, len(words) - 1, 2))


def default_path() -> Path:
    """The directory of this user's default domain."""
    given = os.environ.get("DMABUF_DOMAIN")
    if given and not _secure():
        return Path(given)
    uid = os.geteuid()
    run = Path(f"/run/user/{uid}")
    try:
        if os.stat(run).st_uid == uid:
            return run / "dmabuf"
    except OSError:
        pass
    return Path(f"/dev/shm/dmabuf-{uid}")


def open_directory(path: Path, *, make: bool = True) -> int:
    """Open (make) the domain's directory; EACCES when it is not ours alone."""
    try:
        if make:
            os.mkdir(path, 0o700)
    except FileExistsError:
        pass
    except OSError as e:
        raise fail(e.errno or errno.EIO, "open domain", path, "name another directory in DMABUF_DOMAIN") from None
    try:
        with needing_descriptors("open domain", path):
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except DmaBufError:
        raise
    except OSError as e:
        raise fail(e.errno or errno.EIO, "open domain", path, "a domain is a directory of its own, not a link or a file") from None
    st = os.fstat(fd)
    if st.st_uid != os.geteuid() or stat.S_IMODE(st.st_mode) != 0o700:
        os.close(fd)
        raise fail(
            errno.EACCES,
            "open domain",
            path,
            "a domain belongs to one user: make the directory yours with mode 0700, or name another in DMABUF_DOMAIN",
            what=f"it belongs to uid {st.st_uid} with mode {stat.S_IMODE(st.st_mode):04o}",
        )
    return fd


def format_file(fd: int, identity: bytes) -> None:
    """Make an empty domain of an empty file. The magic goes last: a death before it leaves a file that the next opener replaces."""
    try:
        os.posix_fallocate(fd, 0, _native.HEADER_BYTES)
    except OSError as e:
        raise fail(
            e.errno or errno.EIO, "make domain", "its file", "free memory or name a directory on another file system in DMABUF_DOMAIN"
        ) from None
    os.pwrite(fd, struct.pack("<II32s4I", _native.VERSION, _native.HEADER_BYTES, identity, *geometry()), 8)
    os.pwrite(fd, struct.pack("<QQ", 1, 1), _native.OFF_CONTEXT)
    _native.step("domain_filled")
    os.pwrite(fd, _native.MAGIC.encode(), 0)


def geometry() -> tuple[int, int, int, int]:
    """What both sides must agree on besides the version."""
    return (_native.CHUNK_BYTES, _native.MAX_CHUNKS, _native.LIVES, _native.BUCKETS)


def read_header(fd: int) -> tuple[bytes, str]:
    """(identity, what is wrong); identity is 16 hexadecimal digits, and empty when something is wrong."""
    head = os.pread(fd, 64, 0)
    count = os.pread(fd, 4, _native.OFF_NCHUNKS)
    # Read the size after the count: whoever grows the file makes it longer first and counts the chunk then.
    size = os.fstat(fd).st_size
    if len(head) < 64 or size < _native.HEADER_BYTES:
        return b"", f"it has {size} bytes, an empty domain has {_native.HEADER_BYTES}"
    if head[:8] != _native.MAGIC.encode():
        return b"", "it does not begin like a domain file"
    version, header_bytes, identity, *shape = struct.unpack("<II32s4I", head[8:64])
    if version != _native.VERSION or header_bytes != _native.HEADER_BYTES or tuple(shape) != geometry():
        return b"", f"its layout is version {version}, this library's is {_native.VERSION}"
    identity = identity.rstrip(b"\0")
    if len(identity) != 16 or identity.strip(b"0123456789abcdef"):
        return b"", "its identity is no identity"
    chunks = struct.unpack("<I", count)[0]
    if chunks > _native.MAX_CHUNKS or size < _native.HEADER_BYTES + chunks * _native.CHUNK_BYTES:
        return b"", f"it counts {chunks} chunks and has {size} bytes"
    return identity, ""


def new_identity() -> bytes:
    return secrets.token_hex(8).encode()


def inhabited(fd: int) -> bool:
    """Does any process live in the domain?"""
    return ofd_locked(fd, LIFE_BYTE, _native.LIVES)


def socket_name(life: int) -> str:
    """The name in the domain's directory of the socket of a life."""
    return f"{SOCKET}{life:08x}"


def replace_file(directory: int, identity: bytes) -> None:
    """Put a fresh, empty file of that identity in the place of the domain's file. The door is held, and nobody lives there.

    What the dead left beside it goes first, because a fresh file looks as if there were nothing left to do.
    """
    sync_files.make_all_readable(directory)
    for name in os.listdir(directory):
        if name.startswith(SOCKET):
            os.unlink(name, dir_fd=directory)
    try:
        _replace_file(directory, identity)
    except OSError as e:
        if e.errno != errno.ENOSPC:
            raise
        # A domain that has filled its file system must not keep out everybody for ever: the old file's memory makes room.
        _empty_file(directory)
        _replace_file(directory, identity)


def _empty_file(directory: int) -> None:
    """Give back the memory of the chunks, where nobody lives. Not by truncating: a forked child may still look at them."""
    fd = os.open(FILE, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=directory)
    try:
        size = os.fstat(fd).st_size - _native.HEADER_BYTES
        if size > 0:
            _native.punch(fd, _native.HEADER_BYTES, size)  # a page may lie across the two: not all machines have pages of 4 KiB
    finally:
        os.close(fd)


def _replace_file(directory: int, identity: bytes) -> None:
    name = FILE + ".new"
    fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600, dir_fd=directory)
    try:
        format_file(fd, identity)
        _native.step("domain_formatted")  # a death leaves FILE.new, which the next replacement uses again
        os.rename(name, FILE, src_dir_fd=directory, dst_dir_fd=directory)
        _native.step("domain_replaced")
    except BaseException:
        os.unlink(name, dir_fd=directory)
        raise
    finally:
        os.close(fd)


@contextmanager
def entered(path: Path) -> Iterator[tuple[int, bytes]]:
    """Open the domain in a directory and hold its door: yields (fd, identity). A file without a living process is emptied first."""
    directory = open_directory(path)
    try:
        while True:
            fd = os.open(FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600, dir_fd=directory)
            try:
                with lifecycle_lock(fd):
                    if not is_current(fd, directory):
                        continue  # replaced while we stood at the door
                    identity, wrong = read_header(fd)
                    if inhabited(fd):
                        if wrong:
                            raise fail(
                                errno.EUCLEAN,
                                "open domain",
                                path / FILE,
                                "end the processes that use it; the next opener sets it aside",
                                what=wrong,
                            )
                        if os.fstat(fd).st_uid != os.geteuid():
                            raise fail(errno.EACCES, "open domain", path / FILE, "it belongs to another user")
                        yield fd, identity
                        return
                    if wrong and os.fstat(fd).st_size:
                        os.rename(FILE, FILE + ".corrupt", src_dir_fd=directory, dst_dir_fd=directory)
                        warnings.warn(
                            f"dmabuf: the domain {path / FILE} was corrupt ({wrong}); set aside as {FILE}.corrupt",
                            RuntimeWarning,
                            stacklevel=2,
                        )
                        continue
                    if wrong or os.fstat(fd).st_size > _native.HEADER_BYTES or _used(fd):
                        replace_file(directory, identity or new_identity())
                        continue
                    yield fd, identity
                    return
            finally:
                os.close(fd)
    finally:
        os.close(directory)


def _used(fd: int) -> bool:
    """Has anybody lived in this file? A life that came and left without growing the file leaves its slot's numbers."""
    high: int = struct.unpack("<I", os.pread(fd, 4, _native.OFF_LIFE_HIGH))[0]
    return high != 0


def is_current(fd: int, directory: int) -> bool:
    try:
        there = os.stat(FILE, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    here = os.fstat(fd)
    same: bool = (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)
    return same
