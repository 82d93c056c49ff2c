"""``dmabuf.sim``: a software DMA engine: an asynchronous device that copies, fills and checksums (semantics 4.11).

    with dmabuf.sim.Engine("dma0") as engine:
        queue = engine.queue(timeout=1.0)
        job = queue.copy(source, destination)      # at once: the work is done later, by the queue's thread
        job.fence                                  # on both buffers' reservation objects; any process can wait for it
        job.wait()                                 # or `await job`: bytes moved

It touches memory by DMA address alone, through the IOMMU of its ``device``, in pieces of at most 256 KiB; what is not mapped faults, and
the job's fence ends with -EFAULT. Jobs are ordered with those of other devices and processes, and with CPU accesses, by implicit
synchronisation (see ``dmabuf.devices.submission``), by explicit fences (``wait=``), and, within a queue, by their submission. Queues run
side by side.

*Misbehaving on purpose*, for tests of programs: a queue can be slow (``delay``, ``bandwidth``); a job can hang (``hang=True``) until the
queue's ``timeout`` ends it with -ETIME and the queue goes on with the next; the engine can lose power (``power_off()``). What a failed
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

CHUNK = 256 * 1024  # bytes: small enough to stop at soon, large enough that the look-up of the address costs nothing


class EngineQueue(Queue):
    """A queue of an :class:`Engine`, made by :meth:`Engine.queue`.

    Every job takes the options of ``JobOptions`` (``wait``, ``implicit``, ``delay``, ``hang``). Errors of every job, at once and with
    nothing added: EINVAL no target, an attachment of another device, a negative delay; EBADF the queue or a buffer is closed; ENODEV no
    power; EPERM in a forked child; TypeError something that is no target, no fence or no option; those of ``attach`` and ``map``;
    ``ContractWarning`` and EDEADLK the reservation lock of a buffer is held. Later, by its fence: see ``dmabuf.devices.queue``.
    """

    owner: Engine

    def copy(self, source: Target | Sequence[Target], destination: Target | Sequence[Target], **options: Unpack[JobOptions]) -> Job:
        """Copy the source's bytes to the destination; the result: how many. Either may be several targets.

        Errors besides those of every job: EINVAL lengths that differ, ranges that overlap.
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
        """Set every byte of the destination to ``value``; the result: how many. Errors besides those of every job: EINVAL no byte."""
        if not 0 <= operator.index(value) <= 255:
            raise fail(errno.EINVAL, "fill", self, "a byte is 0 to 255")
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
        """The CRC-32 (``zlib.crc32``) of the source's bytes, its targets one after the other, is the result."""
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
    """A software DMA engine. ``device``: a ``Device`` with the limits it shall have, or the name of one.

    ``with`` closes it at the end: waits for its jobs, or, left by an exception, cancels them. Errors: EINVAL a bad name.
    """

    driver = "dmabuf-sim"

    def __init__(self, device: Device | str = "dma", *, domain: Domain | None = None) -> None:
        super().__init__(device, domain=domain)
        self._numbers = itertools.count()

    def queue(
        self, name: str | None = None, *, timeout: float | None = None, delay: float = 0.0, bandwidth: float | None = None
    ) -> EngineQueue:
        """Another queue. ``name``: of its timeline, None: the device's with a number. The rest: see ``dmabuf.devices.queue.Queue``.

        Errors: EBADF closed; EPERM in a forked child; EINVAL, as there; ENOSPC the domain is full.
        """
        self.check_usable("queue")
        name = f"{self.device.name}.{next(self._numbers)}" if name is None else name
        made = EngineQueue(self, name, timeout=timeout, delay=delay, bandwidth=bandwidth)
        self._add(made)
        return made


def _targets(operation: str, given: Target | Sequence[Target]) -> Sequence[Target]:
    found = [given] if isinstance(given, Target) else given
    if not isinstance(found, (list, tuple)):
        raise TypeError(f"{operation}: a DmaBuf, an attached buffer, a range of one, or a list of these, not {type(given).__name__}")
    if not found:
        raise fail(errno.EINVAL, operation, "no buffer", "name at least one")
    return found


def _fits(read: list[Range], written: list[Range]) -> None:
    if sum(part.length for part in read) != sum(part.length for part in written):
        raise fail(errno.EINVAL, "copy", written[0].attached, "name ranges of one length", what="source and destination differ in length")
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
    """(source, destination, length) of pieces that lie in one entry on either side, which are as long as each other altogether."""
    to = iter(destinations)
    target, room = 0, 0
    for address, left in sources:
        while left:
            if not room:
                target, room = next(to)
            n = min(left, room, CHUNK)
            yield address, target, n
            address, left, target, room = address + n, left - n, target + n, room - n
