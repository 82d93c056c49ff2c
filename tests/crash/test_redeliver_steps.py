"""SIGKILL at every named step of members of a group that redelivers, of whoever adopts their frames, and of their reapers.

Each frame must be released by a member, and none that was released may be handed out again. A page of memory has a mark of each frame, set
before it is released, and another one, set after that.
"""

from __future__ import annotations

import itertools
import mmap
import os
import signal
from collections.abc import Callable

import pytest

import dmabuf
from tests.support.apart import Apart
from tests.support.budget import some_of
from tests.support.steps import Held, fork, reap, trace
from tests.support.stream_world import WhenFull, World, fill, opened, settled, stream_steps, whole

pytestmark = [pytest.mark.crash, pytest.mark.timeout(600)]

FEW = 2  # deaths of a scenario with the quick budget
USED, RELEASED = 1, 2
OPTIONS = {"group": "r", "group_redeliver": True, "wait_for_producer": True}


class Redelivery:
    """A world with a member that survives, which takes frames only when it is told to, unless the group is to be left alone."""

    def __init__(self, when_full: WhenFull, survives: bool) -> None:
        self.world = World(when_full)
        self.marks = mmap.mmap(-1, 1 << 16)
        self.put()
        self.world.look()
        self.survivor = self.world.stream.reader(newest=False, **OPTIONS) if survives else None  # type: ignore[arg-type]

    def use(self) -> None:
        """Take all that there is, as a member, and release it."""
        with opened() as stream, stream.reader(newest=False, **OPTIONS) as reader:  # type: ignore[arg-type]
            while reader.lag:
                try:
                    frame = reader.next(timeout=0)
                except TimeoutError:
                    break
                assert whole(frame) == frame.seq & 255
                self.marks[frame.seq] |= USED
                seq = frame.seq
                frame.release()
                self.marks[seq] |= RELEASED

    def die_with_frames(self) -> None:
        """A member dies with one frame in use, and another one kept."""

        def die() -> None:
            with opened() as stream, stream.reader(newest=False, **OPTIONS) as reader:  # type: ignore[arg-type]
                if self.survivor is None:
                    self.put()
                kept = [reader.next(timeout=0).keep() for _ in range(2)]
                os.kill(os.getpid(), signal.SIGKILL)
                del kept

        assert reap(fork(die)) == -signal.SIGKILL

    def put(self) -> None:
        with opened() as stream:
            for _ in range(2):
                with stream.produce(timeout=0) as frame:
                    fill(frame)

    def check(self, first: int) -> None:
        """All is well since frame `first`."""
        world = self.world
        dmabuf.Domain.default().sweep()
        while self.survivor is not None and self.survivor.lag:
            with self.survivor.next(timeout=0) as frame:
                assert whole(frame) == frame.seq & 255
                assert not self.marks[frame.seq] & RELEASED, f"frame {frame.seq} was released, and came again"
                seq = frame.seq
            self.marks[seq] = RELEASED
        world.look()
        if self.survivor is not None:
            missing = [q for q in range(first, world.stream.info()["published"] + 1) if not self.marks[q]]
            assert not missing, f"frames that nobody has released: {missing}"
        own = [self.survivor, world.witness] if self.survivor is not None else [world.witness]
        found = world.stream.info()["readers"]
        assert [(reader["life"], reader["claims"]) for reader in found] == [(world.stream.domain.shm.life, 0)] * len(own)

    def close(self) -> None:
        if self.survivor is not None:
            self.survivor.close()
        settled(self.world)
        self.world.close()
        self.marks.close()


def take(scene: Redelivery) -> Callable[[], None]:
    """A member takes two frames."""
    if scene.survivor is not None:
        scene.put()
    return scene.use


def adopt(scene: Redelivery) -> Callable[[], None]:
    """A member takes what a dead one had."""
    scene.put()
    scene.die_with_frames()
    dmabuf.Domain.default().sweep()
    scene.world.look()
    scene.put()
    return scene.use


def bury(scene: Redelivery) -> Callable[[], None]:
    """A reaper of a member that had frames."""
    if scene.survivor is not None:
        scene.put()
    scene.die_with_frames()
    return lambda: dmabuf.Domain.default().sweep()


def die_at_every_step(scenario: Callable[[Redelivery], Callable[[], None]], when_full: WhenFull, survives: bool) -> list[str]:
    scene, died = Redelivery(when_full, survives), []
    try:
        count = sum(name.startswith("stream_") for name in trace(scenario(scene)))
        scene.check(3)
        for nth in sorted(some_of(count, quick=FEW)):
            first = scene.world.stream.info()["published"] + 1
            with Held(scenario(scene)) as doomed:
                step = next(itertools.islice(stream_steps(doomed), nth - 1, None), None)
                if step is None:
                    break
                doomed.kill()
            try:
                scene.check(first)
            except AssertionError as e:
                raise AssertionError(f"after a death at step {nth} ({step}): {e}") from e
            died.append(step)
    finally:
        scene.close()
    return died


@pytest.mark.parametrize("when_full", ["wait", "drop"])
@pytest.mark.parametrize("scenario", [take, adopt, bury])
def test_death_at_every_step_of_redelivery_loses_no_frame(
    scenario: Callable[[Redelivery], Callable[[], None]], when_full: WhenFull, apart: Apart
) -> None:
    assert apart(die_at_every_step, scenario, when_full, True)


@pytest.mark.parametrize("scenario", [take, bury])
def test_death_at_every_step_of_the_last_member_leaves_nothing(scenario: Callable[[Redelivery], Callable[[], None]], apart: Apart) -> None:
    assert apart(die_at_every_step, scenario, "wait", False)


def overtaken(dies: bool) -> None:
    """One stands before its compare-and-swap, and another one takes, releases and sees overwritten what it is about to take."""
    scene = Redelivery("wait", True)
    try:
        for step in ("stream_trying", "stream_claimed", "stream_moved"):
            first = scene.world.stream.info()["published"] + 1
            scene.put()
            with Held(scene.use) as member:
                assert member.run_to(step)
                assert scene.survivor is not None
                with scene.survivor.next(timeout=0) as frame:
                    seq = frame.seq
                scene.marks[seq] = RELEASED
                scene.world.look()
                if dies:
                    member.kill()
                    scene.check(first)
                scene.put()
                if not dies:
                    member.go_on()
                    member.release()
                    assert member.wait() == 0
            scene.check(first)
    finally:
        scene.close()


@pytest.mark.parametrize("dies", [False, True], ids=["goes on", "dies"])
def test_member_that_is_overtaken_takes_another_frame(dies: bool, apart: Apart) -> None:
    apart(overtaken, dies)
