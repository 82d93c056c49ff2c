"""``export``: a buffer whose memory and behavior belong to an exporter of this process (semantics 2.1, 2.2)."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import weakref
from collections.abc import Callable

from dmabuf._native import OwnedFd
from dmabuf.core.buffer import residency
from dmabuf.core.buffer.backing import SERVERS
from dmabuf.core.buffer.handle import handle_of
from dmabuf.core.buffer.identity import SEALS, checked_name, memfd_name
from dmabuf.core.buffer.shared import EXPORTED
from dmabuf.core.contract import OwnerReference, checked_ops
from dmabuf.core.dma_buf import DmaBuf
from dmabuf.core.export.exported import EXPORTS, Exported
from dmabuf.core.export.exporter import Exporter
from dmabuf.core.get import from_fd
from dmabuf.core.resv.lock import record_of
from dmabuf.core.resv.resv import DmaResv
from dmabuf.domain.domain import Domain
from dmabuf.domain.limits import refused
from dmabuf.errors import DmaBufError, contract_warning, fail

EXP_NAME_BYTES = 31  # what a record has room for
_F_ADD_SEALS = 1033  # linux/fcntl.h


def export(
    exporter: Exporter,
    size: int,
    *,
    exp_name: str | bytes | None = None,
    resv: DmaResv | None = None,
    flags: int = os.O_RDWR,
    cache_sgt_mapping: bool = False,
    owner: OwnerReference | None = None,
    name: str | bytes | None = None,
    domain: Domain | None = None,
) -> DmaBuf:
    """Return a buffer of ``size`` bytes whose memory and behavior are the exporter's (semantics 2.1).

    The buffer is released once, when its last descriptor, in whatever process, and its last mapping are gone, with no lock held:
    ``close()`` of the last handle calls the exporter's ``release`` itself, or else a thread of the package does.

    Args:
        exporter: Owns the memory; see ``Exporter``.
        size: Bytes. Taken as it is: 0 and part of a page are allowed.
        exp_name: The exporter's name, at most 31 bytes; None means the module of the exporter's class.
        resv: The buffer's reservation object, which several buffers can share; None means one of its own. Accesses count by reservation
            object: two buffers of one can't be written in one ``dmabuf.access()``.
        flags: O_RDWR or O_RDONLY.
        cache_sgt_mapping: Keep one table for each attachment until it detaches.
        owner: Can't go while the buffer lives.
        name: As for ``allocate``.
        domain: None means the domain of ``resv``, or else the user's default domain.

    Raises:
        InvalidError: ``exporter`` is not an exporter, lacks map, unmap or release, has only one of pin and unpin, or is dynamic and caches
            (EINVAL, with a ``ContractWarning``). A name, the size or the flags are wrong (EINVAL).
        CrossDomainError: ``resv`` is of another domain (EXDEV).
        DeadlockError: The caller holds the lock of ``resv`` (EDEADLK, with a ``ContractWarning``).
        NotFoundError: The owner is going away (ENOENT).
        DmaBufError: The process has no descriptor left (EMFILE).
        NoSpaceError: The domain is full (ENOSPC).

    Kernel: dma_buf_export, dma_buf_export_info (exp_name, owner, ops as exporter, size, flags, resv, priv as exporter),
    DEFINE_DMA_BUF_EXPORT_INFO, dma_buf_ops.cache_sgt_mapping as cache_sgt_mapping, dma_buf.owner as owner.
    """
    ops = checked_ops(exporter, cache_sgt_mapping)
    raw = os.fsencode(type(exporter).__module__.rpartition(".")[2][:EXP_NAME_BYTES] if exp_name is None else exp_name)
    if not raw or len(raw) > EXP_NAME_BYTES or b"\0" in raw:
        what = "the exporter's name has a NUL" if b"\0" in raw else f"the exporter's name has {len(raw)} bytes"
        raise fail(errno.EINVAL, "export", f"exp_name {exp_name!r}", f"use 1 to {EXP_NAME_BYTES} bytes without a NUL", what=what)
    if not 0 <= size < 1 << 63:
        raise fail(errno.EINVAL, "export", f"{size} bytes", "use a size from 0 to 2**63 - 1", what="the size is out of range")
    if flags & os.O_ACCMODE == os.O_WRONLY:
        raise fail(errno.EINVAL, "export", f"{size} bytes", "use O_RDWR or O_RDONLY", what="a buffer can't be open for writing only")
    home = (resv.domain if resv is not None else None) if domain is None else domain
    domain = home or Domain.default()
    if resv is not None:
        if resv.domain is not domain:
            what = "the reservation object is of another domain"
            raise fail(errno.EXDEV, "export", resv, "use one of the buffer's domain", what=what)
        if resv.held_here():
            contract_warning(f"export: {resv!r}: its lock is held by this thread or task", 2)
            raise fail(errno.EDEADLK, "export", resv, "unlock the reservation object first", what="this thread or task holds its lock")
    if owner is not None and not owner.try_get():
        raise fail(errno.ENOENT, "export", exporter, "load its owner again", what=f"{owner!r} is going away")
    try:
        return make(exporter, ops, size, raw, resv, flags, cache_sgt_mapping, owner, name, domain)
    except BaseException:
        if owner is not None:
            owner.put()
        raise


def make(
    exporter: Exporter,
    ops: frozenset[str],
    size: int,
    exp_name: bytes,
    resv: DmaResv | None,
    flags: int,
    cache: bool,
    owner: OwnerReference | None,
    name: str | bytes | None,
    domain: Domain,
    prepare: Callable[[OwnedFd], None] | None = None,
) -> DmaBuf:
    """Return the buffer that ``export`` returns. Its memfd is a placeholder without memory, sealed against writing too.

    ``prepare``: the memfd itself carries the memory (see ``residency``). It is called with the exporter's own description of the memfd,
    borrowed until ``release``, before anybody can have the buffer. If it raises, everything is undone.
    """
    raw = None if name is None else checked_name(name, "export")
    shm = domain.join()
    fd: OwnedFd | None = None
    private: OwnedFd | None = None
    try:
        name_of_file = memfd_name(domain, secrets.token_bytes(16))
        fd = next(map(OwnedFd, map(os.memfd_create, (name_of_file,), (os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING,))))
        os.ftruncate(fd.number, size)
        fcntl.fcntl(fd.number, _F_ADD_SEALS, SEALS if prepare is not None else SEALS | residency.F_SEAL_WRITE)
        private = fd.reopen()
        if prepare is not None:
            prepare(private)
        if flags & os.O_ACCMODE == os.O_RDONLY:
            writable, fd = fd, fd.reopen(os.O_RDONLY)
            writable.close()
        buf = from_fd(fd, domain, exp_name=exp_name, home=EXPORTED, name=raw)
    except BaseException as e:
        if fd is not None:
            fd.close()
        if private is not None:
            private.close()
        if isinstance(e, DmaBufError) or not isinstance(e, OSError):
            raise
        calls = "memfd_create, ftruncate or fcntl"
        raise refused("export", f"{size} bytes", e.errno or errno.EIO, calls, "close buffers, or raise RLIMIT_NOFILE") from None
    shared = handle_of(buf).shared
    exported: Exported | None = None
    try:
        if resv is not None:
            given = record_of(resv)
            shm.rec_set_resv(shared.index, given.ensure() + 1, given.gen)
            shared.resv_ref = weakref.ref(resv)
        exported = Exported(exporter, ops, shared, cache, buf.resv, owner, private, prepare is not None)
        SERVERS.find("exported")(domain)
        EXPORTS.of(domain).add(exported)
        shared.backing = exported
    except BaseException:
        if exported is not None:
            EXPORTS.of(domain).forget(exported)
        shared.backing = None
        buf.close()
        private.close()
        raise
    return buf
