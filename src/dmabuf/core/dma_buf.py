"""``DmaBuf``: a buffer is a file descriptor (spec 2, 5.2–5.7).

A ``DmaBuf`` owns one fd and closes it once. ``get(fd)`` and ``get_dma_buf()`` give handles of their own to the same buffer; they are equal
and hash alike, and share the reservation object and the count of vmaps inside the process. Using a closed handle is EBADF, except
``close()``, ``closed`` and ``repr``.

Must be called *without* the buffer's reservation lock held by the caller: ``read``, ``write``, ``begin_cpu_access``, ``end_cpu_access``,
``sync``, ``mmap``, ``dma_mmap``, ``attach``, ``vmap_unlocked``, ``vunmap_unlocked`` (else ``ContractWarning`` and EDEADLK). Must be called
*with* it: ``vmap``, ``vunmap``, ``move_notify`` (else ``ContractError``). The rest doesn't care: in particular a handle may be closed,
because the exporter's ``release`` never runs under a lock (spec 2.4).

Where a buffer has an exporter (``dmabuf.export``), memory and brackets are its ops (spec 2.15–2.18); plain memory needs none. A real
dma-buf is the kernel's: see ``dmabuf.core.buffer.backing_kernel``.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import weakref
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dmabuf import _native
from dmabuf.core.access import cpu_access, implicit
from dmabuf.core.access import poll as polling
from dmabuf.core.access.access import Access
from dmabuf.core.buffer import fdinfo
from dmabuf.core.buffer.backing import backing_of
from dmabuf.core.buffer.backing_kernel import KernelBacking
from dmabuf.core.buffer.handle import Handle
from dmabuf.core.buffer.identity import checked_name
from dmabuf.core.memory.iosys_map import IosysMap
from dmabuf.core.resv.resv import DmaResv, resv_of
from dmabuf.errors import ContractError, contract_warning, fail

if TYPE_CHECKING:
    from dmabuf.core.access.range import BufferRange
    from dmabuf.core.attach.attachment import DmaBufAttachment
    from dmabuf.core.contract import Importer
    from dmabuf.core.memory.device import Device
    from dmabuf.core.sync.sync_file import SyncFile

PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class BufferStatistics:
    """What a handle says of itself. ``mapped``: the handle keeps a mapping for its accesses; ``accesses``: open blocks of this handle.

    Kernel: dma_buf.attachments as attachments, dma_buf.vmapping_counter as vmaps.
    """

    size: int
    ino: int
    home: str
    accesses: int
    mapped: bool
    vmaps: int
    poll_fds: int
    attachments: int


class DmaBuf(Handle):
    """A buffer, made by :func:`dmabuf.allocate`, :func:`dmabuf.export`, :func:`dmabuf.get`, :func:`dmabuf.open` and :func:`dmabuf.recv`.

    Kernel: dma_buf (file as fileno), dma_buf_fd as detach.
    """

    __slots__ = ()

    def __repr__(self) -> str:
        where = "closed" if self._fd < 0 else f"fd {self._fd}"
        return f"<dmabuf.DmaBuf {where} ino {self._record.ino} {self._size} bytes {os.fsdecode(self._record.home)}>"

    # ---- references ----

    def get_dma_buf(self) -> DmaBuf:
        """Another reference: a handle with an fd and a close of its own (spec 2.5). Errors: EBADF, EMFILE.

        Kernel: get_dma_buf.
        """
        return DmaBuf._make(self.dup(), self._record)

    def put(self) -> None:
        """Drop a reference: ``close()`` by the kernel's name (spec 2.4). Kernel: dma_buf_put."""
        self.close()

    # ---- what it is ----

    @property
    def size(self) -> int:
        """Bytes; never changes (spec 1.2). Kernel: dma_buf.size."""
        self._check("size")
        return self._size

    @property
    def ino(self) -> int:
        """The inode number: the same in every process, for every fd of the buffer (spec 1.2)."""
        self._check("ino")
        return self._record.ino

    @property
    def exp_name(self) -> str:
        """The exporter's name (spec 1.2). Kernel: dma_buf.exp_name."""
        self._check("exp_name")
        return os.fsdecode(self._record.exp_name)

    @property
    def home(self) -> str:
        """The kind of memory: ``"memfd"``, ``"exported"``, ``"udmabuf"``, ``"dma_heap:NAME"`` or ``"imported"``."""
        self._check("home")
        return os.fsdecode(self._record.home)

    @property
    def name(self) -> str | None:
        """The name that users gave, None when never set. Settable, from any process: at most 31 bytes (spec 5.4).

        Errors on setting: EINVAL longer, or with a NUL; TypeError neither str nor bytes. Kernel: dma_buf.name.
        """
        self._check("name")
        kernel = self._kernel()
        found = kernel.name(self) if kernel is not None else self._record.info()["name"]
        return None if found is None else os.fsdecode(found)

    @name.setter
    def name(self, value: str | bytes) -> None:
        self._check("name")
        raw = checked_name(value, self)
        shm, index = self._record.at()
        kernel = self._kernel()
        if kernel is not None:
            kernel.set_name(self, raw)
        shm.rec_name(index, raw)
        self._record.shared.pop("message", None)  # what send() prepared names the buffer

    @property
    def resv(self) -> DmaResv:
        """The buffer's reservation object; the same object for every handle in this process. Kernel: dma_buf.resv."""
        if self._resv is None:
            self._check("resv")
            self._resv = resv_of(self._record)
        return self._resv

    # ---- memory ----

    def _kernel(self) -> KernelBacking | None:
        """The kernel's side, of a real dma-buf."""
        live = self._record.live
        return live if type(live) is KernelBacking else None

    def _window_source(self, write: bool) -> _native.Mapping:
        """The mapping that this handle's accesses look through; it stays, because fresh pages cost more than a copy."""
        mapping = self._mapping
        if mapping is None or (write and not mapping.writable):
            self._check("write" if write else "read")
            live = self._record.live
            if live is not None and not live.in_file:  # asked for anew each time: the exporter's memory may have moved
                operation = "write" if write else "read"
                found: _native.Mapping = live.mmap(self, operation, 0, self._size, write)
                return found
            size = self._size if live is None else self._size // PAGE * PAGE or self._size
            try:
                mapping = _native.Mapping(self._fd, size)
            except PermissionError:
                if write:
                    raise fail(errno.EACCES, "write", self, "receive a descriptor that is open for writing") from None
                mapping = _native.Mapping(self._fd, size, writable=False)
            self._mapping = mapping
        return mapping

    def _any_window(self) -> _native.Mapping:
        """The window, writable if the fd is: for devices, which find out when they are mapped."""
        return self._window_source(fcntl.fcntl(self._check("attach"), fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY)

    def mmap(self, offset: int = 0, length: int | None = None, writable: bool = True) -> _native.Mapping:
        """The bare mapping, MAP_SHARED, which waits for nobody and excludes nobody (spec 2.17, 5.2).

        ``offset``: a multiple of the page size; ``length``: None for the rest of the buffer, whole pages of which can be mapped. The
        mapping outlives ``close()``; close it yourself. Errors: EBADF; EINVAL out of bounds, unaligned or empty, or the exporter offers
        none; EOVERFLOW a negative offset, as in the kernel; EACCES writable on a read-only fd; ENOMEM; the exporter's; ``ContractWarning``
        and EDEADLK with the lock held.
        """
        self._not_locked("mmap")
        return self._mmap("mmap", offset, length, writable)

    def _mmap(self, operation: str, offset: int, length: int | None, writable: bool) -> _native.Mapping:
        if offset < 0 and offset % PAGE == 0:
            raise fail(errno.EOVERFLOW, operation, self, "an offset is not negative")
        room = self._size // PAGE * PAGE
        end = room if length is None else offset + length
        if offset % PAGE or end <= offset or end > room:
            raise fail(errno.EINVAL, operation, self, f"0 <= offset < offset + length <= {room}, offset a multiple of {PAGE}")
        live = self._record.live
        if live is not None:
            found: _native.Mapping = live.mmap(self, operation, offset, end - offset, writable)
            return found
        return self._map_memfd(operation, offset, end - offset, writable)

    def _map_memfd(self, operation: str, offset: int, length: int, writable: bool) -> _native.Mapping:
        try:
            return _native.Mapping(self._fd, length, offset=offset, writable=writable)
        except OSError as e:
            raise fail(e.errno or errno.EIO, operation, self) from None

    def export_range(self, offset: int = 0, length: int | None = None) -> BufferRange:
        """A part of the buffer as one value; ``length``: None for the rest. Errors: EINVAL empty, or not inside; EBADF."""
        from dmabuf.core.access.range import BufferRange

        return BufferRange(self, offset, length)

    def dma_mmap(self, offset: int, length: int) -> _native.Mapping:
        """The mapping an importer gets that redirects its own mmap here (spec 2.17).

        Errors: as :meth:`mmap`; EOVERFLOW when offset + length passes the address range. Kernel: dma_buf_mmap.
        """
        self._not_locked("dma_mmap")
        if offset + length > 1 << 64:
            raise fail(errno.EOVERFLOW, "dma_mmap", self, "offset + length must fit in 64 bits")
        return self._mmap("dma_mmap", offset, length, True)

    def lseek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """The kernel's lseek on a dma-buf: (0, SEEK_SET) is 0, (0, SEEK_END) the size, all else EINVAL; no position moves (spec 5.2)."""
        self._check("lseek")
        kernel = self._kernel()
        if kernel is not None:
            return kernel.lseek(self, offset, whence)
        if offset == 0 and whence == os.SEEK_END:
            return self._size
        if offset == 0 and whence == os.SEEK_SET:
            return 0
        raise fail(errno.EINVAL, "lseek", self, "only (0, SEEK_SET) and (0, SEEK_END)")

    def vmap(self, into: IosysMap | None = None) -> IosysMap:
        """The whole buffer as a kernel mapping, counted: n calls need n ``vunmap`` (spec 2.18). The reservation lock is held.

        ``into``: a map to fill and return; it is NULL after every failure. Errors: ``ContractError`` without the lock; EBADF; EINVAL the
        exporter offers none; the exporter's, with a ``ContractWarning``. Kernel: dma_buf_vmap.
        """
        if into is not None:
            into.clear()
        self._locked("vmap")
        return self._vmap(into)

    def vmap_unlocked(self, into: IosysMap | None = None) -> IosysMap:
        """:meth:`vmap` that takes the lock itself. Errors: as vmap, but ``ContractWarning`` and EDEADLK with the lock held.

        Kernel: dma_buf_vmap_unlocked.
        """
        if into is not None:
            into.clear()
        self._not_locked("vmap_unlocked")
        with self.resv.locked():
            return self._vmap(into)

    def _vmap(self, into: IosysMap | None) -> IosysMap:
        made = backing_of(self._record).vmap(self)
        if into is None:
            return made
        into.assign(made)
        return into

    def vunmap(self, map: IosysMap) -> None:
        """End one ``vmap``; the map must be equal to what it gave. The reservation lock is held.

        Errors: ``ContractError`` without the lock, for another map, or for one vunmap too many (spec 2.18: BUG). Kernel: dma_buf_vunmap.
        """
        self._locked("vunmap")
        backing_of(self._record).vunmap(self, map)

    def vunmap_unlocked(self, map: IosysMap) -> None:
        """:meth:`vunmap` that takes the lock itself. Errors: as vunmap, but ``ContractWarning`` and EDEADLK with the lock held.

        Kernel: dma_buf_vunmap_unlocked.
        """
        self._not_locked("vunmap_unlocked")
        with self.resv.locked():
            backing_of(self._record).vunmap(self, map)

    # ---- devices ----

    def attach(self, dev: Device, importer: Importer | None = None, *, interruptible: bool = False) -> DmaBufAttachment:
        """Attach a device (spec 2.8); with an importer the attachment is dynamic. See ``dmabuf.core.attach.attachment``.

        ``interruptible``: a signal ends the wait for KERNEL fences, where one is needed, with EINTR. Errors, with nothing attached: the
        exporter's (EBUSY: the memory is where the device can't reach it); ``ContractWarning`` and EINVAL no device, an importer without
        ``move_notify``; ``ContractWarning`` and EDEADLK with the lock held; ENODEV the exporter's process is gone; EBADF.
        Kernel: dma_buf_attach, dma_buf_dynamic_attach.
        """
        from dmabuf.core.attach import attachment

        self._not_locked("attach")
        return attachment.attach(self, dev, importer, interruptible)

    def move_notify(self) -> None:
        """Tell every dynamic importer, the newest attachment first, that the memory is about to move (spec 2.14). The lock is held.

        For the exporter. What a callback raises goes to ``sys.unraisablehook``. Errors: ``ContractError`` without the lock; EBADF.
        Kernel: dma_buf_move_notify.
        """
        from dmabuf.core.attach import attachment

        self._locked("move_notify")
        attachment.move_notify(backing_of(self._record))

    @property
    def is_dynamic(self) -> bool:
        """May its exporter move it: has it ``pin``? Kernel: dma_buf_is_dynamic."""
        self._check("is_dynamic")
        return self._record.live is not None and bool(self._record.live.dynamic)

    # ---- CPU access ----

    def _locked(self, operation: str) -> None:
        self._check(operation)
        if not self.resv.held_here():
            other = f", or use {operation}_unlocked()" if operation != "move_notify" else ""
            raise ContractError(f"{operation}: {self!r}: hold its reservation lock{other}")

    def _not_locked(self, operation: str) -> None:
        self._check(operation)
        if self._resv is not None and self._resv.held_here():
            contract_warning(f"{operation}: {self!r}: its reservation lock is held by this thread or task", 3)
            raise fail(errno.EDEADLK, operation, self, "unlock the reservation object first")

    def begin_cpu_access(self, direction: int, *, timeout: float | None = None, interruptible: bool = False) -> None:
        """Wait for the implicit fences in the way of a CPU access (spec 2.15); excludes nobody: for that there is ``read()``/``write()``.

        TO_DEVICE and BIDIRECTIONAL wait for writers and readers, FROM_DEVICE and NONE for writers. A failed fence does not fail the
        call. An exporter's op comes first; when it fails, nothing is waited for. Errors: EBADF; the exporter's; EINVAL no direction;
        ETIMEDOUT; EINTR if ``interruptible``; ``ContractWarning`` and EDEADLK with the lock held. Kernel: dma_buf_begin_cpu_access.
        """
        self._not_locked("begin_cpu_access")
        cpu_access.begin(self, direction, timeout, interruptible)

    def end_cpu_access(self, direction: int) -> None:
        """End a CPU access: waits for nothing, and nothing counts begin against end (spec 2.16). Errors: as begin.

        Kernel: dma_buf_end_cpu_access.
        """
        self._not_locked("end_cpu_access")
        cpu_access.end(self, direction)

    def sync(self, flags: int) -> None:
        """DMA_BUF_IOCTL_SYNC: READ 1, WRITE 2, both 3, with END 4 for the end (spec 5.3). Errors: EINVAL other flags, or neither."""
        self._check("sync")
        way = cpu_access.sync_direction(flags, self)
        if flags & cpu_access.SYNC_END:
            self.end_cpu_access(way)
        else:
            self.begin_cpu_access(way)

    def read(self, timeout: float | None = None) -> Access:
        """``with buf.read() as view``: read-only memory that nobody writes meanwhile; ``async with`` too.

        Waits for the writers that came before. ``timeout``: seconds. The view is released at the end of the block; an array made from
        it keeps the access until it is gone. Errors: EBADF; ETIMEDOUT (also ``TimeoutError``), having added nothing; EOWNERDEAD, ECANCELED
        the content is torn; EDEADLK inside an own access of the buffer, or in a circle.
        """
        return Access(self, False, timeout)

    def write(self, timeout: float | None = None) -> Access:
        """``with buf.write() as view``: writable memory that nobody else reads or writes meanwhile; ``async with`` too.

        Waits for the readers and writers that came before. An exception out of the block leaves the content torn, see :meth:`read`.
        Errors: EBADF; EACCES a read-only fd; ETIMEDOUT; EDEADLK; ``BufferError`` at the end when an array made from the view is in use.
        """
        return Access(self, True, timeout)

    # ---- waiting ----

    def poll(self, events: int, timeout: float | None = 0) -> int:
        """Which of select.POLLIN and POLLOUT are ready, waiting up to ``timeout`` seconds (None: for ever) for one (spec 5.6).

        Other events are ignored. Errors: EBADF; EINVAL a negative timeout.
        """
        self._usable("poll")
        return polling.poll(self, events, timeout)

    def poll_fd(self, events: int) -> int:
        """An fd that becomes readable once one of the events was ready; one-shot, the caller closes it. For select and epoll loops.

        Of a real dma-buf a duplicate, which polls natively and knows the kernel's fences only. Errors: EBADF; EINVAL neither POLLIN nor
        POLLOUT; EMFILE.
        """
        self._usable("poll_fd")
        if self._kernel() is not None and events & (select.POLLIN | select.POLLOUT):
            return self.dup()
        if self._polls is None:
            self._polls = weakref.WeakSet()
        waiting = polling.PollFd(self, events)
        fd = waiting.open()
        if waiting.own >= 0:
            self._polls.add(waiting)
        return fd

    def readable(self) -> Coroutine[Any, Any, None]:
        """Awaitable: until no write is pending (POLLIN). Errors: EBADF."""
        self._usable("readable")
        return polling.poll_async(self, select.POLLIN)

    def writable(self) -> Coroutine[Any, Any, None]:
        """Awaitable: until no fence up to READ is pending (POLLOUT). Errors: EBADF."""
        self._usable("writable")
        return polling.poll_async(self, select.POLLOUT)

    def export_sync_file(self, write: bool = False, *, flags: int | None = None) -> SyncFile:
        """What an access would wait for now, as a sync file (EXPORT_SYNC_FILE; spec 5.5): for reading the pending writes, for writing
        the reads too. A snapshot; already signalled if nothing is pending.

        ``flags``: READ 1, WRITE 2 or both, in place of ``write``. Errors: EBADF; EINVAL other flags.
        """
        self._usable("export_sync_file")
        return implicit.export_sync_file(self, implicit.writes(self, "export_sync_file", write, flags))

    def import_sync_file(self, sync_file: SyncFile | int, write: bool = False, *, flags: int | None = None) -> None:
        """Let later accesses wait for a sync file: for a write (``write``), or for a read (IMPORT_SYNC_FILE; spec 5.5).

        ``sync_file``: a SyncFile, or a descriptor of one; ``flags`` as in :meth:`export_sync_file`. Errors: EBADF this buffer is closed;
        EINVAL no sync file, or other flags; EXDEV of another domain; ENOMEM, ENOSPC; ``ContractWarning`` and EDEADLK with the lock held.
        """
        self._not_locked("import_sync_file")
        self._usable("import_sync_file")
        implicit.import_sync_file(self, sync_file, implicit.writes(self, "import_sync_file", write, flags))

    # ---- seeing ----

    def fdinfo(self) -> str:
        """The text of /proc/PID/fdinfo/FD for a dma-buf (spec 5.7). ``count`` is what this user may see of fds and mappings.

        A name may be any bytes; they are decoded with ``os.fsdecode``. Errors: EBADF.
        """
        fd = self._check("fdinfo")
        kernel = self._kernel()
        return fdinfo.text(self, fd) if kernel is None else kernel.fdinfo(self)

    def statistics(self) -> BufferStatistics:
        """A snapshot for programs."""
        behind = self._record.live or self._record.shared.get("backing")
        return BufferStatistics(
            self._size,
            self._record.ino,
            os.fsdecode(self._record.home),
            self._accesses,
            self._mapping is not None,
            behind.vmaps if behind else 0,
            len(self._polls or ()),
            len(behind.attachments) if behind else 0,
        )
