"""A process stands still in the middle of ending or marking another's fence; meanwhile the owner dies and the slot becomes a stranger's.

Whatever the slow one does when it goes on, the stranger's fence is as if it had never been: pending, without an error, a time, a deadline
or a mark; and what was decided about the old one stays decided, in every process, whoever has died.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

import dmabuf
from dmabuf import Domain, SyncFile, _native
from dmabuf.core.fence.fence import wrap
from tests.support.steps import Held, fork, reap

pytestmark = [pytest.mark.crash]

ANYBODY = _native.FF_ANYBODY
SEQNO = 7
ENDING = ["fence_ending", "fence_error", "fence_stamped"]  # before anything; how it ends is decided; when, too
GONE = -errno.EOWNERDEAD


class Old(NamedTuple):
    """A fence of another process: what a stale handle knows of it."""

    handle: int
    context: int
    timeline: int


class Owner:
    """A child with one pending fence that anybody may end."""

    def __init__(self, domain: Domain) -> None:
        self.domain = domain
        theirs, ours = os.pipe()
        self.pid = fork(lambda: self._run(ours), lambda: os.close(theirs))
        os.close(ours)
        with os.fdopen(theirs, "rb") as f:
            self.fence = Old(*map(int, f.readline().split()))
        self.alive = True

    def _run(self, fd: int) -> None:
        shm = self.domain.join()
        slot = self.domain.timeline_open(b"test", b"old")
        handle = shm.fence_alloc(slot.index + 1, slot.context, SEQNO, ANYBODY, 0, 0)
        os.write(fd, f"{handle} {slot.context} {slot.index + 1}\n".encode())
        os.close(fd)
        signal.pause()

    def kill(self) -> None:
        if self.alive:
            os.kill(self.pid, signal.SIGKILL)
            reap(self.pid)
            self.alive = False
        self.domain.reap_dead()


@pytest.fixture
def owner(domain: Domain) -> Iterator[Owner]:
    """In a domain of its own: a stranger is to find the slot among few."""
    made = Owner(domain)
    yield made
    made.kill()


def end(owner: Owner, error: int) -> None:
    """For a child: succeeds if it was this one that ended the fence."""
    assert owner.domain.join().fence_end_any(owner.fence.handle, error)


def look(owner: Owner) -> int:
    """The end of a fence, as somebody sees it who has not looked before."""
    old = owner.fence
    return _native.Fence(owner.domain.join(), old.handle, False, old.context, SEQNO, old.timeline).status


class Stranger:
    """A fence of this process in the slot of a dead one's, with the same number on a timeline in that one's place if it can be had."""

    def __init__(self, domain: Domain, slot: int, flags: int) -> None:
        self.shm = domain.join()
        self.of = domain.timeline_open(b"test", b"stranger")
        self.timeline, self.context = self.of.index + 1, self.of.context
        self.others: list[int] = []
        while True:  # ends: what the dead one had is free, and is taken before the file grows
            self.handle = self.shm.fence_alloc(self.timeline, self.context, SEQNO, flags, 0, 0)
            if self.handle & _native.SLOT_MASK == slot:
                break
            self.others.append(self.handle)
        for handle in self.others:
            self.shm.fence_signal(handle, 0, True)

    def untouched(self) -> bool:
        info = self.shm.fence_info(self.handle)
        assert info is not None
        seen = [info[what] for what in ("pending", "error", "timestamp", "deadline", "sync")]
        return seen == [True, 0, 0, 0, False] and not self.shm.fence_shared(self.handle)

    def end(self) -> None:
        """It ends well, now, and is known for that when its slot is another's too."""
        before = time.monotonic_ns()
        assert self.shm.fence_signal(self.handle, 0, True)
        info = self.shm.fence_info(self.handle)
        assert info is not None
        assert before <= info["timestamp"] <= time.monotonic_ns()
        again = []
        while self.shm.fence_info(self.handle) is not None:
            again.append(self.shm.fence_alloc(self.timeline, self.context, SEQNO + 1, 0, 0, 0))
        for handle in again:
            self.shm.fence_signal(handle, 0, True)
        assert _native.Fence(self.shm, self.handle, False, self.context, SEQNO, self.timeline).status == 1
        self.of.close()


@pytest.mark.parametrize("flags", [0, ANYBODY], ids=["plain", "anybodys"])
@pytest.mark.parametrize("step", ENDING)
def test_who_ends_a_fence_too_late_touches_no_stranger_in_its_slot(owner: Owner, step: str, flags: int) -> None:
    with Held(lambda: end(owner, -errno.EIO), step) as slow:
        assert slow.run_to(step)
        owner.kill()
        decided = GONE if step == "fence_ending" else -errno.EIO
        assert look(owner) == decided
        stranger = Stranger(owner.domain, owner.fence.handle & _native.SLOT_MASK, flags)
        slow.go_on()
        assert slow.wait() == (1 if step == "fence_ending" else 0)
        assert stranger.untouched()
        assert look(owner) == decided
        stranger.end()
        assert look(owner) == decided


def sync_file_of(domain: Domain, handle: int) -> bool:
    with SyncFile(wrap(domain, handle)) as sf:
        return not select.select([sf], [], [], 0)[0]


MARKS: dict[str, Callable[[Domain, int], bool]] = {
    "shared": lambda domain, handle: domain.join().fence_share(handle),
    "sync": sync_file_of,
    "watched": lambda domain, handle: domain.join().fence_watch(handle),
    "deadline": lambda domain, handle: domain.join().fence_set_deadline(handle, 1),
}


@pytest.mark.parametrize("mark", MARKS)
def test_who_marks_a_fence_too_late_touches_no_stranger_in_its_slot(owner: Owner, mark: str) -> None:
    def late() -> None:
        marked = MARKS[mark](owner.domain, owner.fence.handle)
        assert not marked or mark == "deadline"  # a hint, of which nothing is promised

    with Held(late, "fence_marking") as slow:
        assert slow.run_to("fence_marking")
        owner.kill()
        stranger = Stranger(owner.domain, owner.fence.handle & _native.SLOT_MASK, 0)
        slow.go_on()
        assert slow.wait() == 0
        assert stranger.untouched()
        stranger.end()


@pytest.mark.parametrize("step", ENDING)
def test_of_two_who_end_a_fence_the_first_to_decide_is_right_for_ever(owner: Owner, step: str) -> None:
    shm = owner.domain.join()
    with Held(lambda: end(owner, -errno.EIO), step) as slow:
        assert slow.run_to(step)
        mine = shm.fence_end_any(owner.fence.handle, -errno.ENOENT)
        assert not shm.fence_pending(owner.fence.handle)
        assert mine == (step == "fence_ending")
        seen = _native.Fence(shm, owner.fence.handle)
        stamped = seen.timestamp
        assert (seen.status, stamped > 0) == (-errno.ENOENT if mine else -errno.EIO, True)
        slow.go_on()
        assert slow.wait() == (1 if mine else 0)
        later = _native.Fence(shm, owner.fence.handle)
        assert (later.status, later.timestamp) == (seen.status, stamped)


@pytest.mark.parametrize("step", ENDING)
def test_what_a_dead_one_had_decided_stands(owner: Owner, step: str) -> None:
    with Held(lambda: end(owner, -errno.EIO), step) as slow:
        assert slow.run_to(step)
        slow.kill()
    assert owner.domain.join().fence_pending(owner.fence.handle)
    owner.kill()
    assert look(owner) == (GONE if step == "fence_ending" else -errno.EIO)


@pytest.mark.parametrize("step", ["fence_error", "fence_stamped"])
def test_a_plain_fence_that_its_owner_died_ending_ends_as_the_owners_death(domain: Domain, step: str) -> None:
    def dies(fd: int) -> None:
        shm = domain.join()
        handle = shm.fence_alloc(0, 1, SEQNO, 0, 0, 0)
        os.write(fd, f"{handle}\n".encode())
        _native.step_arm("kill", step, 1)
        shm.fence_signal(handle, -errno.EIO, False)

    theirs, ours = os.pipe()
    pid = fork(lambda: dies(ours))
    os.close(ours)
    with os.fdopen(theirs, "rb") as f:
        handle = int(f.readline())
    assert reap(pid) == -signal.SIGKILL
    domain.reap_dead()
    assert _native.Fence(domain.join(), handle).status == GONE


def test_dropped_sw_fence_stays_when_another_asks_for_its_value() -> None:
    with dmabuf.SwSync() as timeline:

        def let_go() -> None:
            timeline.create_fence(5)

        with Held(let_go, "fence_dropped") as slow:
            assert slow.run_to("fence_dropped")
            with timeline.create_fence(5) as mine:
                slow.go_on()
                assert slow.wait() == 0
                assert mine.status == 0
                timeline.inc(5)
                assert mine.status == 1
