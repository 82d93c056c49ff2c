"""Access across processes in many rounds: no torn read, nobody starved, nothing lost."""

import threading

import dmabuf
from dmabuf import DmaBuf
from tests.support.children import Parent, Spawn
from tests.support.fences import keys
from tests.support.waiting import Background

ROUNDS = 10_000
WORDS = 2048


def writes_patterns(parent: Parent, rounds: int) -> int:
    """The number of the round in every word, in two halves, so that a read in between would see both."""
    (buf,) = dmabuf.recv(parent.sock)
    parent.recv()
    for number in range(1, rounds + 1):
        word = number.to_bytes(8, "little") * (WORDS // 2)
        with buf.write() as view:
            view[: len(word)] = word
            view[len(word) :] = word
    return rounds


def reads_patterns(parent: Parent, last: int) -> int:
    """Until the last round: each read is one number, never smaller than the one before."""
    (buf,) = dmabuf.recv(parent.sock)
    parent.recv()
    return read_patterns(buf, last)


def read_patterns(buf: DmaBuf, last: int) -> int:
    number = reads = 0
    while number < last:
        with buf.read() as view:
            content = bytes(view)
        assert content == content[:8] * WORDS, "a torn read"
        now = int.from_bytes(content[:8], "little")
        assert now >= number
        number = now
        reads += 1
    return reads


def test_ten_thousand_rounds_without_a_torn_read(child: Spawn) -> None:
    with dmabuf.allocate(WORDS * 8) as buf:
        writer = child(writes_patterns, ROUNDS)
        readers = [child(reads_patterns, ROUNDS) for _ in range(3)]
        for other in (writer, *readers):
            dmabuf.send(other.sock, buf)
        for other in (*readers, writer):
            other.send("go")
        assert writer.result() == ROUNDS
        assert all(reader.result() > 0 for reader in readers)
        assert keys(buf.resv) == []


def reads_patterns_in_two_threads(parent: Parent, last: int) -> list[int]:
    (buf,) = dmabuf.recv(parent.sock)
    parent.recv()
    with Background(lambda: read_patterns(buf, last)) as one, Background(lambda: read_patterns(buf, last)) as two:
        return [one.result(), two.result()]


def test_two_threads_of_one_process_read_while_another_process_writes(child: Spawn) -> None:
    rounds = 2000
    with dmabuf.allocate(WORDS * 8) as buf:
        writer, reader = child(writes_patterns, rounds), child(reads_patterns_in_two_threads, rounds)
        for other in (writer, reader):
            dmabuf.send(other.sock, buf)
        reader.send("go")
        writer.send("go")
        assert writer.result() == rounds
        assert min(reader.result()) > 0


def reads_until_told(parent: Parent, stop: int) -> int:
    """Reads without a pause until the first byte says stop."""
    (buf,) = dmabuf.recv(parent.sock)
    reads = 0
    parent.send("ready")
    while True:
        with buf.read() as view:
            reads += 1
            if view[0] == stop:
                return reads


def test_a_writer_gets_its_turns_among_readers_that_never_pause(child: Spawn, buf: DmaBuf) -> None:
    readers = [child(reads_until_told, 255) for _ in range(3)]
    for reader in readers:
        dmabuf.send(reader.sock, buf)
        assert reader.recv() == "ready"
    for number in range(1, 256):
        with buf.write() as view:
            view[0] = number
    assert all(reader.result() > 0 for reader in readers)


def test_threads_and_processes_write_one_number(child: Spawn, buf: DmaBuf) -> None:
    others = [child(adds, 300) for _ in range(2)]
    for other in others:
        dmabuf.send(other.sock, buf)
    threads = [threading.Thread(target=add, args=(buf, 300)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for other in others:
        other.result()
    with buf.read() as view:
        assert int.from_bytes(view[:8], "little") == 1200


def add(buf: DmaBuf, rounds: int) -> None:
    for _ in range(rounds):
        with buf.write() as view:
            view[:8] = (int.from_bytes(view[:8], "little") + 1).to_bytes(8, "little")


def adds(parent: Parent, rounds: int) -> None:
    (buf,) = dmabuf.recv(parent.sock)
    add(buf, rounds)


def count_both(parent: Parent, rounds: int, swapped: bool) -> None:
    """Adds 1 to two buffers that are always equal, taken in one order or the other."""
    bufs = dmabuf.recv(parent.sock)
    for _ in range(rounds):
        with dmabuf.access(write=bufs[::-1] if swapped else bufs) as views:
            numbers = {int.from_bytes(view[:8], "little") for view in views}
            assert len(numbers) == 1
            for view in views:
                view[:8] = (numbers.copy().pop() + 1).to_bytes(8, "little")


def read_one_write_the_other(parent: Parent, rounds: int, swapped: bool) -> None:
    bufs = dmabuf.recv(parent.sock)
    source, target = bufs[::-1] if swapped else bufs
    for _ in range(rounds):
        with dmabuf.access(read=[source], write=[target]) as (read, write):
            write[:8] = (int.from_bytes(read[:8], "little") + 1).to_bytes(8, "little")


def test_access_in_opposite_orders_never_deadlocks(child: Spawn, buf: DmaBuf, other_buf: DmaBuf) -> None:
    others = [child(count_both, 300, swapped) for swapped in (False, True, False)]
    for other in others:
        dmabuf.send(other.sock, buf, other_buf)
    for other in others:
        other.result()
    with dmabuf.access(read=[buf, other_buf]) as views:
        assert [int.from_bytes(view[:8], "little") for view in views] == [900, 900]


def test_access_that_reads_what_the_other_writes_never_deadlocks(child: Spawn, buf: DmaBuf, other_buf: DmaBuf) -> None:
    others = [child(read_one_write_the_other, 300, swapped) for swapped in (False, True)]
    for other in others:
        dmabuf.send(other.sock, buf, other_buf)
    for other in others:
        other.result()
    assert keys(buf.resv) == keys(other_buf.resv) == []
