"""`dmabuf ls` and `dmabuf info` of streams, from processes that have no part in them."""

import contextlib
import os
import random
from collections.abc import Iterator
from typing import Any

import pytest

import dmabuf
from dmabuf import Stream
from dmabuf._native import HEADER_BYTES
from dmabuf.observe.records import snapshots
from dmabuf.observe.streams import streams_of
from tests.cli.conftest import Run
from tests.cli.test_ls import LS, PROCESS, STREAM, fits
from tests.support.apart import Apart
from tests.support.children import Parent, Spawn
from tests.support.namespaces import program
from tests.support.waiting import until

READER = {
    "process": PROCESS,
    "role": str,
    "group": (str, type(None)),
    "redelivers": bool,
    "seen": int,
    "lag": int,
    "lost": int,
    "holds": [int],
}
SLOT = {"slot": int, "ino": (int, type(None)), "seq": int, "state": str, "foreign": bool, "held_by": [int], "promised_to": [int]}


@pytest.fixture
def stream() -> Iterator[Stream]:
    with Stream.create("lobby", shape=(4, 6), dtype="uint8", buffers=3) as made:
        yield made


def put(stream: Stream) -> None:
    with stream.produce(timeout=0):
        pass


def found(run: Run, name: str = "lobby") -> Any:
    return run("info", name, "--json").json["stream"]


def producer(parent: Parent, name: str) -> None:
    dmabuf.label("maker")
    with Stream.open(name) as stream:
        put(stream)
        put(stream)
        with stream.produce(timeout=0):
            parent.send("here")
            parent.recv()


def reader(parent: Parent, name: str) -> None:
    dmabuf.label("watcher")
    with Stream.open(name) as stream, stream.reader() as frames:
        parent.send("here")
        parent.recv()
        frame = frames.next(timeout=0)
        parent.send(frame.seq)
        parent.recv()


def test_ls_lists_a_stream_and_marks_its_buffers(run: Run, stream: Stream, child: Spawn) -> None:
    process = child(producer, "lobby")
    assert process.recv() == "here"
    with stream.reader("latest", newest=False):
        ran = run("ls")
        own = stream.ring.own
        assert ran.lines[0].startswith("1 stream, 4 buffers, ")
        assert ran.lines[2].split() == ["INO", "STREAM", "FRAMES", "READERS", "LAG", "PRODUCER"]
        assert ran.lines[3].split() == [str(os.fstat(own.fileno()).st_ino), "lobby", "2", "1", "0", "maker", str(process.pid)]
        assert "3 slots of 4.0 KiB (uint8 (4, 6)), none kept by readers, the producer waits for readers" in ran.lines[4]
        assert [sum(f"slot {k} of stream lobby" in line for line in ran.lines) for k in range(4)] == [1, 1, 1, 0]
        assert sum("memory of stream lobby" in line for line in ran.lines) == 1
    process.send("end")
    process.result()


def test_ls_json_of_a_stream(run: Run, stream: Stream, child: Spawn) -> None:
    process = child(producer, "lobby")
    assert process.recv() == "here"
    answer = run("ls", "--json").json
    assert fits(answer, LS)
    (one,) = answer["streams"]
    assert (one["name"], one["slots"], one["policy"], one["state"], one["published"]) == ("lobby", 3, "wait", "alive", 2)
    assert one["producer"] == {"pid": process.pid, "comm": "maker", "state": "running"}
    assert sorted(str(buf["stream"]["slot"]) for buf in answer["buffers"]) == ["0", "1", "2", "None"]
    assert {buf["stream"]["ino"] for buf in answer["buffers"]} == {one["ino"]}
    process.send("end")
    process.result()


def test_dead_producer_is_told(run: Run, stream: Stream, child: Spawn) -> None:
    process = child(producer, "lobby")
    assert process.recv() == "here"
    process.kill()
    assert "died" in run("ls").lines[3]
    one = found(run)
    assert (one["producer"], one["state"], one["published"]) == (None, "died", 2)
    assert sorted(slot["state"] for slot in one["slots"]) == ["torn", "written", "written"]


def test_info_shows_each_slot_and_each_reader(run: Run, stream: Stream, child: Spawn) -> None:
    process = child(reader, "lobby")
    assert process.recv() == "here"
    put(stream)
    put(stream)
    process.send("take")
    assert process.recv() == 1
    with stream.reader("latest") as latest, stream.reader(group="g", group_redeliver=True):
        frame = latest.next(timeout=0).keep()
        one = found(run)
        assert fits(one, STREAM | {"readers": [READER], "slots": [SLOT]})
        slots = [(slot["seq"], slot["state"], slot["held_by"], slot["promised_to"]) for slot in one["slots"]]
        me, other = os.getpid(), process.pid
        assert slots == [(1, "written", [], [other]), (2, "written", [me], [other, me]), (0, "empty", [], [])]
        readers = [(one["process"]["comm"], one["role"], one["lag"], one["lost"], one["holds"]) for one in one["readers"]]
        assert readers[0] == ("watcher", "queue", 2, 0, [])
        assert [each[1:] for each in readers[1:]] == [("latest", 0, 0, [1]), ("group", 1, 0, [])]
        text = run("info", "lobby").out
        assert "held by" in text
        assert "kept for watcher" in text
        assert "redelivers" in text
        frame.release()
    process.send("end")
    process.result()


PRODUCE = """
import dmabuf
dmabuf.label("camera")
with dmabuf.Stream.create("lobby", size=4096) as stream, stream.reader("latest"):
    with stream.produce():
        print("here", flush=True)
        input()
"""


def test_processes_of_a_container_are_shown_as_such(run: Run) -> None:
    with program(PRODUCE) as container:
        assert container.line() == "here"
        one = found(run)
        there = {"pid": one["producer"]["pid"], "comm": "camera", "state": "elsewhere"}
        assert (one["producer"], [each["process"] for each in one["readers"]]) == (there, [there])
        assert "(in another PID namespace)" in run("ls").lines[3]
        assert "(in another PID namespace)" in run("info", "lobby").lines[-1]


def test_latest_reader_that_was_skipped_shows_what_it_lost(run: Run, stream: Stream) -> None:
    with stream.reader("latest") as latest:
        for _ in range(3):
            put(stream)
        latest.next(timeout=0).release()
        (one,) = found(run)["readers"]
        assert (one["lost"], one["seen"], one["lag"]) == (2, 3, 0)


def test_stopped_reader_is_shown_as_such_and_stops_nobody(run: Run, stream: Stream, child: Spawn) -> None:
    process = child(reader, "lobby")
    assert process.recv() == "here"
    process.stop()
    (one,) = found(run)["readers"]
    assert one["process"] == {"pid": process.pid, "comm": "watcher", "state": "stopped"}
    assert "watcher " + str(process.pid) + " (stopped)" in run("info", "lobby").out
    process.resume()
    put(stream)
    process.send("take")
    assert process.recv() == 1
    process.send("end")
    process.result()


def test_stream_without_a_name_is_found_by_its_inode(run: Run) -> None:
    with Stream.create(size=4096, when_full="drop"):
        (one,) = run("ls", "--json").json["streams"]
        assert (one["name"], one["policy"], one["layout"], one["state"]) == (None, "drop", None, "none yet")
        text = run("info", str(one["ino"])).out
        assert "readers may miss frames" in text
        assert "No readers." in text
        assert f"slot 0 of stream {one['ino']}" in run("ls").out


def test_info_of_a_slot_shows_the_buffer_and_its_slot(run: Run, stream: Stream) -> None:
    ino = str(os.fstat(stream.bufs[1].fileno()).st_ino)
    ran = run("info", ino)
    assert "slot 1 of stream lobby" in ran.out
    assert "accesses" in ran.out


def test_info_of_a_buffer_of_no_stream_has_none(run: Run) -> None:
    with dmabuf.allocate(4096, name="plain"):
        assert run("info", "plain", "--json").json["stream"] is None
        assert run("ls", "--json").json["streams"] == []


def test_looker_that_has_no_part_in_it_takes_no_place(script: Run, stream: Stream) -> None:
    put(stream)
    ran = script("info", "lobby")
    assert ran.status == 0
    assert "1 published" in ran.out
    assert stream.info()["readers"] == []
    assert [one.name for one in dmabuf.streams()] == ["lobby"]


def test_dead_member_whose_frame_waits_is_shown(run: Run, stream: Stream, child: Spawn) -> None:
    with stream.reader(group="g", group_redeliver=True):
        process = child(member, "lobby")
        assert process.recv() == "here"
        put(stream)
        process.send("take")
        assert process.recv() == 1
        process.kill()
        until(lambda: {one["process"]["state"] for one in found(run)["readers"]} == {"running", "ended"})
        assert "a process that has ended" in run("info", "lobby").out


def member(parent: Parent, name: str) -> None:
    with Stream.open(name) as stream, stream.reader(group="g", group_redeliver=True) as frames:
        parent.send("here")
        parent.recv()
        parent.send(frames.next(timeout=0).seq)
        parent.recv()


def busy(parent: Parent, name: str) -> None:
    """Make frames and places come and go until told to end."""
    with Stream.open(name) as stream:
        while not parent.has_sent():
            with stream.reader("latest") as frames:
                put(stream)
                frames.next(timeout=0)


def test_records_of_a_busy_stream_are_whole(stream: Stream, child: Spawn) -> None:
    process = child(busy, "lobby")
    until(lambda: stream.info()["published"] > 10)
    domain = dmabuf.Domain.default()
    seen = snapshots(domain)
    for _ in range(500):
        (one,) = streams_of(domain, seen)
        for slot in one.slots:
            assert slot.state in ("empty", "written", "writing")
            assert (slot.seq == 0) == (slot.state == "empty") or slot.state == "writing"
        for each in one.readers:
            assert each.role == "latest"
            assert each.process.pid == process.pid
            assert each.lost <= 1
    process.send("end")
    process.result()


def look_at_damage(seeds: list[int]) -> None:
    for seed in seeds:
        rng = random.Random(seed)
        with contextlib.suppress(OSError), Stream.create("damaged", size=4096, buffers=3) as stream:
            put(stream)
            at = HEADER_BYTES + stream.ring.stream * 8192
            for _ in range(rng.choice([1, 5, 100])):
                stream.domain.shm.store64(
                    at + 8 * rng.randrange(8192 // 8), rng.choice([0, 1, 1 << 32, (1 << 64) - 1, rng.getrandbits(64)])
                )
            with contextlib.suppress(OSError):
                for one in dmabuf.streams():
                    assert len(one.slots) <= 64
                    assert len(one.readers) <= 32


def test_damaged_stream_is_shown_as_far_as_it_makes_sense(apart: Apart) -> None:
    first = random.randrange(1 << 30)
    print(f"seeds from {first} on")
    apart(look_at_damage, list(range(first, first + 20)))
