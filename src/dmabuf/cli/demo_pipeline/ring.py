"""A ring of buffers through which frames pass by fences alone.

Frame n is in slot k = n mod N. For every frame there is one fence W(n) of the writer, "frame n is written", and one R(n) of each reader,
"frame n is read". All are on the reservation object of the slot's buffer, with usage BOOKKEEP: this is explicit synchronization, in the
order of the frames. A stage accesses the bytes inside ``read()``, ``write()`` or ``access()``, whose own fences (READ, WRITE) keep other
processes out. So a third program may read a slot at any time, and a writer that dies inside leaves the slot torn.

The ring has one rule: **before a stage signals a fence, it adds the fence's successor of the next round to the slot, and it has the fences
that it will wait for next.**

    writer, frame n                               reader, frame n
      wait for R(n-N) of every reader (n >= N)      wait for W(n)
      look up R(n) on the slot                      look up W(n+N) on the slot
      write frame n                                 read frame n
      add W(n+N) to the slot                        add R(n+N) to the slot
      signal W(n)                                   signal R(n)

A look-up finds exactly the right fence, because:

- *The fence is on the slot already.* The reader looks W(n+N) up after W(n) is signaled, and W(n+N) was added before that. The writer looks
  R(n) up after R(n-N) is signaled, and R(n) was added before that. In round 0 the set-up ensures it (below).
- *The fence is pending, and its successor is not on the slot.* W(n+N) is signaled only after R(n), which this reader has not signaled. R(n)
  is signaled only after W(n), which this writer has not signaled. So each peer has exactly one pending fence on the slot, whatever the
  names or numbers of the others.
- *No stage checks whether a slot is free or full.* There is no instant between two rounds at which a slot without fences could look free,
  because the successor is there before the fence is signaled.

*Set-up, once.* Every stage adds its fences of round 0 to every slot. When all have, every stage looks up its peers' fences. When all have,
the first frame starts. These two meeting points are the only messages between the processes, and the sockets are closed after them.

*Death.* A fence is always signaled. If a process dies, its pending fences are signaled with -EOWNERDEAD. A stage that gives up signals its
own with -ECANCELED, and one that has finished with -ENOENT. A waiter gets :class:`PeerEnded` and gives up too, so all stages end, and none
waits for a fence that will not be signaled. A fence that a look-up doesn't find was signaled early, for the same three reasons. That
matters only if this stage waits for it later, which it doesn't after the frame that says "end of stream".
"""

from __future__ import annotations

import errno
import struct
import time
from collections.abc import Sequence
from typing import Final, NamedTuple

from dmabuf._native import View
from dmabuf.core.base.usage import Usage
from dmabuf.core.buffer.handle import PAGE
from dmabuf.core.dma_buf import DmaBuf
from dmabuf.core.fence.fence import DmaFence
from dmabuf.core.fence.timeline import Timeline

SLOTS: Final = 4  # one being written, one being read, and one in reserve on either side
HEADER_BYTES: Final = PAGE  # pixels begin on the next page
DRIVER: Final = "dmabuf-demo"
_HEADER: Final = struct.Struct("<8sQQII")
_MAGIC: Final = b"dmabuf-1"
_END: Final = 1


class PeerEnded(Exception):
    """A stage that this one waits for has ended early. ``status``: the errno of its fence, 0 if it is unknown."""

    def __init__(self, peer: str, status: int) -> None:
        self.peer, self.status = peer, status
        how = {-errno.EOWNERDEAD: "died (its fence ended with EOWNERDEAD)", -errno.ECANCELED: "gave up (its fence ended with ECANCELED)"}
        super().__init__(f"{peer} {how.get(status, 'ended early')}")


def find(buf: DmaBuf, name: str) -> DmaFence | None:
    """Return the pending fence on a buffer whose timeline has this name, None if it is signaled."""
    while True:
        found = buf.resv.fences(Usage.BOOKKEEP)
        for fence in found:
            if fence.timeline_name == name and fence.driver_name == DRIVER:
                return fence
        if not any(fence.is_signaled() for fence in found):
            return None  # otherwise a fence was signaled meanwhile, and its successor may be the right one


def announce(buf: DmaBuf, timeline: Timeline) -> DmaFence:
    """Add a new fence of this stage to a buffer. Implicit synchronization doesn't wait for it."""
    fence = timeline.fence()
    with buf.resv.locked() as resv:
        resv.reserve(1)
        resv.add(fence, Usage.BOOKKEEP)
    return fence


class Port:
    """One stage's side of a ring: it writes (``peers``: the readers' names) or reads (``peers``: the writer's name).

    Call ``look()`` once after every stage has made its Port, then for n = 0, 1, …: ``acquire(n)``, the access, ``release(n)``. ``waits``
    and ``wait_ns`` say how often and how long this stage has waited for a fence. ``acquire`` raises :class:`PeerEnded` when the stage at
    the other end is gone.
    """

    def __init__(self, slots: Sequence[DmaBuf], name: str, peers: Sequence[str], *, writes: bool) -> None:
        self.slots, self.peers, self.writes = slots, peers, writes
        self.waits = self.wait_ns = 0
        self.timeline = Timeline(name, driver=DRIVER)
        self._mine = [announce(slot, self.timeline) for slot in slots]
        self._theirs: list[dict[str, DmaFence | None]] = []

    def look(self) -> None:
        """Look up the peers' fences of round 0, which are all on the slots before the first frame."""
        self._theirs = [{peer: find(slot, peer) for peer in self.peers} for slot in self.slots]

    def acquire(self, n: int) -> DmaBuf:
        """Wait until frame n may be written, or read, and return its slot."""
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
        """Signal that frame n is written, or read, after adding the successor to the slot."""
        k = n % len(self.slots)
        done, self._mine[k] = self._mine[k], announce(self.slots[k], self.timeline)
        done.signal()

    def close(self, error: int = 0) -> None:
        """Signal the pending fences with ``error``, a negative errno, or in order. Closing twice has no effect."""
        if error and not self.timeline.closed:
            for fence in self.timeline.pending():
                fence.signal(error=error)
        self.timeline.close()


class Header(NamedTuple):
    """The header in the first page of a slot.

    ``ino``: the buffer that the writer wrote; ``end``: there is no frame, but the stream's end.
    """

    n: int
    ino: int
    end: bool


def put_header(view: View | memoryview, n: int, ino: int, *, end: bool = False) -> None:
    """Write the header of a frame into a slot."""
    _HEADER.pack_into(view, 0, _MAGIC, n, ino, _END if end else 0, 0)


def get_header(view: View | memoryview, n: int) -> Header:
    """Return the slot's header. Raise RuntimeError if it is of another frame than ``n``, because then the protocol is broken."""
    magic, found, ino, flags, _ = _HEADER.unpack_from(view, 0)
    if magic != _MAGIC or found != n:
        raise RuntimeError(f"frame {n} was expected, the slot holds {found if magic == _MAGIC else 'none'}: the fences are out of order")
    return Header(found, ino, bool(flags & _END))
