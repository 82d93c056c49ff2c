"""What several commands share: finding the domain without making one, and the JSON forms, which docs/cli.md describes."""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from dmabuf.domain import place
from dmabuf.domain.domain import Domain
from dmabuf.errors import fail
from dmabuf.observe.records import BufferRecord, BufferSnapshot, FenceRecord, snapshots

as_json = click.option("--json", "as_json", is_flag=True, help="JSON for programs.")
in_domain: Callable[[Any], Any] = click.option(
    "--domain", "path", type=click.Path(path_type=Path), metavar="PATH", help="The directory of the domain, instead of your own."
)


def domain_path(path: Path | None) -> Path:
    """The directory to look at."""
    return (path or place.default_path()).absolute()


def snapshots_at(path: Path | None) -> tuple[Domain | None, list[BufferSnapshot]]:
    """The domain and what is in it; (None, []) when nobody has made this user's yet.

    Errors: ENOENT a directory that was asked for and has no domain; those of opening one.
    """
    where = domain_path(path)
    if not (where / place.FILE).exists():
        if path is not None:
            raise fail(
                errno.ENOENT, "open domain", where, "name the directory that DMABUF_DOMAIN names for its users", what="no domain there"
            )
        return None, []
    domain = Domain.open(where)
    return domain, snapshots(domain)


def heading(domain: Domain | None, path: Path | None) -> dict[str, Any]:
    """The fields that `ls --json` and `info --json` begin with."""
    return {
        "domain": {"id": domain.id if domain else None, "path": str(domain_path(path))},
        "monotonic_ns": time.monotonic_ns(),
    }


def buffer_json(record: BufferRecord) -> dict[str, Any]:
    """A buffer."""
    return vars(record) | {
        "holders": [holder._asdict() for holder in record.holders],
        "blocking_readers": [fence_json(fence) for fence in record.blocking_readers],
        "blocking_writers": [fence_json(fence) for fence in record.blocking_writers],
        "torn": vars(record.torn) if record.torn else None,
    }


def fence_json(fence: FenceRecord) -> dict[str, Any]:
    """A fence."""
    return dict(vars(fence))


def print_json(data: Any) -> None:
    """Print it: ASCII only, so that a name of any bytes gets through any pipe."""
    click.echo(json.dumps(data, indent=2))
