"""``open``: a buffer by its name or inode number, from a process of the same user that has it open.

The record in the domain says which processes have the buffer open. A memfd is reopened through ``/proc/PID/fd`` of such a process
(proc(5)), which gives a new open file description with its own reference lock. A kernel dma-buf can't be reopened (ENXIO). There a process
of the domain sends a duplicate (``duplicate``), and from a process outside of the domain it is taken with pidfd_getfd(2) if ptrace(2) is
allowed. A process of the domain whose ``/proc/PID/fd`` can't be read here, or isn't shown, is asked for a duplicate too. A buffer of which
no process has a descriptor, because it is only in flight in a socket or only mapped, can't be opened.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from dmabuf._native import LIFE_PID, fd_of, owned
from dmabuf.core.buffer.identity import checked_name, identify, is_kernel_home, memfd_name
from dmabuf.core.buffer.ref import BufferRef
from dmabuf.core.dma_buf import DmaBuf
from dmabuf.core.get import from_fd
from dmabuf.domain import lives, naming, place, records
from dmabuf.domain.domain import Domain, known
from dmabuf.domain.limits import listed
from dmabuf.errors import DmaBufError, fail, needing_descriptors
from dmabuf.sharing import duplicate

if TYPE_CHECKING:
    from dmabuf.answers import RecordInfo

SHOWN = 5  # names or inodes in a message


class _Found(NamedTuple):
    """A record that matches."""

    record: int
    dev: int
    ino: int
    nonce: bytes
    home: bytes
    created: int


def open(name_or_ino: str | bytes | int | BufferRef, *, newest: bool = False, domain: Domain | None = None) -> DmaBuf:
    """Return a new handle of a buffer that a process of this user has open.

    Args:
        name_or_ino: The whole name, the inode number (``buf.ino``), or a token (``buf.ref()``).
        newest: Of several buffers with this name, open the one that was made last: after a restart of its program, a process that is slow
            to notice may still have the old one.
        domain: The domain; None means the user's default domain, or for a token the domain of its buffer.

    Raises:
        NotFoundError: There is no such buffer (ENOENT). The message has the names of the buffers, or says what became of a token's.
        CrossDomainError: The token's buffer belongs to a domain that this process doesn't have (EXDEV).
        NotUniqueError: Several buffers have this name (ENOTUNIQ). The message has their inode numbers.
        NoDeviceError: The buffer is only in flight in a socket, or only mapped (ENODEV).
        NotPermittedError: This process may not read /proc/PID/fd of those that have it open (EACCES).
        InvalidError: The name is longer than 31 bytes or has a NUL, or the inode number is negative (EINVAL).
        TypeError: ``name_or_ino`` is neither a name nor a number nor a token.
        DmaBufError: No descriptor is left (EMFILE), or the inode of the token's buffer is another buffer's now (ESTALE).
    """
    if isinstance(name_or_ino, BufferRef):
        return reopen(name_or_ino, domain)
    if isinstance(name_or_ino, bool) or not isinstance(name_or_ino, str | bytes | int):
        raise TypeError(f"open: expected a name (str or bytes), an inode number or a BufferRef, not {type(name_or_ino).__name__}")
    domain = domain or Domain.default()
    wanted: int | bytes
    if isinstance(name_or_ino, int):
        wanted = name_or_ino
        asked = f"inode {name_or_ino}"
        if not 0 < name_or_ino < 1 << 64:
            remedy = "pass buf.ino, or the first column of `dmabuf ls`"
            raise fail(errno.EINVAL, "open", asked, remedy, what="not an inode number")
    else:
        asked = f"name {os.fsdecode(name_or_ino)!r}"
        wanted = checked_name(name_or_ino, "open")
    domain.join()
    with needing_descriptors("open", asked):
        return _open(domain, asked, _by_ino(domain, wanted) if isinstance(wanted, int) else _by_name(domain, wanted), newest)


def reopen(ref: BufferRef, domain: Domain | None = None) -> DmaBuf:
    """Return a new handle of the buffer of a token. Nothing that the token says is believed: its inode and its nonce must agree."""
    asked = str(ref)
    domain = domain or known(ref.domain) or Domain.default()
    domain.join()
    if domain.id != ref.domain:
        place.check_set_aside(domain.path, ref.domain, "open", asked)
        what = f"this process uses domain {domain.id}: the token is from another program's domain, from before a restart, or from elsewhere"
        raise fail(errno.EXDEV, "open", asked, f"{place.SHARE_DOMAIN}, or make a new token", what=what)
    with needing_descriptors("open", asked):
        found = domain.shm.rec_find(ref.dev, ref.ino)
        info = domain.shm.rec_info(found[0]) if found and found[2] == ref.nonce else None
        index, home = (found[0], info["home"]) if found and info else (-1, b"")
        return _reopened(domain, _Found(index, ref.dev, ref.ino, ref.nonce, home, 0), asked, ref)


def _gone(domain: Domain, ref: BufferRef) -> DmaBufError:
    """Return the error for a token whose buffer no process has."""
    found = domain.shm.rec_find(ref.dev, ref.ino)
    if found and found[2] != ref.nonce:
        what = "the buffer of this token is gone, and its inode is another buffer's now"
        return fail(errno.ESTALE, "open", ref, "make a new token, and keep the buffer open until it was opened", what=what)
    what = "the buffer of this token is gone: no process has it open any more"
    return fail(errno.ENOENT, "open", ref, "keep the buffer open in some process until the token was opened", what=what)


def _open(domain: Domain, asked: str, candidates: list[_Found], newest: bool) -> DmaBuf:
    if len(candidates) > 1:
        there = _present(domain)
        candidates = [found for found in candidates if found.record in there]
        if newest:
            candidates = sorted(candidates, key=lambda found: found.created)[-1:]
        if len(candidates) > 1:
            inodes = ", ".join(str(found.ino) for found in candidates[:SHOWN]) + (", …" if len(candidates) > SHOWN else "")
            what = f"{len(candidates)} buffers have it: inodes {inodes}"
            raise fail(errno.ENOTUNIQ, "open", asked, "open it by inode number, or the last one with newest=True", what=what)
    if not candidates:
        raise _no_such(domain, asked)
    return _reopened(domain, candidates[0], asked)


def _present(domain: Domain) -> set[int]:
    """Return the records whose buffers exist. Others may be gone, and no process has noticed yet."""
    domain.reap_dead()
    return set(records.present(domain))


def _by_ino(domain: Domain, ino: int) -> list[_Found]:
    shm = domain.shm
    found = shm.rec_find(_memfd_device(), ino)
    plain = [_Found(found[0], _memfd_device(), ino, found[2], b"", 0)] if found else []
    return plain + _matching(domain, lambda info: info["ino"] == ino and is_kernel_home(info["home"]))


def _by_name(domain: Domain, name: bytes) -> list[_Found]:
    return _matching(domain, lambda info: info["name"] == name)


def _matching(domain: Domain, wanted: Callable[[RecordInfo], bool]) -> list[_Found]:
    shm = domain.shm
    infos = ((index, shm.rec_info(index)) for index in shm.rec_list())
    return [
        _Found(index, info["dev"], info["ino"], info["nonce"], info["home"], info["created"])
        for index, info in infos
        if info is not None and info["kind"] == records.KIND_BUFFER and wanted(info)
    ]


@cache
def _memfd_device() -> int:
    """Return st_dev of all memfds, which are on one file system that only the kernel mounts."""
    with owned(os.memfd_create, "dmabuf-device", os.MFD_CLOEXEC) as own:
        return own.dev


def _reopened(domain: Domain, wanted: _Found, asked: str, ref: BufferRef | None = None) -> DmaBuf:
    shm, denied = domain.shm, list[int]()
    holders = shm.rec_holders(wanted.record) if wanted.record >= 0 else []  # what a token names may be kept outside of the domain
    others = [i for i in holders if i != lives.index_of(shm.life)]
    kernel = is_kernel_home(wanted.home)
    if kernel and (given := _given(domain, wanted, others)) is not None:
        return given
    held_by = [shm.load32(lives.slot_offset(i) + LIFE_PID) for i in holders]
    for pid in held_by:
        buf = _from_process(domain, wanted, pid, denied)
        if buf is not None:
            return buf
    refused = list(denied)  # for the other processes nothing says that they have the buffer open
    for pid in _own_processes():
        if pid not in held_by:
            buf = _from_process(domain, wanted, pid, denied)
            if buf is not None:
                return buf
    if not kernel and (given := _given(domain, wanted, others)) is not None:
        return given
    if wanted.record not in _present(domain):
        raise _no_such(domain, asked) if ref is None else _gone(domain, ref)
    raise _unreachable(domain, wanted, asked, refused)


def _given(domain: Domain, wanted: _Found, holders: list[int]) -> DmaBuf | None:
    """Return the buffer as one of these slots' processes sends it; None if none of them does."""
    found = (duplicate.ask(domain, i, wanted.dev, wanted.ino, wanted.nonce) for i in holders)
    return next((buf for buf in found if buf is not None), None)


def _unreachable(domain: Domain, wanted: _Found, asked: str, refused: list[int]) -> DmaBufError:
    """Return the error for a buffer that exists, with the cause why it can't be opened."""
    send_it = "have a holder send it with dmabuf.send(), or call dmabuf.serve()"
    unseen = [i for i in domain.shm.rec_holders(wanted.record) if naming.seen(domain.shm, i) is None and lives.is_alive(domain.shm, i)]
    if unseen:
        who = naming.process(domain, lives.life_at(domain.shm, unseen[0]))
        what = f"{who} has it open, can't be reached through /proc, and doesn't answer"
        return fail(errno.ENODEV, "open", asked, send_it, what=what)
    if not refused:
        what = "no process has a descriptor of it: it is only in flight in a socket, or only mapped"
        return fail(errno.ENODEV, "open", asked, "keep a handle open in some process, or receive it where it was sent", what=what)
    if is_kernel_home(wanted.home):
        what = f"a kernel dma-buf can't be reopened, and the descriptor of process {refused[0]} may not be duplicated (ptrace(2))"
        return fail(errno.EACCES, "open", asked, "have a holder send it with dmabuf.send()", what=what)
    what = f"/proc/{refused[0]}/fd is not readable (another user, or not dumpable), and that process doesn't answer"
    return fail(errno.EACCES, "open", asked, send_it, what=what)


def _own_processes() -> Iterator[int]:
    """Yield the pids of this user's processes (for root, of all)."""
    me = os.geteuid()
    for name in listed("open", "/proc"):
        if name.isdigit():
            try:
                if not me or os.stat(f"/proc/{name}").st_uid == me:
                    yield int(name)
            except OSError:
                continue  # ended meanwhile


def _from_process(domain: Domain, wanted: _Found, pid: int, denied: list[int]) -> DmaBuf | None:
    """Return the buffer through a descriptor of that process, if it has one."""
    if is_kernel_home(wanted.home):
        return _duplicated(domain, wanted, pid, denied)
    link = f"/memfd:{memfd_name(domain, wanted.nonce)}"
    try:
        names = os.listdir(f"/proc/{pid}/fd")
    except PermissionError:
        denied.append(pid)
        return None
    except OSError as e:
        if e.errno in (errno.EMFILE, errno.ENFILE):
            raise
        return None  # ended meanwhile
    for name in names:
        path = f"/proc/{pid}/fd/{name}"
        try:
            if os.readlink(path).removesuffix(" (deleted)") != link:
                continue
            # First only the name: the number may be another file's now, and to open a FIFO or a device has effects.
            with owned(os.open, path, os.O_PATH | os.O_CLOEXEC) as seen:
                if os.readlink(f"/proc/self/fd/{seen.number}").removesuffix(" (deleted)") != link:
                    continue
                fd = owned(os.open, f"/proc/self/fd/{seen.number}", os.O_RDWR | os.O_CLOEXEC)
        except OSError as e:
            if e.errno in (errno.EMFILE, errno.ENFILE):
                raise
            continue  # closed meanwhile
        try:
            found = identify(fd.number, domain, "open")
            same = (found.dev, found.ino, found.nonce) == (wanted.dev, wanted.ino, wanted.nonce)
        except DmaBufError:
            same = False  # the number was used again between the two looks
        if same:
            return from_fd(fd, domain)
        fd.close()
    return None


def _duplicated(domain: Domain, wanted: _Found, pid: int, denied: list[int]) -> DmaBuf | None:
    """Return a kernel dma-buf through a duplicate of that process's descriptor, if it has one."""
    try:
        names = os.listdir(f"/proc/{pid}/fd")
        with owned(os.pidfd_open, pid) as process:
            for name in names:
                try:
                    st = os.stat(f"/proc/{pid}/fd/{name}")
                    if (st.st_dev, st.st_ino) != (wanted.dev, wanted.ino):
                        continue
                    fd = fd_of(process.number, int(name))
                    if identify(fd.number, domain, "open").nonce == wanted.nonce:
                        return from_fd(fd, domain)
                except OSError as e:
                    if e.errno in (errno.EMFILE, errno.ENFILE):
                        raise
                    if e.errno in (errno.EPERM, errno.ENOSYS):
                        denied.append(pid)
                        return None
                    # It was closed meanwhile, and perhaps used again.
    except PermissionError:
        denied.append(pid)
    except OSError as e:
        if e.errno in (errno.EMFILE, errno.ENFILE):
            raise
        # ended meanwhile
    return None


def _no_such(domain: Domain, asked: str) -> DmaBufError:
    there = [info for i in sorted(_present(domain)) if (info := domain.shm.rec_info(i)) and info["kind"] == records.KIND_BUFFER]
    names = sorted({os.fsdecode(info["name"]) for info in there if info["name"]})
    if names:
        shown = ", ".join(map(repr, names[:SHOWN])) + (", …" if len(names) > SHOWN else "")
        what = f"no buffer of this domain has it; the names are: {shown}"
    else:
        what = f"no buffer of this domain has it; of its {len(there)} buffers none has a name"
    return fail(errno.ENOENT, "open", asked, "run `dmabuf ls` for all buffers, or name another domain in DMABUF_DOMAIN", what=what)
