"""Pipelines whose processes are killed at random moments: nothing hangs, no frame comes twice or out of order, and nothing is left."""

import random
from typing import Any

import pytest

import dmabuf
from dmabuf.pipe import process
from dmabuf.pipe.outcome import left_behind
from dmabuf.pipe.plan import planned
from dmabuf.pipe.run import parts, run
from tests.support.budget import seeds, times

pytestmark = [pytest.mark.usefixtures("forked_stages"), pytest.mark.crash]

FRAMES = 150
AGAIN = "restart=on-failure:99"
SOURCE = f"test count={FRAMES} size=8x6 format=gray16le"
PIPELINES = [
    f"{SOURCE} {AGAIN} ! tests.cli.work:same workers=2 {AGAIN} ! tests.cli.work:same name=b workers=2 {AGAIN} ! null {AGAIN}",
    f"{SOURCE} {AGAIN} ! tests.cli.work:same {AGAIN} ! tests.cli.work:same name=b workers=2 policy=latest {AGAIN} ! null {AGAIN}",
    f"{SOURCE} {AGAIN} ! tests.cli.work:same workers=3 {AGAIN} ! null {AGAIN} @test ! tests.cli.work:odd_only {AGAIN} ! null {AGAIN}",
]


@pytest.mark.parametrize("seed", seeds(1000, times(quick=2, full=30)))
def test_killed_processes_are_started_again_and_lose_only_what_they_had(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(seed)
    alive: list[Any] = []
    start = process.spawned

    def spawned(*arguments: Any) -> Any:
        alive.append(start(*arguments))
        return alive[-1]

    monkeypatch.setattr(process, "spawned", spawned)
    plan = planned(draw.choice(PIPELINES).split())
    at = sorted(draw.sample(range(FRAMES), draw.randint(1, 4)))

    def kill(frames: dict[str, int]) -> None:
        while at and frames["test"] > at[0]:
            at.pop(0)
            alive.pop(draw.randrange(len(alive))).kill()  # one that has ended by itself is left alone

    with parts(plan):
        outcome = run(plan, kill)
    assert outcome.failed is None
    for stage in outcome.stages:
        # One that died right after it had published a frame has not counted it.
        least, most = (FRAMES, FRAMES) if stage.spec.after is None else map(outcome.stage(stage.spec.after).total, ("frames", "taken"))
        restarts = sum(worker.restarts for worker in stage.workers)
        if stage.spec.policy == "queue" and stage.spec.after != "odd_only":
            # A stage behind several workers may hold back a frame of each.
            held = 1 if stage.spec.after is None else max(1, outcome.stage(stage.spec.after).spec.workers)
            assert least - restarts * held <= stage.total("frames") <= most
    assert left_behind(outcome.inos, outcome.pids) == []
    assert dmabuf.buffers() == []
