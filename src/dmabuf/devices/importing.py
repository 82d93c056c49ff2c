"""``Importing``: the base of this library's devices: attached buffers, queues of jobs, a janitor, power, and an end.

The target of a job is a ``DmaBuf``, a ``BufferRange`` of one, an ``Attached`` or a ``Range`` of one. A buffer is attached for one job, and
the janitor detaches it when the job has ended. Attach a buffer yourself if you use it often. Call the methods without a reservation lock of
the buffers.

*Power.* ``power_off()`` ends every pending job with -ENODEV, in its turn, and returns when none is left. From then on submitting is ENODEV
until ``power_on()``. Mappings stay.

*The end.* ``close()`` waits for the jobs, or cancels them, and detaches what is attached. At the end of the interpreter a device that was
not closed cancels its jobs, so that every fence is signaled. In a forked child the device is inert.
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
    """The state of a device. ``attached``: buffers attached now, including those of jobs that have just ended."""

    device: DeviceStatistics
    attached: int
    powered: bool
    queues: tuple[QueueStatistics, ...]


class Importing(Powered):
    """A device that imports buffers. ``device``: the `Device` that its buffers are mapped for, or its name."""

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
        # Children of multiprocessing end with os._exit. This comes before they leave the domain, which signals the fences.
        if "multiprocessing.util" in sys.modules:
            from multiprocessing import util

            self._finalizer = util.Finalize(None, self._exit, exitpriority=-900)

    def __repr__(self) -> str:
        return f"<dmabuf {type(self).__name__} {self.device.name}{' closed' if self.closed else '' if self.powered else ' without power'}>"

    # ---- buffers ----

    def attach(self, buf: DmaBuf, *, direction: int = Direction.BIDIRECTIONAL, dynamic: bool | None = None) -> Attached:
        """Attach a buffer for many jobs. Detach it, or close the device, at the end.

        Args:
            buf: The buffer.
            direction: What the device may do: TO_DEVICE to read, FROM_DEVICE to write, BIDIRECTIONAL for both. A job that does something
                else faults.
            dynamic: Whether to attach as a dynamic importer, which is notified of moves; None does as the exporter does.

        Raises:
            InvalidError: The direction is NONE or unknown (EINVAL).
            CrossDomainError: The buffer belongs to another domain (EXDEV).
            ClosedError: The buffer or the device is closed (EBADF).
            NotPermittedError: This is a forked child (EPERM).
            DmaBufError: An error of ``DmaBuf.attach``. Errors of ``map`` come with the first job.
        """
        self.check_usable("attach")
        if not isinstance(buf, DmaBuf):
            raise TypeError(f"attach: a DmaBuf, not {type(buf).__name__}")
        if buf.domain is not self.domain:
            raise fail(errno.EXDEV, "attach", buf, "make the device with domain=buf.domain", what="the buffer belongs to another domain")
        made = Attached.__new__(Attached)
        try:
            made.__init__(buf, self.device, self.janitor, direction, dynamic, forget=self._detached)  # type: ignore[misc]
            with self._changing:
                late = self.closed
                if not late:
                    self._attached[made] = None
        except BaseException:
            if hasattr(made, "_attachment"):  # a signal handler raised after the last step
                made.detach()
            raise
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
        """Lose power: end every pending job with -ENODEV, and wait for that. Calling it twice has no effect."""
        self.check_usable("power_off")
        self.lose_power()
        for queue in list(self._queues):
            queue.wake()
        for queue in list(self._queues):
            queue.drain()

    def power_on(self) -> None:
        """Get power again. Calling it twice has no effect."""
        self.check_usable("power_on")
        self.regain_power()

    # ---- the end ----

    def close(self, *, cancel: bool = False) -> None:
        """Wait for every job, detach every buffer, and stop. In a forked child, and when called twice, this has no effect.

        Args:
            cancel: End the jobs with -ECANCELED. Without it, the call waits as long as the jobs' dependencies take.

        Raises:
            DeadlockError: The caller holds the reservation lock of a buffer (EDEADLK, and a ``ContractWarning``).
            OSError: An op of an exporter raised. Everything is detached all the same.
        """
        if self._over or self.inherited:
            return
        for attached in list(self._attached):
            if attached.resv.held_here():
                contract_warning(f"close: {self!r}: this thread or task holds the reservation lock of {attached.buf!r}", 2)
                what = "this thread or task holds the reservation lock of a buffer"
                raise fail(errno.EDEADLK, "close", self, "unlock the reservation object first", what=what)
        with self._changing:
            self.closed = True
        # If a signal handler raises in one of the waits, the next close() does the rest.
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
        """At the end of the interpreter, end every job and every thread. Nothing is detached."""
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
        """Return the device's state at this moment."""
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
    """Queue ``work`` on some targets. It finds their addresses in ``job.reads`` and ``job.writes``.

    ``within``: the bytes (offset, length) of each target. ``check`` may refuse the ranges. After an error nothing is added.

    Raises:
        ClosedError: The queue or a buffer is closed (EBADF).
        NoDeviceError: The device has no power (ENODEV).
        NotPermittedError: This process is a forked child, and the queue is its parent's (EPERM).
        InvalidError: An attachment is of another device, or a delay is negative (EINVAL).
        TypeError: Something is not a target, a fence or an option.
        DmaBufError: ``attach``, ``map`` or `submission.submit` failed.
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
        raise TypeError(f"{job.operation}: expected a DmaBuf, an attached buffer, or a range of one, not {type(target).__name__}")
    if part.attached.janitor is not device.janitor:
        raise fail(errno.EINVAL, job.operation, part.attached, "attach the buffer to this device", what="it is attached to another device")
    return part


def _at_exit(ref: weakref.ref[Importing]) -> None:
    device = ref()
    if device is not None:
        device.stop()
