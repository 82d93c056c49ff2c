"""Many streams and readers in one domain, and nothing that grows with use."""

from __future__ import annotations

import gc
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from dmabuf import Domain, Stream, StreamReader, _native
from tests.stream.conftest import content, put
from tests.support.apart import Apart
from tests.support.budget import times
from tests.support.children import Child, Parent, Spawn
from tests.support.leaks import descriptors
from tests.support.waiting import until

FRAMES: Final = 3
HOLDERS: Final = 8  # processes that read

KINDS: Final[tuple[dict[str, Any], ...]] = ({}, {"policy": "latest"}, {"group": "one"}, {"history": 2})


def name_of(number: int) -> str:
    return f"of many {number}"


# ---- many ----


def readers_of(parent: Parent, streams: list[int]) -> int:
    """Read streams, of which each number is one reader more. Return how many frames came."""
    with ExitStack() as stack:
        opened = {number: stack.enter_context(Stream.open(name_of(number))) for number in set(streams)}
        readers = [stack.enter_context(opened[number].reader(**KINDS[k % len(KINDS)])) for k, number in enumerate(streams)]
        parent.send("here")
        seen = 0
        for _ in range(FRAMES):
            parent.recv()
            for number, reader in zip(streams, readers, strict=True):
                if reader.group is None or reader.lag:  # else another member had it
                    frame = reader.next(timeout=60)
                    assert content(frame) == (number + frame.seq) & 255
                    frame.release()
                    seen += 1
            parent.send(seen)
        parent.recv()
        return seen


def test_many_streams_and_readers_are_in_one_domain(child: Spawn) -> None:
    count, readers = times(quick=24, full=200), times(quick=60, full=500)
    domain = Domain.default()
    with ExitStack() as stack:
        streams = [stack.enter_context(Stream.create(name_of(number), size=4096, buffers=2)) for number in range(count)]
        parts = [[(first + k * HOLDERS) % count for k in range(readers // HOLDERS)] for first in range(HOLDERS)]
        parts[0] += [*range(readers % HOLDERS)]
        others = [child(readers_of, part) for part in parts]
        for other in others:
            assert other.recv() == "here"
        places = [len(stream.info()["readers"]) for stream in streams]
        assert sum(places) == readers
        for _ in range(FRAMES):
            for number, stream in enumerate(streams):
                put(stream, number + stream.info()["published"] + 1)
            for other in others:
                other.send()
            for other in others:
                other.recv()
        for stream in streams:
            stream.drain(timeout=60)
        assert [stream.statistics().published for stream in streams] == [FRAMES] * count
        kill_half(others)
        domain.sweep()
        left = sum(len(part) for part in parts[HOLDERS // 2 :])
        assert sum(len(stream.info()["readers"]) for stream in streams) == left
        for other in others[HOLDERS // 2 :]:
            other.send()
            assert other.result() > 0
        assert sum(len(stream.info()["readers"]) for stream in streams) == 0
    assert domain.shm.stream_list() == []


def kill_half(others: list[Child]) -> None:
    for other in others[: HOLDERS // 2]:
        other.kill()


# ---- growth ----


def one_life() -> None:
    """Make a stream, use it in each way, and close it."""
    with Stream.create("grows", shape=(8, 8), dtype="uint8", buffers=6) as stream, Stream.open("grows") as other:
        readers: list[StreamReader] = [other.reader(**kind) for kind in KINDS]
        readers[1].fileno()
        for _ in range(4):
            with stream.produce(timeout=1) as frame:
                frame.array()[:] = 7
                frame.meta = {"n": frame.seq}
            for reader in readers:
                got = reader.next(timeout=1)
                assert (got.array().sum(), got.meta) == (7 * 64, {"n": got.seq})
        with stream.produce(timeout=1) as frame:
            frame.discard()
        for buf in stream.bufs:
            with buf.export_sync_file(write=True) as file:
                file.fileno()
            with buf.read(timeout=1):
                pass
    with Stream.create(size=4096, buffers=2) as idle:
        idle.reader().fileno()  # one that nobody closes
        with idle.reader("latest") as reader:
            reader.fileno()


class Held:
    """What a process and its domain hold."""

    def __init__(self, domain: Domain) -> None:
        gc.collect()
        self.descriptors = descriptors()
        shm = domain.shm
        until(lambda: not shm.rec_orphans())
        self.file = os.fstat(domain.fileno()).st_size
        self.chunks = shm.load32(_native.OFF_NCHUNKS)
        self.records = len(shm.rec_list())
        self.objects = len(gc.get_objects())
        self.resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def grow(count: int) -> tuple[Held, Held]:
    """Return what is held after so many lives, and after ten times as many more."""
    domain = Domain.default()
    for _ in range(count):
        one_life()
    before = Held(domain)
    for _ in range(10 * count):
        one_life()
    return before, Held(domain)


def test_streams_that_come_and_go_take_no_more_with_time(apart: Apart) -> None:
    count = times(quick=12, full=40)
    before, after = apart(grow, count)
    assert (after.descriptors, after.file, after.chunks, after.records) == (
        before.descriptors,
        before.file,
        before.chunks,
        before.records,
    )
    assert after.objects - before.objects < count, "an object of each stays"
    assert after.resident - before.resident < 1 << 20


def frames(count: int) -> tuple[Held, Held]:
    domain = Domain.default()
    with Stream.create("long", size=4096) as stream, Stream.open("long") as other, ExitStack() as stack:
        readers = [stack.enter_context(other.reader(**kind)) for kind in KINDS]

        def some(count: int) -> None:
            for _ in range(count):
                number = put(stream, 1)
                for reader in readers:
                    assert reader.next(timeout=1).seq == number

        some(count)
        before = Held(domain)
        some(10 * count)
        return before, Held(domain)


def test_frames_take_nothing(apart: Apart) -> None:
    count = times(quick=1000, full=20_000)
    before, after = apart(frames, count)
    assert (after.descriptors, after.file, after.records) == (before.descriptors, before.file, before.records)
    assert after.objects - before.objects < 100
    assert after.resident - before.resident < 1 << 20


def test_readers_that_die_take_nothing(child: Spawn) -> None:
    """Their places, slots and records are used again."""
    domain = Domain.default()
    with Stream.create(name_of(0), size=4096, buffers=4) as stream:

        def some(count: int) -> tuple[int, int, int]:
            for _ in range(count):
                other = child(dies, name_of(0))
                assert other.recv() == "here"
                put(stream, 1)
                assert other.recv() == 1
                other.kill()
                other.close()
                domain.sweep()
            assert stream.info()["readers"] == []
            return os.fstat(domain.fileno()).st_size, domain.shm.load32(_native.OFF_NCHUNKS), len(domain.shm.rec_list())

        some(2)
        assert some(times(quick=3, full=15)) == some(times(quick=9, full=150))


def dies(parent: Parent, name: str) -> None:
    with Stream.open(name) as stream, stream.reader(newest=False) as reader, stream.reader("latest") as latest:
        parent.send("here")
        kept = reader.next(timeout=60).keep(), latest.next(timeout=60)
        parent.send(content(kept[0]))
        parent.recv()


# ---- the most that there can be ----


def test_stream_of_32_readers_in_as_many_processes_reads_every_frame(child: Spawn) -> None:
    processes, each = 8, 4
    with Stream.create(name_of(1), size=4096, buffers=3) as stream:
        others = [child(reads, name_of(1), each) for _ in range(processes)]
        for other in others:
            assert other.recv() == "here"
        assert len(stream.info()["readers"]) == _native.STREAM_READERS == processes * each
        count = times(quick=20, full=500)
        for number in range(count):
            put_waiting(stream, number)
        stream.close()
        assert [other.result() for other in others] == [[count] * each] * processes


def put_waiting(stream: Stream, number: int) -> None:
    with stream.produce(timeout=60) as frame:
        frame.view[0] = number & 255


def reads(parent: Parent, name: str, count: int) -> list[int]:
    with Stream.open(name) as stream, ExitStack() as stack:
        readers = [stack.enter_context(stream.reader()) for _ in range(count)]
        parent.send("here")
        seen = [0] * count
        while True:
            for k, reader in enumerate(readers):
                frame = next(reader, None)
                if frame is None:
                    return seen
                assert content(frame) == (frame.seq - 1) & 255
                frame.release()
                seen[k] += 1
