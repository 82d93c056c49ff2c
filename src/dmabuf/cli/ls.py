"""``dmabuf ls``: every stream, and every buffer with its size, the processes that have it open, and the fences that block it."""

from __future__ import annotations

import errno
import time
from pathlib import Path
from typing import Final

import click
from rich.console import Console
from rich.text import Text

from dmabuf.cli import data, show
from dmabuf.cli.show import safe
from dmabuf.domain import naming
from dmabuf.errors import errno_name
from dmabuf.observe.records import BufferRecord, FenceRecord
from dmabuf.observe.streams import ProcessRecord, StreamRecord, streams_of
from dmabuf.observe.units import age, size

_FENCES_SHOWN = 4  # of one buffer; `dmabuf info` shows all
NOBODY = "no visible process: in flight, or another user's"
_WIDE = 110  # columns from which every field fits
WHEN_FULL: Final = {"wait": "the producer waits for readers", "drop": "readers may miss frames"}
_STATES: Final = {"stopped": "stopped", "elsewhere": naming.UNSEEN, "ended": "a process that has ended"}


@click.command()
@data.in_domain
@data.as_json
def command(path: Path | None, as_json: bool) -> None:
    """List the streams and the buffers, the processes that have them open, and the fences that block them.

    The newest buffer comes first. Below a buffer are the fences that a new reader or writer would wait for, and since when. A new writer
    waits for readers and writers, a new reader for writers only.
    """
    domain, seen = data.snapshots_at(path)
    buffers = [one.record for one in seen]
    streams = streams_of(domain, seen) if domain is not None else []
    if as_json:
        found = {"streams": [data.stream_json(stream) for stream in streams], "buffers": [data.buffer_json(record) for record in buffers]}
        data.print_json(data.heading(domain, path) | found)
    else:
        _print(show.console(), streams, buffers, data.domain_path(path))


def _print(out: Console, streams: list[StreamRecord], buffers: list[BufferRecord], path: Path) -> None:
    where = safe(str(path))
    if not buffers:
        out.print(Text(f"No buffers in {where}."))
        return
    plural = "s" if len(buffers) > 1 else ""
    of = f"{len(streams)} stream{'s' if len(streams) > 1 else ''}, " if streams else ""
    out.print(Text(f"{of}{len(buffers)} buffer{plural}, {size(sum(b.size for b in buffers))}, in {where}\n"))
    if streams:
        _print_streams(out, streams)
    named = {stream.ino: name_in_words(stream) for stream in streams}
    width = show.width_of(out)
    wide = width is None or width >= _WIDE
    heads = ("INO", "NAME", "SIZE", "HOME", "AGE", "HELD BY") if wide else ("INO", "NAME", "SIZE", "AGE", "HELD BY")
    grid = show.Grid(*heads, right=(0, 2, heads.index("AGE")), cut=(1,))
    now, monotonic = time.time_ns(), time.monotonic_ns()
    for buf in buffers:
        cells: list[Text | str] = [str(buf.ino), name_of(buf), size(buf.size)]
        if wide:
            cells.append(safe(buf.home))
        grid.row(*cells, age(now - buf.created), held_by(buf), notes=[*stream_note(buf, named), *_notes(buf, monotonic)])
    grid.print(out)


def _print_streams(out: Console, streams: list[StreamRecord]) -> None:
    grid = show.Grid("INO", "STREAM", "FRAMES", "READERS", "LAG", "PRODUCER", right=(0, 2, 3, 4), cut=(1,))
    for stream in streams:
        slots = f"{len(stream.slots)} slots of {frame_of(stream)}, {kept_in_words(stream)}, {WHEN_FULL.get(stream.policy, '?')}"
        name = Text("–", "dim") if stream.name is None else Text(safe(stream.name))
        numbers = (str(stream.published), str(len(stream.readers)), str(stream.lag))
        grid.row(str(stream.ino), name, *numbers, producer_of(stream), notes=[Text(slots, "cyan")])
    grid.print(out)
    out.print(Text(""))


def frame_of(stream: StreamRecord) -> str:
    """Return what a frame is, in words."""
    return size(stream.size) + (f" ({stream.layout})" if stream.layout is not None else "")


def kept_in_words(stream: StreamRecord) -> str:
    """Return how many slots readers hold."""
    return f"{stream.kept or 'none'} kept by readers"


def producer_of(stream: StreamRecord) -> Text:
    """Return who produces, or why nobody does."""
    return Text(stream.state, "yellow") if stream.producer is None else process(stream.producer)


def process(found: ProcessRecord) -> Text:
    """Return a process with what is unusual about it."""
    about = _STATES.get(found.state, "")
    if found.state == "ended":
        return Text(about, "yellow")
    text = f"{safe(found.comm)} {found.pid}".strip()
    return Text(text).append(f" ({about})", "yellow") if about else Text(text)


def name_in_words(stream: StreamRecord) -> str:
    """Return what a note calls a stream."""
    return f"stream {stream.ino}" if stream.name is None else f"stream {safe(stream.name)}"


def stream_note(buf: BufferRecord, named: dict[int, str]) -> list[Text]:
    """Return what a buffer is in a stream."""
    if buf.stream is None or buf.stream.ino not in named:
        return []
    of = named[buf.stream.ino]
    return [Text(f"memory of {of}" if buf.stream.slot is None else f"slot {buf.stream.slot} of {of}", "cyan")]


def name_of(buf: BufferRecord) -> Text:
    """Return the name, or a sign that there is none."""
    if buf.name is None:
        return Text("–", "dim")
    return Text(safe(buf.name)) if buf.name else Text('""', "dim")


def held_by(buf: BufferRecord) -> Text:
    """Return the processes that have it open or mapped, with counts."""
    if not buf.holders:
        return Text(NOBODY, "yellow")
    holders = (f"{safe(h.comm)} {h.pid} ({counted(fd=h.fds, map=h.maps) or naming.UNSEEN})" for h in buf.holders)
    return Text(", ".join(holder.replace(" ", show.GLUE) for holder in holders))


def counted(**counts: int) -> str:
    """Return counts as "2 fds, 1 map"."""
    return ", ".join(f"{n} {word}{'s' if n > 1 else ''}" for word, n in counts.items() if n)


def _notes(buf: BufferRecord, monotonic: int) -> list[Text]:
    notes = []
    for fence in buf.blocking_writers[:_FENCES_SHOWN]:
        who = "readers and writers wait" if fence in buf.blocking_readers else "writers wait"
        notes.append(Text(f"{who} for ", "cyan").append(blocker(fence, monotonic)))
    if (more := len(buf.blocking_writers) - _FENCES_SHOWN) > 0:
        notes.append(Text(f"and for {more} more: dmabuf info {buf.ino}", "cyan"))
    if buf.locked_by:
        notes.append(Text(f"its reservation lock is held by {buf.locked_by}", "yellow"))
    if buf.torn:
        notes.append(Text(torn_text(buf), "red"))
    return notes


def blocker(fence: FenceRecord, monotonic: int) -> str:
    """Return a fence with its process and its age."""
    owner = f"{safe(fence.comm)} {fence.pid}".strip()
    since = age(monotonic - fence.since).replace(" ", show.GLUE)
    if fence.access is None:
        return f"fence {safe(fence.driver)} {safe(fence.timeline)} {fence.seqno} of {owner}, for {since}"
    waiting = "" if fence.granted else ", which waits itself"
    return f"{fence.access}() of {owner}, for {since}{waiting}"


def torn_text(buf: BufferRecord) -> str:
    """Return why the content is torn."""
    assert buf.torn is not None
    how = "died or left the domain" if buf.torn.errno == errno.EOWNERDEAD else "raised an exception"
    return f"torn: process {buf.torn.pid} {how} while writing ({errno_name(buf.torn.errno)}), until the next complete write()"
