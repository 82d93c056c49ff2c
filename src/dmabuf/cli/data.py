"""What several commands use: the domain, which they never make, and the JSON forms, which docs/cli.md describes."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from dmabuf.domain import place
from dmabuf.domain.domain import Domain
from dmabuf.errors import fail
from dmabuf.observe.records import BufferRecord, BufferSnapshot, FenceRecord, snapshots
from dmabuf.observe.streams import StreamRecord

as_json = click.option("--json", "as_json", is_flag=True, help="JSON for programs.")
in_domain: Callable[[Any], Any] = click.option(
    "--domain", "path", type=click.Path(path_type=Path), metavar="PATH", help="The directory of the domain, instead of your own."
)


def domain_path(path: Path | None) -> Path:
    """Return the directory of the domain."""
    return (path or place.default_path()).absolute()


def snapshots_at(path: Path | None) -> tuple[Domain | None, list[BufferSnapshot]]:
    """Return the domain and its buffers, (None, []) if this user's domain doesn't exist yet.

    Raises:
        NotFoundError: ``path`` is given and has no domain (ENOENT).
        DmaBufError: The domain can't be opened.
    """
    where = domain_path(path)
    if not _exists(where):
        if path is not None:
            raise fail(
                errno.ENOENT, "open domain", where, "name the directory that its processes have in DMABUF_DOMAIN", what="no domain there"
            )
        return None, []
    domain = Domain.open(where)
    return domain, snapshots(domain)


def _exists(where: Path) -> bool:
    """Return True if there is a domain in a directory. It fails if there can't be one, as ``dmabuf.allocate()`` does."""
    try:
        with place.open_directory(where, make=False) as directory:
            return place.has_file(directory.number)
    except FileNotFoundError:
        if os.access(where.parent, os.W_OK | os.X_OK):
            return False
        remedy = "make it, or name another directory in DMABUF_DOMAIN"
        what = f"it doesn't exist, and can't be made in {where.parent}"
        raise fail(errno.ENOENT, "open domain", where, remedy, what=what) from None


def heading(domain: Domain | None, path: Path | None) -> dict[str, Any]:
    """Return the first fields of `ls --json` and `info --json`."""
    return {
        "domain": {"id": domain.id if domain else None, "path": str(domain_path(path))},
        "monotonic_ns": time.monotonic_ns(),
    }


def buffer_json(record: BufferRecord) -> dict[str, Any]:
    """Return a buffer as JSON."""
    return vars(record) | {
        "holders": [holder._asdict() for holder in record.holders],
        "blocking_readers": [fence_json(fence) for fence in record.blocking_readers],
        "blocking_writers": [fence_json(fence) for fence in record.blocking_writers],
        "torn": vars(record.torn) if record.torn else None,
        "stream": vars(record.stream) if record.stream else None,
        "layout": None if record.layout is None else str(record.layout),
    }


def stream_json(stream: StreamRecord, every: bool = False) -> dict[str, Any]:
    """Return a stream as JSON. ``every``: with each slot and reader, not only with how many there are."""
    fields = vars(stream) | {
        "layout": None if stream.layout is None else str(stream.layout),
        "producer": None if stream.producer is None else vars(stream.producer),
        "readers": [vars(reader) | {"process": vars(reader.process)} for reader in stream.readers],
        "slots": [vars(slot) for slot in stream.slots],
    }
    return fields if every else fields | {"readers": len(stream.readers), "slots": len(stream.slots)}


def fence_json(fence: FenceRecord) -> dict[str, Any]:
    """Return a fence as JSON."""
    return dict(vars(fence))


def print_json(data: Any) -> None:
    """Print JSON, in ASCII only, so that a name of any bytes gets through any pipe."""
    click.echo(json.dumps(data, indent=2))
