"""The program of a stage's process: ``python -m dmabuf.pipe.stage FD``, started by ``run`` with a socket and nothing else.

Over the socket come its job, and the streams that it reads. It ends with 0 when its work is done, 1 if it failed, which it tells the parent
with the traceback, and 2 if the parent has gone.
"""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import socket
import sys
import time
import traceback
from typing import TYPE_CHECKING, Any, Final

from dmabuf.domain.lives import LABEL_BYTES
from dmabuf.domain.peers import label
from dmabuf.errors import ExtraMissingError, InvalidError
from dmabuf.pipe import sinks, sources
from dmabuf.pipe.board import Claims, Counters
from dmabuf.pipe.function import Result, Work
from dmabuf.pipe.inputs import Inputs
from dmabuf.pipe.kind import Kind
from dmabuf.pipe.line import Line, ParentGone
from dmabuf.pipe.output import Head, Output, die
from dmabuf.pipe.plan import Spec, chosen, number
from dmabuf.pipe.process import ENDING
from dmabuf.pipe.words import refused

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

DONE: Final = 0
FAILED: Final = 1
ALONE: Final = 2


class Job:
    """What a stage's process has: its line, its part of the plan, its numbers, and its ends of streams."""

    def __init__(self, line: Line, message: dict[str, Any], objects: list[Any]) -> None:
        self.line, self.spec = line, Spec(**message["spec"])
        board, *rest = objects
        self.counters = Counters(board, message["block"])
        if message["again"]:  # the frame that the process before died with is gone
            self.counters["seq"] = self.counters["taken_seq"]
        self.inputs = Inputs(
            line,
            self.spec,
            self.counters,
            Claims(rest.pop(0)) if message["claims"] else None,
            board,
            message["lanes"],
            message["shared"],
        )
        self.output = Output(line, self.spec, self.counters) if message["read"] else None
        if self.output is not None and rest:
            self.output.go_on_in(rest[0], Kind.of_json(message["kind"]))
        self.digest = hashlib.sha256() if self.spec.checksum else None
        self._kill_at = None if message["again"] else self.spec.kill_at
        self._cpu_ns = self.counters["cpu_ns"] - time.process_time_ns() if message["again"] else 0
        self.result: Any = None

    def begun(self) -> bool:
        """Count a frame whose work begins. Return True if this process is to be killed in it."""
        counters = self.counters
        if not counters["started_ns"]:
            counters["started_ns"] = time.monotonic_ns()
        dies = counters["taken"] == self._kill_at
        counters["taken"] += 1
        return dies

    def done(self, seq: int = 0) -> None:
        """Count a frame whose work is done."""
        counters = self.counters
        counters["frames"] += 1
        counters["last_ns"] = time.monotonic_ns()
        counters["cpu_ns"] = self._cpu_ns + time.process_time_ns()
        counters["seq"] = seq

    def close(self) -> None:
        """Leave all streams."""
        self.inputs.close()
        if self.output is not None:
            self.output.close()
        self.counters.close()


class SourceStage:
    """A stage that makes frames."""

    def __init__(self, job: Job) -> None:
        self._job, self._source = job, sources.opened(job.spec)

    def run(self) -> None:
        """Make frames until there are no more, or the parent asks for an end."""
        job, source = self._job, self._source
        assert job.output is not None
        job.output.open(source.kind)
        try:
            self._all(job.output)
        finally:
            source.close()

    def _all(self, output: Output) -> None:
        job = self._job
        for item in self._source.items(job.counters["taken"]):
            job.line.look()
            if job.line.stopping:
                break
            if item is not None:
                self._make(item, output)

    def _make(self, item: Any, output: Output) -> None:
        job = self._job
        dies = job.begun()
        head = Head(job.counters["taken"], 0, time.monotonic_ns(), {})

        def fill(array: Array) -> bool:
            self._source.put(item, array)
            job.counters["copied"] += array.nbytes
            return True

        output.put(head, fill, dies=dies)
        job.done()


class FunctionStage:
    """A stage that calls a user's function with each frame."""

    def __init__(self, job: Job) -> None:
        self._job, own = job, dict(job.spec.own)
        self._shape, self._dtype = own.pop("shape", None), own.pop("dtype", None)
        self._work = Work(job.spec.target, own)
        if not self._work.writes and (self._shape or self._dtype):
            raise refused(f"{job.spec.target} shape=", "it returns its frames", "leave shape= and dtype= out, or give it a parameter out")

    def run(self) -> None:
        """Work on frames until there are no more."""
        job = self._job
        while (got := job.inputs.next()) is not None:
            frame, head, kind = got
            with frame:
                self._one(frame.array(), head, kind, job.begun())
            job.done(job.counters["taken_seq"])
        job.result = self._work.close()

    def _one(self, array: Array, head: Head, kind: Kind, dies: bool) -> None:
        job = self._job
        if job.digest is not None:
            job.digest.update(array.data)
        if self._work.writes:
            self._written(array, head, kind, dies)
            return
        found = self._work(array, head.meta)
        if dies:
            die()
        self._note(head, found)
        if not found.goes_on or job.output is None:
            return
        result = array if found.array is None else found.array
        job.output.open(kind.changed(result.shape, str(result.dtype)))

        def fill(target: Array) -> bool:
            target[...] = result
            job.counters["copied"] += target.nbytes
            return True

        job.output.put(head, fill)

    def _written(self, array: Array, head: Head, kind: Kind, dies: bool) -> None:
        """Let the function write into the next frame; at the end of a branch, into memory that nobody reads."""
        job = self._job
        wanted = kind.changed(_shape(self._shape, job.spec) or kind.shape, _dtype(self._dtype, job.spec) or kind.dtype)

        def fill(target: Array) -> bool:
            found = self._work(array, head.meta, target)
            self._note(head, found)
            return found.goes_on

        if job.output is None:
            import numpy as np

            fill(np.empty(wanted.shape, wanted.dtype))
            if dies:
                die()
            return
        job.output.open(wanted)
        job.output.put(head, fill, dies=dies)

    def _note(self, head: Head, found: Result) -> None:
        if found.value is not None:
            head.meta[self._job.spec.name] = found.value


class SinkStage:
    """A stage that takes frames out of the pipeline."""

    def __init__(self, job: Job) -> None:
        self._job, self._sink, self._begun = job, sinks.opened(job.spec), False

    def run(self) -> None:
        """Take frames until there are no more, and complete what was written."""
        try:
            self._all()
        finally:
            self._sink.close()

    def _all(self) -> None:
        job = self._job
        while (got := job.inputs.next()) is not None:
            frame, head, kind = got
            with frame:
                self._one(frame.array(), head, kind, job.begun())
            job.done(job.counters["taken_seq"])

    def _one(self, array: Array, head: Head, kind: Kind, dies: bool) -> None:
        job = self._job
        if job.digest is not None:
            job.digest.update(array.data)
        if not self._begun:
            self._sink.begin(kind)
            self._begun = True
        if dies:
            die()
        self._sink.put(array, head)
        if self._sink.copies:
            job.counters["copied"] += array.nbytes


_STAGES: Final[dict[str, Any]] = {"source": SourceStage, "function": FunctionStage, "sink": SinkStage}


def _shape(text: str | None, spec: Spec) -> tuple[int, ...] | None:
    if text is None:
        return None
    return tuple(number(part, f"{spec.target} shape={text}", low=1) for part in text.split("x"))


def _dtype(text: str | None, spec: Spec) -> str | None:
    return None if text is None else chosen(text, f"{spec.target} dtype={text}", _DTYPES)


_DTYPES: Final = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float16", "float32", "float64", "bool")


def work(line: Line) -> int:
    """Hear what the job is, do it, and return the exit status."""
    jobs: list[Job] = []

    def have(message: dict[str, Any], objects: list[Any]) -> None:
        jobs.append(Job(line, message, objects))

    line.on["job"] = have
    try:
        line.hear()  # the job is the first message
        return _done(line, jobs[0])
    except ParentGone:
        return ALONE


def _done(line: Line, job: Job) -> int:
    began = False
    label(os.fsencode(f"pipe {job.spec.name}")[:LABEL_BYTES])
    try:
        stage = _STAGES[job.spec.side](job)
        line.tell("ready")
        began = True
        stage.run()
        line.tell("done", result=job.result, checksum=None if job.digest is None else job.digest.hexdigest())
        return DONE
    except ParentGone:
        raise
    except BaseException as e:
        line.tell("failed", **_told(e, began))
        return FAILED
    finally:
        job.close()


def _told(e: BaseException, began: bool) -> dict[str, Any]:
    """Return the error for the parent. ``usage``: the command line is to blame, and not the work."""
    said = isinstance(e, (InvalidError, ExtraMissingError)) and getattr(e, "operation", "pipe") == "pipe"
    usage = not began and (said or (isinstance(e, OSError) and e.errno in _BLAMED))
    if said or usage:
        return {"text": str(e), "traceback": None, "usage": usage}
    trace = e.__traceback__
    own = trace
    while own is not None and own.tb_frame.f_globals.get("__package__") == __package__:
        own = own.tb_next
    lines = traceback.format_exception(type(e), e, own if own is not None else trace)
    text = "".join(traceback.format_exception_only(type(e), e)).strip()
    return {"text": text[:_MOST], "traceback": "".join(lines)[-_MOST:], "usage": False}


_BLAMED: Final = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EBUSY, errno.ENODEV, errno.ENOTTY, errno.ENOTDIR, errno.EISDIR)
_MOST: Final = 20_000  # characters of a traceback


def main(fd: int) -> int:
    """Run a stage."""
    for ending in ENDING:  # the parent gets it too, and ends the pipeline in order; what a function starts is not to inherit SIG_IGN
        signal.signal(ending, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    with socket.socket(fileno=fd) as sock:
        return work(Line(sock))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
