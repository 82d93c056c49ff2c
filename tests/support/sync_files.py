"""Sync files seen from outside: as descriptors, and as names in the domain's directory."""

import os
import select
from typing import Any

import dmabuf


def polled(fd: Any, events: int = select.POLLIN | select.POLLOUT) -> int:
    """What poll(2) says of a descriptor at once."""
    asked = select.poll()
    asked.register(fd, events)
    found = asked.poll(0)
    return found[0][1] if found else 0


def names_in_domain() -> list[str]:
    """The sockets, and the files beside them, that somebody polls."""
    path = dmabuf.Domain.default().path
    assert path is not None
    return [name for name in os.listdir(path) if name.startswith("sync-")]
