"""What the table says of a slot is of one use of it, however often others give the slot to something new while it is read."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from dmabuf import _native
from dmabuf.domain.domain import Domain
from tests.support.children import Child, Parent, Spawn

ROUNDS = 10_000


def until_it_returns(other: Child) -> Iterator[None]:
    """One step after the other, for as long as the child's function runs."""
    waiting = threading.Thread(target=other.result)
    waiting.start()
    try:
        while waiting.is_alive():
            yield
    finally:
        waiting.join()
    assert other.result() is None


def _number(data: bytes) -> int:
    return int(data or b"0")


def open_timelines(parent: Parent, rounds: int) -> None:
    shm = Domain.default().join()
    index = shm.chunk_claim(_native.CH_TIMELINE) * _native.TIMELINES_PER
    parent.send(index)
    for k in range(1, rounds + 1):
        shm.timeline_open(index, k, b"%d" % k * 8, b"%d" % k * 8)
        shm.timeline_close(index)


def make_records(parent: Parent, rounds: int) -> None:
    shm = Domain.default().join()
    for k in range(1, rounds + 1):
        index, gen, _ = shm.rec_create(0, k, k, k.to_bytes(16, "little"), b"%d" % k, b"%d" % k, b"%d" % k, 0, k, k)
        if k == 1:
            parent.send(index)
        shm.rec_put(index)
        assert shm.rec_free(index, gen)


def test_a_timelines_names_are_those_of_its_context(child: Spawn) -> None:
    shm = Domain.default().join()
    other = child(open_timelines, ROUNDS)
    index = other.recv()
    for _ in until_it_returns(other):
        found = shm.timeline_info(index)
        assert found is not None
        _, is_open, context, _, driver, name = found
        if is_open:
            assert (driver, name) == (b"%d" % context * 8,) * 2
    assert shm.timeline_info(index)[1:3] == (0, ROUNDS)


def test_a_records_parts_are_those_of_one_buffer(child: Spawn) -> None:
    shm = Domain.default().join()
    other = child(make_records, ROUNDS)
    index = other.recv()
    for _ in until_it_returns(other):
        found = shm.rec_info(index)
        if found is not None:
            k = found["ino"]
            assert (found["size"], found["created"], found["pid"]) == (k, k, k)
            assert int.from_bytes(found["nonce"], "little") == k
            assert [_number(found[part]) for part in ("exp_name", "home", "name")] == [k] * 3
            again = shm.rec_find(0, k)
            assert again is None or int.from_bytes(again[2], "little") == k
    assert shm.rec_info(index) is None
