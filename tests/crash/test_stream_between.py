"""What one process does at each named step of another one that uses the same stream: nobody sees a frame that isn't whole, none is missing.

A child stands still at each step in turn, and at one more in the middle of its use of a frame. There this process does everything that a
process can do with the stream, without waiting. Then the child goes on, and must come to its end.
"""

from __future__ import annotations

import contextlib
import errno
import random
from collections.abc import Callable

import pytest

import dmabuf
from dmabuf import Frame, Stream, _native
from tests.support.apart import Apart
from tests.support.budget import budget, some_of
from tests.support.steps import Held, fork, trace
from tests.support.stream_world import LONG_S, PLACES, WhenFull, World, fill, opened, settled, stream_steps, succeed, whole

pytestmark = [pytest.mark.crash, pytest.mark.timeout(600)]

FEW = 1  # steps of an action with the quick budget
EXPECTED = (errno.ETIMEDOUT, errno.EBUSY, errno.EOWNERDEAD, errno.ECANCELED)


def look_twice(frame: Frame) -> None:
    """The frame is the same as long as it is had."""
    content = whole(frame)
    _native.step("stream_claimed")
    assert whole(frame) == content


# ---- what stands still ----


def produce() -> None:
    with opened() as stream:
        for _ in range(2):
            with stream.produce(timeout=LONG_S) as frame:
                fill(frame)
                _native.step("stream_chosen")
                assert whole(frame) == frame.seq & 255


def discard() -> None:
    with opened() as stream, stream.produce(timeout=LONG_S) as frame:
        frame.view[0] = 99
        _native.step("stream_chosen")
        frame.discard()


def queue() -> None:
    with opened() as stream, stream.reader(history=3, wait_for_producer=True) as reader:
        last = 0
        for _ in range(reader.lag):
            lost = reader.lost
            try:
                frame = reader.next(timeout=0)
            except TimeoutError:
                break
            assert not last or frame.seq == last + 1 + reader.lost - lost
            last = frame.seq
            look_twice(frame)


def keep() -> None:
    with opened() as stream, stream.reader(history=2, wait_for_producer=True) as reader:
        with contextlib.suppress(TimeoutError):
            frame = reader.next(timeout=0).keep()
            reader._end_turn()
            look_twice(frame)
            frame.release()


def latest() -> None:
    with opened() as stream, stream.reader("latest", wait_for_producer=True) as reader, contextlib.suppress(TimeoutError):
        look_twice(reader.next(timeout=0))


def member() -> None:
    with opened() as stream, stream.reader(group="g", wait_for_producer=True) as reader, contextlib.suppress(TimeoutError):
        look_twice(reader.next(timeout=0))


def third_read() -> None:
    with opened() as stream:
        for buf in stream.bufs[:2]:
            with contextlib.suppress(OSError), buf.read(timeout=0) as view:
                content = whole(view)
                _native.step("stream_foreign")
                assert whole(view) == content


def third_write() -> None:
    with opened() as stream:
        for buf in stream.bufs:
            with contextlib.suppress(TimeoutError), buf.write(timeout=0) as view:
                write_foreign(view)


def write_foreign(view: dmabuf.View) -> None:
    for at in PLACES:
        view[at] = 77
        if at == PLACES[1]:
            _native.step("stream_foreign")


ACTIONS: list[Callable[[], None]] = [produce, discard, queue, keep, latest, member, third_read, third_write]


# ---- what happens meanwhile ----


def some_frames(stream: Stream) -> None:
    for _ in range(6):
        with stream.produce(timeout=0) as frame:
            fill(frame)


def join(stream: Stream) -> None:
    for policy, history in (("queue", 0), ("queue", 3), ("latest", 0)):
        with stream.reader(policy, history=history, wait_for_producer=True) as reader, contextlib.suppress(TimeoutError):  # type: ignore[arg-type]
            for _ in range(reader.lag):
                whole(reader.next(timeout=0))
    with stream.reader(group="g", wait_for_producer=True) as reader, contextlib.suppress(TimeoutError):
        whole(reader.next(timeout=0))


def read_all(stream: Stream) -> None:
    for buf in stream.bufs:
        with contextlib.suppress(OSError), buf.read(timeout=0) as view:
            whole(view)


def write_all(stream: Stream) -> None:
    for buf in stream.bufs:
        with contextlib.suppress(TimeoutError), buf.write(timeout=0) as view:
            for at in PLACES:
                view[at] = 255


MEANWHILE: list[Callable[[Stream], None]] = [some_frames, join, read_all, write_all]


def meanwhile(world: World) -> None:
    if dmabuf.Domain.default().shm.load32(_native.OFF_TABLE_LOCK):  # a member that joins: who comes or goes waits for it
        with contextlib.suppress(TimeoutError):
            some_frames(world.stream)
        world.look()
        world.stream._stop()
        return
    with opened() as stream:
        for do in random.sample(MEANWHILE, len(MEANWHILE)):
            try:
                do(stream)
            except OSError as e:
                if e.errno not in EXPECTED:
                    raise
            world.look()


def stand_still(action: Callable[[], None], when_full: WhenFull, seed: int) -> int:
    """At each step, or with the quick budget at some, in an order of its own."""
    random.seed(seed)
    world, count = World(when_full), 0
    try:
        assert succeed(world, fork(lambda: None)) == 0
        total = sum(name.startswith("stream_") for name in trace(action))
        world.look()
        for nth in sorted(some_of(total, quick=FEW)) * (1 if budget() == "quick" else 4):
            with Held(action) as held:
                for at, step in enumerate(stream_steps(held), 1):
                    if at == nth:
                        try:
                            meanwhile(world)
                        except BaseException as e:
                            e.add_note(f"seed {seed}, at step {nth} ({step})")
                            raise
                        break
                held.go_on()
                held.release()
                assert held.wait() == 0, f"seed {seed}, at step {nth}"
            world.look()
            count += 1
        dmabuf.Domain.default().sweep()
        assert succeed(world, fork(lambda: None)) == 0
        settled(world)
    finally:
        world.close()
    return count


# With the quick budget those that differ in a stream that drops.
DROPS = ACTIONS if budget() == "full" else [produce, queue, keep, member]


@pytest.mark.parametrize(
    ("when_full", "action"),
    [
        pytest.param(when_full, a, id=f"{when_full}-{a.__name__}")
        for when_full in ("wait", "drop")
        for a in (ACTIONS if when_full == "wait" else DROPS)
    ],
)
def test_whatever_happens_at_a_step_of_another_process_is_right(action: Callable[[], None], when_full: WhenFull, apart: Apart) -> None:
    assert apart(stand_still, action, when_full, random.getrandbits(32)) > 0
