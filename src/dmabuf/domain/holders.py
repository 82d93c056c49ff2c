"""``holders``: the processes that have a buffer open or mapped, as far as /proc shows their descriptors and mappings (proc(5))."""

from __future__ import annotations

import errno
import os
from collections.abc import Collection
from typing import NamedTuple

from dmabuf.errors import needing_descriptors


class Holder(NamedTuple):
    """A process that has a buffer open or mapped. ``fds``: its descriptors of the buffer; ``maps``: its mappings."""

    pid: int
    comm: str
    fds: int
    maps: int


def holders(wanted: Collection[tuple[int, int]]) -> dict[tuple[int, int], list[Holder]]:
    """Return the holders of some inodes by (st_dev, st_ino), after one walk over the processes that /proc shows. Errors: EMFILE."""
    found: dict[tuple[int, int], list[Holder]] = {}
    if wanted:
        with needing_descriptors("look up", "holders of buffers in /proc"):
            _walk(wanted, found)
    return found


def _walk(wanted: Collection[tuple[int, int]], found: dict[tuple[int, int], list[Holder]]) -> None:
    for pid in filter(str.isdigit, os.listdir("/proc")):
        process = f"/proc/{pid}"
        counts: dict[tuple[int, int], list[int]] = {}
        try:
            for key in _fds(process):
                if key in wanted:
                    counts.setdefault(key, [0, 0])[0] += 1
            for key in _maps(process):
                if key in wanted:
                    counts.setdefault(key, [0, 0])[1] += 1
            if counts:
                with open(f"{process}/comm", "rb") as f:
                    comm = os.fsdecode(f.read().strip())
                for key, (fds, maps) in counts.items():
                    found.setdefault(key, []).append(Holder(int(pid), comm, fds, maps))
        except OSError as e:
            if e.errno in (errno.EMFILE, errno.ENFILE):  # a buffer whose holders aren't found would be taken for a buffer that is gone
                raise
            # Otherwise this process may not read them, or the other process has ended.


def _fds(process: str) -> list[tuple[int, int]]:
    seen = []
    with os.scandir(f"{process}/fd") as entries:
        for entry in entries:
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
