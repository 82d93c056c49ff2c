"""``DiskDevice``: reads files into buffers and writes buffers into files, without a copy in between.

A job's fence is on the buffer's reservation object from its submission on. A process or device that reads the buffer therefore waits until
the file is in it, and a file is written after the buffer's writers have ended. The rules are those of every device
(``dmabuf.devices.submission``). One thread does the jobs, one at a time and in any order, so a job that waits delays no other.

*The way of the bytes.* The system call reads and writes the memory behind the DMA addresses of the mapped table. Blocks of 4 KiB bypass the
page cache (O_DIRECT) if the file system supports that and memory and file are aligned alike. The rest at both ends, and everything else,
goes through the page cache. ``job.note`` and ``statistics().note`` say why O_DIRECT was not used. Both ways give the same bytes. The data
is durable only with ``sync=True``.

*Results.* A job's result is the number of bytes. A read that reaches the end of the file returns fewer bytes than asked for, and leaves the
rest of the range as it was (unless the file is shortened during the read). An error names the file, has it as ``filename``, and says how
many bytes were moved before. The fence has the same errno. A path is resolved when the job is submitted, and opened when it is done.
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

from dmabuf._native import OwnedFd, buffer_address
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
    errno.ENOENT: "name a file that exists",
    errno.EISDIR: "name a file",
    errno.ENOSPC: "make room on its file system",
    errno.EDQUOT: "make room within the quota",
    errno.EFBIG: "raise RLIMIT_FSIZE, or write less",
    errno.ESPIPE: "name a regular file or a block device",
}

Path = str | bytes | os.PathLike[str] | os.PathLike[bytes]


class ReadOptions(JobOptions, total=False):
    """The options of :meth:`DiskDevice.submit_read`."""

    length: int | None
    at: int


class WriteOptions(ReadOptions, total=False):
    """The options of :meth:`DiskDevice.submit_write`."""

    truncate: bool
    sync: bool


@dataclass(frozen=True)
class DiskStatistics(ImportingStatistics):
    """The state of a disk.

    ``direct`` and ``buffered``: bytes that bypassed the page cache, and bytes that did not. ``note``: why the last of these did not.
    """

    direct: int
    buffered: int
    note: str | None


class DiskDevice(Importing):
    """A disk. A ``with`` block closes it at the end: it waits for the jobs or, if the block raises, cancels them.

    Args:
        device: The `Device`, or a name for it.
        direct: Whether to try O_DIRECT.
        domain: The domain of its buffers; None means the user's default domain.
    """

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
        """Read a file into a buffer later, and return the job at once.

        Args:
            buf: The buffer, or a range of one.
            path: The file.
            offset: The first byte of the file.
            length: The number of bytes; None means the rest of the buffer.
            at: The first byte of the buffer.
            **options: See `JobOptions`.

        Raises:
            InvalidError: The offset is negative, the range is empty or outside of the buffer, or the path has a NUL (EINVAL).
            DmaBufError: An error of every job, see `dmabuf.sim.EngineQueue`. Errors of the file (ENOENT, EISDIR, ESPIPE, EACCES, EIO, …)
                come from the job.
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
        """Write a buffer into a file later, and return the job at once. The file is made if it doesn't exist.

        Args:
            buf: The buffer, or a range of one.
            path: The file.
            offset: The first byte of the file.
            length: The number of bytes; None means the rest of the buffer.
            at: The first byte of the buffer.
            truncate: Whether the file ends where the data ends.
            sync: Whether the data is on the disk when the job ends.
            **options: See `JobOptions`.

        Raises:
            InvalidError: The offset is negative, the range is empty or outside of the buffer, or the path has a NUL (EINVAL).
            DmaBufError: As :meth:`submit_read`. From the job also ENOSPC, EFBIG, EROFS, ….
        """
        name, first = _checked(path, offset, "write_from")

        def work(job: Job) -> int:
            file = _File("write_from", name, os.O_WRONLY | os.O_CREAT, truncate=truncate, sync=sync)
            return self._transfer(job, file, job.reads, first, Direction.TO_DEVICE)

        return submit_work(self, self._io, "write_from", work, (buf,), (), options, within=(at, length))

    # ---- in a coroutine ----

    async def read_into(self, buf: Target, path: Path, offset: int = 0, **options: Unpack[ReadOptions]) -> int:
        """Read a file into a buffer, and return the number of bytes. Arguments and errors are those of :meth:`submit_read`.

        If the coroutine is canceled, nothing stays registered, and the job goes on.
        """
        self._free(buf, "read_into")
        return await self._done(lambda: self.submit_read(buf, path, offset, **options))

    async def write_from(self, buf: Target, path: Path, offset: int = 0, **options: Unpack[WriteOptions]) -> int:
        """Write a buffer into a file, and return the number of bytes. Arguments and errors are those of :meth:`submit_write`.

        If the coroutine is canceled, nothing stays registered, and the job goes on.
        """
        self._free(buf, "write_from")
        return await self._done(lambda: self.submit_write(buf, path, offset, **options))

    async def _done(self, submit: Callable[[], Job]) -> int:
        made: list[Job] = []
        await awaiting.in_thread(lambda: made.append(submit()))
        return int(await made[0])

    def _free(self, target: Target, operation: str) -> None:
        """Refuse to go on if this task holds the buffer's lock (EDEADLK): the submission, in another thread, would wait for it forever."""
        whole: object = target.attached if isinstance(target, Range) else target.buf if isinstance(target, BufferRange) else target
        if isinstance(whole, (DmaBuf, Attached)) and whole.resv.held_here():  # the submission refuses anything else
            contract_warning(f"{operation}: {target!r}: this thread or task holds its reservation lock", 3)
            what = "this thread or task holds the buffer's reservation lock"
            raise fail(errno.EDEADLK, operation, target, "unlock the reservation object first", what=what)

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
                        continue  # O_DIRECT was refused: try again without it
                    if not gone:
                        return job.moved
                    direct += gone * straight
                    job.progress(gone)
                    address, position, length = address + gone, position + gone, length - gone
            file.finish(position)
            return job.moved
        except DmaBufError:
            raise  # a fault, or the end of the queue: not an error of the file
        except OSError as e:
            raise file.error(e, job.moved) from None
        finally:
            file.close()
            job.note = file.note
            self._note = file.note or self._note
            self._direct += direct
            self._buffered += job.moved - direct

    def statistics(self) -> DiskStatistics:
        """Return the disk's state at this moment."""
        base = super().statistics()
        return DiskStatistics(base.device, base.attached, base.powered, base.queues, self._direct, self._buffered, self._note)


class _File:
    """The open file of one job."""

    def __init__(self, operation: str, path: str | bytes, flags: int, *, truncate: bool = False, sync: bool = False) -> None:
        self.operation, self.path, self.flags = operation, path, flags
        self.truncate, self.sync = truncate, sync
        self.writes = flags & os.O_ACCMODE == os.O_WRONLY
        self.note: str | None = None
        self._fd: OwnedFd | None = None
        self._end = 0  # the size of a file that is read
        self._direct = self._is_direct = False  # O_DIRECT may be tried; it is on now

    def open(self, direct: bool) -> None:
        # Not blocking, because the open of a FIFO without another end would delay every job after this one.
        flags = self.flags | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
        self._fd = next(map(OwnedFd, map(os.open, (self.path,), (flags,), (0o666,))))
        fd = self._fd.number
        mode = os.fstat(fd).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
            raise OSError(errno.ESPIPE, os.strerror(errno.ESPIPE))
        fcntl.fcntl(fd, fcntl.F_SETFL, 0)
        self._direct = direct
        if not direct:
            self.note = "O_DIRECT is switched off"
        elif not self.writes:
            with contextlib.suppress(OSError):  # a device without a size has no blocks
                self._end = os.lseek(fd, 0, os.SEEK_END)

    def number(self) -> int:
        """Return the descriptor, compared just now: somebody else may have closed it, and the number may be another file's."""
        assert self._fd is not None
        return self._fd.fileno()

    def piece(self, position: int, length: int) -> int:
        """Return how many bytes to move next, so that blocks are whole blocks of the file."""
        if not self._direct:
            return min(length, CHUNK)
        head = -position % BLOCK
        if head:
            return min(head, length)
        # O_DIRECT reads whole blocks of the disk, so behind the end of the file it would write zeros into the buffer.
        room = length if self.writes else max(0, min(length, self._end - position))
        return min(room, CHUNK) // BLOCK * BLOCK or min(length, CHUNK)

    def straight(self, position: int, views: list[memoryview]) -> bool:
        """Choose the way of one piece. Return True if it bypasses the page cache."""
        n = sum(map(len, views))
        wanted = self._direct and position % BLOCK == 0 and n % BLOCK == 0 and (self.writes or position + n <= self._end)
        if wanted and any(len(view) % BLOCK or buffer_address(view) % BLOCK for view in views):
            self.note, wanted = "memory and file are not aligned alike (to 4 KiB)", False
        if wanted != self._is_direct:
            try:
                fcntl.fcntl(self.number(), fcntl.F_SETFL, os.O_DIRECT if wanted else 0)
                self._is_direct = wanted
            except OSError as e:
                if not wanted:
                    raise
                self._no(e)
        return self._is_direct

    def _no(self, error: OSError) -> None:
        self.note = f"its file system has no O_DIRECT: {error.strerror}"
        self._direct = False

    def move(self, views: list[memoryview], position: int) -> int:
        """Move one piece. Return the bytes moved, 0 at the end of the file, -1 if O_DIRECT was refused."""
        try:
            if not self.writes:
                return os.preadv(self.number(), views[:PIECES], position)
            gone = os.pwritev(self.number(), views[:PIECES], position)
        except OSError as e:
            if e.errno != errno.EINVAL or not self._is_direct:
                raise
            self._no(e)
            return -1
        if not gone:
            raise OSError(errno.EIO, "nothing was written")
        return gone

    def finish(self, end: int) -> None:
        """Truncate and sync the file as asked, after everything was moved."""
        if self.truncate:
            os.ftruncate(self.number(), end)
        if self.sync:
            os.fdatasync(self.number())

    def close(self) -> None:
        if self._fd is not None:
            self._fd.close()

    def error(self, error: OSError, moved: int) -> DmaBufError:
        number = error.errno or errno.EIO
        gone = f", after {moved} bytes" if moved else ""
        made = fail(number, self.operation, os.fsdecode(self.path), _REMEDY.get(number), what=f"{error.strerror or error}{gone}")
        made.filename = self.path
        return made


def _checked(path: Path, offset: int, operation: str) -> tuple[str | bytes, int]:
    name = os.fspath(path)
    if "\0" in os.fsdecode(name):
        raise fail(errno.EINVAL, operation, repr(path), "remove it", what="the path contains a NUL")
    first = operator.index(offset)
    if not 0 <= first <= _LAST >> 1:
        raise fail(errno.EINVAL, operation, f"offset {offset}", f"pass 0 to {_LAST >> 1}", what="the offset is out of range")
    return os.path.abspath(name) if name else name, first
