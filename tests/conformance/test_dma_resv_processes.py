"""Reservation objects across processes: what one adds, others see, wait for, and are freed from when its owner dies."""

import errno
import math
from collections.abc import Iterator
from typing import Any

import pytest

import dmabuf
from dmabuf import Timeline, Usage
from tests.support.children import Child, Parent, Spawn
from tests.support.errnos import raises_errno
from tests.support.fences import USAGES, attach, entries, key, keys, the_fence
from tests.support.waiting import Background, until_asleep


def adds(parent: Parent, usages: list[Usage]) -> None:
    """A fence of its own for each usage; signals them one by one on demand."""
    (buf,) = dmabuf.recv(parent.sock)
    lines = [Timeline(f"child {usage.name}") for usage in usages]
    fences = [line.fence() for line in lines]
    for fence, usage in zip(fences, usages, strict=True):
        attach(buf.resv, fence, usage)
    parent.send([key(fence) for fence in fences])
    for fence in fences:
        error = parent.recv()
        fence.signal(error=error)
        parent.send("signalled")
    parent.recv()


def waits(parent: Parent, usage: Usage) -> tuple[float, list[tuple[int, int]]]:
    (buf,) = dmabuf.recv(parent.sock)
    parent.send(keys(buf.resv, usage))
    return buf.resv.wait(usage), keys(buf.resv, usage)


def describes(parent: Parent) -> tuple[str, list[tuple[tuple[int, int], Usage]], bool]:
    (buf,) = dmabuf.recv(parent.sock)
    with buf.resv.locked():
        text = buf.resv.describe()
    return text, entries(buf.resv), buf.resv.test_signaled(Usage.BOOKKEEP)


def replaces(parent: Parent, context: int, usage: Usage) -> None:
    (buf,) = dmabuf.recv(parent.sock)
    line = Timeline("replacement")
    fence = line.fence()
    with buf.resv.locked():
        buf.resv.replace(context, fence, usage)
    parent.send(key(fence))
    parent.recv()
    line.close()


def adds_what_it_found(parent: Parent, usage: Usage) -> None:
    (buf, target) = dmabuf.recv(parent.sock)
    attach(target.resv, the_fence(buf), usage)
    parent.send("added")
    parent.recv()


# -- semantics 7.4, by name: the fences are another process's, which adds them


def adds_one_by_one(parent: Parent) -> None:
    """For each usage that it is told, a fence on the buffer, which ends when it is told again; None ends it all."""
    (buf,) = dmabuf.recv(parent.sock)
    while (usage := parent.recv()) is not None:
        line = Timeline(f"child {usage.name}")
        fence = line.fence()
        attach(buf.resv, fence, usage)
        parent.send(key(fence))
        parent.recv()
        fence.signal()
        parent.send("signalled")
        line.close()


class Adder:
    """That process, seen from the test."""

    def __init__(self, other: Child, buf: dmabuf.DmaBuf) -> None:
        self.other = other
        dmabuf.send(other.sock, buf)

    def add(self, usage: Usage) -> tuple[int, int]:
        self.other.send(usage)
        name: tuple[int, int] = self.other.recv()
        return name

    def signal(self) -> None:
        self.other.send("signal")
        assert self.other.recv() == "signalled"


@pytest.fixture
def adder(child: Spawn, buf: dmabuf.DmaBuf) -> Iterator[Adder]:
    made = Adder(child(adds_one_by_one), buf)
    yield made
    made.other.send(None)
    made.other.result()


def locks(parent: Parent) -> None:
    (buf,) = dmabuf.recv(parent.sock)
    with buf.resv.locked():
        parent.send("locked")
        parent.recv()
    parent.send("unlocked")


def test_sanitycheck(child: Spawn, buf: dmabuf.DmaBuf) -> None:
    other = child(locks)
    dmabuf.send(other.sock, buf)
    assert other.recv() == "locked"
    assert not buf.resv.trylock()
    other.send("unlock")
    assert other.recv() == "unlocked"
    assert buf.resv.trylock()
    buf.resv.unlock()
    assert [buf.resv.fences(usage) for usage in Usage] == [[]] * 4


def test_signaling(buf: dmabuf.DmaBuf, adder: Adder) -> None:
    for usage in Usage:
        adder.add(usage)
        assert not buf.resv.test_signaled(usage)
        adder.signal()
        assert buf.resv.test_signaled(usage)


def test_for_each(buf: dmabuf.DmaBuf, adder: Adder) -> None:
    for usage in Usage:
        name = adder.add(usage)
        with buf.resv.locked():
            pending = [(key(fence), used) for fence, used in buf.resv.iterate(usage) if not fence.is_signaled()]
        assert pending == [(name, usage)]
        adder.signal()


def test_for_each_unlocked(buf: dmabuf.DmaBuf, adder: Adder, tl: Timeline) -> None:
    """The table grows between two steps: who starts anew at each restart ends with each fence once."""
    for usage in Usage:
        mine = tl.fence()
        names = [adder.add(usage), key(mine)]
        attach(buf.resv, mine, usage)
        seen: list[tuple[tuple[int, int], Usage]] = []
        for number, (fence, used, restarted) in enumerate(buf.resv.iterate_unlocked(usage)):
            if number == 0:
                assert restarted
                with buf.resv.locked():
                    buf.resv.reserve(300 * (usage + 1))
            if restarted:
                seen.clear()
            seen.append((key(fence), used))
        assert sorted(seen) == sorted((name, usage) for name in names)
        mine.signal()
        adder.signal()


def test_get_fences(buf: dmabuf.DmaBuf, adder: Adder) -> None:
    for usage in Usage:
        name = adder.add(usage)
        assert keys(buf.resv, usage) == [name]
        adder.signal()


# -- and more


@USAGES
def test_a_fence_of_another_process_is_seen_with_its_usage(child: Spawn, buf: dmabuf.DmaBuf, usage: Usage) -> None:
    other = child(adds, [usage])
    dmabuf.send(other.sock, buf)
    names = other.recv()
    assert entries(buf.resv) == [(names[0], usage)]
    for level in Usage:
        assert buf.resv.test_signaled(level) is (level < usage)
    other.send(0)
    assert other.recv() == "signalled"
    assert buf.resv.test_signaled(Usage.BOOKKEEP)


@USAGES
@pytest.mark.parametrize("error", [0, -errno.EIO])
def test_another_process_waits_and_notices_the_end(child: Spawn, buf: dmabuf.DmaBuf, tl: Timeline, usage: Usage, error: int) -> None:
    fence = tl.fence()
    attach(buf.resv, fence, usage)
    other = child(waits, usage)
    dmabuf.send(other.sock, buf)
    assert other.recv() == [key(fence)]
    until_asleep(other.pid)
    fence.signal(error=error)
    assert other.result() == (math.inf, [])


def test_a_wait_ends_with_the_last_of_several_processes(child: Spawn, buf: dmabuf.DmaBuf) -> None:
    others = [child(adds, [Usage.READ]) for _ in range(3)]
    for other in others:
        dmabuf.send(other.sock, buf)
        other.recv()
    with Background(lambda: buf.resv.wait(Usage.READ)) as job:
        for other in reversed(others):
            job.until_blocked()
            assert not job.done
            other.send(0)
            assert other.recv() == "signalled"
        assert job.result() == math.inf


def test_the_description_is_the_same_in_another_process(child: Spawn, buf: dmabuf.DmaBuf, tl: Timeline, other_tl: Timeline) -> None:
    write, bookkeep = tl.fence(), other_tl.fence()
    attach(buf.resv, write, Usage.WRITE)
    attach(buf.resv, bookkeep, Usage.BOOKKEEP)
    other = child(describes)
    dmabuf.send(other.sock, buf)
    assert other.result() == (
        "\twrite fence:dmabuf test seq 1 unsignalled\n",
        [(key(write), Usage.WRITE), (key(bookkeep), Usage.BOOKKEEP)],
        False,
    )
    tl.close()
    other_tl.close()


def test_another_process_replaces_the_fences_of_a_context(child: Spawn, buf: dmabuf.DmaBuf, tl: Timeline) -> None:
    fence = tl.fence()
    attach(buf.resv, fence, Usage.READ)
    other = child(replaces, tl.context, Usage.BOOKKEEP)
    dmabuf.send(other.sock, buf)
    name = other.recv()
    assert entries(buf.resv) == [(name, Usage.BOOKKEEP)]
    fence.signal()
    assert not buf.resv.test_signaled(Usage.BOOKKEEP)
    other.send("close")
    assert buf.resv.wait(Usage.BOOKKEEP) == math.inf


def test_a_fence_of_another_process_can_be_added_elsewhere(
    child: Spawn, buf: dmabuf.DmaBuf, other_buf: dmabuf.DmaBuf, tl: Timeline
) -> None:
    """It stays its owner's: his signal ends it everywhere, and so it outlives who added it."""
    fence = tl.fence()
    attach(buf.resv, fence, Usage.WRITE)
    other = child(adds_what_it_found, Usage.READ)
    dmabuf.send(other.sock, buf, other_buf)
    assert other.recv() == "added"
    other.kill()
    assert entries(other_buf.resv) == [(key(fence), Usage.READ)]
    assert not other_buf.resv.test_signaled(Usage.READ)
    fence.signal()
    assert other_buf.resv.test_signaled(Usage.READ)


def test_fences_of_all_levels_of_another_process(child: Spawn, buf: dmabuf.DmaBuf) -> None:
    other = child(adds, list(Usage))
    dmabuf.send(other.sock, buf)
    names = other.recv()
    for level in Usage:
        assert keys(buf.resv, level) == names[: level + 1]
    for left in range(len(names)):
        assert keys(buf.resv) == names[left:]
        other.send(0)
        assert other.recv() == "signalled"
    assert keys(buf.resv) == []


@USAGES
def test_the_fences_of_a_killed_process_end_with_eownerdead(child: Spawn, buf: dmabuf.DmaBuf, usage: Usage) -> None:
    other = child(adds, [usage])
    dmabuf.send(other.sock, buf)
    other.recv()
    fence = the_fence(buf)
    with Background(lambda: buf.resv.wait(usage)) as job, Background(fence.wait) as single:
        job.until_blocked()
        single.until_blocked()
        assert not job.done
        assert not single.done
        other.kill()
        assert job.result() == math.inf
        assert single.result() == math.inf
    assert fence.status == -errno.EOWNERDEAD
    assert buf.resv.test_signaled(Usage.BOOKKEEP)


def test_a_process_that_is_killed_leaves_the_fences_of_others_pending(child: Spawn, buf: dmabuf.DmaBuf, tl: Timeline) -> None:
    fence = tl.fence()
    attach(buf.resv, fence, Usage.READ)
    other = child(adds, [Usage.WRITE])
    dmabuf.send(other.sock, buf)
    other.recv()
    other.kill()
    assert buf.resv.wait(Usage.WRITE) == math.inf
    assert keys(buf.resv) == [key(fence)]
    fence.signal()


def test_exit_of_holder_frees_the_waiters(child: Spawn, buf: dmabuf.DmaBuf) -> None:
    """It forgot to signal; nobody may wait for ever."""
    other = child(adds, [Usage.WRITE])
    dmabuf.send(other.sock, buf)
    other.recv()
    fence = the_fence(buf)
    with Background(fence.wait) as job:
        job.until_blocked()
        assert not job.done
        other.close()
        assert job.result() == math.inf
    assert fence.status < 0


def test_a_killed_waiter_takes_nothing_with_it(child: Spawn, buf: dmabuf.DmaBuf, tl: Timeline) -> None:
    fence = tl.fence()
    attach(buf.resv, fence, Usage.WRITE)
    others = [child(waits, Usage.WRITE) for _ in range(2)]
    for other in others:
        dmabuf.send(other.sock, buf)
        other.recv()
        until_asleep(other.pid)
    others[0].kill()
    assert keys(buf.resv) == [key(fence)]
    fence.signal()
    assert others[1].result() == (math.inf, [])


@pytest.mark.parametrize("call", ["add", "reserve", "replace", "describe"])
def test_a_lock_of_another_process_does_not_count(child: Spawn, buf: dmabuf.DmaBuf, tl: Timeline, call: str) -> None:
    fence = tl.fence()
    other = child(holds_the_lock)
    dmabuf.send(other.sock, buf)
    assert other.recv() == "locked"
    arguments: dict[str, tuple[Any, ...]] = {
        "add": (fence, Usage.WRITE),
        "reserve": (1,),
        "replace": (tl.context, fence, Usage.WRITE),
        "describe": (),
    }
    assert buf.resv.is_locked()
    with pytest.raises(dmabuf.ContractError):
        getattr(buf.resv, call)(*arguments[call])
    other.send("unlock")
    assert other.result() is None
    assert entries(buf.resv) == []


def holds_the_lock(parent: Parent) -> None:
    (buf,) = dmabuf.recv(parent.sock)
    with buf.resv.locked():
        parent.send("locked")
        parent.recv()


def test_a_fence_of_another_domain_is_refused(buf: dmabuf.DmaBuf) -> None:
    line = Timeline("elsewhere", domain=dmabuf.Domain.private())
    fence = line.fence()
    with buf.resv.locked():
        buf.resv.reserve(1)
        with raises_errno(errno.EXDEV):
            buf.resv.add(fence, Usage.WRITE)
    assert keys(buf.resv) == []
    line.close()
