"""``Job`` and ``Queue``: work that a device does later, each with a fence that always ends.

A queue has a thread, which does one job after the other. An *ordered* queue does them in the order of submission and has one timeline. A
job whose dependencies are pending delays the jobs behind it, as on hardware. In an unordered queue the first job that is ready comes next,
and each job has its own timeline, because a later fence of one timeline stands for the earlier ones.

A job's fence is signaled without error, or with a negative errno: -EFAULT for an address that is not mapped, -ETIME for the queue's
timeout, -ENODEV if the device lost its power, -ECANCELED if the queue was closed, else the errno that the work raised, or -EIO if that was
not an ``OSError``. The fences are signaled in the order of the queue, and only when the device no longer touches the memory. A failed
dependency does not fail a job.

The thread never takes a reservation lock, so a process that holds one can wait for a fence. In a forked child a queue is inert (EPERM).
"""

from __future__ import annotations

import contextlib
import copy
import errno
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypedDict

from dmabuf._native import Bracket
from dmabuf.core.base import debug
from dmabuf.core.fence.fence import DmaFence
from dmabuf.core.fence.signalling import signalling
from dmabuf.core.fence.timeline import Timeline
from dmabuf.core.memory.scatterlist import DmaEntry
from dmabuf.core.task.owner import current
from dmabuf.devices.attached import Attached, Range
from dmabuf.devices.power import Powered
from dmabuf.domain.auto_reset_event import AutoResetEvent
from dmabuf.domain.dispatcher import alive_soon, report
from dmabuf.domain.forks import is_mine
from dmabuf.domain.latch import Latch
from dmabuf.errors import fail


class JobOptions(TypedDict, total=False):
    """The options of every job.

    ``wait``: fences that the job waits for, whatever ``implicit`` says. ``implicit=False`` opts out of implicit synchronization: the job
    waits for KERNEL fences, but not for WRITE and READ fences, and its own fence is BOOKKEEP. ``delay``: seconds that the job waits before
    its work, None for the queue's delay. ``hang=True``: the job never does its work.
    """

    wait: Iterable[DmaFence]
    implicit: bool
    delay: float | None
    hang: bool


class Job:
    """Work that a device will do, made by the methods of the device. ``await job``, or :meth:`wait`, returns its result.

    ``fence``: is signaled when the job ends. ``operation``: the method that made it. ``moved``: the bytes that it has moved so far.
    ``note``: how the device did it, if there is something to say, else None.
    """

    def __init__(self, queue: Queue, operation: str, work: Callable[[Job], Any], delay: float | None, hang: bool) -> None:
        self.queue, self.operation, self._work = queue, operation, work
        self._delay, self._hang = queue.delay if delay is None else checked_delay(delay, operation), hang
        self.fence: DmaFence
        self.dependencies: list[DmaFence] = []
        self.reads: list[DmaEntry] = []  # the addresses of what it reads, and writes
        self.writes: list[DmaEntry] = []
        self.moved = 0
        self.note: str | None = None
        self.placed = self.canceled = False
        self.epoch = 0
        self.temporary: list[Attached] = []  # attached for this job only
        self._uses: list[tuple[Attached, object, bool]] = []
        self._tokens: list[tuple[DmaFence, int]] = []
        self._until = self._begun = 0
        self._unready: BaseException | None = None  # what the check of its dependencies raised
        self._result: Any = None
        self._failure: OSError | None = None

    def __repr__(self) -> str:
        fence = getattr(self, "fence", None)
        return f"<dmabuf Job {self.operation} on {self.queue.name}{'' if fence is None else f' {fence.context}:{fence.seqno}'}>"

    # ---- for the submitter ----

    @property
    def done(self) -> bool:
        """Whether the job has ended."""
        return self.fence.is_signaled()

    def wait(self, timeout: float | None = None) -> Any:
        """Wait until the job ends, and return its result.

        Args:
            timeout: Seconds to wait; None waits forever.

        Raises:
            DmaBufTimeout: The job did not end in time (ETIMEDOUT).
            DeadlockError: The job waits for the end of an access of this thread or task (EDEADLK).
            OSError: The error with which the job ended.
        """
        self._check_own_accesses()
        if not self.fence.wait(timeout) and not self.fence.is_signaled():
            what = None if timeout is None else f"timed out after {timeout} s"
            raise fail(errno.ETIMEDOUT, self.operation, self, "run `dmabuf ls` to see what blocks its buffers", what=what)
        return self._outcome()

    def __await__(self) -> Generator[Any, None, Any]:
        """Wait for the job in a coroutine. If the wait is canceled, nothing stays registered, and the job goes on."""
        self._check_own_accesses()
        yield from self.fence.__await__()
        return self._outcome()

    def _check_own_accesses(self) -> None:
        """Raise DeadlockError if the job waits for the end of an access block of the caller, who would wait forever (EDEADLK)."""
        shm, word = self.fence.shm, current(self.fence.domain).word
        for fence in self.queue.blocking(self):
            info = shm.fence_info(fence.handle) if fence.shm is shm else None
            if info is not None and info["pending"] and info["owner"] == word:
                raise fail(
                    errno.EDEADLK,
                    self.operation,
                    self,
                    "leave the read() or write() block first",
                    what="the job waits for the end of an access of this thread or task",
                )

    def _outcome(self) -> Any:
        if self._failure is not None:
            raise copy.copy(self._failure)  # each waiter gets its own copy, because a traceback keeps the objects of its frames
        status = self.fence.status
        if status < 0:
            raise fail(-status, self.operation, self)
        return self._result

    # ---- for the work, in the queue's thread ----

    def checkpoint(self) -> None:
        """Raise the error with which the job must end now, if any. The work calls it often.

        Raises:
            CanceledError: The queue is closed (ECANCELED).
            NoDeviceError: The device has lost its power since the submission (ENODEV).
            DmaBufTimeout: The queue's timeout for a job is over (ETIME).
        """
        if self.canceled or self.queue.canceling:
            raise fail(errno.ECANCELED, self.operation, self, "submit it to another queue", what="its queue was closed")
        if self.epoch != self.queue.owner.epoch:
            raise fail(errno.ENODEV, self.operation, self, "submit it again after power_on()", what="the device lost its power")
        if self._until and time.monotonic_ns() >= self._until:
            raise fail(
                errno.ETIME, self.operation, self, "raise the queue's timeout, or do less in a job", what="not done within the timeout"
            )

    def pause(self, until: int | None) -> None:
        """Wait until a CLOCK_MONOTONIC time in ns, None: forever. Raise what :meth:`checkpoint` raises as soon as the job must end."""
        while True:
            self.checkpoint()
            ends = [end for end in (until, self._until or None) if end is not None]
            left = min(ends) - time.monotonic_ns() if ends else None
            if until is not None and time.monotonic_ns() >= until:
                return
            self.queue.sleep(None if left is None else max(left, 0) / 1e9)

    def progress(self, n: int) -> None:
        """Count ``n`` more bytes as moved, and wait as long as the queue's bandwidth demands. Raise what :meth:`checkpoint` raises."""
        self.moved += n
        if self.queue.bandwidth is not None:
            self.pause(self._begun + int(self.moved / self.queue.bandwidth * 1e9))
        self.checkpoint()

    # ---- for the queue ----

    def enter(self, part: Range, write: bool) -> None:
        """Use a range of a buffer, whose reservation lock is held."""
        addresses = part.attached.enter(self, part.offset, part.length, lambda use: self._uses.append((part.attached, use, write)))
        (self.writes if write else self.reads).extend(addresses)

    def uses(self) -> dict[Attached, bool]:
        """Return the buffers that it uses, True for those that it writes."""
        found: dict[Attached, bool] = {}
        for attached, _, write in self._uses:
            found[attached] = write or found.get(attached, False)
        return found

    def leave(self) -> None:
        """Stop using its buffers."""
        while self._uses:
            attached, use, _ = self._uses[-1]
            attached.leave(self, use)
            del self._uses[-1:]

    def must_end(self) -> bool:
        """Return True if the job ends with an error, whatever it waits for."""
        return self.canceled or self.queue.canceling or self.epoch != self.queue.owner.epoch

    def ready(self) -> bool:
        """Return True if no dependency is pending. The queue is woken when that may have changed."""
        if not self._tokens:
            for fence in self.dependencies:
                with contextlib.suppress(FileNotFoundError):  # it is signaled
                    self._tokens.append((fence, fence.add_callback(self.queue.wake)))
        self.dependencies = [fence for fence in self.dependencies if not fence.is_signaled()]
        return not self.dependencies

    def can_run(self) -> bool:
        """Return True if no dependency is pending, or the check fails: then the job fails, and the queue goes on."""
        try:
            return self.ready()
        except BaseException as e:
            self._unready = e
            return True

    def run(self) -> None:
        """Do the work, and signal the fence."""
        tokens, self._tokens = self._tokens, []
        for fence, token in tokens:
            try:
                fence.remove_callback(token)
            except Exception as e:
                report(e, self._work)
        self.dependencies = []
        error = 0
        try:
            with signalling() if debug.enabled else contextlib.nullcontext():
                self.checkpoint()
                if self._unready is not None:
                    raise self._unready
                self._begun = time.monotonic_ns()
                if self.queue.timeout is not None:
                    self._until = self._begun + int(self.queue.timeout * 1e9)
                if self._delay:
                    self.pause(self._begun + int(self._delay * 1e9))
                if self._hang:
                    self.pause(None)
                with contextlib.ExitStack() as brackets:
                    for attached, write in self.uses().items():
                        brackets.enter_context(attached.bracket(write))
                    self._result = self._work(self)
        except OSError as e:
            error, self._failure = e.errno or errno.EIO, e
        except BaseException as e:
            report(e, self._work)
            error = errno.EIO
            self._failure = fail(errno.EIO, self.operation, self, what=f"the device has a bug: {e!r}")
        if self._failure is not None:
            self._failure.__traceback__ = self._failure.__context__ = None  # they would keep frames, and the frames memory
        del self._work
        try:
            self.queue.ended(self, error)
            self.leave()
            temporary, self.temporary = self.temporary, []
            for attached in temporary:
                attached.janitor.later(attached.detach)
        finally:
            self.fence.signal(-error)


@dataclass(frozen=True)
class QueueStatistics:
    """The state of a queue.

    ``pending``: jobs that have not ended. ``completed`` and ``failed``: jobs that ended without and with an error. ``resets``: failed jobs
    that reached the timeout. ``bytes``: moved so far.
    """

    name: str
    pending: int
    completed: int
    failed: int
    resets: int
    bytes: int


class Queue:
    """Jobs that a device does one after the other. A ``with`` block closes it at the end.

    Args:
        owner: The device.
        name: The name of its timeline.
        ordered: Whether jobs are done in the order of submission.
        timeout: Seconds that a job may take once it has begun; None sets no limit.
        delay: Seconds that each job waits before its work.
        bandwidth: Bytes per second; None sets no limit.

    Raises:
        InvalidError: The timeout or bandwidth is not positive, the delay is negative, or the name is too long (EINVAL).
    """

    def __init__(
        self,
        owner: Powered,
        name: str,
        *,
        ordered: bool = True,
        timeout: float | None = None,
        delay: float = 0.0,
        bandwidth: float | None = None,
    ) -> None:
        if timeout is not None and not timeout > 0:
            raise fail(errno.EINVAL, "queue", name, "pass seconds > 0, or None", what=f"timeout={timeout} is not positive")
        if bandwidth is not None and not bandwidth > 0:
            raise fail(errno.EINVAL, "queue", name, "pass bytes per second > 0, or None", what=f"bandwidth={bandwidth} is not positive")
        self.owner, self.name, self.ordered = owner, name, ordered
        self.timeout, self.delay, self.bandwidth = timeout, checked_delay(delay, name), bandwidth
        self._timeline = self._new_timeline()
        self._life = owner.domain.shm.life
        self._jobs: deque[Job] = deque()
        # Fences get their numbers in the order in which jobs are queued. Re-entrant, so that a signal handler that submits in the middle is
        # refused, and doesn't wait for its own thread.
        self._order = threading.RLock()
        self._placing: Job | None = None  # the last of the jobs, while its submission goes on
        self._event = AutoResetEvent()  # may be set by the garbage collector
        self._thread: threading.Thread | None = None
        self._served = Latch()  # the thread has ended its last job
        self.closed = self.canceling = False
        self._completed = self._failed = self._resets = self._bytes = 0

    def __repr__(self) -> str:
        return f"<dmabuf Queue {self.name} {len(self._jobs)} pending{' closed' if self.closed else ''}>"

    def _new_timeline(self) -> Timeline:
        return Timeline(self.name, driver=self.owner.driver, domain=self.owner.domain)

    @property
    def inherited(self) -> bool:
        """Whether this is the copy of a forked child, which does nothing."""
        return self.owner.domain.shm.life != self._life

    def check(self, operation: str) -> None:
        """Check that the queue takes jobs.

        Raises:
            NotPermittedError: This process is a forked child, and the queue is its parent's (EPERM).
            ClosedError: The queue or its device is closed (EBADF).
            NoDeviceError: The device has no power (ENODEV).
        """
        if self.inherited:
            raise fail(errno.EPERM, operation, self, "make a device in this process", what="a forked child can't use its parent's queue")
        if self.closed or self.owner.closed:
            raise fail(errno.EBADF, operation, self, "make a new one", what="the queue is closed")
        if not self.owner.powered:
            raise fail(errno.ENODEV, operation, self, "call power_on() first", what="the device has no power")

    def placing(self, job: Job) -> AbstractContextManager[DmaFence]:
        """Queue a job for a block, which gets its fence. The job begins after the block.

        It ends in its turn with ECANCELED, unless the block sets ``job.canceled`` to False as its last act.

        Raises:
            DmaBufError: The queue takes no jobs, see :meth:`check`.
            DeadlockError: This thread is in the middle of submitting to the queue (EDEADLK).
            NoSpaceError: The domain has no fence left (ENOSPC).
            RuntimeError: Python can't start a thread.
        """
        return _Placing(self, job)

    def _place(self, job: Job) -> DmaFence:
        """Queue a job. The order is held."""
        if self._placing is not None:
            remedy = "don't submit to it in a signal handler or a finalizer"
            raise fail(errno.EDEADLK, job.operation, self, remedy, what="this thread is in the middle of submitting to the queue")
        job.epoch = self.owner.epoch  # before the check of the power, so that a loss in between ends the job
        self.check(job.operation)
        if self._thread is None:
            self._start()
        job.fence = (self._timeline if self.ordered else self._new_timeline()).fence()
        job.canceled = True
        self._placing = job
        self._jobs.append(job)
        return job.fence

    def _placed(self, job: Job) -> None:
        """Let a job begin that was queued, if it was. The order is held."""
        if self._placing is not job:
            return
        if self._jobs and self._jobs[-1] is job:
            job.placed = True
            self.wake()
        self._placing = None

    def _start(self) -> None:
        thread = threading.Thread(target=self._serve, name=f"dmabuf-{self.name}", daemon=True)
        try:
            thread.start()
        except BaseException as e:
            if not isinstance(e, RuntimeError) and alive_soon(thread):  # a signal handler raised
                self._thread = thread
            raise
        self._thread = thread

    # ---- the thread ----

    def wake(self, _: object = None) -> None:
        """Have the thread check its jobs again, because something has changed."""
        self._event.set()

    def sleep(self, seconds: float | None) -> None:
        """Wait until the queue is woken, or so long."""
        self._event.wait(seconds)

    def blocking(self, job: Job) -> list[DmaFence]:
        """Return the fences that a job waits for. In an ordered queue that includes those of the jobs before it."""
        found: list[DmaFence] = []
        for before in list(self._jobs):
            if before is job or self.ordered:
                found += before.dependencies
            if before is job:
                return found
        return []  # it has ended

    def _next(self) -> Job | None:
        for job in list(self._jobs):
            if job.placed and (job.must_end() or job.can_run()):
                return job
            if self.ordered:
                break
        return None

    def _serve(self) -> None:
        while True:
            job = self._next()
            if job is not None:
                job.run()
            elif self.closed and not self._jobs:
                self._served.set()
                return
            else:
                self.sleep(None)

    def ended(self, job: Job, error: int) -> None:
        """Count a job as ended; its fence is signaled next."""
        self._jobs.remove(job)
        self._bytes += job.moved
        self._completed += not error
        self._failed += error != 0
        self._resets += error == errno.ETIME

    # ---- the end ----

    def drain(self) -> None:
        """Wait until every job submitted so far has ended. In a forked child this has no effect.

        Raises:
            DeadlockError: The caller is a callback of a job's fence, which the queue's own thread runs (EDEADLK).
        """
        if self.inherited:
            return
        if threading.current_thread() is self._thread:
            what = "a callback of a job would wait for the thread that runs it"
            raise fail(errno.EDEADLK, "drain", self, "wait in another thread", what=what)
        with self._order:  # a job that is being submitted counts
            jobs = list(self._jobs)
        for job in jobs:
            job.fence.wait()

    def close(self, *, cancel: bool = False) -> None:
        """Accept no more jobs, and wait until those submitted have ended. In a forked child, and when called twice, this has no effect.

        Args:
            cancel: End the jobs with -ECANCELED instead, the running one as soon as it can stop.
        """
        if self.inherited:
            return
        with self._order:
            self.closed = True
            self.canceling = self.canceling or cancel
        thread = self._thread
        self.wake()
        if thread is not None and thread is not threading.current_thread():
            self._served.wait()  # not join(): up to Python 3.12, a join() that a signal handler ends takes the thread for ended
            thread.join()
            self._thread = None
        self._timeline.close()

    def __enter__(self) -> Queue:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(cancel=kind is not None)

    def statistics(self) -> QueueStatistics:
        """Return the queue's counters at this moment."""
        return QueueStatistics(self.name, len(self._jobs), self._completed, self._failed, self._resets, self._bytes)


class _Placing(Bracket):
    """The block of ``placing``."""

    __slots__ = ("_job", "_nested", "_queue")

    def __init__(self, queue: Queue, job: Job) -> None:
        self._queue, self._job = queue, job
        self._nested: bool | None = None  # whether this thread held the order before, in the middle of another call; None before that

    def enter(self) -> DmaFence:
        """Take the order, and queue the job."""
        order = self._queue._order
        self._nested = is_mine(order)
        if not self._nested:
            order.acquire()
        return self._queue._place(self._job)

    def leave(self) -> None:
        """Let the job begin, and release the order."""
        order = self._queue._order
        if self._nested is None or not is_mine(order):
            return
        self._queue._placed(self._job)
        if not self._nested:
            order.release()


def checked_delay(delay: float, obj: object) -> float:
    """Return the delay. Raise InvalidError if it is negative or a NaN (EINVAL)."""
    if not delay >= 0:
        raise fail(errno.EINVAL, "queue", obj, "pass seconds >= 0", what=f"delay={delay} is negative or not a number")
    return delay
