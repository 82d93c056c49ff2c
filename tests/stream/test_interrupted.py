"""A signal handler that raises, at every place of an operation of a stream where one can: nothing is held, and no frame is missing."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import signal
import struct
from collections.abc import Callable, Iterator

import pytest

import dmabuf
from dmabuf import Stream
from tests.support.budget import times
from tests.support.every_stop import Raised, at_every_stop

SIZE = 4096
_numbers = itertools.count()


class World:
    """A stream, its producer, and a reader that is promised every frame."""

    def __init__(self) -> None:
        self.name = f"interrupted {next(_numbers)}"
        self.stream = Stream.create(self.name, size=SIZE)
        self.frames = self.stream.reader()
        self.latest = self.stream.reader("latest")
        self.seen = 0
        self.produce()

    def produce(self) -> None:
        with self.stream.produce(timeout=1) as frame:
            struct.pack_into("<Q", frame.view, 0, frame.seq)
            frame.meta = {"seq": frame.seq}

    def look(self, frame: dmabuf.Frame) -> None:
        if struct.unpack_from("<Q", frame.view)[0] != frame.seq:
            raise AssertionError("another frame's content")
        # One may have been taken just before the handler ran, and is over.
        if frame.seq not in (self.seen, self.seen + 1, self.seen + 2):
            raise AssertionError(f"{frame.seq} after {self.seen}")
        self.seen = frame.seq

    def drain(self) -> None:
        while self.frames.lag:
            self.look(self.frames.next(timeout=0))
        self.frames._end_turn()
        self.latest._end_turn()
        self.seen = self.stream.info()["published"]

    def settle(self) -> None:
        """All is usable, and only what this has is there."""
        if self.stream._making:
            self.stream._end_turn()  # the handler ran when __enter__ had returned
        self.drain()
        info = self.stream.info()
        assert not any(slot["writing"] for slot in info["slots"])
        assert [reader["claims"] for reader in info["readers"]] == [0, 0]
        for _ in range(5):
            self.produce()
            self.drain()
        assert self.seen == self.stream.info()["published"]

    def close(self) -> None:
        self.frames.close()
        self.latest.close()
        self.stream.close()


def produce_and_read(world: World) -> None:
    world.drain()
    world.produce()
    with world.frames.next(timeout=1) as frame:
        world.look(frame)


def read_in_a_loop(world: World) -> None:
    world.drain()
    world.produce()
    world.produce()
    for frame in world.frames:
        world.look(frame)
        if not world.frames.lag:
            break
    world.frames._end_turn()


def read_the_latest(world: World) -> None:
    world.drain()
    world.produce()
    with world.latest.next(timeout=1) as frame:
        assert frame.meta == {"seq": frame.seq}
    world.drain()


def keep(world: World) -> None:
    world.drain()
    world.produce()
    kept = world.frames.next(timeout=1).keep()
    world.frames._end_turn()
    world.look(kept)
    kept.release()


def wait_in_vain(world: World) -> None:
    world.drain()
    with contextlib.suppress(TimeoutError):
        world.frames.next(timeout=0.0001)


def discard(world: World) -> None:
    world.drain()
    with world.stream.produce(timeout=1) as frame:
        frame.view[0] = 1
        frame.discard()


def come_and_go(world: World) -> None:
    world.drain()
    with world.stream.reader(group="g") as member, world.stream.reader("latest") as latest:
        member.next(timeout=1)
        latest.next(timeout=1)


def open_and_close(world: World) -> None:
    with Stream.open(world.name) as other, other.reader() as reader:
        reader.next(timeout=1)


def create_and_close(_: World) -> None:
    Stream.create(size=SIZE, buffers=2).close()


def in_a_task(world: World) -> None:
    async def main() -> None:
        async with world.stream.produce(timeout=1) as frame:
            struct.pack_into("<Q", frame.view, 0, frame.seq)
        world.look(await world.frames.anext(timeout=1))

    asyncio.run(main())
    world.drain()


OPERATIONS: list[Callable[[World], None]] = [
    produce_and_read, read_in_a_loop, read_the_latest, keep, wait_in_vain, discard, come_and_go, open_and_close, create_and_close,
]  # fmt: skip


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.close()


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
def test_interrupted_operation_leaves_nothing(world: World, operation: Callable[[World], None]) -> None:
    stops, faults = at_every_stop(lambda: operation(world), world.settle, step=times(quick=13, full=1))
    assert not faults, "\n".join(faults)
    assert stops > 3


@pytest.mark.timeout(600)
def test_signals_at_random_moments_leave_nothing(world: World) -> None:
    """In C as well: a wait, a look, a release."""
    seed = random.getrandbits(32)
    choose, arrived, count = random.Random(seed), 0, times(quick=100, full=1_000)

    def raise_it(*_: object) -> None:
        raise Raised

    before = signal.signal(signal.SIGALRM, raise_it)
    try:
        for _ in range(count):
            operation = choose.choice(OPERATIONS[:-2])
            try:
                signal.setitimer(signal.ITIMER_REAL, choose.uniform(1e-6, 1e-4))
                while True:
                    operation(world)
            except Raised:
                arrived += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
            try:
                world.settle()
            except BaseException as e:
                e.add_note(f"seed {seed}, after {arrived} signals, in {operation.__name__}")
                raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert arrived == count
