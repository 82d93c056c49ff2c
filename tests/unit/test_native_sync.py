"""Fences that anybody may end, and those that a sync file's descriptor waits for, in the C extension."""

from __future__ import annotations

import errno
import select
from collections.abc import Iterator
from typing import Any

import pytest

import dmabuf
from dmabuf import SyncFile, Timeline, _native
from tests.support.errnos import raises_errno
from tests.support.sync_files import polled

ANYBODY = _native.FF_ANYBODY
GARBAGE = [0, 1, (1 << 64) - 1, 1 << 24, 0x3FFFFF, 0xFFFFFFFF00000000]


@pytest.fixture
def domain() -> Iterator[dmabuf.Domain]:
    made = dmabuf.Domain.private()
    made.join()
    yield made
    made.leave()


@pytest.fixture
def shm(domain: dmabuf.Domain) -> _native.Shm:
    return domain.shm


def fence(shm: _native.Shm, flags: int = 0) -> int:
    return shm.fence_alloc(0, 1, 1, flags, 0, 0)


def marked(shm: _native.Shm, handle: int) -> bool:
    info = shm.fence_info(handle)
    assert info is not None
    return bool(info["sync"])


@pytest.mark.parametrize("error", [0, -errno.ENOENT])
def test_a_fence_of_anybodys_is_ended_once(shm: _native.Shm, error: int) -> None:
    handle = fence(shm, ANYBODY)
    assert shm.fence_end_any(handle, error) is True
    assert shm.fence_end_any(handle, error) is False
    assert _native.Fence(shm, handle).status == (error or 1)


def test_a_fence_of_its_owners_alone_is_not(shm: _native.Shm) -> None:
    handle = fence(shm)
    assert shm.fence_end_any(handle, 0) is False
    assert shm.fence_pending(handle)
    shm.fence_signal(handle, 0, True)


@pytest.mark.parametrize("handle", GARBAGE)
def test_no_fence_is_not(shm: _native.Shm, handle: int) -> None:
    assert shm.fence_end_any(handle, 0) is False


def test_a_slot_that_was_used_again_is_not(shm: _native.Shm) -> None:
    handle = fence(shm, ANYBODY)
    shm.fence_signal(handle, 0, True)
    later = [fence(shm, ANYBODY) for _ in range(_native.FENCES_PER * 2)]
    assert any(one & _native.SLOT_MASK == handle & _native.SLOT_MASK for one in later)
    assert shm.fence_end_any(handle, 0) is False
    assert all(map(shm.fence_pending, later))
    for one in later:
        shm.fence_signal(one, 0, True)


def test_signaler_makes_readable_and_clears_the_mark(domain: dmabuf.Domain) -> None:
    with Timeline(domain=domain) as timeline, SyncFile(fence := timeline.fence()) as sf:
        assert (polled(sf), marked(domain.shm, fence.handle)) == (0, True)
        fence.signal()
        assert (polled(sf), marked(domain.shm, fence.handle)) == (select.POLLIN, False)


def test_reaper_makes_readable_and_clears_the_mark(domain: dmabuf.Domain) -> None:
    with Timeline(domain=domain) as timeline, SyncFile(fence := timeline.fence()) as sf:
        sf.fileno()
        domain.shm.life_leave(lambda _: None)  # as a reaper ends a life
        assert (polled(sf), marked(domain.shm, fence.handle)) == (select.POLLIN, False)
        assert sf.status == -errno.EOWNERDEAD


@pytest.mark.parametrize(("slots", "leaves"), [((), ()), ((0,), ())], ids=["no fence", "a slot too many"])
def test_sync_file_without_a_slot_for_each_fence_is_valueerror(shm: _native.Shm, slots: tuple[int, ...], leaves: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match="one slot for each fence"):
        shm.sync_make(shm.chunk_claim(_native.CH_SYNC) * _native.SYNC_PER, slots, b"", leaves)


def test_sync_file_in_a_slot_of_another_life_is_euclean(shm: _native.Shm) -> None:
    mine = shm.chunk_claim(_native.CH_SYNC) * _native.SYNC_PER, shm.chunk_claim(_native.CH_LEAF) * _native.SYNC_PER
    handle = fence(shm)
    leaf = (handle, 1, 1, 0, 0, 0, b"", b"")
    entry = _native.OFF_CHUNKTAB + 8 * (mine[0] // _native.SYNC_PER)
    shm.store64(entry, shm.load64(entry) & 0xFFFFFFFF)  # nobody's
    with raises_errno(errno.EUCLEAN):
        shm.sync_make(mine[0], (mine[1],), b"", (leaf,))
    shm.fence_signal(handle, 0, True)


def test_chunk_of_a_dead_life_has_slots_but_those_in_use(shm: _native.Shm) -> None:
    """The next owner of the chunks asks for each slot whether some process has the descriptor."""
    heads, leaves = shm.chunk_claim(_native.CH_SYNC), shm.chunk_claim(_native.CH_LEAF)
    slots = heads * _native.SYNC_PER, leaves * _native.SYNC_PER
    handle = fence(shm)
    leaf = (handle, 1, 1, 0, 0, 0, b"", b"")
    kept, gen = shm.sync_make(slots[0] + 5, (slots[1] + 1, slots[1] + 2), b"", (leaf, leaf))
    closed, _ = shm.sync_make(slots[0] + 6, (slots[1] + 3,), b"", (leaf,))
    closed.close()
    assert set(range(slots[0], slots[0] + _native.SYNC_PER)) - set(shm.sync_slots(heads)) == {slots[0] + 5}
    assert set(range(slots[1], slots[1] + _native.SYNC_PER)) - set(shm.sync_slots(leaves)) == {slots[1] + 1, slots[1] + 2}
    kept.close()
    assert (len(shm.sync_slots(heads)), len(shm.sync_slots(leaves))) == (_native.SYNC_PER, _native.SYNC_PER)
    assert not shm.sync_exists(slots[0] + 5, gen)
    shm.fence_signal(handle, 0, True)


@pytest.mark.parametrize(("given", "status", "error"), [(1, 1, 0), (-5, -5, -5), (0, 1, 0), (7, 1, 0), (-5000, 1, 0)])
def test_a_past_fence_takes_the_end_that_somebody_saw(shm: _native.Shm, given: int, status: int, error: int) -> None:
    handle = fence(shm)
    shm.fence_signal(handle, 0, True)
    again = [fence(shm) for _ in range(_native.FENCES_PER * 2)]
    seen = _native.Fence(shm, handle, False, 3, 4, 0, given, 99)
    assert (seen.status, seen.error, seen.context, seen.seqno) == (status, error, 3, 4)
    assert seen.timestamp == (99 if given in (1, -5) else 0)
    for one in again:
        shm.fence_signal(one, 0, True)


def test_a_fence_whose_slot_tells_is_not_told_another_end(shm: _native.Shm) -> None:
    handle = fence(shm)
    assert _native.Fence(shm, handle, False, 3, 4, 0, -5, 99).status == 0
    shm.fence_signal(handle, 0, True)
