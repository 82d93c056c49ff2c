"""``dmabuf info BUFFER``: everything about one buffer, or one stream."""

from __future__ import annotations

import errno
import os
import re
import time
from datetime import datetime
from pathlib import Path

import click
from rich.console import Console
from rich.text import Text

from dmabuf._native import owned
from dmabuf.cli import data, show
from dmabuf.cli.ls import (
    NOBODY,
    WHEN_FULL,
    counted,
    frame_of,
    kept_in_words,
    name_in_words,
    name_of,
    process,
    producer_of,
    torn_text,
)
from dmabuf.cli.show import safe
from dmabuf.domain import naming
from dmabuf.domain.domain import Domain
from dmabuf.errors import fail
from dmabuf.observe.records import BufferSnapshot, FenceRecord
from dmabuf.observe.streams import StreamRecord, streams_of
from dmabuf.observe.units import age, size

_PID_FD = re.compile(r"(\d+):(\d+)\Z", re.ASCII)


@click.command()
@click.argument("buffer")
@data.in_domain
@data.as_json
def command(buffer: str, path: Path | None, as_json: bool) -> None:
    """Show everything about one buffer, or about the stream whose memory it is.

    BUFFER is an inode number as in `dmabuf ls`, PID:FD for a descriptor of a process, or a name, in this order. If several buffers have the
    name, the error lists their inode numbers.
    """
    domain, seen = data.snapshots_at(path)
    found = _find(buffer, seen, domain)
    streams = {stream.ino: stream for stream in (streams_of(domain, seen) if domain is not None else [])}
    part = found.record.stream
    stream = streams.get(part.ino) if part is not None else None
    if as_json:
        fences = [data.fence_json(fence) for fence in found.fences]
        answer = {"buffer": data.buffer_json(found.record) | {"fences": fences}}
        data.print_json(data.heading(domain, path) | answer | {"stream": None if stream is None else data.stream_json(stream, every=True)})
        return
    out = show.console()
    if stream is not None and part is not None and part.slot is None:
        _print_stream(out, stream, data.domain_path(path))
    else:
        _print(out, found, stream, data.domain_path(path))


def _find(wanted: str, seen: list[BufferSnapshot], domain: Domain | None) -> BufferSnapshot:
    """Return the buffer that the argument names.

    Raises:
        NotFoundError: No buffer has the name or the inode, or the process or its descriptor is gone (ENOENT).
        NotUniqueError: Several buffers have the name (ENOTUNIQ).
        NotPermittedError: The descriptors of the process may not be read (EACCES).
        InvalidError: The descriptor is not a buffer of this domain (EINVAL).
        CrossDomainError: The buffer belongs to another domain (EXDEV).
    """
    if wanted.isascii() and wanted.isdigit():
        for one in seen:
            if one.record.ino == int(wanted):
                return one
    if match := _PID_FD.match(wanted):
        return _by_descriptor(int(match[1]), int(match[2]), seen, domain)
    named = [one for one in seen if one.record.name == wanted]
    if len(named) > 1:
        inodes = ", ".join(str(one.record.ino) for one in named)
        raise fail(errno.ENOTUNIQ, "info", repr(wanted), "pass the inode number", what=f"several buffers have this name: inodes {inodes}")
    if not named:
        raise fail(errno.ENOENT, "info", repr(wanted), "run `dmabuf ls` for a list", what="no buffer of this inode or name")
    return named[0]


def _by_descriptor(pid: int, fd: int, seen: list[BufferSnapshot], domain: Domain | None) -> BufferSnapshot:
    link = f"/proc/{pid}/fd/{fd}"
    what = f"{pid}:{fd}"
    try:
        with owned(os.open, link, os.O_PATH | os.O_CLOEXEC) as own:  # so that both looks are at one file
            target, st = os.readlink(f"/proc/self/fd/{own.number}"), os.fstat(own.number)
    except FileNotFoundError:
        why = "the process has no such descriptor" if os.path.exists(f"/proc/{pid}") else "there is no such process"
        raise fail(errno.ENOENT, "info", what, "run `dmabuf ls` for the processes of each buffer", what=why) from None
    except OSError as e:
        raise fail(e.errno or errno.EIO, "info", what, "run this as the user of that process") from None
    for one in seen:
        if (one.record.dev, one.record.ino) == (st.st_dev, st.st_ino):
            return one
    here = f":{domain.id}:" if domain else "::"
    if target.startswith("/memfd:dmabuf:") and here not in target:
        other = target.split(":")[2]
        raise fail(errno.EXDEV, "info", what, "name its directory with --domain", what=f"the buffer belongs to domain {other}")
    raise fail(errno.EINVAL, "info", what, "run `dmabuf ls` for the buffers", what=f"not a buffer of this domain but {target}")


def _print_stream(out: Console, stream: StreamRecord, path: Path) -> None:
    grid = show.Grid("", "")

    def field(name: str, value: Text | str) -> None:
        grid.row(Text(name, "bold"), value)

    field("stream", Text("–", "dim") if stream.name is None else safe(stream.name))
    field("inode", str(stream.ino))
    field("slots", f"{len(stream.slots)} of {frame_of(stream)}, {kept_in_words(stream)}")
    field("metadata", f"up to {stream.meta_bytes} bytes a frame")
    field("when full", WHEN_FULL.get(stream.policy, "?"))
    field("producer", producer_of(stream))
    field("frames", f"{stream.published} published")
    field("domain", safe(str(path)))
    grid.print(out)
    who = {reader.process.pid: process(reader.process).plain for reader in stream.readers}
    out.print(Text(""))
    slots = show.Grid("SLOT", "INO", "FRAME", "STATE", "USED BY", right=(0, 1, 2))
    for slot in stream.slots:
        users = [f"held by {who[pid]}" for pid in slot.held_by] + [
            f"kept for {who[pid]}" for pid in slot.promised_to if pid not in slot.held_by
        ]
        users += ["a program that doesn't know the stream"] * slot.foreign
        state = Text(slot.state, {"torn": "red", "writing": "cyan"}.get(slot.state, ""))
        slots.row(
            str(slot.slot), str(slot.ino or "–"), str(slot.seq or "–"), state, ", ".join(dict.fromkeys(users)) or Text("nobody", "dim")
        )
    slots.print(out)
    out.print(Text(""))
    if not stream.readers:
        out.print(Text("No readers."))
        return
    readers = show.Grid("READS", "SEEN", "LAG", "LOST", "HOLDS", "READER", right=(1, 2, 3, 4))
    for reader in stream.readers:
        reads = f"group {reader.group[:8]}" + (", redelivers" if reader.redelivers else "") if reader.group else reader.role
        readers.row(reads, str(reader.seen), str(reader.lag), str(reader.lost), str(len(reader.holds)), process(reader.process))
    readers.print(out)


def _print(out: Console, found: BufferSnapshot, stream: StreamRecord | None, path: Path) -> None:
    buf, monotonic = found.record, time.monotonic_ns()
    made = datetime.fromtimestamp(buf.created / 1e9).astimezone().isoformat(sep=" ", timespec="seconds")
    grid = show.Grid("", "")

    def field(name: str, *values: Text | str) -> None:
        for i, value in enumerate(values):
            grid.row(Text("" if i else name, "bold"), value)

    field("inode", str(buf.ino))
    field("name", name_of(buf))
    field("size", f"{size(buf.size)} ({buf.size} bytes)" if buf.size >= 1024 else f"{buf.size} bytes")
    field("layout", "none" if buf.layout is None else str(buf.layout))
    field("home", f"{safe(buf.home)}, exported by {safe(buf.exp_name)}")
    field("created", f"{made} by process {buf.pid}, {age(time.time_ns() - buf.created)} ago")
    if stream is not None and buf.stream is not None:
        field("stream", f"slot {buf.stream.slot} of {name_in_words(stream)}")
    field("domain", safe(str(path)))
    held: list[Text | str] = [f"{safe(h.comm)} {h.pid}: {counted(descriptor=h.fds, mapping=h.maps) or naming.UNSEEN}" for h in buf.holders]
    field("held by", *(held or [Text(NOBODY, "yellow")]))
    field("content", Text(torn_text(buf), "red") if buf.torn else "whole")
    field("accesses", f"{buf.accesses} entered or waiting" if buf.accesses else "none")
    field("locked", f"by process {buf.locked_by}" if buf.locked_by else "no")
    field("fences", *([_fence(fence, monotonic) for fence in found.fences] or [Text("none")]))
    grid.print(out)


def _fence(fence: FenceRecord, monotonic: int) -> Text:
    blocks = {"read": ", blocks writers", "bookkeep": ""}.get(fence.usage, ", blocks readers and writers")
    kind = ""
    if fence.access:
        kind = f", a {fence.access}() that {'is entered' if fence.granted else 'waits'}"
    names = " ".join(filter(None, (safe(fence.driver), safe(fence.timeline)))) or "of a timeline that is gone"
    text = f"{fence.usage}: {names} {fence.seqno}, of {safe(fence.comm)} {fence.pid}, made {age(monotonic - fence.since)} ago{kind}"
    return Text(text + ", signaled", "dim") if fence.signaled else Text(text + blocks)
