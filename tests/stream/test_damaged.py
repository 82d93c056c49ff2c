"""Random words in a stream's part of the domain's file: every call ends, with an error or without one, and none crashes."""

import contextlib
import random

import pytest

import dmabuf
from dmabuf._native import HEADER_BYTES, STREAM_SLOTS
from tests.support.apart import Apart
from tests.support.budget import times

STREAM_BYTES = 8192
WORDS = 6976 // 8  # the rest is unused


def use(stream: dmabuf.Stream) -> None:
    """Call whatever there is. Nothing waits."""
    for call in (stream.info, stream.statistics, lambda: stream.size, lambda: stream.when_full):
        with contextlib.suppress(OSError, ValueError):
            call()
    readers = [("queue", None, False), ("latest", None, False), ("queue", "g", False), ("queue", "r", True)]
    for policy, group, again in readers:
        with (
            contextlib.suppress(OSError, ValueError),
            stream.reader(policy, group=group, group_redeliver=again) as reader,  # type: ignore[arg-type]
        ):
            for _ in range(3):
                frame = reader.next(timeout=0)
                bytes(frame.view[:16])
                assert frame.used >= 0
                str(frame.meta)
    for _ in range(3):
        with contextlib.suppress(OSError, ValueError), stream.produce(timeout=0) as frame:
            frame.view[0] = 1
    for buf in stream.bufs:
        for enter in (buf.read, buf.write):
            with contextlib.suppress(OSError, ValueError), enter(timeout=0):
                pass
        with contextlib.suppress(OSError):
            buf.resv.test_signaled(dmabuf.Usage.READ)


def damaged(seed: int) -> None:
    """Overwrite words of a stream at random, in a domain of its own, and use it."""
    rng = random.Random(seed)
    stream = dmabuf.Stream.create("damaged", size=4096, buffers=3, when_full=rng.choice(["wait", "drop"]))
    with stream.produce() as frame:
        frame.meta = {"a": 1}
    at = HEADER_BYTES + stream.ring.stream * STREAM_BYTES
    numbers = [0, 1, 3, STREAM_SLOTS, 1 << 8, (1 << 32) - 1, 1 << 63, (1 << 64) - 1, (1 << 64) - 2]
    for _ in range(rng.choice([1, 5, 100])):
        value = rng.choice(numbers) if rng.random() < 0.5 else rng.getrandbits(64)
        stream.domain.shm.store64(at + 8 * rng.randrange(WORDS), value)
    use(stream)
    with contextlib.suppress(OSError, ValueError), dmabuf.Stream.open("damaged") as again:
        use(again)
    with contextlib.suppress(OSError):
        stream.close()


def in_vain(seeds: list[int]) -> None:
    for seed in seeds:
        damaged(seed)


@pytest.mark.timeout(300)
def test_random_words_in_a_stream_end_no_process_and_hang_none(apart: Apart) -> None:
    first = random.randrange(1 << 30)
    print(f"seeds from {first} on")
    apart(in_vain, list(range(first, first + times(quick=20, full=400))))
