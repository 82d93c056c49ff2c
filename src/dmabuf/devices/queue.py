"""``Job`` and ``Queue``: work that a device does later, each with a fence that always ends.

A queue has a thread, which does one job after the other. An *ordered* queue does them in the order of submission and has one timeline; a
job whose dependencies are pending holds up those behind it, as on hardware. Otherwise whichever is ready comes first, and each job has
a timeline of its own (a later fence of one timeline stands for the earlier ones).

A job's fence ends without error, or with the negative errno of what went wrong: -EFAULT an address that is not mapped, -ETIME the queue's
timeout, -ENODEV the device lost its power, -ECANCELED the queue was closed, else what the work raised, -EIO if that was no ``OSError``. It
ends in its turn, and only when the device no longer touches the memory. A failed dependency does not fail a job.

The thread never takes a reservation lock, so whoever waits for a fence with one held gets it. In a forked child a queue is inert (EPERM).
"""

from __future__ import annotations

import contextlib
import copy
import errno
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypedDict

from dmabuf.core.base import debug
from dmabuf.core.fence.fence import DmaFence
from dmabuf.core.fence.signalling import signalling
from dmabuf.core.fence.timeline import Timeline
from dmabuf.core.memory.scatterlist import DmaEntry
from dmabuf.core.task.owner import current
from dmabuf.devices.attached import Attached, Range
from dmabuf.devices.power import Powered
from dmabuf.domain.auto_reset_event import AutoResetEvent
from dmabuf.domain.dispatcher import report
from dmabuf.errors import fail


class JobOptions(TypedDict, total=False):
    """What every job can be told; the defaults are what a submission means without it.

    ``wait``: fences to wait for, whatever ``implicit`` says. ``implicit``: False opts out of implicit synchronisation: WRITE and READ
    fences are not waited for, KERNEL fences are, and the job's own fence is BOOKKEEP. ``delay``: seconds to wait before the work, None:
    the queue's. ``hang``: never do it.
    """

    wait: Iterable[DmaFence]
    implicit: bool
    delay: float | None
    hang: bool


class Job:
    """Work on its way; made by the methods of a device. ``await job``, or :meth:`wait`, gives its result.

    ``fence``: ends with it. ``done``: has ended. ``operation``: what it does. ``moved``: bytes that it has moved so far. ``note``: what
    the device has to say of how it was done, or None.
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
        self.temporary: list[Attached] = []  # attached for this job alone
        self._uses: list[tuple[Attached, object, bool]] = []
        self._tokens: list[tuple[DmaFence, int]] = []
        self._until = self._begun = 0
        self._unready: BaseException | None = None  # what looking at its dependencies raised
        self._result: Any = None
        self._failure: OSError | None = None

    def __repr__(self) -> str:
        fence = getattr(self, "fence", None)
        return f"<dmabuf Job {self.operation} on {self.queue.name}{'' if fence is None else f' {fence.context}:{fence.seqno}'}>"

    # ---- for whoever submitted it ----

    @property
    def done(self) -> bool:
        """Has it ended?"""
        return self.fence.is_signaled()

    def wait(self, timeout: float | None = None) -> Any:
        """Wait for the end; the result. ``timeout``: seconds, None for ever.

        Errors: what the job ended with; ETIMEDOUT (also ``TimeoutError``); EDEADLK it waits for an access block of this thread or task.
        """
        self._not_for_us()
        if not self.fence.wait(timeout) and not self.fence.is_signaled():
            raise fail(errno.ETIMEDOUT, self.operation, self, "`dmabuf ls` shows whose fences are in the way")
        return self._outcome()

    def __await__(self) -> Generator[Any, None, Any]:
        """:meth:`wait` in a coroutine. Cancelling leaves nothing registered; the job goes on, and its fence ends."""
        self._not_for_us()
        yield from self.fence.__await__()
        return self._outcome()

    def _not_for_us(self) -> None:
        """Who waits inside of an access block for a job that waits for the end of the block would wait for ever."""
        shm, word = self.fence.shm, current(self.fence.domain).word
        for fence in self.queue.in_the_way(self):
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
            raise copy.copy(self._failure)  # each who waits gets one of his own: a traceback keeps what its frames show
        status = self.fence.status
        if status < 0:
            raise fail(-status, self.operation, self)
        return self._result

    # ---- for the work, in the queue's thread ----

    def checkpoint(self) -> None:
        """Errors: ECANCELED, ENODEV, ETIME when the job must end now; to be called often."""
        if self.canceled or self.queue.canceling:
            raise fail(errno.ECANCELED, self.operation, self, "submit it again elsewhere", what="its queue was closed")
        if self.epoch != self.queue.owner.epoch:
            raise fail(errno.ENODEV, self.operation, self, "submit it again when the power is back", what="the device lost its power")
        if self._until and time.monotonic_ns() >= self._until:
            raise fail(
                errno.ETIME, self.operation, self, "a longer timeout= of the queue, or less work a job", what="not done within the timeout"
            )

    def pause(self, until: int | None) -> None:
        """Wait for a CLOCK_MONOTONIC time in ns, None: for ever. Errors: as :meth:`checkpoint`."""
        while True:
            self.checkpoint()
            ends = [end for end in (until, self._until or None) if end is not None]
            left = min(ends) - time.monotonic_ns() if ends else None
            if until is not None and time.monotonic_ns() >= until:
                return
            self.queue.sleep(None if left is None else max(left, 0) / 1e9)

    def progress(self, n: int) -> None:
        """Some bytes more are moved: be as slow as the queue is told to be. Errors: as :meth:`checkpoint`."""
        self.moved += n
        if self.queue.bandwidth is not None:
            self.pause(self._begun + int(self.moved / self.queue.bandwidth * 1e9))
        self.checkpoint()

    # ---- for the queue ----

    def enter(self, part: Range, write: bool) -> None:
        """Use a range of a buffer, whose reservation lock is held."""
        token, addresses = part.attached.enter(self, part.offset, part.length)
        self._uses.append((part.attached, token, write))
        (self.writes if write else self.reads).extend(addresses)

    def uses(self) -> dict[Attached, bool]:
        """The buffers that it uses, True: writes."""
        found: dict[Attached, bool] = {}
        for attached, _, write in self._uses:
            found[attached] = write or found.get(attached, False)
        return found

    def leave(self) -> None:
        """Use nothing any more."""
        uses, self._uses = self._uses, []
        for attached, token, _ in uses:
            attached.leave(self, token)

    def must_end(self) -> bool:
        """Will :meth:`checkpoint` raise, whatever it waits for?"""
        return self.canceled or self.queue.canceling or self.epoch != self.queue.owner.epoch

    def ready(self) -> bool:
        """Is nothing in the way any more? The queue is woken when that may have changed."""
        if not self._tokens:
            for fence in self.dependencies:
                with contextlib.suppress(FileNotFoundError):  # signalled
                    self._tokens.append((fence, fence.add_callback(self.queue.wake)))
        self.dependencies = [fence for fence in self.dependencies if not fence.is_signaled()]
        return not self.dependencies

    def looked(self) -> bool:
        """:meth:`ready`, or what it waits for can't be waited for: then it fails, and the queue goes on."""
        try:
            return self.ready()
        except BaseException as e:
            self._unready = e
            return True

    def run(self) -> None:
        """Do the work, and end the fence."""
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
            self._failure = fail(errno.EIO, self.operation, self, what=f"a mistake in the device: {e!r}")
        if self._failure is not None:
            self._failure.__traceback__ = self._failure.__context__ = None  # they keep frames, and these the memory
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
    """What a queue says of itself. ``pending``: jobs not ended; ``completed``, ``failed``: ended without and with an error; ``resets``: of
    the failed, those that its timeout ended; ``bytes``: moved so far."""

    name: str
    pending: int
    completed: int
    failed: int
    resets: int
    bytes: int


class Queue:
    """What a device does one after the other; ``with`` closes it at the end.

    ``name``: of its timeline. ``timeout``: seconds that a job may take once it has begun, None: any. ``delay``: seconds that each job
    waits before its work; ``bandwidth``: bytes a second, None: as fast as it goes. Errors: EINVAL a timeout or bandwidth that is not
    positive, a negative delay, a name that is too long.
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
            raise fail(errno.EINVAL, "queue", name, "a timeout is seconds > 0, or None")
        if bandwidth is not None and not bandwidth > 0:
            raise fail(errno.EINVAL, "queue", name, "a bandwidth is bytes a second > 0, or None")
        self.owner, self.name, self.ordered = owner, name, ordered
        self.timeout, self.delay, self.bandwidth = timeout, checked_delay(delay, name), bandwidth
        self._timeline = self._new_timeline()
        self._life = owner.domain.shm.life
        self._jobs: deque[Job] = deque()
        self._order = threading.Lock()  # fences are numbered as jobs are queued
        self._event = AutoResetEvent()  # may be set by the garbage collector
        self._thread: threading.Thread | None = None
        self._served = threading.Event()  # the thread has ended its last job
        self.closed = self.canceling = False
        self._completed = self._failed = self._resets = self._bytes = 0

    def __repr__(self) -> str:
        return f"<dmabuf Queue {self.name} {len(self._jobs)} pending{' closed' if self.closed else ''}>"

    def _new_timeline(self) -> Timeline:
        return Timeline(self.name, driver=self.owner.driver, domain=self.owner.domain)

    @property
    def inherited(self) -> bool:
        """Is this a forked child's copy, which does nothing?"""
        return self.owner.domain.shm.life != self._life

    def check(self, operation: str) -> None:
        """Errors: EPERM in a forked child; EBADF closed; ENODEV the device has no power."""
        if self.inherited:
            raise fail(errno.EPERM, operation, self, "what a fork inherits is inert in the child: make a device in this process")
        if self.closed or self.owner.closed:
            raise fail(errno.EBADF, operation, self, "make a new one", what="the queue is closed")
        if not self.owner.powered:
            raise fail(errno.ENODEV, operation, self, "power_on() first", what="the device has no power")

    @contextmanager
    def placing(self, job: Job) -> Iterator[DmaFence]:
        """Queue a job; its fence. It begins when the block is left; left by an exception, it ends in its turn with ECANCELED.

        Errors: as :meth:`check`; ENOSPC no fence left; RuntimeError no thread can be started.
        """
        with self._order:
            job.epoch = self.owner.epoch  # before the look at the power: who loses it in between ends the job
            self.check(job.operation)
            if self._thread is None:
                thread = threading.Thread(target=self._serve, name=f"dmabuf-{self.name}", daemon=True)
                thread.start()
                self._thread = thread
            job.fence = (self._timeline if self.ordered else self._new_timeline()).fence()
            try:
                self._jobs.append(job)
                yield job.fence
            except BaseException:
                job.canceled = True
                raise
            finally:
                job.placed = True
                self.wake()

    # ---- the thread ----

    def wake(self, _: object = None) -> None:
        """Have the thread check its jobs again, because something has changed."""
        self._event.set()

    def sleep(self, seconds: float | None) -> None:
        """Wait until the queue is woken, or so long."""
        self._event.wait(seconds)

    def in_the_way(self, job: Job) -> list[DmaFence]:
        """What a job waits for, and in an ordered queue those before it."""
        found: list[DmaFence] = []
        for before in list(self._jobs):
            if before is job or self.ordered:
                found += before.dependencies
            if before is job:
                return found
        return []  # it has ended

    def _next(self) -> Job | None:
        for job in list(self._jobs):
            if job.placed and (job.must_end() or job.looked()):
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
        """A job is over but for its fence."""
        self._jobs.remove(job)
        self._bytes += job.moved
        self._completed += not error
        self._failed += error != 0
        self._resets += error == errno.ETIME

    # ---- the end ----

    def drain(self) -> None:
        """Wait until every job submitted so far has ended. In a forked child: nothing."""
        if self.inherited:
            return
        with self._order:  # what is just being submitted counts
            jobs = list(self._jobs)
        for job in jobs:
            job.fence.wait()

    def close(self, *, cancel: bool = False) -> None:
        """No job from now on; wait until those submitted have ended. Again, and in a forked child: nothing.

        ``cancel``: end them with -ECANCELED instead, the running one as soon as it can stop.
        """
        if self.inherited:
            return
        with self._order:
            self.closed = True
            self.canceling = self.canceling or cancel
        thread = self._thread
        self.wake()
        if thread is not None and thread is not threading.current_thread():
            self._served.wait()  # not join(): up to Python 3.12, one that a signal breaks off takes the thread for ended
            thread.join()
            self._thread = None
        self._timeline.close()

    def __enter__(self) -> Queue:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(cancel=kind is not None)

    def statistics(self) -> QueueStatistics:
        """A snapshot for programs."""
        return QueueStatistics(self.name, len(self._jobs), self._completed, self._failed, self._resets, self._bytes)


def checked_delay(delay: float, obj: object) -> float:
    """Errors: EINVAL a negative delay, or a NaN."""
    if not delay >= 0:
        raise fail(errno.EINVAL, "queue", obj, "a delay is seconds >= 0")
    return delay
