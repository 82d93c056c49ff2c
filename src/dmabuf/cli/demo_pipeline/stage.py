"""The program of one stage: ``python -m dmabuf.cli.demo_pipeline.stage FD``, started by ``run`` with a socket.

Over the socket come, once, a description and the buffers, and three bytes to meet at; then it is closed. From there on the stage knows of
the others by fences alone. It ends with 0 done, 1 failed, 2 gave up because another ended, and says why in its block of counters.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

from dmabuf._native import View
from dmabuf.cli.demo_pipeline import video
from dmabuf.cli.demo_pipeline.counters import Counters
from dmabuf.cli.demo_pipeline.ring import DRIVER, PeerEnded, Port, announce, find, get_header, put_header
from dmabuf.cli.demo_pipeline.video import Clip
from dmabuf.core.access.many import access
from dmabuf.core.dma_buf import DmaBuf
from dmabuf.core.fence.timeline import Timeline
from dmabuf.sharing.passing import recv

MESSAGE_BYTES: Final = 1 << 16
PARENT: Final = "demo"  # the name of the parent's timeline, whose fence is pending while the demo goes on
DONE, FAILED, GAVE_UP = 0, 1, 2


class Job:
    """The job of a stage, with its buffers."""

    def __init__(self, setup: dict[str, Any], bufs: list[DmaBuf]) -> None:
        self.name: str = setup["name"]
        clip = setup["clip"]
        self.clip = Clip(Path(clip["path"]), clip["width"], clip["height"], Fraction(clip["rate"]), None)
        self.limit: int | None = setup["limit"]
        self.output = Path(setup["output"])
        self.kill_at: int | None = setup["kill_at"]
        self.board, *rings = bufs
        self.counters = Counters(self.board, setup["index"])
        slots: int = setup["slots"]
        self.ports = {
            ring["name"]: Port(rings[i * slots : (i + 1) * slots], self.name, ring["peers"], writes=ring["writes"])
            for i, ring in enumerate(setup["rings"])
        }
        self.timeline = Timeline(self.name, driver=DRIVER)
        self.over = announce(self.board, self.timeline)
        self.goes_on = find(self.board, PARENT)

    def look(self) -> None:
        for port in self.ports.values():
            port.look()

    def begin(self, n: int) -> None:
        """Check before frame n that the demo still runs."""
        if self.goes_on is None or self.goes_on.is_signaled():
            raise PeerEnded("the parent", self.goes_on.status if self.goes_on else 0)

    def found(self, view: View | memoryview, n: int, slot: DmaBuf, size: int) -> bool:
        """Return True if a slot has frame n, False at the end. Its bytes count as shared only if they are where the writer wrote them."""
        header = get_header(view, n)
        if not header.end:
            self.counters["shared" if header.ino == os.fstat(slot.fileno()).st_ino else "copied_between"] += size
        return not header.end

    def finished(self, n: int) -> None:
        """Count frame n as done."""
        self.counters["frames"] = n + 1
        self.counters["waits"] = sum(port.waits for port in self.ports.values())
        self.counters["wait_ns"] = sum(port.wait_ns for port in self.ports.values())

    def dies_at(self, n: int) -> bool:
        return n == self.kill_at

    def close(self, error: int) -> None:
        for port in self.ports.values():
            port.close(error)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def decode(job: Job) -> bytes:
    """Decode the frames of the video into the ring ``frames``."""
    ring, clip, n = job.ports["frames"], job.clip, 0
    for frame in video.decoded(clip, job.limit):
        job.begin(n)
        slot = ring.acquire(n)
        with slot.write() as view:
            if job.dies_at(n):
                video.put_frame(frame, view, clip, rows=clip.height // 2)
                _die()
            video.put_frame(frame, view, clip)
            put_header(view, n, slot.ino)
        ring.release(n)
        job.counters["copied_inside"] += clip.frame_bytes
        job.finished(n)
        n += 1
    slot = ring.acquire(n)
    with slot.write() as view:
        put_header(view, n, slot.ino, end=True)
    ring.release(n)
    return b""


def filter(job: Job) -> bytes:
    """Put the edges of the frames into the ring ``edges``."""
    source, target, clip, n, more = job.ports["frames"], job.ports["edges"], job.clip, 0, True
    while more:
        job.begin(n)
        a, b = source.acquire(n), target.acquire(n)
        with access(read=[a], write=[b]) as (before, after):
            more = job.found(before, n, a, clip.pixels)
            if more:
                dies = job.dies_at(n)
                video.edges(video.luma(before, clip), video.luma(after, clip), rows=clip.height // 2 if dies else None)
                if dies:
                    _die()
            put_header(after, n, b.ino, end=not more)
        source.release(n)
        target.release(n)
        if more:
            job.finished(n)
        n += 1
    return b""


def histogram(job: Job) -> bytes:
    """Count the brightness of the frames. Return the SHA-256 of all histograms."""
    source, digest, n = job.ports["frames"], hashlib.sha256(), 0
    while True:
        job.begin(n)
        slot = source.acquire(n)
        with slot.read() as view:
            more = job.found(view, n, slot, job.clip.pixels)
            if more:
                digest.update(video.histogram(video.luma(view, job.clip)))
            if job.dies_at(n):
                _die()
        source.release(n)
        if not more:
            return digest.digest()
        job.finished(n)
        n += 1


def encode(job: Job) -> bytes:
    """Encode the filtered frames into a file. Return the SHA-256 of all."""
    source, digest, n = job.ports["edges"], hashlib.sha256(), 0
    encoder = video.Encoder(job.output, job.clip)
    try:
        while True:
            job.begin(n)
            slot = source.acquire(n)
            with slot.read() as view:
                more = job.found(view, n, slot, job.clip.pixels)
                if more:
                    digest.update(video.luma(view, job.clip).data)
                    encoder.put(video.luma(view, job.clip))
                if job.dies_at(n):
                    _die()
            source.release(n)
            if not more:
                return digest.digest()
            job.counters["copied_inside"] += job.clip.pixels
            job.finished(n)
            n += 1
    finally:
        encoder.close()


WORK: Final[dict[str, Callable[[Job], bytes]]] = {"decode": decode, "filter": filter, "histogram": histogram, "encode": encode}


def work(job: Job) -> int:
    """Do the stage's work and return its exit status. In every case the stage's fences are signaled."""
    counters = job.counters
    counters["started_ns"] = time.monotonic_ns()
    counters.say("running")
    error, status, say = -errno.ECANCELED, FAILED, functools.partial(counters.say, "failed")
    try:
        digest = WORK[job.name](job)
        error, status, say = 0, DONE, functools.partial(counters.say, "done", digest=digest)
    except PeerEnded as e:
        status, say = GAVE_UP, functools.partial(counters.say, "gave up", text=str(e))
    except Exception as e:
        say = functools.partial(counters.say, "failed", text=str(e) if isinstance(e, video.VideoError) else f"{type(e).__name__}: {e}")
    finally:
        counters["ended_ns"] = time.monotonic_ns()
        say()
        job.close(error)
        job.over.signal()
    return status


def main(fd: int) -> int:
    """Set up, meet the others, work."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends the demo by its fence
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    with socket.socket(fileno=fd) as sock:
        message = sock.recv(MESSAGE_BYTES)
        if not message:
            return GAVE_UP
        job = Job(json.loads(message), recv(sock))
        # All fences of round 0 are on the slots before any stage looks, and all stages have looked before any begins.
        if _meet(sock):
            job.look()
            if _meet(sock):
                sock.close()
                return work(job)
    job.close(-errno.ECANCELED)
    return GAVE_UP


def _meet(sock: socket.socket) -> bool:
    """Wait until all stages are here. Return False if one will not come."""
    try:
        return bool(sock.send(b"1") and sock.recv(1))
    except ConnectionError:
        return False


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
