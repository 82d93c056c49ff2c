"""The parent of a pipeline: it starts the stages' processes, passes streams on to their readers, watches, restarts, and ends them.

It takes no part in the hand-over of frames. But it has every stream open, and a place in the group of each stage that is to get every
frame: so a stage that is started again goes on where the one before ended, and its frames wait for it.

A pipeline ends when its sources do: each stage ends when the stages before have, and all their frames are worked on. Ctrl-C and a failure
end the sources, and the rest follows.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Final

from dmabuf.core.dma_buf import DmaBuf
from dmabuf.heap.recommended import allocate
from dmabuf.pipe.board import BLOCK_BYTES, Counters
from dmabuf.pipe.kind import Kind
from dmabuf.pipe.outcome import Outcome, StageOutcome, WorkerOutcome
from dmabuf.pipe.plan import Plan, part_of
from dmabuf.pipe.process import ENDING, Worker, signal_name
from dmabuf.pipe.words import refused
from dmabuf.stream.reader import StreamReader

Progress = Callable[[dict[str, int]], None]

REFRESH_S: Final = 0.1  # of the progress; nothing else depends on it
GRACE_S: Final = 2.0  # after a failure, without a frame and without the end of a process
CLOSING_S: Final = 5.0  # the same, for what completes a file
_PARTS: Final = ("video", "raw")  # sinks with one file


def run(
    plan: Plan,
    progress: Progress | None = None,
    *,
    stdout: int | IO[Any] | None = None,
    keep_part: bool = False,
) -> Outcome:
    """Run a pipeline to its end, inside a block of :func:`parts`.

    Args:
        plan: The pipeline.
        progress: Called with the frames of each stage, about ten times a second.
        stdout: What the stages print to; None for this process's own.
        keep_part: Whether files that a failure cut short are kept, if they were completed.

    Raises:
        DmaBufError: Memory can't be allocated.
    """
    with contextlib.closing(Pipeline(plan, stdout)) as pipeline:
        outcome = pipeline.run(progress)
    if outcome.failed is None or keep_part:
        outcome.outputs = [stage.spec.target for stage in outcome.stages if stage.spec.part is not None and _keep(stage)]
    return outcome


@contextlib.contextmanager
def parts(plan: Plan) -> Iterator[None]:
    """Have another name for each file that the plan writes, until it is complete. What was not complete is gone when the block ends.

    Raises:
        InvalidError: A file can't be written, or would overwrite a source (EINVAL).
    """
    made: list[Path] = []
    try:
        _name_parts(plan, made)
        yield
    finally:
        _remove(made)


def _name_parts(plan: Plan, made: list[Path]) -> None:
    sinks = [spec for spec in plan.stages if spec.side == "sink" and spec.kind in _PARTS]
    sources = {os.path.realpath(spec.target) for spec in plan.stages if spec.side == "source"}
    targets = [os.path.realpath(spec.target) for spec in sinks]
    for k, spec in enumerate(sinks):
        if targets[k] in sources:
            raise refused(spec.target, "it would overwrite the source", "name another file")
        if targets[k] in targets[:k]:
            raise refused(spec.target, "two sinks write it", "give each sink a file of its own")
        if os.path.exists(targets[k]) and not os.path.isfile(targets[k]):  # /dev/null, a FIFO: nothing may take its place
            if spec.kind != "raw" or os.path.isdir(targets[k]):
                raise refused(spec.target, "it is not a file", "name a file; raw:PATH writes to devices and pipes")
            spec.part = spec.target
            continue
        spec.part = part_of(targets[k])
        try:
            Path(spec.part).touch()
        except OSError as e:
            raise refused(spec.target, str(e.strerror), "name a file in a directory that you may write") from None
        made.append(Path(spec.part))


def _remove(paths: list[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _keep(stage: StageOutcome) -> bool:
    """Give a file its name if its sink has completed it, and it has a frame."""
    assert stage.spec.part is not None
    if stage.state != "done" or not stage.total("frames"):
        return False
    if stage.spec.part != stage.spec.target:
        Path(stage.spec.part).replace(os.path.realpath(stage.spec.target))
    return True


class Pipeline:
    """The processes of a plan while they run."""

    def __init__(self, plan: Plan, stdout: int | IO[Any] | None = None) -> None:
        self._plan, self._stdout, self._outcome = plan, stdout, Outcome()
        self._places: dict[str, list[StreamReader]] = {spec.name: [] for spec in plan.stages}
        self._selector = selectors.DefaultSelector()
        self._workers: list[Worker] = []
        self._begun = self._stopping = self._killing = self._closed = False
        self._deadline: float | None = None
        self._came: tuple[int, ...] = ()  # at the last look after a failure: what has ended, and the frames
        count = sum(spec.workers for spec in plan.stages)
        self._board = allocate(count * BLOCK_BYTES, name="pipe-numbers")
        self._claims: dict[str, DmaBuf] = {}
        try:
            self._make_workers()
        except BaseException:
            self.close()
            raise
        self._count_buffers(self._board, *self._claims.values())

    def _make_workers(self) -> None:
        for spec in self._plan.stages:
            if spec.policy == "latest" and spec.workers > 1 and not self._plan.lanes(spec):
                self._claims[spec.name] = allocate(64, name="pipe-claims")
            for lane in range(spec.workers):
                block = len(self._workers)
                self._workers.append(Worker(spec, lane, block, Counters(self._board, block)))

    def _count_buffers(self, *bufs: DmaBuf) -> None:
        self._outcome.buffers += len(bufs)
        self._outcome.buffer_bytes += sum(buf.size for buf in bufs)
        self._outcome.inos |= {buf.ino for buf in bufs}

    def _of(self, name: str) -> list[Worker]:
        return [worker for worker in self._workers if worker.spec.name == name]

    # ---- from the first process to the last ----

    def run(self, progress: Progress | None) -> Outcome:
        """Run it to its end."""
        with _signals(self._selector):
            began = time.monotonic()
            self._start_all()
            self._until_over(progress)
            self._outcome.seconds = time.monotonic() - began
            if progress is not None:
                progress(self._frames())
        self._finish()
        return self._outcome

    def _start_all(self) -> None:
        for worker in self._workers:
            self._start(worker)

    def _until_over(self, progress: Progress | None) -> None:
        while not all(worker.over for worker in self._workers):
            self._turn(progress)

    def _frames(self) -> dict[str, int]:
        return {spec.name: sum(worker.counters["frames"] for worker in self._of(spec.name)) for spec in self._plan.stages}

    def _turn(self, progress: Progress | None) -> None:
        timeout = None if progress is None else REFRESH_S
        if self._deadline is not None:
            left = max(0.0, self._deadline - time.monotonic())
            timeout = left if timeout is None else min(timeout, left)
        for key, _ in self._selector.select(timeout):
            if isinstance(key.data, _Signals):
                for number in key.data.taken():
                    self._signaled(number)
            elif key.data[1] == "message":
                self._heard(key.data[0])
            else:
                self._ended(key.data[0])
        if self._deadline is not None and time.monotonic() >= self._deadline:
            self._too_late()
        if progress is not None:
            progress(self._frames())

    def _start(self, worker: Worker, *, again: bool = False) -> None:
        worker.start(self._stdout)
        assert worker.process is not None
        self._outcome.pids.append(worker.process.pid)
        self._selector.register(worker.sock, selectors.EVENT_READ, (worker, "message"))  # type: ignore[arg-type]  # there is one
        self._selector.register(worker.pidfd, selectors.EVENT_READ, (worker, "exit"))
        spec, plan = worker.spec, self._plan
        before = [] if spec.after is None else self._of(spec.after)
        lanes = plan.lanes(spec)
        objects: list[Any] = [self._board]
        if spec.name in self._claims:
            objects.append(self._claims[spec.name])
        if worker.stream is not None:  # the process goes on in the stream of the one before
            objects.append(worker.stream)
        worker.tell(
            "job",
            *objects,
            spec=spec.to_json(),
            block=worker.block,
            again=again,
            lanes=1 if lanes else len(before),
            shared=spec.workers > 1 and not lanes,
            read=bool(plan.readers(spec.name)),
            claims=spec.name in self._claims,
            kind=None if worker.kind is None else worker.kind.to_json(),
        )
        if again:
            for one in self._workers:
                if one.stream is not None:
                    self._tell_way(one, worker)
            if worker.going:
                worker.tell("go")
            for producer in before:
                if worker not in self._readers_of(producer):
                    continue
                if producer.stream is not None:
                    self._connect(producer, worker)
                if producer.ended:
                    self._tell_end(producer, worker)

    # ---- what processes say ----

    def _heard(self, worker: Worker) -> bool:
        """Take a message. Return False if there are no more."""
        if worker.sock is None:
            return False
        got = worker.hear()
        if got is None:
            self._selector.unregister(worker.sock)
            worker.hang_up()
            return False
        message, objects = got
        op = message["op"]
        if op == "ready":
            worker.state = "running"
            self._let_go()
        elif op == "stream":
            worker.stream, worker.kind = objects[0], Kind.of_json(message["kind"])
            self._count_buffers(worker.stream.ring.own, *worker.stream.bufs)
            self._opened(worker)
        elif op == "attached":
            self._attached(worker, message["lane"])
        elif op == "done":
            worker.told_done, worker.result, worker.checksum = True, message["result"], message["checksum"]
        elif op == "failed":
            worker.text, worker.traceback, worker.usage = message["text"], message["traceback"], message["usage"]
        return True

    def _readers_of(self, producer: Worker) -> list[Worker]:
        """Return the processes that read a process's stream."""
        return [
            worker
            for spec in self._plan.readers(producer.spec.name)
            for worker in self._of(spec.name)
            if not self._plan.lanes(spec) or worker.lane == producer.lane
        ]

    def _opened(self, producer: Worker) -> None:
        """Pass a stream on to those who read it. Who is to get every frame has a place before the first one."""
        assert producer.stream is not None
        for spec in self._plan.readers(producer.spec.name):
            if spec.policy == "queue":
                self._places[spec.name].append(producer.stream.reader(group=spec.name, wait_for_producer=True))
        for worker in self._workers:
            self._tell_way(producer, worker)
        for worker in self._readers_of(producer):
            if not worker.over:
                self._connect(producer, worker)
        self._let_go()

    def _connect(self, producer: Worker, reader: Worker) -> None:
        assert producer.stream is not None
        assert producer.kind is not None
        lane = 0 if self._plan.lanes(reader.spec) else producer.lane
        reader.tell("input", producer.stream, lane=lane, kind=producer.kind.to_json())

    def _tell_way(self, producer: Worker, merger: Worker) -> None:
        """Tell a stage that merges of a stream on its frames' way: that which the workers share, or one between them."""
        assert producer.stream is not None
        way = self._plan.way(merger.spec)
        names = [spec.name for spec in way]
        if way and producer.spec.name == way[0].after:
            merger.tell("split", producer.stream, workers=way[0].name)
        elif producer.spec.name in names[:-1]:
            worker = self._of(names[names.index(producer.spec.name) + 1])[producer.lane]
            merger.tell("between", producer.stream, lane=producer.lane, block=worker.block)

    def _attached(self, reader: Worker, lane: int) -> None:
        assert reader.spec.after is not None
        lane = reader.lane if self._plan.lanes(reader.spec) else lane
        self._of(reader.spec.after)[lane].attached.add((reader.spec.name, reader.lane))
        self._let_go()

    def _let_go(self) -> None:
        """Let those produce whose readers have their places, once every stage is ready."""
        if not self._begun and any(worker.state == "starting" for worker in self._workers):
            return
        self._begun = True
        for worker in self._workers:
            if worker.stream is None or worker.going or worker.over:
                continue
            if all(reader.over or (reader.spec.name, reader.lane) in worker.attached for reader in self._readers_of(worker)):
                worker.going = True
                worker.tell("go")

    # ---- ends ----

    def _ended(self, worker: Worker) -> None:
        self._selector.unregister(worker.pidfd)
        while self._heard(worker):
            pass
        status = worker.reap()
        if status == 0 and worker.told_done:
            worker.state = "done"
        else:
            worker.state = "killed" if status < 0 else "failed"
            if status > 0 and not worker.text:
                worker.text = f"its process ended with exit status {status}"
            elif status < 0:
                worker.text = f"its process was killed by {signal_name(status)}"
            if self._begun and not self._stopping and worker.restarts < worker.spec.restarts:
                worker.restarts += 1
                self._start(worker, again=True)
                return
            if not self._killing:  # else it was this process that killed it
                self._failed(worker)
        worker.ended = True
        for reader in self._readers_of(worker):
            self._tell_end(worker, reader)
        self._let_go()

    def _tell_end(self, producer: Worker, reader: Worker) -> None:
        reader.tell("end", lane=0 if self._plan.lanes(reader.spec) else producer.lane)

    def _failed(self, worker: Worker) -> None:
        """End the pipeline after a failure: the stages after the one that failed complete what they can."""
        first, self._outcome.failed = self._outcome.failed is None, self._outcome.failed or worker.spec.name
        # Whoever waits for it to read goes on.
        places, self._places[worker.spec.name] = self._places[worker.spec.name], []
        for place in places:
            place.close()
        if first:
            if not self._begun:
                self._kill(self._workers)
            self._stop()
            self._deadline = time.monotonic() + GRACE_S
            self._came = (sum(one.over for one in self._workers), *self._frames().values())

    def _too_late(self) -> None:
        """End what stands still after a failure: sinks, which may have a file to complete, get more time."""
        came = (sum(worker.over for worker in self._workers), *self._frames().values())
        if came != self._came:
            self._came, self._deadline = came, time.monotonic() + GRACE_S
            return
        others = [worker for worker in self._workers if not worker.over and worker.spec.side != "sink"]
        if others:
            self._deadline = time.monotonic() + CLOSING_S
            self._kill(others)
        else:
            self._deadline = None
            self._kill(self._workers)

    def _stop(self) -> None:
        """Have the sources end."""
        self._stopping = True
        for worker in self._workers:
            if worker.spec.side == "source":
                worker.tell("stop")
                worker.tell("go")  # one that waits for its readers looks at the other

    def _kill(self, workers: list[Worker]) -> None:
        for worker in workers:
            if not worker.over and worker.process is not None:
                worker.process.kill()

    def _signaled(self, number: int) -> None:
        if self._outcome.stopped_by or not self._begun:
            self._killing = True
            self._kill(self._workers)
        self._outcome.stopped_by = self._outcome.stopped_by or number
        self._stop()

    def _finish(self) -> None:
        """Make the outcome of what the stages and their streams say."""
        for spec in self._plan.stages:
            workers = self._of(spec.name)
            lost = 0
            if spec.after is not None:
                made = sum(one.stream.info()["published"] for one in self._of(spec.after) if one.stream is not None)
                lost = max(0, made - sum(one.counters["frames"] for one in workers))
            self._outcome.stages.append(StageOutcome(spec, [_outcome_of(worker) for worker in workers], lost))

    def close(self) -> None:
        """End every process, and close everything. Twice has no effect."""
        if self._closed:
            return
        self._closed = True
        for places in self._places.values():
            for place in places:
                place.close()
        for worker in self._workers:
            worker.close()
        self._selector.close()
        for buf in (self._board, *self._claims.values()):
            buf.close()


def _outcome_of(worker: Worker) -> WorkerOutcome:
    return WorkerOutcome(
        worker.pids[-1] if worker.pids else 0,
        worker.exit,
        worker.state,
        worker.text,
        worker.traceback,
        worker.usage,
        worker.restarts,
        worker.counters.all(),
        worker.result,
        worker.checksum,
    )


class _Signals:
    """SIGINT and SIGTERM of this process as something to wait for."""

    def __init__(self) -> None:
        self.here, self.there = socket.socketpair()
        self.here.setblocking(False)
        self.there.setblocking(False)

    def taken(self) -> list[int]:
        """Return the signals that have come."""
        with contextlib.suppress(BlockingIOError):
            return [number for number in self.here.recv(64) if number in ENDING]
        return []


@contextlib.contextmanager
def _signals(selector: selectors.BaseSelector) -> Iterator[None]:
    """Have SIGINT and SIGTERM wake a selector, in the main thread; elsewhere nothing is changed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    told = _Signals()
    selector.register(told.here, selectors.EVENT_READ, told)
    wakeup = signal.set_wakeup_fd(told.there.fileno(), warn_on_full_buffer=False)
    before = {number: signal.signal(number, lambda *_: None) for number in ENDING}
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before[signal.SIGINT])
        signal.signal(signal.SIGTERM, before[signal.SIGTERM])
        signal.set_wakeup_fd(wakeup)
        selector.unregister(told.here)
        told.here.close()
        told.there.close()
