"""A ring of buffers that frames go round by fences alone.

Frame n lives in slot k = n mod N. For every frame there is one fence W(n) of the writer, "frame n is written", and one R(n) of each
reader, "frame n is read". All are on the reservation object of the slot's buffer, with usage BOOKKEEP: this is explicit sync, the order
of the frames is ours. Who touches the bytes does so inside ``read()``, ``write()`` or ``access()``, whose own fences (READ, WRITE) keep
out everybody else: a third program may read a slot at any time, and a writer that dies inside leaves the slot torn.

The rule of the ring is one sentence: **whoever ends a fence has put its successor of the next round on the slot before, and holds the
fences it will wait for next.**

    writer, frame n                               reader, frame n
      wait for R(n-N) of every reader (n >= N)      wait for W(n)
      look up R(n) on the slot                      look up W(n+N) on the slot
      write frame n                                 read frame n
      add W(n+N) to the slot                        add R(n+N) to the slot
      signal W(n)                                   signal R(n)

Why a look-up finds exactly the fence that it means:

- *It is there already.* The reader looks W(n+N) up after W(n) has ended, and W(n+N) was added before that. The writer looks R(n) up after
  R(n-N) has ended, and R(n) was added before that. In round 0 the set-up has seen to it (below).
- *It is not over yet, and its successor is not there yet.* W(n+N) ends only after R(n), which this reader has not signalled. R(n) ends
  only after W(n), which this writer has not signalled. So each peer has exactly one pending fence on the slot, whatever the names or
  numbers of the others.
- *Nobody looks at the slot for "free" or "full".* Between one round and the next there is no instant at which a slot without fences
  could be taken for a free one: the successor is there before the fence ends.

Set-up, once: every stage adds its fences of round 0 to every slot; when all have, every stage looks its peers' up; when all have, the
first frame goes. These two meeting points are the only messages between the processes, and the sockets are closed after them.

Death: a fence always ends. When a process dies its pending fences end with -EOWNERDEAD, a stage that gives up ends its own with
-ECANCELED, one that is through leaves -ENOENT. Whoever waits gets :class:`PeerEnded` and gives up in turn, so the news goes round the
graph of stages without anybody waiting for a fence that nobody will end. A fence that a look-up no longer finds has ended early, for the
same three reasons; that matters only if this stage comes to wait for it, which it doesn't after the frame that says "end of stream".
"""

from __future__ import annotations

import errno
import struct
import time
from collections.abc import Sequence
from typing import Final, NamedTuple

from dmabuf.core.base.usage import Usage
from dmabuf.core.buffer.handle import PAGE
from dmabuf.core.dma_buf import DmaBuf
from dmabuf.core.fence.fence import DmaFence
from dmabuf.core.fence.timeline import Timeline

SLOTS: Final = 4  # one being written, one being read, and one in reserve on either side
HEADER_BYTES: Final = PAGE  # pixels begin on a page of their own
DRIVER: Final = "dmabuf-demo"
_HEADER: Final = struct.Struct("<8sQQII")
_MAGIC: Final = b"dmabuf-1"
_END: Final = 1


class PeerEnded(Exception):
    """A stage that this one waits for has ended before its time. ``status``: the errno of its fence, 0 when that was not seen any more."""

    def __init__(self, peer: str, status: int) -> None:
        self.peer, self.status = peer, status
        how = {-errno.EOWNERDEAD: "died (its fence ended with EOWNERDEAD)", -errno.ECANCELED: "gave up (its fence ended with ECANCELED)"}
        super().__init__(f"{peer} {how.get(status, 'ended early')}")


def find(buf: DmaBuf, name: str) -> DmaFence | None:
    """The pending fence on a buffer whose timeline has this name, None when it has ended."""
    while True:
        found = buf.resv.fences(Usage.BOOKKEEP)
        for fence in found:
            if fence.timeline_name == name and fence.driver_name == DRIVER:
                return fence
        if not any(fence.is_signaled() for fence in found):
            return None  # else one ended while we looked, and its successor may be the one


def announce(buf: DmaBuf, timeline: Timeline) -> DmaFence:
    """A new fence of ours on a buffer; who waits for it is outside of implicit sync."""
    fence = timeline.fence()
    with buf.resv.locked() as resv:
        resv.reserve(1)
        resv.add(fence, Usage.BOOKKEEP)
    return fence


class Port:
    """One stage's side of a ring: it writes (``peers``: the readers' names) or reads (``peers``: the writer's name).

    Call ``look()`` once after everybody has made his Port, then for n = 0, 1, …: ``acquire(n)``, the access, ``release(n)``.
    ``waits``, ``wait_ns``: how often and how long a fence was not yet ended. Errors: :class:`PeerEnded` out of ``acquire``.
    """

    def __init__(self, slots: Sequence[DmaBuf], name: str, peers: Sequence[str], *, writes: bool) -> None:
        self.slots, self.peers, self.writes = slots, peers, writes
        self.waits = self.wait_ns = 0
        self.timeline = Timeline(name, driver=DRIVER)
        self._mine = [announce(slot, self.timeline) for slot in slots]
        self._theirs: list[dict[str, DmaFence | None]] = []

    def look(self) -> None:
        """Look up the peers' fences of round 0: all of them are on the slots, and nothing has begun."""
        self._theirs = [{peer: find(slot, peer) for peer in self.peers} for slot in self.slots]

    def acquire(self, n: int) -> DmaBuf:
        """Wait until frame n may be written, or read; its slot."""
        k = n % len(self.slots)
        if n >= len(self.slots) or not self.writes:
            theirs = self._theirs[k]
            for peer in self.peers:
                self._wait(peer, theirs[peer])
                theirs[peer] = find(self.slots[k], peer)
        return self.slots[k]

    def _wait(self, peer: str, fence: DmaFence | None) -> None:
        if fence is None:
            raise PeerEnded(peer, 0)
        if not fence.is_signaled():
            began = time.monotonic_ns()
            fence.wait()
            self.waits += 1
            self.wait_ns += time.monotonic_ns() - began
        if fence.status < 0:
            raise PeerEnded(peer, fence.status)

    def release(self, n: int) -> None:
        """Frame n is written, or read; the successor goes on the slot before the fence ends."""
        k = n % len(self.slots)
        done, self._mine[k] = self._mine[k], announce(self.slots[k], self.timeline)
        done.signal()

    def close(self, error: int = 0) -> None:
        """End what is pending: with ``error``, a negative errno, or in order. Again: nothing."""
        if error and not self.timeline.closed:
            for fence in self.timeline.pending():
                fence.signal(error=error)
        self.timeline.close()


class Header(NamedTuple):
    """What the first page of a slot says. ``ino``: the buffer that the writer wrote; ``end``: no frame, the stream is over."""

    n: int
    ino: int
    end: bool


def put_header(view: memoryview, n: int, ino: int, *, end: bool = False) -> None:
    """Say which frame is in the slot."""
    _HEADER.pack_into(view, 0, _MAGIC, n, ino, _END if end else 0, 0)


def get_header(view: memoryview, n: int) -> Header:
    """The slot's header. RuntimeError: it holds another frame than n, so the protocol is broken."""
    magic, found, ino, flags, _ = _HEADER.unpack_from(view, 0)
    if magic != _MAGIC or found != n:
        raise RuntimeError(f"frame {n} was expected, the slot holds {found if magic == _MAGIC else 'none'}: the fences are out of order")
    return Header(found, ino, bool(flags & _END))
