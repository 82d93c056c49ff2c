"""What stands behind a buffer in this process: its exporter's ops, its attachments, its vmap count, and its end (spec 1.2, 2.6).

``Plain`` backs a buffer of the memfd heap, whose memory every process can map; it is made when somebody attaches or vmaps. ``Exported``
backs what :func:`dmabuf.export` made: it is ``record.live``, the one attribute that the paths of access look at. Where the exporter is
another process, something stands in its place that carries the calls there: it comes from above (:data:`elsewhere`).

*The end of an exported buffer.* The descriptors that travel carry a read lock, the lease. An exported buffer keeps a description of its
own, without one, and tries to take the write lock through it: success proves that nobody holds the buffer, in flight or mapped, and no
newcomer can. Then it is released, once. The try is made when this process closes its last handle: by ``close()`` itself when the caller
holds no reservation lock and is no callback, else (and after ``__del__``) by a thread, the releaser, which is there while there are
exported buffers. While others hold a buffer that this process has closed, the releaser tries again every tick.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import sys
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dmabuf import _native
from dmabuf.core.base import debug
from dmabuf.core.base.usage import Direction
from dmabuf.core.buffer import residence
from dmabuf.core.buffer.identity import SEALS, memfd_name
from dmabuf.core.contract import Exporter, OwnerReference, overrides
from dmabuf.core.fence.signalling import in_signalling
from dmabuf.core.memory.checked import CheckedMap
from dmabuf.core.memory.iosys_map import IosysMap
from dmabuf.core.memory.scatterlist import SgTable
from dmabuf.core.resv.lock import record_of
from dmabuf.core.resv.resv import DmaResv, resv_of
from dmabuf.core.task.owner import current
from dmabuf.domain import dispatcher, place
from dmabuf.domain.bell import Bell
from dmabuf.domain.domain import TICK_NS, Domain
from dmabuf.domain.forks import fork_lock
from dmabuf.domain.records import KIND_RESV, Record
from dmabuf.errors import ContractError, DmaBufError, contract_warning, fail

if TYPE_CHECKING:
    from dmabuf.core.attach.attachment import DmaBufAttachment
    from dmabuf.core.dma_buf import DmaBuf

EXPORTED = b"exported"
OPS = ("attach", "detach", "pin", "unpin", "map", "unmap", "release", "begin_cpu_access", "end_cpu_access", "mmap", "vmap", "vunmap")
_MANDATORY = {"map", "unmap", "release"}
_F_ADD_SEALS = 1033  # linux/fcntl.h


def checked_ops(exporter: object, cache: bool) -> frozenset[str]:
    """What the exporter can do. Errors: as :func:`dmabuf.export`, the first three."""
    ops = frozenset(op for op in OPS if overrides(exporter, Exporter, op)) if isinstance(exporter, Exporter) else frozenset()
    wrong = ""
    if not _MANDATORY <= ops:
        wrong = "an exporter is a dmabuf.Exporter with map, unmap and release"
    elif cache and ops & {"pin", "unpin"}:
        wrong = "cache_sgt_mapping excludes pin and unpin: what is cached can't move"
    elif ("pin" in ops) != ("unpin" in ops):
        wrong = "pin and unpin come together"
    if wrong:
        contract_warning(f"export: {exporter!r}: {wrong}", 3)
        raise fail(errno.EINVAL, "export", repr(exporter), wrong)
    return ops


class Backing:
    """The driver side of one buffer in this process.

    ``in_file``: the memory is the buffer's own file, which every handle maps for itself.
    """

    in_file = False

    def __init__(self, exporter: Exporter, ops: frozenset[str], record: Record, cache: bool) -> None:
        self.exporter, self.ops, self.record, self.cache = exporter, ops, record, cache
        self.dynamic = "pin" in ops
        self.attachments: list[DmaBufAttachment] = []  # newest first; under the reservation lock
        self.vmaps = 0
        self.mapped: IosysMap | None = None
        self.brackets = 0  # open begin_cpu_access calls of this process, counted by the debug layer

    def here(self, operation: str) -> None:
        """Errors: ENODEV the exporter is not in this process."""

    # ---- CPU access ----

    def begin(self, buf: DmaBuf, direction: Direction) -> None:
        self.here("begin_cpu_access")
        if "begin_cpu_access" in self.ops:
            self.exporter.begin_cpu_access(buf, direction)

    def end(self, buf: DmaBuf, direction: Direction) -> None:
        self.here("end_cpu_access")
        if "end_cpu_access" in self.ops:
            self.exporter.end_cpu_access(buf, direction)

    def mappable(self, buf: DmaBuf, operation: str) -> None:
        """Errors: as :meth:`here`; EINVAL the exporter offers no mmap."""
        self.here(operation)
        if "mmap" not in self.ops and not self.in_file:
            raise fail(errno.EINVAL, operation, buf, "use vmap(), or attach a device", what="its exporter offers no mmap")

    def mmap(self, buf: DmaBuf, operation: str, offset: int, length: int, writable: bool) -> _native.Mapping:
        """The exporter's mapping. Errors: EINVAL it has none to offer; EACCES writable wanted, and it is not."""
        self.mappable(buf, operation)
        if self.in_file:
            return self._map_file(buf, operation, offset, length, writable)
        mapping = self.exporter.mmap(buf, offset, length)
        if not isinstance(mapping, _native.Mapping):
            raise TypeError(f"{operation}: the exporter's mmap returned {type(mapping).__name__}, not what DmaBuf.mmap() returns")
        if writable and not mapping.writable:
            mapping.close()
            raise fail(errno.EACCES, operation, buf, "map it with writable=False", what="the exporter's memory is read-only")
        self.keep(mapping)
        return mapping

    def _map_file(self, buf: DmaBuf, operation: str, offset: int, length: int, writable: bool) -> _native.Mapping:
        direction = Direction.BIDIRECTIONAL if writable else Direction.FROM_DEVICE
        self.begin(buf, direction)  # the memory is there until the end, and from the mapping on by that
        try:
            mapping = residence.mapping(buf.fileno(), operation, buf, offset, length, writable)
        finally:
            self.end(buf, direction)
        self.keep(mapping)
        return mapping

    def keep_open(self, buf: DmaBuf) -> Any:
        """What to call :meth:`end` with once the handle may be closed; None: there is nothing, so it must be called before."""
        return buf

    def keep(self, mapping: _native.Mapping) -> None:
        """A mapping is a reference until it is closed."""

    # ---- vmap, the lock is held ----

    def vmap(self, buf: DmaBuf, *, tell: bool = True) -> IosysMap:
        """Spec 2.18, from step 2 on. ``tell``: warn when the exporter fails."""
        self.here("vmap")
        if "vmap" not in self.ops:
            raise fail(errno.EINVAL, "vmap", buf, "use mmap(), or attach a device", what="its exporter offers no vmap")
        if self.vmaps:
            if self.mapped is None:
                raise ContractError(f"vmap: {buf!r} is counted as mapped and has no map")
        else:
            try:
                made = self.exporter.vmap(buf)
                if not isinstance(made, IosysMap):
                    raise TypeError(f"vmap: the exporter's vmap returned {type(made).__name__}, not an IosysMap")
                if made.is_null():
                    raise fail(errno.ENOMEM, "vmap", buf, what="its exporter returned no map")
            except OSError as e:
                if tell:
                    contract_warning(f"vmap: {buf!r}: its exporter failed: {e}", 4)
                raise
            if debug.enabled:
                made = CheckedMap.of(made, self.bracketed, debug.place(sys._getframe(1)))
            self.mapped = made
        assert self.mapped is not None
        given = self.mapped.copy()
        self.vmaps += 1
        return given

    def vunmap(self, buf: DmaBuf, map: IosysMap) -> None:
        """Spec 2.18."""
        self.here("vunmap")
        if not self.vmaps or self.mapped is None:
            raise ContractError(f"vunmap: {buf!r} is not mapped")
        if not self.mapped.is_equal(map):
            raise ContractError(f"vunmap: {buf!r}: this is not the map that vmap() gave")
        self.vmaps -= 1
        if not self.vmaps:
            kept, self.mapped = self.mapped, None
            try:
                if "vunmap" in self.ops:
                    self.exporter.vunmap(buf, map)
            finally:
                kept.clear()

    def bracketed(self) -> bool:
        """May the CPU access the buffer: inside of begin and end, or of an access block of the running thread or task?"""
        if self.brackets > 0:
            return True
        shm, word = self.record.shm, current(self.record.domain).word
        target = record_of(resv_of(self.record))
        entries = (shm.fence_info(handle) for handle in shm.resv_pending(target.index, 3, 0))
        return any(info is not None and info["owner"] == word for info in entries)


class _Memfd(Exporter):
    """The memfd heap as an exporter: static, its memory the file of the buffer itself."""

    __slots__ = ()

    def attach(self, attachment: DmaBufAttachment) -> None:
        attachment.priv = attachment.dmabuf._any_window()

    def map(self, attachment: DmaBufAttachment, direction: Direction) -> SgTable:
        memory: _native.Mapping = attachment.priv
        sgt = SgTable.from_ranges([(0, memory.size)], max_segment=attachment.dev.max_segment, memory=memory)
        return attachment.dev.map_sgtable(sgt, direction)

    def unmap(self, attachment: DmaBufAttachment, sgt: SgTable, direction: Direction) -> None:
        attachment.dev.unmap_sgtable(sgt, direction)

    def vmap(self, buf: DmaBuf) -> IosysMap:
        return IosysMap.init_vaddr(memoryview(buf._map_memfd("vmap", 0, buf.size, True)))

    def release(self, buf: DmaBuf) -> None:
        """The kernel frees a memfd by itself."""


_MEMFD = _Memfd()
_MEMFD_OPS = checked_ops(_MEMFD, False)


def backing_of(record: Record) -> Backing:
    """The driver side of a buffer; for plain memory made at first use."""
    found: Backing | None = record.shared.get("backing") if record.live is None else record.live
    if found is None:
        found = record.shared.setdefault("backing", Backing(_MEMFD, _MEMFD_OPS, record, False))
    return found


def devices_of(domain: Domain, dev: int, ino: int) -> list[str]:
    """Names of the devices that this process has attached to a buffer, the newest first; takes no lock."""
    known: weakref.WeakValueDictionary[tuple[int, int], Record] = domain.local.get("records") or weakref.WeakValueDictionary()
    record = known.get((dev, ino))
    found: Backing | None = None if record is None else record.live or record.shared.get("backing")
    return [attachment.dev.name for attachment in list(found.attachments)] if found is not None else []


def _nothing(domain: Domain) -> None:
    """Nobody answers calls from other processes."""


def _unreachable(record: Record, life: int, in_file: bool) -> Backing:
    raise fail(errno.ENODEV, "get", f"buffer ino {record.ino}", "import dmabuf", what="calls to other processes need dmabuf.sharing")


# Set by sharing: makes the driver side of a buffer whose exporter is the process with that life (the flag: ``Backing.in_file``); and starts
# to answer calls of other processes.
elsewhere: Callable[[Record, int, bool], Backing] = _unreachable
serve: Callable[[Domain], object] = _nothing


class Exported(Backing):
    """A buffer with an exporter of this process. Keeps the record, so that the buffer is known again when it comes back."""

    def __init__(
        self,
        exporter: Exporter,
        ops: frozenset[str],
        record: Record,
        cache: bool,
        resv: DmaResv,
        owner: OwnerReference | None,
        private: int,
        in_file: bool,
    ) -> None:
        super().__init__(exporter, ops, record, cache)
        self.in_file = in_file
        self.resv, self.owner, self.private = resv, owner, private
        self.life = record.shm.life
        self.released = False
        self.closing = 0  # handles of this process that are being closed: their close() releases, not the thread
        self._once = fork_lock()  # a handle's __del__ may run in the middle
        self._mappings: weakref.WeakSet[_native.Mapping] = weakref.WeakSet()

    def here(self, operation: str) -> None:
        if self.life != self.record.shm.life:  # of an attachment from before a fork, or after a fork that Python didn't see
            raise fail(
                errno.ENODEV,
                operation,
                f"buffer ino {self.record.ino}",
                "attach again; what a forked child inherits is the parent's",
                what="its exporter lives in the parent process",
            )

    def keep(self, mapping: _native.Mapping) -> None:
        self._mappings.add(mapping)

    def leaving(self) -> None:
        """A handle of this process is about to be closed."""
        if self.life == self.record.shm.life:  # in a forked child the lock may be another thread's that isn't there
            with self._once:
                self.closing += 1

    def departed(self, quiet: bool) -> None:
        """A handle of this process was closed; ``quiet``: by the garbage collector. Errors: those of the release."""
        if self.life != self.record.shm.life:
            return
        with self._once:  # in one step: in between the thread would find that nobody closes it any more
            self.closing -= 1
            if self.record.handles:
                return
            mine = not quiet and outside() and self._claimed()
        if mine:
            self._release()
        else:
            exports_of(self.record.domain).wake()

    def try_release(self) -> bool:
        """Release the buffer if nobody holds it; True when it is released. Errors: ``ContractError``, ``ContractWarning``."""
        with self._once:
            if self.released or self.life != self.record.shm.life:
                return True
            if not self._claimed():
                return False
        self._release()
        return True

    def _claimed(self) -> bool:
        """Nobody holds it, and the caller is the one to release it. The lock is held."""
        if self.released or self.record.handles or any(not mapping.closed for mapping in list(self._mappings)):
            return False
        self.released = place.ofd_lock(self.private, fcntl.F_WRLCK, 0)
        return self.released

    def _release(self) -> None:
        """Spec 2.6. No newcomer can come: their read lock is refused."""
        from dmabuf.core.dma_buf import DmaBuf

        record = self.record
        record.live = None
        last = DmaBuf._make(self.private, record)
        bug, self.vmaps, self.mapped = self.vmaps, 0, None
        try:
            if not bug:
                self.exporter.release(last)
        except Exception as e:
            dispatcher.report(e, self.exporter.release)
        finally:
            last.close()
            left = [attachment.dev.name for attachment in self.attachments]
            # Proven to be gone: the record needs no judging, it goes with the last reference to it in this process.
            record.kind = KIND_RESV
            owner, self.owner = self.owner, None
            del self.resv
            if owner is not None:
                owner.put()
            exports_of(record.domain).forget(self)
        if bug:
            raise ContractError(
                f"release: buffer ino {record.ino}: {bug} vmap() without vunmap(); its exporter was not asked to release it"
            )
        if left:
            contract_warning(f"release: buffer ino {record.ino}: still attached: {', '.join(left)}; detach before closing", 2)


def outside() -> bool:
    """Is the caller free of locks and callbacks, so that an exporter may be called from here?"""
    return not dispatcher.in_callback() and not in_signalling() and not any(current(d).locks for d in _DOMAINS)


_DOMAINS: weakref.WeakSet[Domain] = weakref.WeakSet()


class Exports:
    """The exported buffers of this process in one domain, and the thread that releases what nobody else does."""

    def __init__(self, domain: Domain) -> None:
        self.domain = weakref.ref(domain)
        self.live: dict[int, Exported] = {}  # by id()
        self._lock = fork_lock()
        self._bell = Bell()  # may be rung from __del__
        self._thread: threading.Thread | None = None
        _DOMAINS.add(domain)

    def add(self, exported: Exported) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="dmabuf-releaser", daemon=True)
                try:
                    self._thread.start()  # it looks when the lock is free
                except RuntimeError:  # none can be started: the next export tries again
                    self._thread = None
                    raise
            self.live[id(exported)] = exported

    def forget(self, exported: Exported) -> None:
        with self._lock:
            self.live.pop(id(exported), None)
        self._bell.ring()

    def wake(self) -> None:
        self._bell.ring()

    def orphans(self) -> list[Exported]:
        """Those that this process has closed and others may hold."""
        with self._lock:
            return [exported for exported in self.live.values() if not exported.record.handles and not exported.closing]

    def look(self) -> None:
        """Release what can be released: by the caller if it may, else by the thread."""
        orphans = self.orphans()
        if orphans and not outside():
            self.wake()
            return
        for exported in orphans:
            try:
                exported.try_release()
            except Exception as e:
                dispatcher.report(e, exported.exporter)

    def _serve(self) -> None:
        while True:
            with self._lock:
                if not self.live:
                    self._thread = None
                    return
            self._bell.wait(TICK_NS / 1e9 if self.orphans() else None)
            self.look()

    def forked(self) -> None:
        """What the parent exports is the parent's; our copies of its private descriptions are of no use."""
        for exported in self.live.values():
            with contextlib.suppress(OSError):  # closed by the child already, and the number perhaps used again
                if os.fstat(exported.private).st_ino == exported.record.ino:
                    os.close(exported.private)
        self.live.clear()


def _after_fork() -> None:
    """In the child the exporter is elsewhere: in the parent."""
    for domain in list(_DOMAINS):
        exports: Exports | None = domain.local.get("exports")
        for exported in list(exports.live.values()) if exports is not None else ():
            exported.record.live = elsewhere(exported.record, exported.life, exported.in_file)


os.register_at_fork(after_in_child=_after_fork)


def exports_of(domain: Domain) -> Exports:
    """The exports of this process in a domain."""
    found: Exports | None = domain.local.get("exports")
    if found is None:
        me = weakref.ref(domain)

        def current() -> Exports | None:
            here = me()
            return None if here is None else here.local.get("exports")

        def look() -> None:
            if (exports := current()) is not None:
                exports.look()

        def reset() -> None:
            if (exports := current()) is not None:
                exports.forked()

        # Once a domain: after a fork the exports begin anew, and the hooks stay.
        domain.sweep_hooks.ensure("exports", look)
        domain.reset_hooks.ensure("exports", reset)
        found = domain.local.setdefault("exports", Exports(domain))
    return found


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
    prepare: Callable[[int], None] | None = None,
) -> DmaBuf:
    """The buffer that :func:`dmabuf.export` returns. Its memfd is a token without memory, sealed against writing too.

    ``prepare``: the memfd itself carries the memory (see ``residence``); called with the exporter's own description of it, borrowed until
    ``release``, before anybody can have the buffer. What it raises undoes everything.
    """
    from dmabuf.core.dma_buf import checked_name
    from dmabuf.core.get import from_fd

    raw = None if name is None else checked_name(name, f"{size} bytes")
    shm = domain.join()
    fd = private = -1
    try:
        fd = os.memfd_create(memfd_name(domain, secrets.token_bytes(16)), os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, _F_ADD_SEALS, SEALS if prepare is not None else SEALS | residence.F_SEAL_WRITE)
        private = place.reopen(fd)
        if prepare is not None:
            prepare(private)
        if flags & os.O_ACCMODE == os.O_RDONLY:
            readonly = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
            os.close(fd)
            fd = readonly
    except BaseException as e:
        for opened in (fd, private):
            if opened >= 0:
                os.close(opened)
        if isinstance(e, DmaBufError) or not isinstance(e, OSError):
            raise
        raise fail(e.errno or errno.EIO, "export", f"{size} bytes", "close buffers or raise RLIMIT_NOFILE") from None
    try:
        buf = from_fd(fd, domain, exp_name=exp_name, home=EXPORTED, name=raw)
    except BaseException:
        os.close(private)
        raise
    record: Any = buf._record
    try:
        if resv is not None:
            shm.rec_set(record.index, "resv", record_of(resv).ensure() + 1)
            record.resv_ref = weakref.ref(resv)
        exported = Exported(exporter, ops, record, cache, buf.resv, owner, private, prepare is not None)
        serve(domain)
        exports_of(domain).add(exported)
        record.live = exported
    except BaseException:
        record.live = None
        buf.close()
        os.close(private)
        raise
    return buf
