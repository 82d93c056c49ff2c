"""SIGKILL at random moments of a stream with producers, readers of each kind and third parties.

The content of each frame is its number at three places. Who reads it checks them; a reader that is promised every frame also checks that
none is missing. Of the frames that a group redelivers somebody must have released each. Each of the survivors must go on after each kill,
and at the end nothing of anybody is left.

The seed is printed with every failure: ``DMABUF_TEST_SEED=…`` makes the same choices again, but not the same timing. The long test kills
3,000, or as many as ``DMABUF_TEST_KILLS`` says.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import random
from collections.abc import Callable

import pytest

import dmabuf
from dmabuf import Frame, Stream, Usage
from tests.support.apart import Apart
from tests.support.budget import times
from tests.support.crew import Crew
from tests.support.fences import attach
from tests.support.stream_world import nothing_left
from tests.support.three_places import fill, whole

pytestmark = pytest.mark.crash

SIZE, SLOTS = 16384, 4
FOREIGN = 1 << 63  # in the content: a third party wrote it
TORN = (errno.EOWNERDEAD, errno.ECANCELED)
LONG_S = 60.0  # so long nobody waits unless somebody hangs
NAME = "killed"
SURE = {"group": "sure", "group_redeliver": True, "wait_for_producer": True}
MARKS = 1 << 26  # frames that can be marked; memory is used for those that are


class Worker:
    """What one process does until it is killed. ``counter``: its rounds."""

    def __init__(self, drops: bool, counter: memoryview, released: mmap.mmap, seed: str) -> None:
        self.drops, self.counter, self.released = drops, counter, released
        self.rng = random.Random(seed)

    def round_done(self) -> None:
        self.counter[0] += 1

    def check(self, frame: Frame, promised: bool = False) -> None:
        """``promised``: since before it was published, so no third party can have written it."""
        content = whole(frame.view)
        if promised and not self.drops:
            assert content == frame.seq, f"frame {frame.seq} has {content:#x}"
        assert content & FOREIGN or content == frame.seq, f"frame {frame.seq} has {content:#x}"
        assert frame.meta == {"seq": frame.seq}

    def produce(self) -> None:
        while True:
            with Stream.open(NAME) as stream:
                for _ in range(self.rng.randint(1, 200)):
                    try:
                        self.produce_one(stream)
                    except BlockingIOError:
                        pass
                    except OSError as e:
                        if e.errno != errno.EBUSY:
                            raise
                    self.round_done()

    def produce_one(self, stream: Stream) -> None:
        what = self.rng.random()
        with contextlib.suppress(KeyError), stream.produce(timeout=LONG_S) as frame:
            frame.meta = {"seq": frame.seq}
            fill(frame.view, frame.seq)
            if what < 0.05:
                fill(frame.view, 99)
                raise KeyError
            if what < 0.1:
                frame.discard()

    def queue(self) -> None:
        while True:
            with Stream.open(NAME) as stream, stream.reader(history=self.rng.randint(0, 3), wait_for_producer=True) as reader:
                last, kept, joined = 0, [], stream.info()["published"]
                for _ in range(self.rng.randint(1, 200)):
                    lost = reader.lost
                    frame = reader.next(timeout=LONG_S)
                    self.check(frame, promised=frame.seq > joined)
                    assert not last or frame.seq == last + 1 + reader.lost - lost, f"{frame.seq} comes after {last}"
                    last = frame.seq
                    if self.rng.random() < 0.1 and not kept:
                        kept.append((frame.keep(), last, whole(frame.view)))
                    for old, seq, content in kept:
                        assert (old.seq, whole(old.view)) == (seq, content)
                    if kept and self.rng.random() < 0.5:
                        kept.clear()
                    self.round_done()

    def latest(self) -> None:
        while True:
            with Stream.open(NAME) as stream, stream.reader("latest", wait_for_producer=True) as reader:
                last = 0
                for _ in range(self.rng.randint(1, 200)):
                    frame = reader.next(timeout=LONG_S)
                    self.check(frame)
                    assert frame.seq > last
                    last = frame.seq
                    self.round_done()

    def member(self) -> None:
        while True:
            with Stream.open(NAME) as stream, stream.reader(group="g", wait_for_producer=True) as reader:
                last, joined = 0, stream.info()["published"]
                for _ in range(self.rng.randint(1, 200)):
                    try:
                        frame = reader.next(timeout=0.5)  # the others may have them all
                    except TimeoutError:
                        self.round_done()
                        continue
                    self.check(frame, promised=frame.seq > joined)
                    assert frame.seq > last
                    last = frame.seq
                    self.round_done()

    def sure(self) -> None:
        while True:
            with Stream.open(NAME) as stream, stream.reader(**SURE) as reader:  # type: ignore[arg-type]
                for _ in range(self.rng.randint(1, 200)):
                    try:
                        frame = reader.next(timeout=0.5)
                    except TimeoutError:
                        self.round_done()
                        continue
                    self.check(frame, promised=True)
                    self.released[frame.seq % MARKS] = 1  # and then it is
                    self.round_done()

    def third(self) -> None:
        line = dmabuf.Timeline("third")
        while True:
            with Stream.open(NAME) as stream:
                for _ in range(self.rng.randint(1, 50)):
                    buf, what = self.rng.choice(stream.bufs), self.rng.random()
                    try:
                        if what < 0.4:
                            with buf.read(timeout=LONG_S) as view:
                                whole(view)
                        elif what < 0.6:
                            with buf.write(timeout=LONG_S) as view:
                                fill(view, FOREIGN)  # it may be torn before
                        elif what < 0.7:
                            with dmabuf.access(read=[buf], write=[b for b in stream.bufs if b is not buf][:1], timeout=0.01) as (view, _):
                                whole(view)
                        elif what < 0.8:
                            fence = line.fence()
                            attach(buf.resv, fence, Usage.READ)
                            fence.signal()
                        elif what < 0.9:
                            buf.resv.wait(Usage.READ, timeout=LONG_S)
                        else:
                            with buf.export_sync_file(write=True):
                                pass
                    except TimeoutError:
                        if not 0.6 <= what < 0.7:
                            raise
                    except OSError as e:
                        if e.errno not in TORN:
                            raise
                    self.round_done()


JOBS = ("produce", "produce", "queue", "queue", "latest", "member", "member", "sure", "sure", "third", "third")


class Workload:
    def __init__(self, when_full: str, seed: str) -> None:
        self.stream = Stream.create(NAME, size=SIZE, buffers=SLOTS, when_full=when_full)  # type: ignore[arg-type]
        self.drops = when_full == "drop"
        self.released = mmap.mmap(-1, MARKS)
        self.anchor = self.stream.reader(newest=False, **SURE)  # type: ignore[arg-type]  # the group has a member all the time

        def work(job: str, words: memoryview, seed: str) -> None:
            getattr(Worker(self.drops, words, self.released, seed), job)()

        self.crew = Crew(JOBS, work, seed, self.stream.info)

    def kill_one(self) -> None:
        crew = self.crew
        crew.a_moment()
        victim = crew.any_place()
        if crew.rng.random() < 0.2:  # stopped for a while, and killed as it is
            crew.stop(victim)
        crew.kill(victim)
        crew.start(victim)
        crew.progress()

    def check_clean(self) -> None:
        self.crew.end()
        dmabuf.Domain.default().sweep()
        self.check_released()
        nothing_left(self.stream)
        with self.stream.reader() as reader:
            while reader.lag:
                reader.next(timeout=0)
            for _ in range(2 * SLOTS):
                with self.stream.produce(timeout=0) as frame:
                    fill(frame.view, frame.seq)
                got = reader.next(timeout=0)
                assert whole(got.view) == got.seq

    def check_released(self) -> None:
        """Every frame was released at least once, by one of the dead or by the one that is left. No frame is torn."""
        while self.anchor.lag:
            with self.anchor.next(timeout=0) as frame:
                content = whole(frame.view)
                assert content == frame.seq or (self.drops and content & FOREIGN)
                self.released[frame.seq % MARKS] = 1
        published = self.stream.info()["published"]
        if not self.drops and published < MARKS:
            missing = self.released.find(b"\0", 1, published + 1)
            assert missing == -1, f"nobody has released frame {missing} of {published}"
        self.anchor.close()

    def close(self) -> None:
        self.anchor.close()
        self.released.close()
        self.crew.close()
        self.stream.close()


def kill(when_full: str, count: int, seed: str) -> int:
    work = Workload(when_full, seed)
    try:
        for _ in range(count):
            work.kill_one()
        work.check_clean()
        return work.stream.info()["published"]
    except BaseException as e:
        e.add_note(f"seed {seed}, {work.crew.started} workers so far")
        raise
    finally:
        work.close()


@pytest.fixture
def kill_some(apart: Apart) -> Callable[[str, int], int]:
    seed = os.environ.get("DMABUF_TEST_SEED") or f"{random.getrandbits(32):08x}"
    return lambda when_full, count: apart(kill, when_full, count, seed)


@pytest.mark.parametrize("when_full", ["wait", "drop"])
@pytest.mark.timeout(600)
def test_survivors_of_random_kills_go_on(kill_some: Callable[[str, int], int], when_full: str) -> None:
    assert kill_some(when_full, times(quick=4, full=150)) > 0


@pytest.mark.long
@pytest.mark.parametrize("when_full", ["wait", "drop"])
@pytest.mark.timeout(7200)
def test_survivors_of_thousands_of_random_kills_go_on(kill_some: Callable[[str, int], int], when_full: str) -> None:
    assert kill_some(when_full, int(os.environ.get("DMABUF_TEST_KILLS", "3000")) // 2) > 0
