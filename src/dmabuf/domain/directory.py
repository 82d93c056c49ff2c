"""The directory of a domain, and the files in it. What stands there may be anybody's work, and is looked at before it is used.

The directory has mode 0700 and belongs to the effective user. So only programs of this user, and root, put something into it: by mistake,
by a backup that was restored, or to do harm. A file is used only if it is a regular file of this user with one name. What this library
didn't make is left alone.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import socket
import stat
from functools import partial
from pathlib import Path
from typing import Final

from dmabuf._native import OwnedFd, owned, rename_new, step
from dmabuf.domain.limits import refused
from dmabuf.errors import DmaBufError, fail, needing_descriptors

_FLAGS: Final = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY  # a FIFO or a device must not make the caller wait
_REMEDY: Final = "remove it, or name another directory in DMABUF_DOMAIN"
_KINDS: Final = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFDIR: "a directory",
    stat.S_IFBLK: "a device",
    stat.S_IFLNK: "a link",
    stat.S_IFSOCK: "a socket",
}


def open_directory(path: Path, *, make: bool = True) -> OwnedFd:
    """Open the domain's directory, and make it if need be. Raise NotPermittedError if it doesn't belong to this user alone (EACCES)."""
    try:
        if make:
            _make_directory(path)
    except FileExistsError:
        pass
    except OSError as e:
        raise _unusable(path, e.errno or errno.EIO, "name another directory in DMABUF_DOMAIN") from None
    try:
        with needing_descriptors("open domain", path):
            own = owned(os.open, path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except DmaBufError:
        raise
    except OSError as e:
        raise _unusable(path, e.errno or errno.EIO, "name a directory, not a link or a file, in DMABUF_DOMAIN") from None
    st = os.fstat(own.number)
    if st.st_uid != os.geteuid() or stat.S_IMODE(st.st_mode) & ~stat.S_ISGID != 0o700:
        own.close()
        raise fail(
            errno.EACCES,
            "open domain",
            path,
            "make the directory yours with mode 0700, or name another in DMABUF_DOMAIN",
            what=f"it belongs to uid {st.st_uid} with mode {stat.S_IMODE(st.st_mode):04o}",
        )
    return own


def _unusable(path: Path, number: int, remedy: str) -> DmaBufError:
    """Return the error for a directory that can't be opened or made."""
    raw = os.fsencode(path)
    if number == errno.ENAMETOOLONG:
        longest = max(len(name) for name in raw.split(b"/"))
        what = f"its path has {len(raw)} bytes, and a name in it {longest}"
        remedy = "name one of fewer than 4096 and 256 bytes in DMABUF_DOMAIN"
        return fail(number, "open domain", f"{os.fsdecode(raw[:48])}…", remedy, what=what)
    if number == errno.ENOENT and not path.parent.is_dir():
        return fail(number, "open domain", path, f"make {path.parent}, or {remedy}", what="its parent directory doesn't exist")
    return fail(number, "open domain", path, remedy)


def open_at(directory: int, name: str, flags: int, mode: int = 0o777) -> OwnedFd:
    """Open a name in a directory. Raise what open(2) fails with."""
    return owned(partial(os.open, dir_fd=directory), name, flags, mode)


def _make_directory(path: Path) -> None:
    """Make a directory of mode 0700. Raise FileExistsError if something has the name, or another OSError of mkdir(2).

    A strict umask takes rights of the owner away. Then the directory gets them before it gets its name, so that no other process finds it
    without them, even if this one dies in between.
    """
    if not _umask() & 0o700:
        os.mkdir(path, 0o700)  # it may inherit the set-group-ID bit, which gives nobody rights
        return
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
    made = path.with_name(f"{path.name}.new-{secrets.token_hex(4)}")
    os.mkdir(made, 0o700)
    try:
        os.chmod(made, 0o700)
        step("directory_made")  # an empty directory of a name that nobody uses
        rename_new(made, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):  # a signal handler raised after the renaming
            os.rmdir(made)
        raise


def _umask() -> int:
    """Return the umask, which only a change would tell otherwise; 0o700 if /proc doesn't tell (Linux 4.7)."""
    try:
        with needing_descriptors("read", "/proc/self/status"), open("/proc/self/status", "rb") as f:
            return next((int(line.split()[1], 8) for line in f if line.startswith(b"Umask:")), 0o700)
    except FileNotFoundError:
        return 0o700


def open_file(directory: int, name: str, *, make: bool = False) -> OwnedFd:
    """Open a file of the domain for reading and writing, and prove that it is one.

    Args:
        directory: A descriptor of the domain's directory.
        name: Its name there.
        make: Make it if nothing has the name.

    Raises:
        NotFoundError: Nothing has the name (ENOENT).
        NotPermittedError: It belongs to another user (EACCES).
        DmaBufError: It is something else: a link (ELOOP), a directory (EISDIR), a FIFO, a socket or a device (EUCLEAN), or it has several
            names (EUCLEAN).
    """
    flags = os.O_RDWR | _FLAGS
    try:
        with needing_descriptors("open domain", name):
            own = _opened(directory, name, flags, make)
    except DmaBufError:
        raise
    except OSError as e:
        raise _refused(directory, name, e.errno or errno.EIO) from None
    try:
        _check(os.fstat(own.number), directory, name)
    except BaseException:
        own.close()
        raise
    return own


def make_file(directory: int, name: str) -> OwnedFd:
    """Make a file that replaces what a dead process left of that name. If something else has the name, raise as `open_file` does."""
    with contextlib.suppress(FileNotFoundError):
        open_file(directory, name).close()
        os.unlink(name, dir_fd=directory)
    return new_file(directory, name)


def _opened(directory: int, name: str, flags: int, make: bool) -> OwnedFd:
    while True:
        if make:
            with contextlib.suppress(FileExistsError):
                return new_file(directory, name)
        try:
            return open_at(directory, name, flags)
        except PermissionError:
            _grant_owner_of_file(directory, name)
            return open_at(directory, name, flags)
        except FileNotFoundError:
            if not make:  # else another process has just renamed it
                raise


def new_file(directory: int, name: str) -> OwnedFd:
    """Make a file and open it. Raise FileExistsError if something has the name."""
    own = open_at(directory, name, os.O_RDWR | os.O_CREAT | os.O_EXCL | _FLAGS, 0o600)
    os.fchmod(own.number, 0o600)  # what a strict umask took away; if this process dies before, the next one does it
    return own


def _grant_owner_of_file(directory: int, name: str) -> None:
    with open_at(directory, name, os.O_PATH | _FLAGS) as own:
        st = os.fstat(own.number)
        if stat.S_ISREG(st.st_mode) and st.st_uid == os.geteuid() and st.st_nlink == 1:
            os.chmod(f"/proc/self/fd/{own.number}", 0o600)


def _refused(directory: int, name: str, number: int) -> DmaBufError:
    """Return the error of a file that can't be opened."""
    try:
        kind = _KINDS.get(stat.S_IFMT(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode))
    except OSError:
        kind = None
    shown = _path_of(directory, name)
    if kind is None:
        otherwise = "free space there, or name another directory in DMABUF_DOMAIN"
        return refused("open domain", shown, number, "open or fchmod", otherwise)
    number = number if number in (errno.ELOOP, errno.EISDIR) else errno.EUCLEAN
    return fail(number, "open domain", shown, _REMEDY, what=f"not a file but {kind}")


def _path_of(directory: int, name: str) -> str:
    try:
        return f"{os.readlink(f'/proc/self/fd/{directory}')}/{name}"
    except OSError:
        return name


def _check(st: os.stat_result, directory: int, name: str) -> None:
    if is_file(st):
        return
    kind, shown = stat.S_IFMT(st.st_mode), _path_of(directory, name)
    if kind != stat.S_IFREG:
        raise fail(errno.EUCLEAN, "open domain", shown, _REMEDY, what=f"not a file but {_KINDS.get(kind, 'something else')}")
    if st.st_uid != os.geteuid():
        raise fail(errno.EACCES, "open domain", shown, _REMEDY, what=f"it belongs to uid {st.st_uid}")
    raise fail(errno.EUCLEAN, "open domain", shown, _REMEDY, what=f"it has {st.st_nlink} names (hard links)")


def is_file(st: os.stat_result) -> bool:
    """Return True if this may be a file that this library made: a regular file of this user with one name, or none any more."""
    return stat.S_ISREG(st.st_mode) and st.st_uid == os.geteuid() and st.st_nlink <= 1


def is_socket(directory: int, name: str) -> bool:
    """Return True if a socket of this user has the name. A link to one doesn't count."""
    try:
        st = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return stat.S_ISSOCK(st.st_mode) and st.st_uid == os.geteuid()


def bind_socket(sock: socket.socket, directory: int, name: str) -> None:
    """Bind a socket to a name that only this process uses.

    What a dead process left there is removed. If something else has the name, bind(2) fails with EADDRINUSE.
    """
    address = socket_address(directory, name)
    remove_socket(directory, name)
    try:
        sock.bind(address)
    except OSError as e:
        if e.errno != errno.EADDRINUSE:
            raise
        raise fail(errno.EADDRINUSE, "serve", _path_of(directory, name), _REMEDY, what="something else stands there") from None
    os.chmod(address, 0o600)  # whatever the umask took away


def socket_address(directory: int, name: str) -> str:
    """Return the address of a socket in the directory, whose own path may be too long for one (unix(7))."""
    return f"/proc/self/fd/{directory}/{name}"


def remove_socket(directory: int, name: str) -> None:
    """Remove a socket of this user. Anything else of that name stays."""
    if is_socket(directory, name):
        os.unlink(name, dir_fd=directory)
