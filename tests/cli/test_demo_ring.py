"""The protocol of `dmabuf demo`'s rings, without a video: order, exclusion, and the end of a peer."""

import errno
import os
import threading

import pytest

import dmabuf
from dmabuf.cli.demo_pipeline.ring import PeerEnded, Port, find, get_header, put_header
from tests.support.children import Parent, Spawn
from tests.support.partners import handed
from tests.support.waiting import Background

FRAMES = 300
BYTES = 2 * 4096


@pytest.fixture
def slots(request):
    made = [dmabuf.allocate(BYTES) for _ in range(getattr(request, "param", 3))]
    yield made
    for buf in made:
        buf.close()


def write_all(port: Port, frames: int) -> None:
    for n in range(frames):
        slot = port.acquire(n)
        with slot.write() as view:
            put_header(view, n, slot.ino)
            view[4096:] = bytes([n % 251]) * 4096
        port.release(n)


def read_all(port: Port, frames: int) -> list[int]:
    seen = []
    for n in range(frames):
        slot = port.acquire(n)
        with slot.read() as view:
            seen.append(get_header(view, n).n)
            assert bytes(view[4096:]) == bytes([n % 251]) * 4096
        port.release(n)
    return seen


@pytest.mark.parametrize("slots", [1, 2, 3], indirect=True)
def test_every_reader_sees_every_frame_once_and_in_order(slots):
    names = ("one", "two", "three")
    writer = Port(slots, "writer", names, writes=True)
    readers = [Port(slots, name, ("writer",), writes=False) for name in names]
    for port in (writer, *readers):
        port.look()
    with Background(lambda: read_all(readers[0], FRAMES)) as one, Background(lambda: read_all(readers[1], FRAMES)) as two:
        with Background(lambda: read_all(readers[2], FRAMES)) as three:
            write_all(writer, FRAMES)
            assert one.result() == two.result() == three.result() == list(range(FRAMES))
    for port in (writer, *readers):
        port.close()


def test_third_program_never_reads_half_a_frame(slots):
    writer, reader = Port(slots, "writer", ("reader",), writes=True), Port(slots, "reader", ("writer",), writes=False)
    writer.look()
    reader.look()
    over = threading.Event()

    def look_on() -> int:
        looks = 0
        while not looks or not over.is_set():
            with slots[0].read() as view:
                assert len(set(bytes(view[4096:]))) == 1
            looks += 1
        return looks

    with Background(lambda: read_all(reader, FRAMES)) as job, Background(look_on) as stranger:
        write_all(writer, FRAMES)
        job.result()
        over.set()
        assert stranger.result() > 0
    writer.close()
    reader.close()


def test_slot_always_has_a_pending_fence_of_every_stage(slots):
    writer, reader = Port(slots, "writer", ("reader",), writes=True), Port(slots, "reader", ("writer",), writes=False)
    writer.look()
    reader.look()
    over = threading.Event()

    def look_on() -> None:
        while not over.is_set():
            assert all(find(slot, name) is not None for slot in slots for name in ("writer", "reader"))

    with Background(lambda: read_all(reader, FRAMES)) as job, Background(look_on) as observer:
        write_all(writer, FRAMES)
        job.result()
        over.set()
        observer.result()
    writer.close()
    reader.close()


def test_a_reader_waits_for_a_frame_that_is_not_written_yet(slots):
    writer, reader = Port(slots, "writer", ("reader",), writes=True), Port(slots, "reader", ("writer",), writes=False)
    writer.look()
    reader.look()
    with Background(lambda: read_all(reader, 1)) as job:
        job.until_blocked()
        assert not job.done
        write_all(writer, 1)
        assert job.result() == [0]
    assert (reader.waits, writer.waits) == (1, 0)
    assert reader.wait_ns > 0
    writer.close()
    reader.close()


def test_a_writer_waits_for_the_slowest_reader(slots):
    names = ("fast", "slow")
    writer = Port(slots, "writer", names, writes=True)
    fast, slow = (Port(slots, name, ("writer",), writes=False) for name in names)
    for port in (writer, fast, slow):
        port.look()
    with Background(lambda: write_all(writer, len(slots) + 1)) as job:
        read_all(fast, len(slots))
        job.until_blocked()
        assert not job.done
        read_all(slow, 1)
        job.result()
    for port in (writer, fast, slow):
        port.close()


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [(-errno.ECANCELED, -errno.ECANCELED, "gave up"), (0, -errno.ENOENT, "ended early")],
    ids=["error", "close"],
)
def test_who_waits_for_a_peer_that_ends_is_told(slots, error, status, words):
    writer, reader = Port(slots, "writer", ("reader",), writes=True), Port(slots, "reader", ("writer",), writes=False)
    writer.look()
    reader.look()
    with Background(lambda: reader.acquire(0)) as job:
        job.until_blocked()
        writer.close(error)
        with pytest.raises(PeerEnded, match=f"writer {words}") as caught:
            job.result()
    assert caught.value.status == status
    reader.close()


def test_frames_written_before_the_writer_ended_are_read_first(slots):
    writer, reader = Port(slots, "writer", ("reader",), writes=True), Port(slots, "reader", ("writer",), writes=False)
    writer.look()
    reader.look()
    write_all(writer, 2)
    writer.close(-errno.ECANCELED)
    assert read_all(reader, 2) == [0, 1]
    with pytest.raises(PeerEnded):
        reader.acquire(2)
    reader.close()


def a_writer(parent: Parent) -> None:
    slots = dmabuf.recv(parent.sock)
    writer = Port(slots, "writer", ("reader",), writes=True)
    parent.send()
    parent.recv()
    writer.look()
    write_all(writer, 2)
    with writer.acquire(2).write() as view:
        view[4096:] = b"half" * 1024
        parent.send()
        parent.recv()


@pytest.mark.crash
def test_killed_writer_ends_its_reader_after_the_whole_frames(child: Spawn, slots):
    other = handed(child(a_writer), *slots)
    other.recv()
    reader = Port(slots, "reader", ("writer",), writes=False)
    reader.look()
    other.send()
    other.recv()
    assert read_all(reader, 2) == [0, 1]
    with Background(lambda: reader.acquire(2)) as job:
        job.until_blocked()
        other.kill()
        with pytest.raises(PeerEnded, match="writer died") as caught:
            job.result()
    assert caught.value.status == -errno.EOWNERDEAD
    with pytest.raises(OSError) as torn, slots[2].read():
        pass
    assert torn.value.errno == errno.EOWNERDEAD
    reader.close()


def a_reader(parent: Parent) -> None:
    slots = dmabuf.recv(parent.sock)
    reader = Port(slots, "reader", ("writer",), writes=False)
    parent.send()
    parent.recv()
    reader.look()
    parent.send()
    with reader.acquire(0).read():
        parent.send()
        parent.recv()


@pytest.mark.crash
def test_a_reader_killed_inside_a_frame_ends_its_writer(child: Spawn, slots):
    other = handed(child(a_reader), *slots)
    other.recv()
    writer = Port(slots, "writer", ("reader",), writes=True)
    writer.look()
    other.send()
    other.recv()
    write_all(writer, len(slots))
    other.recv()
    with Background(lambda: writer.acquire(len(slots))) as job:
        job.until_blocked()
        other.kill()
        with pytest.raises(PeerEnded, match="reader died"):
            job.result()
    writer.close()


def test_a_slot_that_holds_another_frame_is_an_error():
    page = memoryview(bytearray(4096))
    with pytest.raises(RuntimeError, match="frame 0 was expected, the slot holds none"):
        get_header(page, 0)
    put_header(page, 7, os.getpid(), end=True)
    assert get_header(page, 7) == (7, os.getpid(), True)
    with pytest.raises(RuntimeError, match="frame 8 was expected, the slot holds 7"):
        get_header(page, 8)
