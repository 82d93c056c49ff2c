"""Who holds a buffer: every process of which /proc lets us see the descriptors and mappings (proc(5))."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import NamedTuple


class Holder(NamedTuple):
    """A process that holds a buffer. ``fds``: descriptors; ``maps``: mappings."""

    pid: int
    comm: str
    fds: int
    maps: int


def holders(wanted: Collection[tuple[int, int]]) -> dict[tuple[int, int], list[Holder]]:
    """Holders by (st_dev, st_ino), for the inodes in ``wanted``; one walk over /proc, of the processes that we may look into."""
    found: dict[tuple[int, int], list[Holder]] = {}
    if not wanted:
        return found
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        counts: dict[tuple[int, int], list[int]] = {}
        try:
            for key in _fds(entry.path):
                if key in wanted:
                    counts.setdefault(key, [0, 0])[0] += 1
            for key in _maps(entry.path):
                if key in wanted:
                    counts.setdefault(key, [0, 0])[1] += 1
            if counts:
                with open(f"{entry.path}/comm", "rb") as f:
                    comm = os.fsdecode(f.read().strip())
                for key, (fds, maps) in counts.items():
                    found.setdefault(key, []).append(Holder(int(entry.name), comm, fds, maps))
        except OSError:
            continue  # not ours to look into, or gone meanwhile
    return found


def _fds(process: str) -> list[tuple[int, int]]:
    seen = []
    for entry in os.scandir(f"{process}/fd"):
        try:
            if os.readlink(entry.path).startswith(("/memfd:dmabuf:", "/dmabuf:")):
                st = os.stat(entry.path)
                seen.append((st.st_dev, st.st_ino))
        except OSError:
            continue  # closed meanwhile
    return seen


def _maps(process: str) -> list[tuple[int, int]]:
    seen = []
    with open(f"{process}/maps", "rb") as f:
        for line in f:
            if b"/memfd:dmabuf:" in line or b"/dmabuf:" in line:
                fields = line.split(maxsplit=5)
                major, minor = fields[3].split(b":")
                seen.append((os.makedev(int(major, 16), int(minor, 16)), int(fields[4])))
    return seen
