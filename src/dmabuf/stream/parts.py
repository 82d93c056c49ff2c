"""``Part``: what a process has of a stream, a reader or the stream itself with its producer, and how one is found."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, NamedTuple

from dmabuf._native import Mapping, Port
from dmabuf.core.buffer.handle import handle_of
from dmabuf.core.buffer.ref import BufferRef
from dmabuf.core.dma_buf import DmaBuf
from dmabuf.domain import records
from dmabuf.domain.domain import Domain
from dmabuf.errors import NotFoundError, fail
from dmabuf.sharing import opening

if TYPE_CHECKING:
    from dmabuf.answers import StreamInfo

LOOK_S: Final = 0.01  # how often open(wait=) looks at first for a name, which nobody announces
LOOK_MOST_S: Final = 0.25
META_HEAD: Final = 8  # bytes before a frame's metadata


class Ring(NamedTuple):
    """A stream as this process has it open: its number, its own memory, and its buffers."""

    domain: Domain
    stream: int
    gen: int
    name: str | None
    own: DmaBuf
    bufs: tuple[DmaBuf, ...]
    meta_bytes: int
    meta: Mapping | None

    def close(self) -> None:
        """Close all of it."""
        if self.meta is not None:
            self.meta.close()
        for buf in (*self.bufs, self.own):
            buf.close()


class Part(Port):
    """A part in a stream: that of a reader, or of whoever may produce."""

    ring: Ring
    waits_for_producer = False  # of a reader: an end isn't its end

    def told_taken(self, vain: int) -> None:
        """Hear that a frame was taken (0), or that there was none when there was this ``news``: of a reader that is watched."""

    def attach(self, ring: Ring) -> None:
        """Belong to a stream."""
        self.ring = ring
        slots = tuple((buf, handle_of(buf)) for buf in ring.bufs)
        self._attach(ring.domain.shm, ring.stream, ring.gen, slots, ring.meta, ring.meta_bytes)

    @property
    def domain(self) -> Domain:
        """The domain of the stream's buffers."""
        return self.ring.domain

    def info(self) -> StreamInfo:
        """Return what the stream's words say."""
        return self.ring.domain.shm.stream_info(self.ring.stream, self.ring.gen)

    @property
    def closed(self) -> bool:
        """Whether ``close()`` was called."""
        return not self._attached

    @property
    def reads(self) -> bool:
        """Whether it has a reader's place; not any more while it leaves."""
        return 0 <= self._role < 100

    def __repr__(self) -> str:
        named = "" if self.ring.name is None else f" {self.ring.name!r}"
        return f"<dmabuf.{type(self).__name__}{named}{', closed' if self.closed else ''}>"


def found(domain: Domain, name: bytes) -> list[tuple[int, int, int]]:
    """Return (stream, generation, record) of the streams with a name, the newest last. Those that nobody has open any more are left out."""
    shm = domain.join()
    there = []
    for stream, gen, record in shm.stream_list():
        info = shm.rec_info(record)
        if info is not None and info["name"] == name:
            there.append((info["created"], stream, gen, record))
    if there:
        present = set(records.present(domain))
        there = [item for item in there if item[3] in present]
    return [item[1:] for item in sorted(there)]


def of_record(domain: Domain, record: int, gen: int | None = None) -> BufferRef | None:
    """Return the token of a record's buffer; None if it is gone."""
    info = domain.shm.rec_info(record)
    if info is None or (gen is not None and info["gen"] != gen):
        return None
    return BufferRef(domain.id, info["dev"], info["ino"], info["size"], info["nonce"], os.fsdecode(info["name"]) if info["name"] else None)


def open_ring(domain: Domain, stream: int, gen: int, record: int, name: str | None) -> Ring | None:
    """Open a stream that was found; None if it is gone, or not complete."""
    token = of_record(domain, record)
    if token is None:
        return None
    with closing_if_failed() as made:
        try:
            made.append(opening.reopen(token, domain))
            info = domain.shm.stream_info(stream, gen)
            for slot in info["slots"]:
                token = of_record(domain, slot["rec"] - 1, slot["rec_gen"]) if slot["rec"] else None
                if token is None:
                    raise fail(errno.ENOENT, "open", f"stream {name!r}", "make it again", what="one of its buffers is gone")
                made.append(opening.reopen(token, domain))
        except OSError as e:
            if e.errno not in (errno.ENOENT, errno.ESTALE, errno.ENODEV):
                raise
            for buf in made:
                buf.close()
            return None
        return ring_of(domain, stream, gen, name, made[0], tuple(made[1:]), info["meta_bytes"])


def newest_ring(domain: Domain, raw: bytes, name: str) -> Ring | None:
    """Open the newest stream with this name that is complete; None if there is none."""
    rings = (open_ring(domain, stream, gen, record, name) for stream, gen, record in reversed(found(domain, raw)))
    return next((ring for ring in rings if ring is not None), None)


def ring_of(domain: Domain, stream: int, gen: int, name: str | None, own: DmaBuf, bufs: tuple[DmaBuf, ...], meta_bytes: int) -> Ring:
    """Return the ring of buffers that this process has."""
    need = len(bufs) * (meta_bytes + META_HEAD)
    if not bufs:
        raise fail(errno.EUCLEAN, "open", f"stream {name!r}", "make it again", what="its words say that it has no buffers")
    if own.size < need:
        raise fail(errno.EUCLEAN, "open", f"stream {name!r}", "make it again", what="its memory is too small for its metadata")
    mapping = handle_of(own).map_file("open", 0, own.size, True) if meta_bytes else None
    return Ring(domain, stream, gen, name, own, bufs, meta_bytes, mapping)


@contextmanager
def closing_if_failed() -> Iterator[list[DmaBuf]]:
    """Close the buffers of a list if the block raises."""
    made: list[DmaBuf] = []
    try:
        yield made
    except BaseException:
        for buf in made:
            buf.close()
        raise


def open_named(domain: Domain, name: bytes, wait: float | None, operation: str = "open") -> Ring:
    """Open the newest stream with a name; ``wait``: seconds to look for it, None to look once."""
    text = os.fsdecode(name)
    until = time.monotonic() + (wait or 0)
    pause, look = threading.Event(), LOOK_S
    while True:
        if (ring := newest_ring(domain, name, text)) is not None:
            return ring
        left = until - time.monotonic()
        if left <= 0:
            break
        pause.wait(min(left, look))
        look = min(2 * look, LOOK_MOST_S)
    names = sorted(
        {os.fsdecode(info["name"]) for _, _, rec in domain.shm.stream_list() if (info := domain.shm.rec_info(rec)) and info["name"]}
    )
    there = f"; the streams are: {', '.join(map(repr, names[:5]))}" if names else ""
    what = f"no stream of this domain has this name{there}"
    error = fail(errno.ENOENT, operation, f"stream {text!r}", "start its program, or wait for it: Stream.open(name, wait=5)", what=what)
    assert isinstance(error, NotFoundError)
    raise error
