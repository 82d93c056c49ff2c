"""``dmabuf.sim``: a software DMA engine, an asynchronous device that copies, fills and computes checksums (semantics 4.11).

    with dmabuf.sim.Engine("dma0") as engine:
        queue = engine.queue(timeout=1.0)
        job = queue.copy(source, destination)      # returns at once; the queue's thread does the work later
        job.fence                                  # on both buffers' reservation objects; any process can wait for it
        job.wait()                                 # or `await job`; returns the bytes moved

The engine accesses memory by DMA address only, through the IOMMU of its ``device``, in pieces of at most 256 KiB. An address that is not
mapped faults, and the job's fence is signaled with -EFAULT. Jobs are ordered with those of other devices and processes, and with CPU
accesses, by implicit synchronization (see ``dmabuf.devices.submission``), by explicit fences (``wait=``), and within a queue by their
submission. Queues run side by side.

For tests of programs, an engine can misbehave. A queue can be slow (``delay``, ``bandwidth``). A job can hang (``hang=True``) until the
queue's ``timeout`` ends it with -ETIME and the queue goes on with the next job. The engine can lose power (``power_off()``). What a failed
job has written is undefined.
"""

from __future__ import annotations

import errno
import itertools
import operator
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Unpack

from dmabuf.core.memory.device import Device
from dmabuf.core.memory.scatterlist import DmaEntry
from dmabuf.devices.attached import Attached, AttachedStatistics, Range
from dmabuf.devices.importing import Importing, ImportingStatistics, Target, submit_work
from dmabuf.devices.queue import Job, JobOptions, Queue, QueueStatistics
from dmabuf.domain.domain import Domain
from dmabuf.errors import fail

__all__ = [
    "Attached",
    "AttachedStatistics",
    "Engine",
    "EngineQueue",
    "ImportingStatistics",
    "Job",
    "JobOptions",
    "QueueStatistics",
    "Range",
]

CHUNK = 256 * 1024  # bytes: small enough to stop soon, large enough that looking up the address costs nothing


class EngineQueue(Queue):
    """A queue of an :class:`Engine`, made by :meth:`Engine.queue`.

    Every job takes the options of ``JobOptions`` (``wait``, ``implicit``, ``delay``, ``hang``). Later errors come from the job, see
    ``dmabuf.devices.queue``. The following ones are raised at once by every method, and nothing is added.

    Raises:
        InvalidError: There is no target, an attachment belongs to another device, or the delay is negative (EINVAL).
        ClosedError: The queue or a buffer is closed (EBADF).
        NoDeviceError: The device has no power (ENODEV).
        NotPermittedError: This is a forked child (EPERM).
        DeadlockError: The caller holds the reservation lock of a buffer (EDEADLK, and a ``ContractWarning``).
        TypeError: Something is not a target, not a fence or not an option.
        DmaBufError: An error of ``attach`` or ``map``.
    """

    owner: Engine

    def copy(self, source: Target | Sequence[Target], destination: Target | Sequence[Target], **options: Unpack[JobOptions]) -> Job:
        """Copy the source's bytes to the destination. Either may be several targets. The job's result is the number of bytes.

        Raises:
            InvalidError: The lengths differ, or the ranges overlap (EINVAL).
        """
        device = self.owner.device

        def work(job: Job) -> int:
            for address, to, length in _pairs(job.reads, job.writes):
                job.checkpoint()
                device.write(to, device.read(address, length))
                job.progress(length)
            return job.moved

        return submit_work(self.owner, self, "copy", work, _targets("copy", source), _targets("copy", destination), options, check=_fits)

    def fill(self, destination: Target | Sequence[Target], value: int = 0, **options: Unpack[JobOptions]) -> Job:
        """Set every byte of the destination to ``value``. The job's result is the number of bytes.

        Raises:
            InvalidError: The value is not a byte (EINVAL).
        """
        if not 0 <= operator.index(value) <= 255:
            raise fail(errno.EINVAL, "fill", self, "pass 0 to 255", what=f"{value} is not a byte")
        device = self.owner.device

        def work(job: Job) -> int:
            pattern = memoryview(bytes([value]) * min(CHUNK, max(length for _, length in job.writes)))
            for address, length in _chunks(job.writes):
                job.checkpoint()
                device.write(address, pattern[:length])
                job.progress(length)
            return job.moved

        return submit_work(self.owner, self, "fill", work, (), _targets("fill", destination), options)

    def checksum(self, source: Target | Sequence[Target], **options: Unpack[JobOptions]) -> Job:
        """Compute the CRC-32 (``zlib.crc32``) of the source's bytes, its targets one after the other. It is the job's result."""
        device = self.owner.device

        def work(job: Job) -> int:
            value = 0
            for address, length in _chunks(job.reads):
                job.checkpoint()
                value = zlib.crc32(device.read(address, length), value)
                job.progress(length)
            return value

        return submit_work(self.owner, self, "checksum", work, _targets("checksum", source), (), options)


class Engine(Importing):
    """A software DMA engine. A ``with`` block closes it at the end: it waits for the jobs or, if the block raises, cancels them.

    Args:
        device: A `Device` with the limits of the engine, or a name for one.
        domain: The domain of its buffers; None means the user's default domain.

    Raises:
        InvalidError: The name is bad (EINVAL).
    """

    driver = "dmabuf-sim"

    def __init__(self, device: Device | str = "dma", *, domain: Domain | None = None) -> None:
        super().__init__(device, domain=domain)
        self._numbers = itertools.count()

    def queue(
        self, name: str | None = None, *, timeout: float | None = None, delay: float = 0.0, bandwidth: float | None = None
    ) -> EngineQueue:
        """Return a new queue.

        Args:
            name: The name of its timeline; None means the device's name with a number.
            timeout: Seconds that a job may take once it has begun; None sets no limit.
            delay: Seconds that each job waits before its work.
            bandwidth: Bytes per second; None sets no limit.

        Raises:
            ClosedError: The engine is closed (EBADF).
            NotPermittedError: This is a forked child (EPERM).
            InvalidError: The timeout or bandwidth is not positive, the delay is negative, or the name is too long (EINVAL).
            NoSpaceError: The domain is full (ENOSPC).
        """
        self.check_usable("queue")
        name = f"{self.device.name}.{next(self._numbers)}" if name is None else name
        made = EngineQueue(self, name, timeout=timeout, delay=delay, bandwidth=bandwidth)
        self._add(made)
        return made


def _targets(operation: str, given: Target | Sequence[Target]) -> Sequence[Target]:
    found = [given] if isinstance(given, Target) else given
    if not isinstance(found, (list, tuple)):
        raise TypeError(f"{operation}: expected a DmaBuf, Attached, range of one, or a list of these, not {type(given).__name__}")
    if not found:
        raise fail(errno.EINVAL, operation, "an empty list", "name at least one buffer", what="there is no target")
    return found


def _fits(read: list[Range], written: list[Range]) -> None:
    if sum(part.length for part in read) != sum(part.length for part in written):
        raise fail(errno.EINVAL, "copy", written[0].attached, "pass ranges of one length", what="source and destination differ in length")
    for i, part in enumerate(written):
        for other in (*read, *written[:i]):
            apart = part.offset + part.length <= other.offset or other.offset + other.length <= part.offset
            if part.attached.buf == other.attached.buf and not apart:
                raise fail(errno.EINVAL, "copy", part.attached, "copy through a third buffer", what="the ranges overlap")


def _chunks(entries: Iterable[DmaEntry]) -> Iterator[tuple[int, int]]:
    for address, length in entries:
        for at in range(0, length, CHUNK):
            yield address + at, min(CHUNK, length - at)


def _pairs(sources: Iterable[DmaEntry], destinations: Iterable[DmaEntry]) -> Iterator[tuple[int, int, int]]:
    """Yield (source, destination, length) of pieces that lie in one entry on either side. Both sides have the same length."""
    to = iter(destinations)
    target, room = 0, 0
    for address, left in sources:
        while left:
            if not room:
                target, room = next(to)
            n = min(left, room, CHUNK)
            yield address, target, n
            address, left, target, room = address + n, left - n, target + n, room - n
