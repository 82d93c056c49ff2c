"""Fences that anybody may end, and those that a sync file's descriptor waits for, in the C extension."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator

import pytest

import dmabuf
from dmabuf import _native

ANYBODY = _native.FF_ANYBODY
GARBAGE = [0, 1, (1 << 64) - 1, 1 << 24, 0x3FFFFF, 0xFFFFFFFF00000000]


@pytest.fixture
def shm() -> Iterator[_native.Shm]:
    domain = dmabuf.Domain.private()
    yield domain.join()
    domain.leave()


def fence(shm: _native.Shm, flags: int = 0) -> int:
    return shm.fence_alloc(0, 1, 1, flags, 0, 0)


def rung(shm: _native.Shm, answer: bool) -> list[int]:
    seen: list[int] = []

    def on_sync(handle: int) -> bool:
        seen.append(handle)
        return answer

    shm.on_sync = on_sync
    return seen


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
    assert shm.fence_watch_sync(handle) is False


def test_a_slot_that_was_used_again_is_not(shm: _native.Shm) -> None:
    handle = fence(shm, ANYBODY)
    shm.fence_signal(handle, 0, True)
    later = [fence(shm, ANYBODY) for _ in range(_native.FENCES_PER * 2)]
    assert any(one & _native.SLOT_MASK == handle & _native.SLOT_MASK for one in later)
    assert shm.fence_end_any(handle, 0) is False
    assert all(map(shm.fence_pending, later))
    for one in later:
        shm.fence_signal(one, 0, True)


@pytest.mark.parametrize("answer", [True, False])
def test_who_ends_a_marked_fence_rings_and_clears_the_mark_when_it_is_done(shm: _native.Shm, answer: bool) -> None:
    seen = rung(shm, answer)
    handle = fence(shm)
    assert shm.fence_watch_sync(handle) is True
    shm.fence_signal(handle, 0, False)
    assert seen == [handle]
    assert marked(shm, handle) is not answer
    shm.fence_signal(handle, 0, True)


def test_an_unmarked_fence_rings_nothing(shm: _native.Shm) -> None:
    seen = rung(shm, True)
    shm.fence_signal(fence(shm), 0, True)
    assert seen == []


def test_a_mark_after_the_end_is_told_so(shm: _native.Shm) -> None:
    handle = fence(shm)
    shm.fence_signal(handle, 0, False)
    assert shm.fence_watch_sync(handle) is False
    shm.fence_signal(handle, 0, True)


@pytest.mark.parametrize("ended", [True, False], ids=["ended", "pending"])
def test_the_reaper_rings_what_is_marked(shm: _native.Shm, ended: bool) -> None:
    handle = fence(shm)
    shm.fence_watch_sync(handle)
    if ended:
        rung(shm, False)
        shm.fence_signal(handle, 0, False)
    seen = rung(shm, True)
    shm.reap_fences((handle & _native.SLOT_MASK) // _native.FENCES_PER, -errno.EOWNERDEAD)
    assert (seen, marked(shm, handle)) == ([handle], False)
    assert _native.Fence(shm, handle).status == (1 if ended else -errno.EOWNERDEAD)


def test_a_ring_that_raises_is_reported_and_leaves_the_mark(shm: _native.Shm, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[type[BaseException]] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda what: told.append(what.exc_type))

    def on_sync(_: int) -> bool:
        raise KeyError("ring")

    shm.on_sync = on_sync
    handle = fence(shm)
    shm.fence_watch_sync(handle)
    shm.fence_signal(handle, 0, False)
    # Tried once more: what raised may have been a signal's handler.
    assert (told, shm.fence_pending(handle), marked(shm, handle)) == ([KeyError, KeyError], False, True)
    rung(shm, True)
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
