"""A stream with a witness, for tests in which processes stop or die at the named steps of streams."""

from __future__ import annotations

import contextlib
import os
import select
from collections.abc import Iterator
from typing import Literal

import dmabuf
from dmabuf import Frame, Stream, Usage, _native
from dmabuf.core.buffer.handle import handle_of
from dmabuf.domain import lives, records
from tests.support.steps import Held
from tests.support.waiting import until

NAME, SIZE, SLOTS = "stepped", 8192, 4
PLACES = (0, SIZE // 2, SIZE - 1)
LONG_S = 30.0  # so long nobody waits unless somebody hangs
FOREIGN = (77, 255)  # what third parties write

WhenFull = Literal["wait", "drop"]


class World:
    """A stream, and its witness: a reader that is promised every frame, and checks each."""

    def __init__(self, when_full: WhenFull) -> None:
        self.stream = Stream.create(NAME, size=SIZE, buffers=SLOTS, when_full=when_full)
        self.witness = self.stream.reader(wait_for_producer=True)
        self.seen = self.lost = 0
        self.drops = when_full == "drop"  # then third parties may write what the witness has not read, and it may be lost

    def look(self) -> None:
        """The witness has all that there is."""
        while self.witness.lag:
            try:
                frame = self.witness.next(timeout=0)
            except TimeoutError:
                assert self.drops
                break
            lost, self.lost = self.witness.lost - self.lost, self.witness.lost
            assert frame.seq == self.seen + 1 + lost, f"frame {frame.seq} came after {self.seen}, {lost} lost"
            assert whole(frame) == frame.seq & 255 or (self.drops and whole(frame) in FOREIGN)
            self.seen = frame.seq
            frame.release()

    def close(self) -> None:
        self.witness.close()
        self.stream.close()


def fill(frame: Frame) -> None:
    view = frame.view
    for at in PLACES:
        view[at] = frame.seq & 255


def whole(frame: Frame | dmabuf.View) -> int:
    """What is in a frame, which is the same in three places."""
    view = frame.view if isinstance(frame, Frame) else frame
    first, *others = (view[at] for at in PLACES)
    assert others == [first] * len(others), f"a torn frame: {[first, *others]}"
    return first


@contextlib.contextmanager
def opened() -> Iterator[Stream]:
    with Stream.open(NAME) as stream:
        yield stream


def succeed(world: World, waiter: int) -> int:
    """Produce until the waiter has ended; its exit code."""
    with opened() as stream:
        while True:
            with stream.produce(timeout=LONG_S) as frame:
                fill(frame)
            world.look()
            pid, status = os.waitpid(waiter, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            select.select([], [], [], 0.001)


def nothing_left(*streams: Stream) -> None:
    """Nothing is left of other processes, and there are no other buffers than those of the streams."""
    domain = dmabuf.Domain.default()
    domain.sweep()
    shm = domain.shm
    assert lives.alive_slots(shm) == [lives.index_of(shm.life)]
    for stream in streams:
        info = stream.info()
        assert [reader for reader in info["readers"] if reader["life"] != shm.life or reader["claims"]] == []
        assert info["why"] != _native.SD_ALIVE
        assert not any(slot["writing"] for slot in info["slots"])
    until(lambda: not records.sweep(domain) and not shm.rec_orphans())
    own = [buf for stream in streams for buf in (stream.ring.own, *stream.bufs)]
    assert sorted(records.present(domain)) == sorted(handle_of(buf).shared.index for buf in own)
    assert sorted(number for number, _, _ in shm.stream_list()) == sorted(stream.ring.stream for stream in streams)
    for buf in own:
        assert buf.resv.fences(Usage.BOOKKEEP) == []
        assert not buf.resv.is_locked()
    assert shm.load32(_native.OFF_TABLE_LOCK) == 0
    assert shm.table_audit() == (0, 0, 0, 0)


def settled(world: World) -> None:
    """Nothing is left but what this process has."""
    nothing_left(world.stream)
    info = world.stream.info()
    assert len(info["readers"]) == 1
    assert info["why"] == _native.SD_CLOSED


def stream_steps(held: Held) -> Iterator[str]:
    """The steps of streams at which it stands, one after the other; the next one is after it went on."""
    while (name := held.next_step()) is not None:
        if name.startswith("~"):
            continue
        if name.startswith("stream_"):
            yield name
        held.go_on()
