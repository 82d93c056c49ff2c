"""``Inputs``: a stage's ends of the streams that it reads, one for each process of the stage before, merged in order.

A stage behind one process reads one stream; its own workers are a group, in which each frame is for one of them. A stage with one process
behind several workers merges their streams by the frames' ``order``, the number in the stream that the workers share. A number may be
missing: a function let the frame end, or a worker died with it. So before a later frame passes, the workers' streams must say that no
earlier one can come: nobody holds an earlier frame of the shared stream, and whatever was published on the way has been worked on.
"""

from __future__ import annotations

import os
import select
import time
from typing import TYPE_CHECKING, Any, Final

from dmabuf._native import SR_LATEST, SR_MEMBER
from dmabuf.pipe.board import Claims, Counters
from dmabuf.pipe.kind import Kind
from dmabuf.pipe.line import Line
from dmabuf.pipe.output import Head
from dmabuf.pipe.plan import Spec
from dmabuf.stream.reader import StreamReader, group_number
from dmabuf.stream.stream import Stream

if TYPE_CHECKING:
    from dmabuf._native import Frame

GAP_MS: Final = 2  # how often to ask whether a missing frame can still come: nobody tells that a worker has dropped one


class _Lane:
    """One of the streams. ``frame``: the next of it, held until its turn comes."""

    def __init__(self, stream: Stream, reader: StreamReader, kind: Kind) -> None:
        self.stream, self.reader, self.kind = stream, reader, kind
        self.inos = tuple(os.fstat(buf.fileno()).st_ino for buf in stream.bufs)
        self.frame: Frame | None = None
        self.head: Head | None = None
        self.nbytes = kind.nbytes

    def take(self) -> bool:
        """Return True if there is a frame."""
        if self.frame is None:
            self.frame = self.reader.attempt()
            if self.frame is not None:
                self.head = Head.of(self.frame.meta)
        return self.frame is not None

    def pop(self) -> tuple[Frame, Head]:
        """Return the frame, which is the caller's now."""
        frame, head = self.frame, self.head
        assert frame is not None
        assert head is not None
        self.frame = self.head = None
        return frame, head

    def drop(self) -> None:
        """Give the frame back unread."""
        if self.frame is not None:
            self.pop()[0].release()


class Inputs:
    """The frames that a stage's process gets. ``lanes``: of how many streams; ``shared``: whether other workers read the same stream."""

    def __init__(self, line: Line, spec: Spec, counters: Counters, claims: Claims | None, board: Any, lanes: int, shared: bool) -> None:
        self._line, self._spec, self._counters, self._claims = line, spec, counters, claims
        self._board, self._count, self._shared = board, lanes, shared
        self._lanes: dict[int, _Lane] = {}
        self._ended: set[int] = set()
        self._order = 0
        self._split: Stream | None = None
        self._workers = 0  # the group of the workers that share it
        self._between: list[tuple[int, Stream, Counters]] = []
        line.on |= {"input": self._add, "end": self._end, "split": self._have_split, "between": self._have_between}

    # ---- what the parent says ----

    def _add(self, message: dict[str, Any], objects: list[Any]) -> None:
        (stream,) = objects
        if self._spec.policy == "latest":
            reader = stream.reader("latest", wait_for_producer=True)
        else:
            reader = stream.reader(group=self._spec.name, wait_for_producer=True)
        self._lanes[message["lane"]] = _Lane(stream, reader, Kind.of_json(message["kind"]))
        self._line.tell("attached", lane=message["lane"])

    def _end(self, message: dict[str, Any], objects: list[Any]) -> None:
        self._ended.add(message["lane"])

    def _have_split(self, message: dict[str, Any], objects: list[Any]) -> None:
        if self._split is not None:
            self._split.close()
        (self._split,) = objects
        self._workers = group_number(message["workers"])

    def _have_between(self, message: dict[str, Any], objects: list[Any]) -> None:
        self._between.append((message["lane"], objects[0], Counters(self._board, message["block"])))

    # ---- frames ----

    def next(self) -> tuple[Frame, Head, Kind] | None:
        """Return the next frame, which the caller releases; None at the end.

        Raises:
            ParentGone: The parent has ended.
        """
        began = 0
        while True:
            self._line.look()
            ended = len(self._ended) == self._count  # before the look at the streams, which then have all that will come
            lane = self._next(ended)
            if lane is not None:
                if began:
                    self._counters["waits"] += 1
                    self._counters["wait_ns"] += time.monotonic_ns() - began
                return self._passed(lane)
            if ended:
                return None
            began = began or time.monotonic_ns()
            self._wait()

    def _passed(self, lane: _Lane) -> tuple[Frame, Head, Kind]:
        frame, head = lane.pop()
        self._order = head.order
        if self._shared:
            head.order = frame.seq
        self._counters["shared" if head.ino == lane.inos[frame.slot] else "copied_between"] += lane.nbytes
        self._counters["taken_seq"] = frame.seq
        return frame, head, lane.kind

    def _next(self, ended: bool) -> _Lane | None:
        if self._count == 1:
            lane = self._lanes.get(0)
            return lane if lane is not None and self._take_one(lane) else None
        ready = [lane for lane in self._lanes.values() if lane.take()]
        if not ready:
            return None
        if self._spec.policy == "latest":
            return self._newest(ready)
        first = min(ready, key=_order)
        order = _order(first)
        if ended or order <= self._order + 1 or self._nothing_before(order):
            return first
        return None

    def _take_one(self, lane: _Lane) -> bool:
        while lane.take():
            assert lane.frame is not None
            if self._spec.policy != "latest":
                return True
            if self._claims.claim(lane.frame.seq) if self._claims else lane.frame.seq > self._counters["taken_seq"]:
                return True
            lane.drop()  # another worker has it, or a process of this stage had it before it died
        return False

    def _newest(self, ready: list[_Lane]) -> _Lane | None:
        newest = max(ready, key=_order)
        for lane in ready:
            if lane is not newest or _order(lane) <= self._order:
                lane.drop()
        return newest if newest.frame is not None else None

    def _nothing_before(self, order: int) -> bool:
        """Return True if no frame before this one can come. The streams are asked in the order in which frames pass them."""
        open_lanes = [k for k in range(self._count) if k not in self._lanes or self._lanes[k].frame is None]
        if not open_lanes:
            return True
        if self._split is not None:
            info = self._split.info()
            held = 0
            for reader in info["readers"]:
                if reader["role"] == SR_LATEST or (reader["role"] == SR_MEMBER and reader["group"] == self._workers):
                    held |= reader["claims"]
            if any(held >> k & 1 and 0 < slot["seq"] < order for k, slot in enumerate(info["slots"])):
                return False
        self._line.look()  # a stream that the earlier frame may be in was told of before it
        going = [k for k in open_lanes if k not in self._ended]
        if any(lane in going and stream.info()["published"] > done["seq"] for lane, stream, done in self._between):
            return False
        return not any(k in self._lanes and self._lanes[k].take() and _order(self._lanes[k]) < order for k in open_lanes)

    def _wait(self) -> None:
        poll = select.poll()
        poll.register(self._line.sock, select.POLLIN)
        held = False
        for lane in self._lanes.values():
            if lane.frame is None:
                poll.register(lane.reader.fileno(), select.POLLIN)
            else:
                held = True
        poll.poll(GAP_MS if held else None)

    def close(self) -> None:
        """Leave the streams."""
        for lane in self._lanes.values():
            lane.drop()
            lane.stream.close()
        for _, stream, done in self._between:
            stream.close()
            done.close()
        if self._split is not None:
            self._split.close()


def _order(lane: _Lane) -> int:
    assert lane.head is not None
    return lane.head.order
