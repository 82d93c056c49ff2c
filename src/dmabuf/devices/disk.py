"""``DiskDevice``: reads files straight into buffers and writes buffers straight into files.

A job's fence is on the buffer's reservation object from its submission, so whoever reads the buffer, by CPU or by device, in whatever
process, waits for the file to be in it; and a file is written after the buffer's writers have ended. The rules are those of every device
(``dmabuf.devices.submission``). Jobs are done by one thread, in any order but one at a time: a job that waits holds up nobody.

*How the bytes go.* The file is read and written by the memory behind the DMA addresses of the mapped table, without a copy of ours. Blocks
of 4 KiB bypass the page cache (O_DIRECT) where the file system takes that and memory and file are aligned alike; what is left at both ends,
and everything else, goes through the page cache. ``job.note`` and ``statistics().note`` say why O_DIRECT was not used. Both ways give the
same bytes. Data is on the disk for good only with ``sync=True``.

*Results.* The number of bytes. Fewer than asked for is a read that met the end of the file; the rest of the range is untouched (unless the
file is shortened while it is read). An error
names the file, has it as ``filename``, and says how many bytes had gone before; the fence ends with the same errno. A path is resolved when
the job is submitted, and opened when it is done.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import operator
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Unpack

from dmabuf._native import buffer_address
from dmabuf.core.access.range import BufferRange
from dmabuf.core.base.usage import Direction
from dmabuf.core.dma_buf import DmaBuf
from dmabuf.core.memory.device import Device
from dmabuf.core.memory.scatterlist import DmaEntry
from dmabuf.core.task import waiting as awaiting
from dmabuf.devices.attached import Attached, Range
from dmabuf.devices.importing import Importing, ImportingStatistics, Target, submit_work
from dmabuf.devices.queue import Job, JobOptions, Queue
from dmabuf.domain.domain import Domain
from dmabuf.errors import DmaBufError, contract_warning, fail

BLOCK: Final = 4096  # bytes: no disk of today asks for more alignment than this
CHUNK: Final = 4 << 20  # bytes in one system call: a job can end only between two
PIECES: Final = 1024  # IOV_MAX, linux/uio.h
_LAST: Final = (1 << 63) - 1
_REMEDY: Final = {
    errno.ENOENT: "name a file that is there",
    errno.EISDIR: "name a file",
    errno.ENOSPC: "make room on its file system",
    errno.EDQUOT: "make room within the quota",
    errno.EFBIG: "raise RLIMIT_FSIZE, or write less",
    errno.ESPIPE: "name a regular file or a block device",
}

Path = str | bytes | os.PathLike[str] | os.PathLike[bytes]


class ReadOptions(JobOptions, total=False):
    """What :meth:`DiskDevice.submit_read` takes."""

    length: int | None
    at: int


class WriteOptions(ReadOptions, total=False):
    """What :meth:`DiskDevice.submit_write` takes."""

    truncate: bool
    sync: bool


@dataclass(frozen=True)
class DiskStatistics(ImportingStatistics):
    """What a disk says of itself. ``direct``, ``buffered``: bytes that bypassed the page cache, and that did not; ``note``: why not, of
    the last job of which it had to be said."""

    direct: int
    buffered: int
    note: str | None


class DiskDevice(Importing):
    """A disk. ``direct``: try O_DIRECT. ``with`` closes it at the end: waits for its jobs, or, left by an exception, cancels them."""

    driver = "dmabuf-disk"

    def __init__(self, device: Device | str = "disk", *, direct: bool = True, domain: Domain | None = None) -> None:
        super().__init__(device, domain=domain)
        self._try_direct = direct
        self._direct = self._buffered = 0
        self._note: str | None = None
        self._io = Queue(self, self.device.name, ordered=False)
        self._add(self._io)

    # ---- at once, the result later ----

    def submit_read(
        self, buf: Target, path: Path, offset: int = 0, *, length: int | None = None, at: int = 0, **options: Unpack[JobOptions]
    ) -> Job:
        """Read a file from byte ``offset`` into a buffer from byte ``at``; ``length``: None for the rest of the buffer.

        Errors at once, with nothing added: EINVAL a negative offset, a range outside of the buffer or empty, a path with a NUL; those of
        every job (``submit_work``). Later, by the fence: ENOENT, EISDIR, ESPIPE, EACCES, EIO, …
        """
        name, first = _checked(path, offset, "read_into")

        def work(job: Job) -> int:
            return self._transfer(job, _File("read_into", name, os.O_RDONLY), job.writes, first, Direction.FROM_DEVICE)

        return submit_work(self, self._io, "read_into", work, (), (buf,), options, within=(at, length))

    def submit_write(
        self,
        buf: Target,
        path: Path,
        offset: int = 0,
        *,
        length: int | None = None,
        at: int = 0,
        truncate: bool = False,
        sync: bool = False,
        **options: Unpack[JobOptions],
    ) -> Job:
        """Write a buffer from byte ``at`` into a file from byte ``offset``; the file is made if it is not there.

        ``truncate``: the file ends where the data ends. ``sync``: it is on the disk when the job ends. Errors as :meth:`submit_read`; later
        also ENOSPC, EFBIG, EROFS, ….
        """
        name, first = _checked(path, offset, "write_from")

        def work(job: Job) -> int:
            file = _File("write_from", name, os.O_WRONLY | os.O_CREAT, truncate=truncate, sync=sync)
            return self._transfer(job, file, job.reads, first, Direction.TO_DEVICE)

        return submit_work(self, self._io, "write_from", work, (buf,), (), options, within=(at, length))

    # ---- in a coroutine ----

    async def read_into(self, buf: Target, path: Path, offset: int = 0, **options: Unpack[ReadOptions]) -> int:
        """:meth:`submit_read`, and its result. Cancelling leaves nothing registered; the job goes on, and its fence ends."""
        self._free(buf, "read_into")
        return await self._done(lambda: self.submit_read(buf, path, offset, **options))

    async def write_from(self, buf: Target, path: Path, offset: int = 0, **options: Unpack[WriteOptions]) -> int:
        """:meth:`submit_write`, and its result. Cancelling leaves nothing registered; the job goes on, and its fence ends."""
        self._free(buf, "write_from")
        return await self._done(lambda: self.submit_write(buf, path, offset, **options))

    async def _done(self, submit: Callable[[], Job]) -> int:
        made: list[Job] = []
        await awaiting.in_thread(lambda: made.append(submit()))
        return int(await made[0])

    def _free(self, target: Target, operation: str) -> None:
        """The submission waits for the lock in a thread, so that the loop goes on; it would wait for ever for this task's own."""
        whole: object = target.attached if isinstance(target, Range) else target.buf if isinstance(target, BufferRange) else target
        if isinstance(whole, (DmaBuf, Attached)) and whole.resv.held_here():  # anything else is refused by the submission
            contract_warning(f"{operation}: {target!r}: its reservation lock is held by this thread or task", 3)
            raise fail(errno.EDEADLK, operation, target, "unlock the reservation object first")

    # ---- in the queue's thread ----

    def _transfer(self, job: Job, file: _File, entries: list[DmaEntry], position: int, direction: Direction) -> int:
        direct = 0
        try:
            file.open(self._try_direct)
            for address, length in entries:
                while length:
                    job.checkpoint()
                    n = file.piece(position, length)
                    with self.device.views(address, n, direction) as views:
                        straight = file.straight(position, views)
                        gone = file.move(views, position)
                    if gone < 0:
                        continue  # refused as O_DIRECT: once more, without
                    if not gone:
                        return job.moved
                    direct += gone * straight
                    job.progress(gone)
                    address, position, length = address + gone, position + gone, length - gone
            file.finish(position)
            return job.moved
        except DmaBufError:
            raise  # a fault, or the end of the queue: nothing of the file's
        except OSError as e:
            raise file.error(e, job.moved) from None
        finally:
            file.close()
            job.note = file.note
            self._note = file.note or self._note
            self._direct += direct
            self._buffered += job.moved - direct

    def statistics(self) -> DiskStatistics:
        """A snapshot for programs."""
        base = super().statistics()
        return DiskStatistics(base.device, base.attached, base.powered, base.queues, self._direct, self._buffered, self._note)


class _File:
    """The open file of one job."""

    def __init__(self, operation: str, path: str | bytes, flags: int, *, truncate: bool = False, sync: bool = False) -> None:
        self.operation, self.path, self.flags = operation, path, flags
        self.truncate, self.sync = truncate, sync
        self.writes = flags & os.O_ACCMODE == os.O_WRONLY
        self.note: str | None = None
        self._fd = -1
        self._end = 0  # of the file that is read
        self._direct = self._is_direct = False  # may be tried; is on now

    def open(self, direct: bool) -> None:
        # Not blocking: a FIFO without another end would hold up every job after this one.
        self._fd = os.open(self.path, self.flags | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK, 0o666)
        mode = os.fstat(self._fd).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
            raise OSError(errno.ESPIPE, os.strerror(errno.ESPIPE))
        fcntl.fcntl(self._fd, fcntl.F_SETFL, 0)
        self._direct = direct
        if not direct:
            self.note = "O_DIRECT is switched off"
        elif not self.writes:
            with contextlib.suppress(OSError):  # a device without a size has no blocks either
                self._end = os.lseek(self._fd, 0, os.SEEK_END)

    def piece(self, position: int, length: int) -> int:
        """How much of what is left to take next, so that blocks are whole blocks of the file."""
        if not self._direct:
            return min(length, CHUNK)
        head = -position % BLOCK
        if head:
            return min(head, length)
        # O_DIRECT reads whole blocks of the disk: behind the end of the file it would put zeros into the buffer.
        room = length if self.writes else max(0, min(length, self._end - position))
        return min(room, CHUNK) // BLOCK * BLOCK or min(length, CHUNK)

    def straight(self, position: int, views: list[memoryview]) -> bool:
        """Choose the way for one piece: True past the page cache."""
        n = sum(map(len, views))
        wanted = self._direct and position % BLOCK == 0 and n % BLOCK == 0 and (self.writes or position + n <= self._end)
        if wanted and any(len(view) % BLOCK or buffer_address(view) % BLOCK for view in views):
            self.note, wanted = "memory and file are not aligned alike (to 4 KiB)", False
        if wanted != self._is_direct:
            try:
                fcntl.fcntl(self._fd, fcntl.F_SETFL, os.O_DIRECT if wanted else 0)
                self._is_direct = wanted
            except OSError as e:
                if not wanted:
                    raise
                self._no(e)
        return self._is_direct

    def _no(self, error: OSError) -> None:
        self.note = f"its file system takes no O_DIRECT: {error.strerror}"
        self._direct = False

    def move(self, views: list[memoryview], position: int) -> int:
        """Bytes moved; 0 at the end of the file; -1 refused as O_DIRECT."""
        try:
            if not self.writes:
                return os.preadv(self._fd, views[:PIECES], position)
            gone = os.pwritev(self._fd, views[:PIECES], position)
        except OSError as e:
            if e.errno != errno.EINVAL or not self._is_direct:
                raise
            self._no(e)
            return -1
        if not gone:
            raise OSError(errno.EIO, "nothing was written")
        return gone

    def finish(self, end: int) -> None:
        """Everything was moved."""
        if self.truncate:
            os.ftruncate(self._fd, end)
        if self.sync:
            os.fdatasync(self._fd)

    def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def error(self, error: OSError, moved: int) -> DmaBufError:
        number = error.errno or errno.EIO
        gone = f", after {moved} bytes" if moved else ""
        made = fail(number, self.operation, os.fsdecode(self.path), _REMEDY.get(number), what=f"{error.strerror or error}{gone}")
        made.filename = self.path
        return made


def _checked(path: Path, offset: int, operation: str) -> tuple[str | bytes, int]:
    name = os.fspath(path)
    if "\0" in os.fsdecode(name):
        raise fail(errno.EINVAL, operation, repr(path), "a path has no NUL")
    first = operator.index(offset)
    if not 0 <= first <= _LAST >> 1:
        raise fail(errno.EINVAL, operation, f"offset {offset}", "an offset is bytes >= 0")
    return os.path.abspath(name) if name else name, first
