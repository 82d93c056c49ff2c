"""``DmaBuf``: a buffer is a file descriptor (semantics 2, 5.2–5.7).

A ``DmaBuf`` owns one descriptor and closes it once. ``get(fd)`` and ``get_dma_buf()`` give other handles of the same buffer. They are equal
and hash alike, and inside a process they share the reservation object and the count of vmaps. Using a closed handle raises EBADF, except
for ``close()``, ``closed`` and ``repr``.

The caller must *not* hold the buffer's reservation lock for ``read``, ``write``, ``begin_cpu_access``, ``end_cpu_access``, ``sync``,
``mmap``, ``dma_mmap``, ``attach``, ``import_sync_file``, ``vmap_unlocked`` and ``vunmap_unlocked`` (else ``ContractWarning`` and EDEADLK).
The caller must hold it for ``vmap``, ``vunmap`` and ``move_notify`` (else ``ContractError``). Everything else works either way. In
particular a handle may be closed, because the exporter's ``release`` never runs under a lock (semantics 2.4).

If a buffer has an exporter (``dmabuf.export``), the exporter's ops provide memory and brackets (semantics 2.15–2.18). Plain memory needs
none, and a kernel dma-buf is the kernel's (``core/buffer/backing_kernel.py``).

The class is a face: one line a verb. What a verb does is a function that takes a ``Handle`` (``core/buffer``, ``core/access``,
``core/attach``).
"""

from __future__ import annotations

import os
import select
from collections.abc import Coroutine
from functools import partial
from typing import Any, NoReturn, Self

from dmabuf._native import Access, OwnedFd, access_block
from dmabuf.core.access import access as _rules  # noqa: F401  (C calls its rules)
from dmabuf.core.access import cpu_access, implicit, poll
from dmabuf.core.access.range import BufferRange
from dmabuf.core.attach import attachment
from dmabuf.core.attach.attachment import DmaBufAttachment
from dmabuf.core.attach.importer import Importer
from dmabuf.core.base.closing import Closing
from dmabuf.core.buffer import description, fdinfo, statistics
from dmabuf.core.buffer.handle import Face, Handle, face_of, open_face
from dmabuf.core.buffer.mappable import Mappable
from dmabuf.core.buffer.ref import BufferRef, ref_of
from dmabuf.core.memory.device import Device
from dmabuf.core.resv.resv import DmaResv
from dmabuf.core.sync.sync_file import SyncFile
from dmabuf.domain.domain import Domain
from dmabuf.domain.guards import numbered
from dmabuf.layout.stored import Layout


class DmaBuf(Face, Mappable, Closing):
    """A buffer: memory that processes and devices share, and that is a file descriptor.

    The eight things to know:

    - ``dmabuf.allocate(size, name=…)`` makes a buffer.
    - ``with buf.read() as view`` waits for the writer before it. Nobody writes during the block.
    - ``with buf.write() as view`` waits for the readers and writers before it. Nobody else is in a block.
    - ``with dmabuf.access(read=[a], write=[b]) as (x, y)`` does the same for several buffers, without a deadlock.
    - ``dmabuf.send(sock, buf)`` and ``dmabuf.recv(sock)`` pass buffers to another process. multiprocessing takes them too.
    - ``dmabuf.open(name)`` gives a buffer that another process has open.
    - ``buf.close()`` closes the handle. The memory goes with the last handle of the last process.
    - ``dmabuf ls``, in a shell, shows who has which buffer open, and what blocks it.

    ``dmabuf.export()`` and ``dmabuf.get()`` make handles too. Everything below is for drivers, and for programs that poll or map by hand.
    On a closed handle, everything but ``close()``, ``put()``, ``closed``, ``domain``, ``statistics()``, ``==`` and ``repr`` raises
    ClosedError (EBADF).

    Kernel: dma_buf (file as fileno), dma_buf_fd as detach.
    """

    __slots__ = ()

    def __new__(cls, *_: object, **__: object) -> Self:
        raise TypeError("a DmaBuf is made by dmabuf.allocate(), export(), get(), open() or recv()")

    def __repr__(self) -> str:
        return repr(self._handle)

    def __array__(self, *_: object, **__: object) -> NoReturn:
        raise TypeError("a DmaBuf is reached inside a block: with buf.read() as view: view.array()")

    def _check(self, operation: str) -> object:
        return self._handle.check(operation)

    # ---- reading and writing ----

    def read(self, timeout: float | None = None) -> Access:
        """Return a context manager that waits for earlier writers and yields a read-only view. ``async with`` works too.

        No process can write until the block ends. An array made from the view keeps the access, until it is gone or a writer has waited
        for 50 ms; then it has a private copy (docs/views.md). The errors come when the block is entered.

        Args:
            timeout: Seconds to wait; None waits forever.

        Raises:
            ClosedError: The handle is closed (EBADF).
            DmaBufTimeout: A writer did not finish in time (ETIMEDOUT).
            OwnerDeadError, CanceledError: The last writer died or raised, so the content is torn (EOWNERDEAD, ECANCELED).
            DeadlockError: This thread or task is already inside a block of the buffer; another task of this thread is, and the wait would
                stop it; or accesses wait in a cycle (EDEADLK).
        """
        return access_block(self, self._handle, False, timeout)

    def write(self, timeout: float | None = None) -> Access:
        """Return a context manager that waits for earlier readers and writers and yields a writable view. ``async with`` works too.

        No other process can read or write until the block ends. An exception in the block leaves the content torn, see :meth:`read`.
        What is made from the view and kept has a private copy afterwards, with a ``KeptWarning``. The errors come when the block is
        entered.

        Args:
            timeout: Seconds to wait; None waits forever.

        Raises:
            ClosedError: The handle is closed (EBADF).
            NotPermittedError: The descriptor is read-only (EACCES).
            DmaBufTimeout: A reader or writer did not finish in time (ETIMEDOUT).
            DeadlockError: This thread or task is already inside a block of the buffer; another task of this thread is, and the wait would
                stop it; or accesses wait in a cycle (EDEADLK).
            BufferError: At the end of the block, more than 256 MiB of the view are still in use.
        """
        return access_block(self, self._handle, True, timeout)

    # ---- the descriptor ----

    @property
    def closed(self) -> bool:
        """Whether ``close()`` or ``detach()`` was called."""
        return self._handle.fd < 0

    def close(self) -> None:
        """Close the handle. Existing mappings stay valid (mmap(2)), and closing twice has no effect.

        Raises:
            BusyError: A ``read()`` or ``write()`` block of this handle is open (EBUSY).
        """
        self._handle.close()

    def put(self) -> None:
        """Drop a reference: ``close()`` by the kernel's name (semantics 2.4).

        Kernel: dma_buf_put.
        """
        self._handle.close()

    def get_dma_buf(self) -> DmaBuf:
        """Return another handle of the buffer, with a descriptor and a close of its own (semantics 2.5).

        Raises:
            DmaBufError: The process has no descriptor left (EMFILE).

        Kernel: get_dma_buf.
        """
        return new_handle(self._handle.dup_owned(), self._handle.shared)

    def fileno(self) -> int:
        """Return the file descriptor, which the buffer keeps owning and closes itself.

        Raises:
            ClosedError: The buffer is closed, or somebody else closed the descriptor (EBADF).
        """
        return self._handle.fileno()

    @numbered
    def dup(self, cloexec: bool = True) -> OwnedFd:
        """Return a new file descriptor of the buffer, which the caller owns.

        Args:
            cloexec: A program started by exec doesn't inherit the descriptor.

        Raises:
            DmaBufError: The process has no descriptor left (EMFILE).
        """
        return self._handle.dup_owned(cloexec)

    @numbered
    def detach(self) -> OwnedFd:
        """Close the handle but keep its file descriptor, and return it: the caller owns it from now on.

        Raises:
            BusyError: A ``read()`` or ``write()`` block of this handle is open (EBUSY).
        """
        return self._handle.detach()

    # ---- passing it on ----

    def give(self) -> DmaBuf:
        """Close this handle, and return one that closes itself when multiprocessing has pickled it: ``queue.put(buf.give())``.

        So nothing has to stay open here, and the buffer arrives although this process has closed it, or has ended in order.

        Raises:
            BusyError: A ``read()`` or ``write()`` block of this handle is open (EBUSY).
            DmaBufError: The process has no descriptor left (EMFILE). The handle stays open.
        """
        handle = self._handle
        made = open_face(DmaBuf, GivenHandle, handle.dup_owned(), handle.shared)
        try:
            handle.close()
        except BaseException:
            made.close()
            raise
        return made

    def ref(self) -> BufferRef:
        """Return a token that says which buffer this is, which any pickle carries, and which ``dmabuf.open`` opens again.

        It doesn't keep the buffer alive: some process must have it open when the token is opened.
        """
        return ref_of(self._handle, self._handle.name())

    # ---- what it is ----

    @property
    def domain(self) -> Domain:
        """The domain that the buffer belongs to."""
        return self._handle.domain

    @property
    def size(self) -> int:
        """The size in bytes, which never changes (semantics 1.2).

        Kernel: dma_buf.size.
        """
        self._handle.check("size")
        return self._handle.size

    @property
    def ino(self) -> int:
        """The inode number, the same in every process and for every descriptor of the buffer (semantics 1.2)."""
        self._handle.check("ino")
        return self._handle.shared.ino

    @property
    def exp_name(self) -> str:
        """The exporter's name (semantics 1.2).

        Kernel: dma_buf.exp_name.
        """
        self._handle.check("exp_name")
        return os.fsdecode(self._handle.shared.exp_name)

    @property
    def home(self) -> str:
        """The kind of memory: ``"memfd"``, ``"exported"``, ``"udmabuf"``, ``"dma_heap:NAME"`` or ``"imported"``."""
        self._handle.check("home")
        return os.fsdecode(self._handle.shared.home)

    @property
    def name(self) -> str | None:
        """The name that users gave the buffer; None if it has none. Any process can set it, to at most 31 bytes (semantics 5.4).

        Raises:
            InvalidError: The new name is longer than 31 bytes, or has a NUL (EINVAL).
            TypeError: The new name is neither str nor bytes.

        Kernel: dma_buf.name.
        """
        found = self._handle.name()
        return None if found is None else os.fsdecode(found)

    @name.setter
    def name(self, value: str | bytes) -> None:
        self._handle.set_name(value)

    @property
    def layout(self) -> Layout | None:
        """What the bytes mean, the same in every process: an ``ImageLayout`` or a ``TensorLayout``; None if nobody said so."""
        return description.layout_of(self._handle)

    @property
    def layout_part(self) -> int:
        """Which of the buffers of its layout this one is, if a picture is spread over several."""
        return description.part_of(self._handle)

    def describe(self, layout: Layout, part: int = 0) -> None:
        """Say what the bytes mean, once: for a buffer of a driver, such as a camera's. ``allocate(layout=…)`` does it for new ones.

        Raises:
            InvalidError: The buffer is too small for it, or the layout has no such part (EINVAL).
            ExistsError: It has another layout already (EEXIST).
        """
        description.describe(self._handle, layout, part)

    @property
    def resv(self) -> DmaResv:
        """The buffer's reservation object; the same object for every handle in this process.

        Kernel: dma_buf.resv.
        """
        return self._handle.resv

    def export_range(self, offset: int = 0, length: int | None = None) -> BufferRange:
        """Return a part of the buffer as one value.

        Args:
            offset: The first byte.
            length: The number of bytes; None means the rest of the buffer.

        Raises:
            InvalidError: The range is empty, or not within the buffer (EINVAL).
        """
        return BufferRange(self, offset, length)

    # ---- devices ----

    def attach(self, dev: Device, importer: Importer | None = None, *, interruptible: bool = False) -> DmaBufAttachment:
        """Attach a device (semantics 2.8). See ``dmabuf.core.attach.attachment``.

        Args:
            dev: The device.
            importer: Makes the attachment dynamic.
            interruptible: A signal ends the wait for KERNEL fences, if one is needed, with EINTR.

        Raises:
            InvalidError: There is no device, or the importer has no ``move_notify`` (EINVAL, with a ``ContractWarning``).
            DeadlockError: The caller holds the lock (EDEADLK, with a ``ContractWarning``).
            NoDeviceError: The exporter's process is gone (ENODEV).
            OSError: What the exporter raised. EBUSY says that the device can't reach the memory.

        Kernel: dma_buf_attach, dma_buf_dynamic_attach.
        """
        return attachment.attach(self, dev, importer, interruptible)

    def move_notify(self) -> None:
        """Notify every dynamic importer, the newest attachment first, that the memory is about to move (semantics 2.14). The lock is held.

        Exporters call this. ``sys.unraisablehook`` reports what an importer raises.

        Raises:
            ContractError: The lock isn't held.

        Kernel: dma_buf_move_notify.
        """
        attachment.move_notify(self._handle)

    @property
    def is_dynamic(self) -> bool:
        """Whether the exporter may move the memory: it has ``pin``.

        Kernel: dma_buf_is_dynamic.
        """
        self._handle.check("is_dynamic")
        backing = self._handle.shared.backing
        return backing is not None and backing.dynamic

    # ---- CPU access ----

    def begin_cpu_access(self, direction: int, *, timeout: float | None = None, interruptible: bool = False) -> None:
        """Wait for the implicit fences that block a CPU access (semantics 2.15). Excludes nobody: use ``read()`` and ``write()`` for that.

        TO_DEVICE and BIDIRECTIONAL wait for writers and readers, FROM_DEVICE and NONE for writers. A failed fence does not fail the
        call. The exporter's op comes first; if it fails, nothing is waited for.

        Args:
            direction: A ``Direction``.
            timeout: Seconds to wait; None waits forever.
            interruptible: A signal ends the wait with EINTR.

        Raises:
            InvalidError: ``direction`` is not a direction (EINVAL).
            DmaBufTimeout: The fences did not end in time (ETIMEDOUT).
            InterruptedWaitError: A signal came (EINTR).
            DeadlockError: The caller holds the lock (EDEADLK, with a ``ContractWarning``).
            OSError: What the exporter raised.

        Kernel: dma_buf_begin_cpu_access.
        """
        cpu_access.begin_cpu_access(self._handle, direction, timeout, interruptible)

    def end_cpu_access(self, direction: int) -> None:
        """End a CPU access. Waits for nothing, and nothing counts begin against end (semantics 2.16).

        Raises:
            OSError: As :meth:`begin_cpu_access`.

        Kernel: dma_buf_end_cpu_access.
        """
        cpu_access.end_cpu_access(self._handle, direction)

    def sync(self, flags: int) -> None:
        """Begin or end a CPU access as DMA_BUF_IOCTL_SYNC does (semantics 5.3).

        Args:
            flags: READ 1, WRITE 2 or both 3; plus END 4 for the end.

        Raises:
            InvalidError: Unknown flags, or neither READ nor WRITE (EINVAL).
            OSError: As :meth:`begin_cpu_access`.
        """
        cpu_access.sync(self._handle, flags)

    # ---- waiting ----

    def poll(self, events: int, timeout: float | None = 0) -> int:
        """Return which of select.POLLIN and POLLOUT are ready, waiting for one if none is (semantics 5.6). Other events are ignored.

        Args:
            events: A sum of POLLIN and POLLOUT.
            timeout: Seconds to wait; None waits forever.

        Raises:
            InvalidError: ``timeout`` is negative (EINVAL).
        """
        return poll.poll(self._handle, events, timeout)

    @numbered
    def poll_fd(self, events: int) -> OwnedFd:
        """Return a descriptor that becomes readable, once, when one of the events was ready. The caller closes it.

        It is for select and epoll loops. Of a kernel dma-buf it is a duplicate, which polls natively and knows the kernel's fences only.

        Raises:
            InvalidError: Neither POLLIN nor POLLOUT is asked for (EINVAL).
            DmaBufError: The process has no descriptor left (EMFILE).
        """
        return poll.poll_fd(self._handle, events)

    def readable(self) -> Coroutine[Any, Any, None]:
        """Return an awaitable that ends when no write is pending (POLLIN)."""
        self._handle.usable("readable")
        return poll.poll_async(self._handle, select.POLLIN)

    def writable(self) -> Coroutine[Any, Any, None]:
        """Return an awaitable that ends when no fence up to READ is pending (POLLOUT)."""
        self._handle.usable("writable")
        return poll.poll_async(self._handle, select.POLLOUT)

    def export_sync_file(self, write: bool = False, *, flags: int | None = None) -> SyncFile:
        """Return what an access would wait for now, as a sync file: a snapshot (EXPORT_SYNC_FILE; semantics 5.5).

        It is signaled if nothing is pending.

        Args:
            write: As for a writer, which waits for pending reads too.
            flags: READ 1, WRITE 2 or both, instead of ``write``.

        Raises:
            InvalidError: Other flags (EINVAL).
            DmaBufError: The process has no descriptor left (EMFILE).
        """
        return implicit.export_sync_file(self._handle, write, flags)

    def import_sync_file(self, sync_file: SyncFile | int, write: bool = False, *, flags: int | None = None) -> None:
        """Let later accesses wait for a sync file (IMPORT_SYNC_FILE; semantics 5.5).

        Args:
            sync_file: A ``SyncFile``, or a descriptor of one.
            write: Its fences stand for a write, which readers wait for too.
            flags: READ 1, WRITE 2 or both, instead of ``write``.

        Raises:
            InvalidError: ``sync_file`` is not a sync file, or there are other flags (EINVAL).
            CrossDomainError: The sync file belongs to another domain (EXDEV).
            NoSpaceError: The domain is full (ENOSPC).
            DeadlockError: The caller holds the lock (EDEADLK, with a ``ContractWarning``).
        """
        implicit.import_sync_file(self._handle, sync_file, write, flags)

    # ---- seeing ----

    def fdinfo(self) -> str:
        """Return the text of /proc/PID/fdinfo/FD for a dma-buf (semantics 5.7). ``count`` is what this user may see of fds and mappings.

        A name may be any bytes; they are decoded with ``os.fsdecode``.
        """
        return fdinfo.fdinfo(self._handle)

    def statistics(self) -> statistics.BufferStatistics:
        """Return a snapshot for programs."""
        return statistics.statistics(self._handle)


class BufHandle(Handle):
    """A handle whose face is a ``DmaBuf``."""

    __slots__ = ()

    def face(self) -> DmaBuf:
        return face_of(DmaBuf, self)


class GivenHandle(BufHandle):
    """A handle that its pickler closes, because the receiver owns the buffer then."""

    __slots__ = ()


new_handle = partial(open_face, DmaBuf, BufHandle)
"""Return a new handle of a buffer, which owns a descriptor: ``new_handle(fd, shared, name=None)``."""
