"""The kernel's selftests of sync_file and sw_sync by their names, written anew (semantics 7.5), on timelines of one process and of several.

The stresses are short here and as long as the kernel's in ``make test-long``.
"""

import random
import select
import threading
from collections.abc import Callable
from typing import Any

import pytest

import dmabuf
from dmabuf import SwSync, SyncFile
from tests.support.children import Parent, Spawn
from tests.support.errnos import raises_errno

Stress = Callable[[int, int], int]


def active(sf: SyncFile) -> int:
    return sum(one.status == 0 for one in sf.info().fences)


def signaled(sf: SyncFile) -> int:
    return sum(one.status == 1 for one in sf.info().fences)


def ready(sf: SyncFile, timeout: float | None = 0) -> bool:
    return bool(select.select([sf], [], [], timeout)[0])


# ---- what moves the timeline on: this process, or another that holds it ----


def increments(parent: Parent) -> None:
    """Moves the timelines that it is sent by what it is told, until told nothing."""
    timelines = dmabuf.recv(parent.sock)
    while (what := parent.recv()) is not None:
        at, n = what
        timelines[at].inc(n)
        parent.send("done")
    for timeline in timelines:
        timeline.close()


@pytest.fixture(params=["here", "elsewhere"])
def mover(request: pytest.FixtureRequest, child: Spawn) -> Callable[..., Callable[[int, int], None]]:
    def move(*timelines: SwSync) -> Callable[[int, int], None]:
        if request.param == "here":
            return lambda at, n: timelines[at].inc(n)
        other = child(increments)
        dmabuf.send(other.sock, *timelines)

        def tell(at: int, n: int) -> None:
            other.send((at, n))
            assert other.recv() == "done"

        return tell

    return move


# ---- sync_alloc ----


def test_alloc_timeline() -> None:
    with SwSync() as timeline:
        assert timeline.fileno() >= 0


def test_alloc_fence() -> None:
    with SwSync() as timeline, timeline.create_fence(1) as fence:
        assert fence.fileno() >= 0


def test_alloc_fence_negative() -> None:
    with SwSync() as timeline:
        fd = timeline.fileno()
    with raises_errno(9):
        timeline.create_fence(1)
    with raises_errno(9):
        SwSync.from_fd(fd)


# ---- sync_fence ----


def test_fence_one_timeline_wait(mover: Any) -> None:
    with SwSync() as timeline, timeline.create_fence(5) as fence:
        inc = mover(timeline)
        assert not ready(fence)
        inc(0, 1)
        assert not ready(fence)
        inc(0, 4)
        assert ready(fence)
        assert fence.wait(0) > 0
        inc(0, 10)
        assert ready(fence)


def test_fence_one_timeline_merge(mover: Any) -> None:
    with SwSync() as timeline:
        inc = mover(timeline)
        a, b, c = (timeline.create_fence(value) for value in (1, 2, 3))
        with a.merge(b, "ab") as ab, c.merge(ab, "abc") as d:
            assert (active(d), d.info().num_fences) == (1, 1)
            for status in (0, 0, 1):
                inc(0, 1)
                assert d.status == status
                assert ready(d) is bool(status)
        for sf in (a, b, c):
            assert signaled(sf) == 1
            sf.close()


# ---- sync_merge ----


def test_fence_merge_same_fence(mover: Any) -> None:
    with SwSync() as timeline, timeline.create_fence(5) as fence, fence.merge(fence, "same") as merged:
        inc = mover(timeline)
        assert signaled(merged) == 0
        inc(0, 5)
        assert signaled(merged) == 1


# ---- sync_wait ----


def test_fence_multi_timeline_wait(mover: Any) -> None:
    with SwSync("a") as a, SwSync("b") as b, SwSync("c") as c:
        inc = mover(a, b, c)
        with a.create_fence(5) as fa, b.create_fence(5) as fb, c.create_fence(5) as fc, fa.merge(fb) as ab, ab.merge(fc) as merged:
            assert active(merged) == 3
            for at, left in ((0, 2), (1, 1), (2, 0)):
                assert not ready(merged)
                inc(at, 5)
                assert (active(merged), signaled(merged)) == (left, 3 - left)
            assert ready(merged)


# ---- the stresses ----


def parallelism(turns: int, threads: int = 2) -> int:
    """Two threads take turns on one timeline; what they count under it is exact."""
    counter = [0]
    with SwSync() as timeline:

        def run(at: int) -> None:
            for turn in range(turns):
                with timeline.create_fence(turn * threads + at) as fence:
                    assert fence.wait() > 0
                counter[0] = counter[0] + 1
                timeline.inc(1)

        running = [threading.Thread(target=run, args=(at,)) for at in range(threads)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
    return counter[0]


def test_stress_two_threads_shared_timeline() -> None:
    assert parallelism(500) == 1000


@pytest.mark.long
def test_stress_two_threads_shared_timeline_whole() -> None:
    assert parallelism(65536) == 2 * 65536


def takes_turns(parent: Parent, turns: int) -> int:
    (timeline,) = dmabuf.recv(parent.sock)
    (buf,) = dmabuf.recv(parent.sock)
    counted = take_turns(timeline, buf, turns, 1)
    timeline.close()
    buf.close()
    return counted


def take_turns(timeline: SwSync, buf: dmabuf.DmaBuf, turns: int, at: int) -> int:
    with buf.mmap() as view:
        memory = memoryview(view).cast("Q")
        for turn in range(turns):
            with timeline.create_fence(turn * 2 + at) as fence:
                assert fence.wait() > 0
            memory[0] = memory[0] + 1  # nothing guards it but the timeline
            timeline.inc(1)
        counted = int(memory[0])
        memory.release()
    return counted


@pytest.mark.parametrize("turns", [200, pytest.param(65536, marks=pytest.mark.long)])
def test_stress_two_processes_shared_timeline(child: Spawn, turns: int) -> None:
    with SwSync() as timeline, dmabuf.allocate(4096) as buf:
        other = child(takes_turns, turns)
        dmabuf.send(other.sock, timeline)
        dmabuf.send(other.sock, buf)
        take_turns(timeline, buf, turns, 0)
        assert other.result() == 2 * turns
        assert timeline.value == 2 * turns


def consumer(rounds: int, producers: int = 5) -> int:
    """Producers count, each on a timeline of its own, and wait for the consumer's; the consumer waits for the merge of all."""
    timelines = [SwSync(f"p{i}") for i in range(producers)]
    mine, lock, counter, wrong = SwSync("consumer"), threading.Lock(), [0], [0]

    def produce(at: int) -> None:
        for turn in range(rounds):
            with mine.create_fence(turn) as fence:
                assert fence.wait() > 0
            with lock:
                counter[0] += 1
            timelines[at].inc(1)

    running = [threading.Thread(target=produce, args=(at,)) for at in range(producers)]
    for thread in running:
        thread.start()
    for turn in range(rounds):
        merged = timelines[0].create_fence(turn + 1)
        for timeline in timelines[1:]:
            with timeline.create_fence(turn + 1) as fence:
                before, merged = merged, merged.merge(fence, "merged")
                before.close()
        assert merged.wait() > 0
        wrong[0] += counter[0] != producers * (turn + 1)
        merged.close()
        mine.inc(1)
    for thread in running:
        thread.join()
    for timeline in (mine, *timelines):
        timeline.close()
    return wrong[0]


def test_consumer_stress_multi_producer_single_consumer() -> None:
    assert consumer(100) == 0


@pytest.mark.long
def test_consumer_stress_multi_producer_single_consumer_whole() -> None:
    assert consumer(4096) == 0


def random_merges(count: int, timelines: int = 32, seed: int = 1) -> None:
    """The number of fences in a random merge is that of the timelines in it; it ends with the last of them."""
    chance = random.Random(seed)
    all_ = [SwSync(f"t{i}") for i in range(timelines)]
    latest: dict[int, int] = {}
    with SwSync("start") as start:
        fence = start.create_fence(1)
        for _ in range(count):
            at, value = chance.randrange(timelines), chance.randrange(1, 1 << 20)
            latest[at] = max(latest.get(at, 0), value)
            with all_[at].create_fence(value) as other:
                before, fence = fence, fence.merge(other, "fence")
                before.close()
        assert fence.info().num_fences == len(latest) + 1
        start.inc(1)
        for at, value in latest.items():
            assert not ready(fence)
            all_[at].inc(value)
        assert ready(fence)
        fence.close()
    for timeline in all_:
        timeline.close()


def test_merge_stress_random_merge() -> None:
    random_merges(400)


@pytest.mark.long
def test_merge_stress_random_merge_whole() -> None:
    random_merges(32768)


def test_sync_expired_merge(mover: Any) -> None:
    """IGT sw_sync: a merge of what has ended has ended."""
    with SwSync() as timeline, timeline.create_fence(1) as a, timeline.create_fence(2) as b:
        mover(timeline)(0, 2)
        with a.merge(b) as merged:
            assert (merged.status, ready(merged)) == (1, True)
