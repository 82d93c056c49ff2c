"""The place of a domain's file: its directory, and how the file is opened, made, replaced, and renamed when it is corrupt.

A domain is a directory of mode 0700 that belongs to the effective user, with one file in it. The version of the layout is part of the
file's name. The directory is ``$DMABUF_DOMAIN`` (ignored if the kernel set AT_SECURE), else ``/run/user/UID/dmabuf`` if ``/run/user/UID``
exists and belongs to the user, else ``/dev/shm/dmabuf-UID``. If processes live in the second of these, that one is meant. If the file
system of the first can't keep a domain, the second is used.

A process that opens, joins or leaves a domain holds the *lifecycle lock*, a write lock on one byte of the file, so these never overlap. The
kernel frees the lock if the holder dies. A domain in which no life's byte is locked has no living process. The next process that joins
reaps what the dead left, in the same file. The last process that leaves gives the file's memory back, but keeps what is said of buffers
that a message or another program still holds. A file that makes no sense is renamed to ``….corrupt`` if no process lives there, and at most
one such file is kept. The new file has another identity.

A process that serves other processes has a socket in the directory (sharing/server.py). It unlinks the socket when it leaves, and a reaper
unlinks the socket of a dead process.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import os
import re
import secrets
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from zlib import crc32

from dmabuf._native import (
    BUCKETS,
    CHUNK_BYTES,
    HEADER_BYTES,
    LIFE_ALIVE,
    LIFE_BYTE,
    LIFE_BYTES,
    LIFE_PID,
    LIFE_START,
    LIFE_STATE,
    LIFECYCLE_BYTE,
    LIVES,
    MAGIC,
    MAX_CHUNKS,
    OFF_CONTEXT,
    OFF_DEV,
    OFF_LIVES,
    OFF_NCHUNKS,
    PRESENCE_BYTE,
    VERSION,
    Bracket,
    OwnedFd,
    step,
)
from dmabuf.domain import proved
from dmabuf.domain.directory import make_file, open_file, remove_socket
from dmabuf.domain.directory import open_directory as open_directory
from dmabuf.domain.limits import file_too_large, listed, read_at
from dmabuf.domain.ofd import OFD_SETLK as OFD_SETLK
from dmabuf.domain.ofd import lock_holder, lock_within, reopen_owned
from dmabuf.domain.ofd import ofd_lock as ofd_lock
from dmabuf.domain.ofd import ofd_locked as ofd_locked
from dmabuf.domain.ofd import reopen as reopen
from dmabuf.errors import DmaBufError, fail, needing_descriptors

SHARE_DOMAIN = (
    "start both processes with the same DMABUF_DOMAIN, and again if its directory was removed meanwhile, or send the domain along: "
    "dmabuf.send(sock, domain, …)"
)  # what to do about an object of another domain
LIFECYCLE_S = 30.0  # seconds that a process waits for the lifecycle lock, which others hold for milliseconds
NAME_BYTE = 1 << 43  # the first of 2**32 bytes of the domain's file, far behind its end, for the locks of names
FILE = f"domain-{VERSION}"
SOCKET = "server-"  # and the life's id in 8 hexadecimal digits: the socket of a process that serves others
_SOCKET_NAME = re.compile(SOCKET + "[0-9a-f]{8}")


def comm() -> bytes:
    """Return the kernel's name of this process, at most 15 bytes (proc_pid_comm(5))."""
    with needing_descriptors("read", "/proc/self/comm"), open("/proc/self/comm", "rb") as f:
        return f.read().strip()[:15]


class lifecycle_lock(Bracket):
    """Hold the lifecycle lock of the domain file behind ``fd`` for a block, which gets the description that holds it.

    Raises:
        DmaBufTimeout: Another process has held it for :data:`LIFECYCLE_S`, because it is stopped (ETIMEDOUT).
    """

    __slots__ = ("_byte", "_called", "_fd", "_own")

    def __init__(self, fd: int) -> None:
        self._fd, self._byte, self._called = fd, LIFECYCLE_BYTE, "lifecycle lock"
        self._own: OwnedFd | None = None

    def enter(self) -> int:
        """Take the lock, with a description of its own, because forked children share the domain's."""
        self._own = own = reopen_owned(self._fd)
        if not ofd_lock(own.number, fcntl.F_WRLCK, self._byte):
            step("~lifecycle_lock")
            self._wait(own.number)
        return own.number

    def _wait(self, own: int) -> None:
        if not lock_within(LIFECYCLE_S, lambda: ofd_lock(own, fcntl.F_WRLCK, self._byte)):
            what = f"{lock_holder(own, self._byte)} has held its {self._called} for {LIFECYCLE_S:g} s"
            raise fail(errno.ETIMEDOUT, self._called, "the domain", "continue that process (kill -CONT), or end it", what=what)

    def leave(self) -> None:
        """Release it."""
        own = self._own
        if own is not None and own.number >= 0:
            # A child that was forked meanwhile shares the description, so closing it here would not free the lock.
            ofd_lock(own.number, fcntl.F_UNLCK, self._byte)
            own.close()


class name_lock(lifecycle_lock):
    """Hold the lock of a buffer's name for a block, as a lifecycle lock: of several processes, one makes the buffer.

    It is a byte behind all others, by the checksum of the name. Two names that share it wait for each other.
    """

    __slots__ = ()

    def __init__(self, fd: int, name: bytes) -> None:
        super().__init__(fd)
        self._byte, self._called = NAME_BYTE + crc32(name), "lock of a name"


def _secure() -> bool:
    """Return True if the program has more rights than its caller, which controls the environment (AT_SECURE, getauxval(3))."""
    try:
        words = memoryview(Path("/proc/self/auxv").read_bytes()).cast("L")
    except OSError:
        return os.geteuid() != os.getuid()
    return any(words[i] == 23 and words[i + 1] for i in range(0, len(words) - 1, 2))


def default_places() -> list[Path]:
    """Return the directories in which this user's default domain may be, the first choice first."""
    given = os.environ.get("DMABUF_DOMAIN")
    if given and not _secure():
        return [Path(given)]
    return usual_places()


def usual_places() -> list[Path]:
    """Return the directories in which this user's default domain may be if the environment names none."""
    uid = os.geteuid()
    memory = Path(f"/dev/shm/dmabuf-{uid}")
    run = _runtime_directory(uid)
    return [memory] if run is None else [run / "dmabuf", memory]


def _runtime_directory(uid: int) -> Path | None:
    """Return the directory that the system gives to a user who is logged in; None without one."""
    run = Path(f"/run/user/{uid}")
    try:
        return run if os.stat(run).st_uid == uid else None
    except OSError:
        return None


def default_path() -> Path:
    """Return the directory of this user's default domain.

    ``/run/user/UID`` comes and goes with the user's logins. So if processes live in another place, their place is the default one until the
    last of them has left.
    """
    places = default_places()
    return next((path for path in places if len(places) > 1 and lived_in(path)), places[0])


def lived_in(path: Path) -> bool:
    """Return True if a process lives in the domain of a directory, or a forked child that may join has its file. Nothing is made."""
    try:
        with open_directory(path, make=False) as directory:
            file = open_file(directory.number, FILE)
    except OSError:
        return False
    with file:
        return inhabited(file.number) or ofd_locked(file.number, PRESENCE_BYTE)


def format_file(fd: int, identity: bytes) -> None:
    """Make an empty file an empty domain. The magic is written last: a file without it is replaced by the next process that opens it."""
    try:
        os.posix_fallocate(fd, 0, HEADER_BYTES)
    except OSError as e:
        otherwise = "free memory or name a directory on another file system in DMABUF_DOMAIN"
        raise file_too_large("make domain", "its file", e.errno or errno.EIO, otherwise) from None
    os.pwrite(fd, struct.pack("<II32s4I", VERSION, HEADER_BYTES, identity, *geometry()), 8)
    os.pwrite(fd, struct.pack("<QQ", 1, 1), OFF_CONTEXT)
    st = os.fstat(fd)
    os.pwrite(fd, struct.pack("<QQ", st.st_dev, st.st_ino), OFF_DEV)
    step("domain_filled")
    os.pwrite(fd, MAGIC.encode(), 0)


def geometry() -> tuple[int, int, int, int]:
    """Return the sizes in which all processes must agree, besides the version."""
    return (CHUNK_BYTES, MAX_CHUNKS, LIVES, BUCKETS)


_read = functools.partial(read_at, "open domain", "its file")


def read_header(fd: int) -> tuple[bytes, str]:
    """Return (identity, what is wrong). The identity is 16 hexadecimal digits, empty if something is wrong."""
    head = _read(fd, 64, 0)
    count = _read(fd, 4, OFF_NCHUNKS)
    # Read the size after the count. A process that adds a chunk makes the file longer first, and increments the count then.
    size = os.fstat(fd).st_size
    if len(head) < 64 or size < HEADER_BYTES:
        return b"", f"it has {size} bytes, and an empty domain has {HEADER_BYTES}"
    if head[:8] != MAGIC.encode():
        return b"", "it doesn't begin like a domain's file"
    version, header_bytes, identity, *shape = struct.unpack("<II32s4I", head[8:64])
    if version != VERSION or header_bytes != HEADER_BYTES or tuple(shape) != geometry():
        return b"", f"its layout has version {version}, and this library's has {VERSION}"
    identity = identity.rstrip(b"\0")
    if len(identity) != 16 or identity.strip(b"0123456789abcdef"):
        return b"", "its identity isn't 16 hexadecimal digits"
    chunks = struct.unpack("<I", count)[0]
    if chunks > MAX_CHUNKS or size < HEADER_BYTES + chunks * CHUNK_BYTES:
        return b"", f"it has {chunks} chunks, but only {size} bytes"
    return identity, ""


def check_header(fd: int, path: Path | None) -> None:
    """Check the file of a domain that this process has open, before it joins. The lifecycle lock is held.

    Raises:
        DmaBufError: The file makes no sense (EUCLEAN), or will be set aside because nobody lives there (ESTALE).
    """
    _, wrong = read_header(fd)
    if wrong and inhabited(fd):
        raise _corrupt(path, wrong)
    if wrong:
        remedy = "close what this process has of it, and start the process again"
        what = f"its file makes no sense any more ({wrong}), so nothing is known of its buffers"
        raise fail(errno.ESTALE, "join", path or "a private domain", remedy, what=what)


def _corrupt(path: Path | None, wrong: str) -> OSError:
    where = path / FILE if path else "a private domain"
    return fail(errno.EUCLEAN, "open domain", where, "end the processes that use it, then open it again", what=wrong)


def _is_itself(fd: int) -> bool:
    """Return True if the file is the one that its header names, and not a copy of it, or what another mount shows of it."""
    st = os.fstat(fd)
    return struct.unpack("<QQ", _read(fd, 16, OFF_DEV)) == (st.st_dev, st.st_ino)


def _used_elsewhere(fd: int) -> bool:
    """Return True if a living process uses the file through another mount. Nothing here shows its lock, but its slot is here.

    An overlay shows the same bytes as the layer below it, under the same inode number of another device. A copy has another inode number.
    """
    if struct.unpack("<Q", _read(fd, 8, OFF_DEV + 8))[0] != os.fstat(fd).st_ino:
        return False
    slots = _read(fd, LIVES * LIFE_BYTES, OFF_LIVES)
    for at in range(0, len(slots), LIFE_BYTES):
        state, pid = (int.from_bytes(slots[at + word : at + word + 4], "little") for word in (LIFE_STATE, LIFE_PID))
        start = int.from_bytes(slots[at + LIFE_START : at + LIFE_START + 8], "little")
        if state == LIFE_ALIVE and proved.still_runs(pid, start):
            return True
    return False


@functools.cache
def boot_id() -> bytes:
    """Return the id of this boot of the machine, 16 bytes; zeros if the kernel doesn't tell (random(4)).

    A container manager may have mounted a file of its own there, whose id isn't that of the host and of other containers.
    """
    try:
        with needing_descriptors("read", "the boot id"), open("/proc/sys/kernel/random/boot_id", "rb") as f:
            if os.fstat(f.fileno()).st_dev != os.stat("/proc/self").st_dev:
                return bytes(16)
            return bytes.fromhex(f.read().decode().strip().replace("-", "")).ljust(16, b"\0")[:16]
    except DmaBufError:
        raise  # no descriptor is free: the caller tries again
    except (OSError, ValueError):
        return bytes(16)


def new_identity() -> bytes:
    """Return a random id for a new domain."""
    return secrets.token_hex(8).encode()


def inhabited(fd: int) -> bool:
    """Return True if any process lives in the domain."""
    return ofd_locked(fd, LIFE_BYTE, LIVES)


def socket_name(life: int) -> str:
    """Return the name of a life's socket in the domain's directory."""
    return f"{SOCKET}{life:08x}"


def replace_file(directory: int, identity: bytes) -> None:
    """Replace an empty file by an empty domain with this identity. The lifecycle lock is held.

    What a domain that was set aside has left in the directory is removed first: no process can end its sync files any more.
    """
    for old in listed("open domain", directory):
        if _SOCKET_NAME.fullmatch(old):
            remove_socket(directory, old)
    name = FILE + ".new"
    file = make_file(directory, name)
    try:
        format_file(file.number, identity)
        step("domain_formatted")  # if this process dies here, FILE.new is left, which the next replacement overwrites
        os.rename(name, FILE, src_dir_fd=directory, dst_dir_fd=directory)
        step("domain_replaced")
    except BaseException:
        with suppress(FileNotFoundError):  # a signal handler raised after the renaming
            os.unlink(name, dir_fd=directory)
        raise
    finally:
        file.close()


class entered(Bracket):
    """Open the domain in a directory and hold its lifecycle lock, for a block, which gets (fd, identity).

    A file that makes no sense is set aside, and ``told`` gets the text of a warning. The caller warns when no lock is held, because code of
    the program runs then.
    """

    __slots__ = ("_directory", "_file", "_lock", "_path", "_told")

    def __init__(self, path: Path, told: Callable[[str], object]) -> None:
        self._path, self._told = path, told
        self._directory: OwnedFd | None = None
        self._file: OwnedFd | None = None
        self._lock: lifecycle_lock | None = None

    def enter(self) -> tuple[int, bytes]:
        """Open and lock it."""
        self._directory = directory = open_directory(self._path)
        while True:
            self._file = file = open_file(directory.number, FILE, make=True)
            self._lock = lock = lifecycle_lock(file.number)
            lock.enter()
            identity = self._looked(directory.number, file.number)
            if identity:
                return file.number, identity
            lock.leave()
            file.close()

    def _looked(self, directory: int, fd: int) -> bytes:
        """Return the identity of the file that is open, b"" if another one has to be opened. The lifecycle lock is held."""
        path = self._path
        if not is_current(fd, directory):
            return b""  # it was replaced while this process waited for the lock
        identity, wrong = read_header(fd)
        if not wrong and not _is_itself(fd):
            _refuse_if_used(fd, path)
            _prove(directory, path)
            replace_file(directory, new_identity())  # a copy, which says nothing about any buffer
            return b""
        if wrong and inhabited(fd):
            raise _corrupt(path, wrong)
        if wrong and os.fstat(fd).st_size:
            _set_aside(directory, path)
            self._told(f"dmabuf: the domain {path / FILE} was corrupt ({wrong}); renamed to {FILE}.corrupt")
            return b""
        if wrong:  # empty: it was just made, by this process or by one that died
            _prove(directory, path)
            replace_file(directory, new_identity())
            return b""
        return identity

    def leave(self) -> None:
        """Release the lock, and close what is open."""
        if self._lock is not None:
            self._lock.leave()
        for own in (self._file, self._directory):
            if own is not None:
                own.close()


def _refuse_if_used(fd: int, path: Path) -> None:
    if inhabited(fd) or _used_elsewhere(fd):
        remedy = "reach it by the same mount in all processes, or name another directory in DMABUF_DOMAIN"
        what = "processes use it through another mount, whose locks this one doesn't show"
        raise fail(errno.ENOTSUP, "open domain", path / FILE, remedy, what=what)


def _prove(directory: int, path: Path) -> None:
    """Try what a new domain needs of its place. The empty file goes if something is missing."""
    proved.tidy(directory)
    try:
        proved.prove(directory, path)
    except BaseException:
        os.unlink(FILE, dir_fd=directory)  # a process that waits for its lock then finds that it isn't the domain's
        raise


def _set_aside(directory: int, path: Path) -> None:
    """Rename a file that makes no sense."""
    name = FILE + ".corrupt"
    try:
        os.rename(FILE, name, src_dir_fd=directory, dst_dir_fd=directory)
    except OSError as e:  # a directory stands there
        remedy = "remove that directory, or name another one in DMABUF_DOMAIN"
        raise fail(e.errno or errno.EIO, "open domain", path / FILE, remedy, what=f"corrupt, and can't be renamed to {name}") from None


class own_directory(Bracket):
    """Open the directory of a domain whose file is open, for the block.

    The block gets its descriptor, or None if the domain has no directory: a private domain never had one. Another one's was removed, and
    what is at its path now, if anything, is not its own.

    Args:
        path: Where the directory was.
        file: ``(st_dev, st_ino)`` of the domain's file.
    """

    __slots__ = ("_file", "_own", "_path")

    def __init__(self, path: Path | None, file: tuple[int, int]) -> None:
        self._path, self._file = path, file
        self._own: OwnedFd | None = None

    def enter(self) -> int | None:
        """Open it."""
        if self._path is None:
            return None
        try:
            self._own = own = open_directory(self._path, make=False)
        except OSError as e:
            if e.errno in (errno.EMFILE, errno.ENFILE):
                raise
            return None
        return own.number if _has_file(own.number, self._file) else None

    def leave(self) -> None:
        """Close it."""
        if self._own is not None:
            self._own.close()


def _has_file(directory: int, file: tuple[int, int]) -> bool:
    try:
        there = os.stat(FILE, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == file


def check_set_aside(path: Path | None, identity: str, operation: str, obj: object) -> None:
    """Fail if the domain of an object is one whose file was set aside, as far as that file still says who it was.

    Raises:
        DmaBufError: Nothing is known any more of what belongs to it (ESTALE).
    """
    try:
        with open(path / f"{FILE}.corrupt", "rb") if path else open(os.devnull, "rb") as f:
            found = f.read(48)[16:32]
    except OSError:
        return
    if found == identity.encode():
        what = "its domain's file made no sense and was set aside, so nothing is known of it any more"
        raise fail(errno.ESTALE, operation, obj, "make a new one", what=what)


def has_file(directory: int) -> bool:
    """Return True if there is a domain's file in a directory."""
    return os.access(FILE, os.F_OK, dir_fd=directory, follow_symlinks=False)


def is_current(fd: int, directory: int) -> bool:
    """Return True if the directory still has the file behind ``fd``."""
    here = os.fstat(fd)
    return _has_file(directory, (here.st_dev, here.st_ino))
