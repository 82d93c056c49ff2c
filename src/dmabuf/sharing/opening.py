"""``open``: a buffer by its name or inode number, from a process of the same user that holds it.

The record in the domain says who holds the buffer; the memfd is opened anew through ``/proc/PID/fd`` of a holder (proc(5)), which
gives an open file description and a lease of its own. A real dma-buf can't be opened anew (ENXIO): a holder hands a duplicate over its
socket (``duplicate``), and of a process outside of the domain it is taken (pidfd_getfd(2)), where ptrace(2) would be allowed. What no
process has a descriptor of, because it is only in flight in a socket or only mapped, can't be opened.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

from dmabuf._native import LIFE_PID, fd_of
from dmabuf.core.buffer.identity import checked_name, identify, is_kernel_home, memfd_name
from dmabuf.core.dma_buf import DmaBuf
from dmabuf.core.get import from_fd
from dmabuf.domain import lives, records
from dmabuf.domain.domain import Domain
from dmabuf.errors import DmaBufError, fail, needing_descriptors
from dmabuf.sharing import duplicate
from dmabuf.uapi.call import OwnedFd

SHOWN = 5  # names or inodes in a message


class _Found(NamedTuple):
    """A record that answers to what was asked for."""

    record: int
    dev: int
    ino: int
    nonce: bytes
    home: bytes


def open(name_or_ino: str | bytes | int, *, domain: Domain | None = None) -> DmaBuf:
    """Another handle of a buffer that some process of this user holds.

    ``name_or_ino``: the whole name, or the inode number (``buf.ino``). ``domain``: None for this user's.

    Errors: ENOENT no such buffer, with the names there are; ENOTUNIQ several of that name, with their inode numbers; ENODEV it is held only
    in flight in a socket or by a mapping; EACCES /proc/PID/fd of its holders is not readable; EINVAL a name longer than 31 bytes or with
    a NUL, a negative inode number; TypeError neither name nor number; EMFILE.
    """
    if isinstance(name_or_ino, bool) or not isinstance(name_or_ino, str | bytes | int):
        raise TypeError(f"open: a name (str or bytes) or an inode number, not {type(name_or_ino).__name__}")
    domain = domain or Domain.default()
    wanted: int | bytes
    if isinstance(name_or_ino, int):
        wanted = name_or_ino
        asked = f"inode {name_or_ino}"
        if not 0 < name_or_ino < 1 << 64:
            raise fail(errno.EINVAL, "open", asked, "an inode number is positive: buf.ino, or the first column of `dmabuf ls`")
    else:
        asked = f"name {os.fsdecode(name_or_ino)!r}"
        wanted = checked_name(name_or_ino, asked)
    domain.join()
    with needing_descriptors("open", asked):
        return _open(domain, asked, _by_ino(domain, wanted) if isinstance(wanted, int) else _by_name(domain, wanted))


def _open(domain: Domain, asked: str, candidates: list[_Found]) -> DmaBuf:
    if len(candidates) > 1:
        there = _present(domain)
        candidates = [found for found in candidates if found.record in there]
        if len(candidates) > 1:
            inodes = ", ".join(str(found.ino) for found in candidates[:SHOWN]) + (", …" if len(candidates) > SHOWN else "")
            raise fail(errno.ENOTUNIQ, "open", asked, "open it by inode number", what=f"{len(candidates)} buffers bear it: inodes {inodes}")
    if not candidates:
        raise _no_such(domain, asked)
    return _reopened(domain, candidates[0], asked)


def _present(domain: Domain) -> set[int]:
    """The records whose buffers are there; others may have gone without anybody having looked yet."""
    domain.reap_dead()
    return set(records.present(domain))


def _by_ino(domain: Domain, ino: int) -> list[_Found]:
    shm = domain.shm
    found = shm.rec_find(_memfd_device(), ino)
    plain = [_Found(found[0], _memfd_device(), ino, found[2], b"")] if found else []
    return plain + _matching(domain, lambda info: info["ino"] == ino and is_kernel_home(info["home"]))


def _by_name(domain: Domain, name: bytes) -> list[_Found]:
    return _matching(domain, lambda info: info["name"] == name)


def _matching(domain: Domain, wanted: Callable[[dict[str, Any]], bool]) -> list[_Found]:
    shm = domain.shm
    infos = ((index, shm.rec_info(index)) for index in shm.rec_list())
    return [
        _Found(index, info["dev"], info["ino"], info["nonce"], info["home"])
        for index, info in infos
        if info is not None and info["kind"] == records.KIND_BUFFER and wanted(info)
    ]


@cache
def _memfd_device() -> int:
    """All memfds lie on one file system that only the kernel mounts: its st_dev."""
    fd = os.memfd_create("dmabuf-device", os.MFD_CLOEXEC)
    try:
        return os.fstat(fd).st_dev
    finally:
        os.close(fd)


def _reopened(domain: Domain, wanted: _Found, asked: str) -> DmaBuf:
    denied: list[int] = []
    for i in domain.shm.rec_holders(wanted.record) if is_kernel_home(wanted.home) else ():
        given = duplicate.ask(domain, i, wanted.dev, wanted.ino, wanted.nonce)
        if given is not None:
            return given
    held_by = [domain.shm.load32(lives.slot_offset(i) + LIFE_PID) for i in domain.shm.rec_holders(wanted.record)]
    for pid in held_by:
        buf = _from_process(domain, wanted, pid, denied)
        if buf is not None:
            return buf
    refused = list(denied)  # of the rest of the world nobody said that it holds the buffer
    for pid in _own_processes():
        if pid not in held_by:
            buf = _from_process(domain, wanted, pid, denied)
            if buf is not None:
                return buf
    if wanted.record not in _present(domain):
        raise _no_such(domain, asked)
    if refused and is_kernel_home(wanted.home):
        raise fail(
            errno.EACCES, "open", asked, "have a holder send it with dmabuf.send()",
            what=f"a real dma-buf can't be opened anew, and the descriptor of process {refused[0]} may not be duplicated (ptrace(2))",
        )  # fmt: skip
    if refused:
        raise fail(
            errno.EACCES, "open", asked, "have a holder send it with dmabuf.send()",
            what=f"/proc/{refused[0]}/fd of its holder is not readable (another user, or not dumpable)",
        )  # fmt: skip
    raise fail(
        errno.ENODEV, "open", asked, "have a holder keep its handle open, or receive it where it was sent",
        what="no process has a descriptor of it: it is held only in flight in a socket, or only by mappings",
    )  # fmt: skip


def _own_processes() -> Iterator[int]:
    """Pids of this user's processes (all of them for root)."""
    me = os.geteuid()
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                if not me or os.stat(f"/proc/{name}").st_uid == me:
                    yield int(name)
            except OSError:
                continue  # ended meanwhile


def _from_process(domain: Domain, wanted: _Found, pid: int, denied: list[int]) -> DmaBuf | None:
    """The buffer through a descriptor of that process, if it has one."""
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
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as e:
            if e.errno in (errno.EMFILE, errno.ENFILE):
                raise
            continue  # closed meanwhile
        try:
            same = identify(fd, domain, "open").nonce == wanted.nonce
        except DmaBufError:
            same = False  # the number was used again between the two looks
        if same:
            return from_fd(fd, domain)
        os.close(fd)
    return None


def _duplicated(domain: Domain, wanted: _Found, pid: int, denied: list[int]) -> DmaBuf | None:
    """The real dma-buf through a duplicate of that process's descriptor, if it has one."""
    try:
        names = os.listdir(f"/proc/{pid}/fd")
        with OwnedFd(os.pidfd_open(pid)) as process:
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
                    # closed meanwhile, and perhaps used again
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
        what = f"no buffer of this domain has it; the names there are: {shown}"
    else:
        what = f"no buffer of this domain has it; of its {len(there)} buffers none has a name"
    return fail(errno.ENOENT, "open", asked, "`dmabuf ls` shows all buffers; another domain is named by DMABUF_DOMAIN", what=what)
