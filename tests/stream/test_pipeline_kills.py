"""SIGKILL, SIGSTOP and SIGCONT at random moments of a pipeline of five stages, each a process, with third parties at its buffers.

Source, three filters and a sink have a stream between each two. Each frame carries the number that the source gave it, and the number of
the stage that wrote it, at three places of its bytes and in its metadata. Every reader checks them. A reader that is promised every frame
checks that none is missing, and no stage goes back to an older number, whoever has died. Two third parties know nothing but the inode
numbers of the slots' buffers, and read and write them all the time. After each kill everybody must go on, and at the end nothing of
anybody is left.

The seed is printed with every failure: ``DMABUF_TEST_SEED=…`` makes the same choices again, but not the same timing. The long test kills
1,000 of each kind of pipeline, or as many as ``DMABUF_TEST_KILLS`` says.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

import dmabuf
from dmabuf import Frame, Stream, StreamReader, Usage
from tests.support.apart import Apart
from tests.support.budget import times
from tests.support.crew import Crew
from tests.support.leaks import descriptors
from tests.support.stream_world import nothing_left
from tests.support.three_places import fill, whole

pytestmark = pytest.mark.crash

SIZE, SLOTS = 16384, 4
STAGE = 48  # in the content: the stage that wrote it, above the number that the source gave
FOREIGN = 1 << 63  # in the content: a third party wrote it
TORN = (errno.EOWNERDEAD, errno.ECANCELED)
LONG_S = 60.0  # so long nobody waits unless somebody hangs
STAGES = ("source", "first", "second", "third", "sink")
JOBS = (*STAGES, "third party", "third party")
LAST = 1  # of a stage's words: the newest number that it has read, whoever had the place


@dataclass(frozen=True)
class Link:
    """A stream between two stages: what its producer does when it is full, and how the next stage reads."""

    when_full: str = "wait"
    reader: tuple[tuple[str, Any], ...] = ()

    def opened(self, stream: Stream) -> StreamReader:
        return stream.reader(wait_for_producer=True, **dict(self.reader))

    @property
    def promises(self) -> bool:
        """Whether the next stage is promised every frame, from when it has come."""
        return self.when_full == "wait" and self.reader == ()


PIPELINES = {
    "queues": (Link(), Link(), Link(), Link()),
    "mixed": (Link(), Link("drop"), Link("wait", (("policy", "latest"),)), Link("wait", (("group", "sinks"),))),
}


def name_of(link: int) -> str:
    return f"pipeline {link}"


class Stage:
    """What one process does until it is killed."""

    def __init__(self, links: tuple[Link, ...], inos: list[int], words: memoryview, seed: str) -> None:
        self.links, self.inos, self.words = links, inos, words
        self.rng = random.Random(seed)

    def run(self, job: str) -> None:
        while True:
            if job == "third party":
                self.interfere()
                continue
            at = STAGES.index(job)
            with contextlib.ExitStack() as stack:
                source = stack.enter_context(Stream.open(name_of(at - 1))) if at else None
                target = stack.enter_context(Stream.open(name_of(at))) if at < len(self.links) else None
                if source is not None:
                    self.use(at, source, stack.enter_context(self.links[at - 1].opened(source)), target)
                elif target is not None:
                    self.make(target)

    def some(self) -> range:
        """Rounds until it closes what it has open, and begins again."""
        return range(self.rng.randint(1, 300))

    def round_done(self) -> None:
        self.words[0] += 1

    def make(self, target: Stream) -> None:
        for _ in self.some():
            self.put(target, 0, None)
            self.round_done()

    def put(self, target: Stream, stage: int, number: int | None) -> None:
        """Make a frame with a number; None: the frame's own. Sometimes it is given up after it was half written."""
        while True:
            try:
                with contextlib.suppress(KeyError), target.produce(timeout=LONG_S) as frame:
                    said = frame.seq if number is None else number
                    if self.rng.random() < 0.05:
                        frame.view[: SIZE // 2] = b"\xff" * (SIZE // 2)
                        raise KeyError
                    frame.meta = {"stage": stage, "number": said, "seq": frame.seq}
                    fill(frame.view, stage << STAGE | said)
                return
            except OSError as e:
                # One that is stopped may be in the middle of reaping the one that had the place before.
                if e.errno != errno.EBUSY:
                    raise

    def use(self, at: int, source: Stream, reader: StreamReader, target: Stream | None) -> None:
        link, joined, last, kept = self.links[at - 1], source.info()["published"], 0, []
        for _ in self.some():
            lost = reader.lost
            frame = reader.next(timeout=LONG_S)
            if link.promises and last:
                assert frame.seq == last + 1, f"frame {frame.seq} comes after {last}"
            elif "group" not in dict(link.reader) and last:
                assert frame.seq == last + 1 + reader.lost - lost, f"frame {frame.seq} comes after {last}"
            assert frame.seq > last
            last = frame.seq
            number = self.check(at, frame, link.promises and frame.seq > joined)
            if self.rng.random() < 0.05 and not kept:
                kept.append((frame.keep(), last, whole(frame.view)))
            if number is not None and target is not None:
                self.put(target, at, number)
                assert self.check(at, frame, link.promises and frame.seq > joined) == number  # it is this stage's still
            for old, seq, content in kept:
                assert (old.seq, whole(old.view)) == (seq, content)
            if kept and self.rng.random() < 0.3:
                kept.clear()
            self.round_done()

    def check(self, at: int, frame: Frame, promised: bool) -> int | None:
        """Return the number in a frame; None if a third party wrote it. ``promised``: since before it was published, so that none can."""
        content, meta = whole(frame.view), frame.meta
        assert isinstance(meta, dict)
        assert (meta["stage"], meta["seq"]) == (at - 1, frame.seq), f"frame {frame.seq} has the metadata {meta}"
        if content & FOREIGN:
            assert not promised, f"frame {frame.seq} has {content:#x}"
            return None
        number = content & (1 << STAGE) - 1
        assert (content >> STAGE, meta["number"]) == (at - 1, number), f"frame {frame.seq} has {content:#x} and {meta}"
        assert number >= self.words[LAST], f"number {number} comes after {self.words[LAST]}"
        self.words[LAST] = number
        return number

    def pause(self) -> None:
        """Take as long as several frames, sometimes."""
        for _ in range(self.rng.choice((0, 0, 20_000))):
            pass

    def interfere(self) -> None:
        """As somebody who has the inode numbers of buffers, and has never heard of streams."""
        at = self.rng.randrange(len(self.inos))
        stage = at // SLOTS
        with dmabuf.open(self.inos[at]) as buf:
            for _ in range(self.rng.randint(1, 4)):
                what = self.rng.random()
                try:
                    if what < 0.5:
                        with buf.read(timeout=LONG_S) as view:
                            content = whole(view)
                            assert not content or content & FOREIGN or content >> STAGE == stage, f"stream {stage} has {content:#x}"
                            self.pause()
                            assert whole(view) == content
                    elif what < 0.8:
                        with buf.write(timeout=LONG_S) as view:  # it may be torn before
                            fill(view, FOREIGN | self.words[0])
                            self.pause()
                            assert whole(view) == FOREIGN | self.words[0]
                    elif what < 0.9:
                        buf.resv.wait(Usage.READ, timeout=LONG_S)
                    else:
                        with buf.export_sync_file(write=True):
                            pass
                except OSError as e:
                    if e.errno not in TORN:
                        raise
                self.round_done()


class Pipeline:
    """The streams, and the crew of the stages and third parties."""

    def __init__(self, kind: str, seed: str) -> None:
        self.links = PIPELINES[kind]
        self.streams = [
            Stream.create(name_of(at), size=SIZE, buffers=SLOTS, when_full=link.when_full)  # type: ignore[arg-type]
            for at, link in enumerate(self.links)
        ]
        inos = [buf.ino for stream in self.streams for buf in stream.bufs]
        self.crew = Crew(JOBS, lambda job, words, seed: Stage(self.links, inos, words, seed).run(job), seed, self.info)

    def info(self) -> object:
        return [stream.info() for stream in self.streams]

    def strike(self) -> None:
        """Kill one, while another one is stopped perhaps; sometimes several at once. The others must go on."""
        crew = self.crew
        crew.a_moment()
        stopped = crew.any_place() if crew.rng.random() < 0.3 else None
        if stopped is not None:
            crew.stop(stopped)
        victims = crew.rng.sample(crew.places, crew.rng.choice((1, 1, 1, 1, 1, 1, 2, len(STAGES))))
        for victim in victims:
            crew.kill(victim)
        for victim in victims:
            crew.start(victim)
        if stopped is not None and stopped not in victims:
            crew.resume(stopped)
        crew.progress()

    def halt(self) -> None:
        """Stop one for a moment."""
        place = self.crew.any_place()
        self.crew.stop(place)
        self.crew.a_fraction()
        self.crew.resume(place)

    def check_clean(self) -> None:
        self.crew.end()
        nothing_left(*self.streams)
        for stream in self.streams:
            with stream.reader(newest=False) as reader:
                for number in range(2 * SLOTS):
                    with stream.produce(timeout=0) as frame:
                        fill(frame.view, number)
                    assert whole(reader.next(timeout=0).view) == number

    def close(self) -> None:
        self.crew.close()
        for stream in self.streams:
            stream.close()


def kill(kind: str, count: int, seed: str) -> tuple[int, float]:
    """Kill so many. Return how many frames came to the end, and in how many seconds everybody went on, at most."""
    pipeline = Pipeline(kind, seed)
    crew = pipeline.crew
    try:
        crew.progress()
        while crew.killed < count:
            if crew.rng.random() < 0.3:
                pipeline.halt()
            pipeline.strike()
        pipeline.check_clean()
        return pipeline.streams[-1].info()["published"], crew.longest
    except BaseException as e:
        e.add_note(f"seed {seed}, {crew.killed} killed so far")
        raise
    finally:
        pipeline.close()


def kill_twice(kind: str, count: int, seed: str) -> tuple[int, float]:
    """The second time leaves no more descriptors than the first, which opens those that a process keeps."""
    kill(kind, 1, f"{seed} first")
    before = descriptors()
    result = kill(kind, count, seed)
    nothing_left()
    assert descriptors() == before
    return result


@pytest.fixture
def kill_some(apart: Apart) -> Callable[[str, int], tuple[int, float]]:
    seed = os.environ.get("DMABUF_TEST_SEED") or f"{random.getrandbits(32):08x}"
    return lambda kind, count: apart(kill_twice, kind, count, seed)


@pytest.mark.parametrize("kind", PIPELINES)
@pytest.mark.timeout(600)
def test_pipeline_goes_on_after_random_kills(kill_some: Callable[[str, int], tuple[int, float]], kind: str) -> None:
    frames, _ = kill_some(kind, times(quick=8, full=200))
    assert frames > 0


@pytest.mark.long
@pytest.mark.parametrize("kind", PIPELINES)
@pytest.mark.timeout(7200)
def test_pipeline_goes_on_after_a_thousand_random_kills(
    kill_some: Callable[[str, int], tuple[int, float]], kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    count = int(os.environ.get("DMABUF_TEST_KILLS", "1000"))
    frames, longest = kill_some(kind, count)
    assert frames > 0
    with capsys.disabled():
        print(f"{count} kills in a pipeline of {kind}: {frames} frames; everybody went on within {longest:.2f} s")
