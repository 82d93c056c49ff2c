"""``Outcome``: how a pipeline ended, of which the commands make their tables and JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dmabuf.domain.domain import Domain
from dmabuf.observe.records import buffers
from dmabuf.pipe.plan import Spec


@dataclass(frozen=True)
class WorkerOutcome:
    """How one process of a stage ended. ``exit``: its status, negative for a signal; ``counts``: see ``Counters``."""

    pid: int
    exit: int | None
    state: str
    text: str
    traceback: str | None
    usage: bool
    restarts: int
    counts: dict[str, int]
    result: Any
    checksum: str | None


@dataclass(frozen=True)
class StageOutcome:
    """How a stage ended. ``lost``: frames of the stage before that it didn't get."""

    spec: Spec
    workers: list[WorkerOutcome]
    lost: int

    def total(self, field: str) -> int:
        """Return the sum of a number of its workers."""
        return sum(worker.counts[field] for worker in self.workers)

    @property
    def rate(self) -> float:
        """The frames per second, from the begin of its first frame to the end of its last."""
        begun = [worker.counts["started_ns"] for worker in self.workers if worker.counts["frames"]]
        last = max((worker.counts["last_ns"] for worker in self.workers), default=0)
        seconds = (last - min(begun)) / 1e9 if begun else 0
        return self.total("frames") / seconds if seconds > 0 else 0.0

    @property
    def state(self) -> str:
        """The worst state of its workers."""
        states = [worker.state for worker in self.workers]
        return next((state for state in ("killed", "failed", "starting", "running") if state in states), "done")

    @property
    def worst(self) -> WorkerOutcome:
        """The worker that says why, if the stage failed."""
        return next(worker for worker in self.workers if worker.state == self.state)


@dataclass
class Outcome:
    """How a pipeline ended.

    ``failed``: the name of the stage that failed first. ``stopped_by``: the signal that ended it, 0 for none. ``outputs``: the files that
    were written. ``buffers``, ``buffer_bytes``: of its streams. ``inos``, ``pids``: what it had, for :func:`left_behind`.
    """

    stages: list[StageOutcome] = field(default_factory=list)
    seconds: float = 0.0
    failed: str | None = None
    stopped_by: int = 0
    outputs: list[str] = field(default_factory=list)
    buffers: int = 0
    buffer_bytes: int = 0
    inos: set[int] = field(default_factory=set)
    pids: list[int] = field(default_factory=list)

    def stage(self, name: str) -> StageOutcome:
        """Return a stage by its name."""
        return next(stage for stage in self.stages if stage.spec.name == name)


def left_behind(inos: set[int], pids: list[int]) -> list[str]:
    """Return what is left of a pipeline's buffers and processes, a line each, as `dmabuf ls` and /proc show it."""
    lines = [
        f"buffer {seen.ino} ({seen.name}), held by {', '.join(str(h.pid) for h in seen.holders) or 'no visible process'}"
        for seen in buffers(domain=Domain.default())
        if seen.ino in inos
    ]
    lines += [f"process {pid}" for pid in pids if Path(f"/proc/{pid}").exists()]
    return lines
