"""Who uses a stream, in words: for the messages of waits."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from dmabuf._native import SD_ALIVE, SLOT_MASK, STREAM_SLOTS
from dmabuf.domain.naming import Named, process

if TYPE_CHECKING:
    from dmabuf.answers import StreamInfo

_SHOWN = 3  # readers in a message


def in_the_way(domain: Named, info: StreamInfo) -> str:
    """Return who keeps a stream's producer from a free slot; "" if nobody does."""
    newest, found = info["published"], []
    for reader in info["readers"]:
        held = sum(reader["claims"] >> k & 1 for k in range(len(info["slots"])))
        behind = newest - reader["cursor"] + 1 if reader["cursor"] else 0
        if held or behind > 0:
            what = f"keeps {held} of its slots" if held else f"has {behind} frame{'s' * (behind > 1)} to read"
            found.append(f"{process(domain, reader['life'])} {what}")
    others = sum(slot["foreign"] for slot in info["slots"])
    if others:
        found.append(f"{others} of its buffers are in use by programs that don't read the stream")
    return "; ".join(found[:_SHOWN]) + ("; …" if len(found) > _SHOWN else "")


def waited_for(domain: Named, number: int) -> str:
    """Return what a producer waits for. ``number``: of the stream's first slot, among the slots of all streams."""
    name, info = _stream(domain, number // STREAM_SLOTS)
    about = "" if info is None else in_the_way(domain, info)
    return f"a free slot of stream {name}" + (f": {about}" if about else "")


def stands_in_the_way(domain: Named, handle: int) -> str:
    """Return what a fence stands for that was made for a slot of a stream. ``handle``: of the slot's entry."""
    slot = handle & SLOT_MASK
    name, info = _stream(domain, slot // STREAM_SLOTS)
    if info is None:
        return f"stream {name}, which is over"
    if info["slots"][slot % STREAM_SLOTS]["writing"]:
        by = f" ({process(domain, info['producer'])})" if info["why"] == SD_ALIVE else ""
        return f"the producer of stream {name}{by}, which writes a frame into the buffer"
    about = in_the_way(domain, info)
    return f"readers of stream {name}, of which the buffer has a frame" + (f": {about}" if about else "")


def _stream(domain: Named, stream: int) -> tuple[str, StreamInfo | None]:
    """Return the name of a stream in words, and what it says of itself; None if it is over."""
    shm = domain.shm
    for number, gen, record in shm.stream_list():
        if number == stream:
            found = shm.rec_info(record)
            name = repr(os.fsdecode(found["name"])) if found is not None and found["name"] else "without a name"
            try:
                return name, shm.stream_info(stream, gen)
            except OSError:
                break
    return "without a name", None
