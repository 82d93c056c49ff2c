"""``Importing``: what every device of ours is made of: attached buffers, queues of jobs, a janitor, power, and an end.

A target of a job is a ``DmaBuf``, a ``BufferRange`` of one, an ``Attached`` or a ``Range`` of one. A buffer is attached for the one job and
given back by the janitor when it has ended: attach it yourself if it is used often. Call the methods without a reservation lock of the
buffers held.

*Power.* ``power_off()`` ends everything pending with -ENODEV, in its turn, and returns when nothing is left; what is submitted then is
ENODEV until ``power_on()``. Mappings stay.

*The end.* ``close()`` waits for the jobs, or cancels them, and detaches what is attached. Who forgets to close has it cancelled at the end
of the interpreter: every fence ends. In a forked child the device is inert.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from dmabuf.core.access.range import BufferRange
from dmabuf.core.base.usage import Direction
from dmabuf.core.dma_buf import DmaBuf
from dmabuf.core.memory.device import Device, DeviceStatistics
from dmabuf.devices.attached import Attached, Range
from dmabuf.devices.power import Powered
from dmabuf.devices.queue import Job, JobOptions, Queue, QueueStatistics
from dmabuf.devices.submission import checked_wait, submit
from dmabuf.domain.domain import Domain
from dmabuf.errors import contract_warning, fail

Target = DmaBuf | BufferRange | Attached | Range


@dataclass(frozen=True)
class ImportingStatistics:
    """What a device of ours says of itself. ``attached``: buffers attached now, those of jobs that have just ended included."""

    device: DeviceStatistics
    attached: int
    powered: bool
    queues: tuple[QueueStatistics, ...]


class Importing(Powered):
    """Base class of devices that are importers. ``device``: what its buffers are mapped for, or its name."""

    def __init__(self, device: Device | str, *, domain: Domain | None = None) -> None:
        if isinstance(device, str):
            device = Device(device)
        if not isinstance(device, Device):
            raise TypeError(f"{type(self).__name__}: a dmabuf.Device or a name, not {type(device).__name__}")
        super().__init__(device, domain or Domain.default())
        self._queues: list[Queue] = []
        self._attached: dict[Attached, None] = {}
        self._over = False
        self._changing = threading.Lock()
        me = weakref.ref(self)
        self._exit = lambda: _at_exit(me)
        self._finalizer: Any = None
        atexit.register(self._exit)
        if "multiprocessing.util" in sys.modules:  # its children end by os._exit; before the domain is left, which ends our fences
            from multiprocessing import util

            self._finalizer = util.Finalize(None, self._exit, exitpriority=-900)

    def __repr__(self) -> str:
        return f"<dmabuf {type(self).__name__} {self.device.name}{' closed' if self.closed else '' if self.powered else ' without power'}>"

    # ---- buffers ----

    def attach(self, buf: DmaBuf, *, direction: int = Direction.BIDIRECTIONAL, dynamic: bool | None = None) -> Attached:
        """Attach a buffer, to be used by many jobs; detach it, or close the device.

        ``direction``: what the device may do: TO_DEVICE read, FROM_DEVICE write, BIDIRECTIONAL both; a job that does otherwise faults.
        ``dynamic``: attach as a dynamic importer, which hears of moves; None: as the exporter is. Errors: those of ``DmaBuf.attach`` and,
        at the first job, of ``map``; EINVAL no direction, or NONE; EXDEV a buffer of another domain; EBADF; EPERM in a forked child.
        """
        self.check_usable("attach")
        if not isinstance(buf, DmaBuf):
            raise TypeError(f"attach: a DmaBuf, not {type(buf).__name__}")
        if buf.domain is not self.domain:
            raise fail(
                errno.EXDEV, "attach", buf, "make the device in the buffer's domain (domain=)", what="the buffer is of another domain"
            )
        made = Attached(buf, self.device, self.janitor, direction, dynamic, forget=self._detached)
        with self._changing:
            late = self.closed
            if not late:
                self._attached[made] = None
        if late:  # closed by another thread meanwhile
            made.detach()
            self.check_usable("attach")
        return made

    def _detached(self, attached: Attached) -> None:
        with self._changing:
            self._attached.pop(attached, None)

    # ---- jobs ----

    def _add(self, queue: Queue) -> None:
        with self._changing:
            self._queues = [known for known in self._queues if not known.closed]
            self._queues.append(queue)

    # ---- power ----

    def power_off(self) -> None:
        """Lose power: what is pending ends with -ENODEV; returns when all of it has. Again: nothing."""
        self.check_usable("power_off")
        self.lose_power()
        for queue in list(self._queues):
            queue.wake()
        for queue in list(self._queues):
            queue.drain()

    def power_on(self) -> None:
        """Get power again. Again: nothing."""
        self.check_usable("power_on")
        self.regain_power()

    # ---- the end ----

    def close(self, *, cancel: bool = False) -> None:
        """Wait for every job, detach every buffer, stop. ``cancel``: end the jobs with -ECANCELED instead of waiting. Again: nothing.

        Without ``cancel`` it waits as long as the jobs' dependencies take. In a forked child: nothing. Errors: ``ContractWarning`` and
        EDEADLK the reservation lock of a buffer is held; what an exporter's ops raise, after everything is detached.
        """
        if self._over or self.inherited:
            return
        for attached in list(self._attached):
            if attached.resv.held_here():
                contract_warning(f"close: {self!r}: the reservation lock of {attached.buf!r} is held by this thread or task", 2)
                raise fail(errno.EDEADLK, "close", self, "unlock the reservation object first")
        with self._changing:
            self.closed = True
        # A signal handler that raises in one of the waits leaves the rest to the next close().
        for queue in list(self._queues):
            queue.close(cancel=cancel)
        self.janitor.close()  # detaching does what is left
        with contextlib.ExitStack() as all_of_them:
            for attached in list(self._attached):
                all_of_them.callback(attached.detach)
        self._over = True
        atexit.unregister(self._exit)
        if self._finalizer is not None:
            self._finalizer.cancel()

    def stop(self) -> None:
        """At the end of the interpreter: every fence ends, no thread is left. Nothing is detached any more."""
        if self._over or self.inherited:
            return
        self.closed = self._over = True
        for queue in list(self._queues):
            queue.close(cancel=True)
        self.janitor.stop(1.0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(cancel=kind is not None)

    def statistics(self) -> ImportingStatistics:
        """A snapshot for programs."""
        queues = tuple(queue.statistics() for queue in list(self._queues))
        return ImportingStatistics(self.device.statistics(), len(self._attached), self.powered, queues)


def submit_work(
    device: Importing,
    queue: Queue,
    operation: str,
    work: Callable[[Job], Any],
    reads: Sequence[Target],
    writes: Sequence[Target],
    options: JobOptions,
    *,
    within: tuple[int, int | None] = (0, None),
    check: Callable[[list[Range], list[Range]], object] | None = None,
) -> Job:
    """Queue ``work`` on these targets, whose addresses it finds in ``job.reads`` and ``job.writes``.

    ``within``: which bytes (offset, length) of each target. ``check`` may refuse the ranges.

    Errors, with nothing added: EBADF the queue or a buffer is closed; ENODEV no power; EPERM in a forked child; EINVAL an attachment
    of another device, a negative delay; TypeError something that is no target, no fence, or no option; those of :meth:`attach`, of
    ``map`` and of ``dmabuf.devices.submission.submit``.
    """
    unknown = options.keys() - JobOptions.__annotations__
    if unknown:
        raise TypeError(f"{operation}: got an unexpected keyword argument {min(unknown)!r}")
    fences = checked_wait(options.get("wait", ()))
    queue.check(operation)
    job = Job(queue, operation, work, options.get("delay"), options.get("hang", False))
    try:
        read = [_range(device, job, target, Direction.TO_DEVICE).range(*within) for target in reads]
        written = [_range(device, job, target, Direction.FROM_DEVICE).range(*within) for target in writes]
        if check is not None:
            check(read, written)
        for part in (*read, *written):
            part.attached.prepare()
        resvs = {part.attached.resv: False for part in read} | {part.attached.resv: True for part in written}

        def prepare() -> None:
            for part in read:
                job.enter(part, False)
            for part in written:
                job.enter(part, True)

        submit(queue, job, resvs, prepare, wait=fences, implicit=options.get("implicit", True))
    except BaseException:
        if not job.placed:
            for attached in job.temporary:
                attached.detach()
        raise
    return job


def _range(device: Importing, job: Job, target: Target, direction: Direction) -> Range:
    if isinstance(target, (DmaBuf, BufferRange)):
        buf, *within = (target,) if isinstance(target, DmaBuf) else (target.buf, target.offset, target.length)
        attached = device.attach(buf, direction=direction)
        job.temporary.append(attached)
        return attached.range(*within)
    part = target.range() if isinstance(target, Attached) else target
    if not isinstance(part, Range):
        raise TypeError(f"{job.operation}: a DmaBuf, an attached buffer, or a range of one, not {type(target).__name__}")
    if part.attached.janitor is not device.janitor:
        raise fail(errno.EINVAL, job.operation, part.attached, "attach the buffer to this device", what="it is attached to another device")
    return part


def _at_exit(ref: weakref.ref[Importing]) -> None:
    device = ref()
    if device is not None:
        device.stop()
