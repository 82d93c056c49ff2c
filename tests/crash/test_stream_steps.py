"""SIGKILL at every named step of streams, in a producer, a reader of each kind, a joiner, a third party, and a reaper.

A witness, a reader that is promised every frame, is there all the time: it must get each frame once, in order and whole. At each death
another process waits, as a reader and as a third party, for what the dead one held. A successor then produces until that one has all that
it wanted, and afterwards the stream has nothing of the dead one.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import signal
from collections.abc import Callable

import pytest

import dmabuf
from dmabuf import Stream, Usage, _native
from tests.support.apart import Apart
from tests.support.budget import budget, some_of
from tests.support.steps import Held, fork, reap, trace
from tests.support.stream_world import (
    LONG_S,
    PLACES,
    SIZE,
    WhenFull,
    World,
    fill,
    opened,
    settled,
    stream_steps,
    succeed,
    whole,
)
from tests.support.waiting import until_asleep

pytestmark = [pytest.mark.crash, pytest.mark.timeout(600)]

FEW = 1  # death of a scenario with the quick budget
TORN = (errno.EOWNERDEAD, errno.ECANCELED)


# ---- what is killed ----


def produce() -> None:
    with opened() as stream:
        for _ in range(2):
            with stream.produce(timeout=LONG_S) as frame:
                fill(frame)
                frame.meta = {"seq": frame.seq}


def discard() -> None:
    with opened() as stream:
        with contextlib.suppress(KeyError), stream.produce(timeout=LONG_S) as frame:
            frame.view[0] = 99
            raise KeyError
        with stream.produce(timeout=LONG_S) as frame:
            frame.discard()
        with stream.produce(timeout=LONG_S) as frame:
            fill(frame)


def read_queue() -> None:
    with opened() as stream, stream.reader(history=2) as reader:
        for _ in range(reader.lag):
            whole(reader.next(timeout=0))


def keep() -> None:
    with opened() as stream, stream.reader(history=2) as reader:
        kept = [reader.next(timeout=0).keep() for _ in range(reader.lag)]
        reader._end_turn()
        for frame in kept:
            whole(frame)
            frame.release()


def read_latest() -> None:
    with opened() as stream, stream.reader("latest") as reader:
        if reader.lag:
            whole(reader.next(timeout=0))


def read_as_member() -> None:
    with opened() as stream, stream.reader(group="g") as reader, stream.reader(group="g") as other:
        for member in (reader, other):
            if member.lag:
                whole(member.next(timeout=0))


def read_by_third_party() -> None:
    with opened() as stream:
        for buf in stream.bufs[:2]:
            with contextlib.suppress(OSError), buf.read(timeout=LONG_S) as view:
                whole(view)


def write_by_third_party() -> None:
    with opened() as stream:
        for buf in stream.bufs:
            with buf.write(timeout=LONG_S) as view:
                for at in PLACES:
                    view[at] = 77


def ask() -> None:
    """A third party that waits in vain, and then one that waits with success, for what this process itself gives back."""
    with opened() as stream, stream.reader() as reader:
        if not reader.lag:
            return
        frame = reader.next(timeout=0)
        with contextlib.suppress(OSError), frame.buf.write(timeout=0):
            pass
        fence = frame.buf.resv.fences(Usage.READ)
        frame.release()
        for asked in fence:
            asked.wait(timeout=LONG_S)


def produce_to_a_reader() -> None:
    """All in one process, so that each wakes the other."""
    with opened() as stream, stream.reader(newest=False) as reader:
        word = stream.ring.domain.shm.stream_await(stream.ring.stream, stream.ring.gen, _native.SW_NEWS)
        with stream.produce(timeout=LONG_S) as frame:
            fill(frame)
        assert not stream.ring.domain.shm.fence_pending(word)
        stream.ring.domain.shm.stream_await(stream.ring.stream, stream.ring.gen, _native.SW_SPACE)
        whole(reader.next(timeout=0))


def clear() -> None:
    """A producer that finds what third parties have left."""
    with opened() as stream:
        for buf in stream.bufs:
            with contextlib.suppress(OSError), buf.read(timeout=LONG_S):
                pass
        with stream.produce(timeout=LONG_S) as frame:
            fill(frame)


def reap_another() -> None:
    def die() -> None:
        _native.step_disarm()
        with opened() as stream, stream.reader(), stream.reader("latest") as latest, stream.reader(group="h") as member:
            for reader in (latest, member):
                if reader.lag:
                    reader.next(timeout=0).keep()
            with stream.produce(timeout=LONG_S) as frame:
                frame.view[0] = 99
                os.kill(os.getpid(), signal.SIGKILL)

    assert reap(fork(die)) == -signal.SIGKILL
    dmabuf.Domain.default().sweep()


def hand_out_again() -> None:
    """A member of a group that redelivers gets what another one was about to take when it died."""

    def die() -> None:
        _native.step_disarm()
        with opened() as stream, stream.reader(group="r", group_redeliver=True) as member:
            _native.step_arm("kill", "stream_moved", 1)
            member.next(timeout=0)

    with opened() as stream, stream.reader(group="r", group_redeliver=True) as member:
        assert reap(fork(die)) == -signal.SIGKILL
        dmabuf.Domain.default().sweep()
        while member.lag:
            whole(member.next(timeout=0))
        with stream.produce(timeout=LONG_S) as frame:
            fill(frame)
        whole(member.next(timeout=0))


def create() -> None:
    with Stream.create("short-lived", size=SIZE, buffers=2) as stream, stream.produce() as frame:
        fill(frame)


SCENARIOS: list[Callable[[], None]] = [
    produce, discard, read_queue, keep, read_latest, read_as_member, read_by_third_party, write_by_third_party, ask, produce_to_a_reader,
    clear, reap_another, hand_out_again, create,
]  # fmt: skip


# ---- who waits ----


def want_everything() -> None:
    with opened() as stream:
        with stream.reader(newest=False, wait_for_producer=True) as reader, stream.reader("latest", wait_for_producer=True) as latest:
            whole(reader.next(timeout=LONG_S))
            whole(latest.next(timeout=LONG_S))
        with stream.reader(group="g", wait_for_producer=True) as member:
            whole(member.next(timeout=LONG_S))
        for buf in stream.bufs:
            try:
                with buf.read(timeout=LONG_S) as view:
                    whole(view)
            except OSError as e:
                if e.errno not in TORN:
                    raise
            with buf.write(timeout=LONG_S) as view:
                for at in PLACES:
                    view[at] = 255


def die_at_every_step(scenario: Callable[[], None], when_full: WhenFull) -> list[str]:
    """After each death all must be well. The steps at which it died."""
    world, died = World(when_full), []
    try:
        assert succeed(world, fork(lambda: None)) == 0
        count = sum(name.startswith("stream_") for name in trace(scenario))
        world.look()
        for nth in sorted(some_of(count, quick=FEW)):
            with Held(scenario) as doomed:
                step = next(itertools.islice(stream_steps(doomed), nth - 1, None), None)
                if step is None:
                    break
                waiter = fork(want_everything)
                until_asleep(waiter)
                doomed.kill()
            world.look()
            assert succeed(world, waiter) == 0, f"who waited failed after a death at step {nth} ({step})"
            try:
                settled(world)
            except AssertionError as e:
                raise AssertionError(f"after a death at step {nth} ({step}): {e}") from e
            died.append(step)
    finally:
        world.close()
    return died


# With the quick budget those that differ in a stream that drops.
DROPS = SCENARIOS if budget() == "full" else [produce, read_queue, read_as_member, clear]


@pytest.mark.parametrize(
    ("when_full", "scenario"),
    [
        pytest.param(when_full, s, id=f"{when_full}-{s.__name__}")
        for when_full in ("wait", "drop")
        for s in (SCENARIOS if when_full == "wait" else DROPS)
    ],
)
def test_death_at_every_step_of_a_stream_is_repaired(scenario: Callable[[], None], when_full: WhenFull, apart: Apart) -> None:
    assert apart(die_at_every_step, scenario, when_full)


def slot_that_is_marked(world: World) -> dmabuf.DmaBuf:
    (at,) = [k for k, slot in enumerate(world.stream.info()["slots"]) if slot["writing"]]
    return world.stream.bufs[at]


def give_way(when_full: WhenFull, dies: bool) -> None:
    """A third party comes between the mark of a slot and the second look: the producer gives way, and uses another slot."""
    world = World(when_full)
    try:
        assert succeed(world, fork(lambda: None)) == 0
        with Held(produce) as producer:
            assert producer.run_to("stream_marked")
            buf = slot_that_is_marked(world)
            with contextlib.suppress(TimeoutError), buf.read(timeout=0):
                pass
            producer.go_on()
            steps = stream_steps(producer)
            assert next(steps) == "stream_backed"
            with buf.read(timeout=0):  # nothing was written, and the mark is gone
                pass
            if dies:
                producer.kill()
            else:
                assert "stream_marked" in steps  # those before it wake who waits
                assert slot_that_is_marked(world) is not buf
                producer.go_on()
                producer.release()
                assert producer.wait() == 0
        dmabuf.Domain.default().sweep()
        assert succeed(world, fork(want_everything)) == 0
        settled(world)
    finally:
        world.close()


@pytest.mark.parametrize("when_full", ["wait", "drop"])
@pytest.mark.parametrize("dies", [False, True], ids=["goes on", "dies"])
def test_producer_gives_way_to_a_third_party(when_full: WhenFull, dies: bool, apart: Apart) -> None:
    apart(give_way, when_full, dies)


def steps_that_are_passed() -> set[str]:
    passed: set[str] = {"stream_backed"}  # give_way()
    world = World("wait")
    try:
        for scenario in SCENARIOS:
            assert succeed(world, fork(lambda: None)) == 0
            passed.update(trace(scenario))
    finally:
        world.close()
    return passed


def test_every_step_of_streams_has_a_scenario(apart: Apart) -> None:
    passed = apart(steps_that_are_passed)
    assert {step for step in _native.STEPS if step.startswith("stream_")} <= passed
