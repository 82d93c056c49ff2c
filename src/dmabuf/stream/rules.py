"""The rules of streams that are Python code; C calls them (native/stream/port.h)."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Final, NoReturn

from dmabuf._native import SD_ALIVE, Frame, Port, set_stream_rules
from dmabuf.core.fence.fence import DmaFence, wrap
from dmabuf.core.fence.travel import pack
from dmabuf.domain import lives, naming
from dmabuf.errors import fail
from dmabuf.sharing.items import check_fence
from dmabuf.stream import awaited, meta
from dmabuf.stream.refusals import failed

if TYPE_CHECKING:
    from dmabuf._native import FrameMaking
    from dmabuf.stream.parts import Part


REAPED_S: Final = 0.2  # how long a producer that isn't seen may be about to be reaped by another process
LOOK_S: Final = 0.002


def _may_be_dead(port: Part) -> bool:
    """Return True unless the producer's process is there."""
    info, shm = port.info(), port.domain.shm
    if info["why"] != SD_ALIVE:
        return True
    life = info["producer"]
    return bool(life != shm.life and naming.seen(shm, lives.index_of(life)) is None)


class StreamRules:
    """The rules."""

    def failed(self, port: Part, operation: str, error: int) -> NoReturn:
        """Raise the error of an operation."""
        failed(port, operation, error)

    def begin(self, port: Part) -> None:
        """Have the port become the producer. One that died is reaped first."""
        error, pause, until = port.begin_producing(), threading.Event(), time.monotonic() + REAPED_S
        while error == errno.EBUSY and time.monotonic() < until and _may_be_dead(port):
            port.domain.reap_dead()
            error = port.begin_producing()
            if error:  # another process may be in the middle of reaping it
                pause.wait(LOOK_S)
        if error:
            failed(port, "produce", error)

    def meta(self, port: Port, kind: int, data: bytes) -> meta.Meta:
        """Return a frame's metadata."""
        return meta.unpack(kind, data)

    def pack_meta(self, port: Port, value: object) -> tuple[int, bytes]:
        """Return the bytes of a frame's metadata."""
        return meta.pack(value)

    def fence(self, port: Part, handle: int) -> DmaFence:
        """Return a frame's fence."""
        return wrap(port.domain, handle, (0, 0, 0))

    def handle_of_fence(self, port: Part, fence: DmaFence | None) -> int:
        """Return the handle of a fence for which readers are to wait; 0 if it has ended well."""
        if fence is None:
            return 0
        if not isinstance(fence, DmaFence):
            raise TypeError(f"frame.fence: expected a DmaFence, not {type(fence).__name__}")
        check_fence(fence, "frame.fence")
        if pack(fence) is not None:
            raise fail(errno.EINVAL, "frame.fence", fence, "give a single fence, or wait for it first", what="it is made of several fences")
        if fence.domain is not port.domain:
            raise fail(errno.EXDEV, "frame.fence", fence, "use a fence of the stream's domain", what="it is of another domain")
        fence.publish()
        fence.shm.fence_share(fence.handle)
        return fence.handle

    def taken(self, port: Part, vain: int) -> None:
        """A frame was taken (0), or there was none when there was this ``news``: the reader's descriptor says whether there is one."""
        port.told_taken(vain)

    def enter(self, making: FrameMaking) -> Awaitable[Frame]:
        """Return what enters the block of a frame in a task."""
        return awaited.enter(making)


set_stream_rules(StreamRules())
