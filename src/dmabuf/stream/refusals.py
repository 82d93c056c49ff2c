"""The errors of streams, in words."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final, NoReturn

from dmabuf._native import SD_ALIVE, SD_CLOSED, SD_NEVER
from dmabuf.domain import naming
from dmabuf.domain.stream_users import in_the_way
from dmabuf.errors import fail

if TYPE_CHECKING:
    from dmabuf.answers import StreamInfo
    from dmabuf.stream.parts import Part

_TEXTS: Final = {
    errno.EALREADY: ("use a reader, or a stream, for each thread", "another thread is waiting in it"),
    errno.EINPROGRESS: ("end the block of the frame before", "a frame is being made already"),
    errno.ENODATA: (
        "end, or wait for a successor with reader(wait_for_producer=True)",
        "its producer has closed it, and all frames were read",
    ),
    errno.ESTALE: ("open it again", "it is over: no process had it open any more"),
    errno.EUCLEAN: ("make it again", "what its memory says makes no sense"),
    errno.EUSERS: ("close a reader", "it has 32 readers, which is the most"),
    errno.ENOSPC: ("use one of its groups", "it has 8 groups, which is the most"),
}


def producer_in_words(part: Part, info: StreamInfo) -> str:
    """Return who produces, or why nobody does."""
    why = info["why"]
    if why == SD_ALIVE:
        return f"its producer is {naming.process(part.domain, info['producer'])}"
    return {SD_NEVER: "nobody has produced yet", SD_CLOSED: "its producer has closed it"}.get(why, "its producer has died")


def failed(part: Part, operation: str, error: int) -> NoReturn:
    """Raise the error of an operation."""
    remedy, what = _TEXTS.get(error, (None, None))
    if error == errno.EBADF:
        remedy, what = "open it again", "it is closed"
    elif error == errno.EOWNERDEAD and not part.is_current:
        remedy, what = "open it again", "it was opened before this process was forked, or before it left the domain"
    elif error in (errno.ETIMEDOUT, errno.EBUSY, errno.EOWNERDEAD):
        try:
            info = part.info()
        except OSError:
            info = None
        if error == errno.ETIMEDOUT:
            if operation == "next":
                about = "" if info is None else f": {producer_in_words(part, info)}"
                what, remedy = f"no new frame came in time{about}", "wait longer, or see `dmabuf ls`"
            else:
                about = "" if info is None else in_the_way(part.domain, info)
                what = "no slot became free in time" + (f": {about}" if about else "")
                remedy = "read faster, use more buffers, or make the stream with when_full='drop'"
        elif error == errno.EBUSY:
            about = "" if info is None or info["why"] != SD_ALIVE else f": {naming.process(part.domain, info['producer'])}"
            what, remedy = f"the stream has a producer{about}", "close that one first; a stream has one producer at a time"
        else:
            what, remedy = "its producer died", "wait for a successor with reader(wait_for_producer=True), or end"
    raise fail(error, operation, part, remedy, what=what)
