"""``holders``: the processes that have a buffer open or mapped, as far as /proc shows their descriptors and mappings (proc(5))."""

from __future__ import annotations

import errno
import os
from collections.abc import Collection
from typing import NamedTuple

from dmabuf._native import owned
from dmabuf.domain.directory import open_at
from dmabuf.domain.limits import listed
from dmabuf.errors import needing_descriptors


class Holder(NamedTuple):
    """A process that has a buffer open or mapped. ``fds``: its descriptors of the buffer; ``maps``: its mappings."""

    pid: int
    comm: str
    fds: int
    maps: int


def holders(wanted: Collection[tuple[int, int]]) -> dict[tuple[int, int], list[Holder]]:
    """Return the holders of some inodes by (st_dev, st_ino), after one walk over the processes in /proc. No free descriptor is EMFILE."""
    found: dict[tuple[int, int], list[Holder]] = {}
    if wanted:
        with needing_descriptors("look up", "holders of buffers in /proc"):
            _walk(wanted, found)
    return found


def _walk(wanted: Collection[tuple[int, int]], found: dict[tuple[int, int], list[Holder]]) -> None:
    for pid in filter(str.isdigit, listed("look up holders", "/proc")):
        try:
            # What is read through this descriptor is of one process. A path would lead to the next process with its number.
            with owned(os.open, f"/proc/{pid}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC) as process:
                _look(int(pid), process.number, wanted, found)
        except OSError as e:
            if e.errno in (errno.EMFILE, errno.ENFILE):  # a buffer whose holders aren't found would be taken for a buffer that is gone
                raise
            # Otherwise this process may not read them, or the other process has ended.


def _look(pid: int, process: int, wanted: Collection[tuple[int, int]], found: dict[tuple[int, int], list[Holder]]) -> None:
    counts: dict[tuple[int, int], list[int]] = {}
    for key in _fds(process):
        if key in wanted:
            counts.setdefault(key, [0, 0])[0] += 1
    for key in _maps(process):
        if key in wanted:
            counts.setdefault(key, [0, 0])[1] += 1
    if counts:
        with open_at(process, "comm", os.O_RDONLY | os.O_CLOEXEC) as own, open(own.number, "rb", closefd=False) as f:
            comm = os.fsdecode(f.read().strip())
        for key, (fds, maps) in counts.items():
            found.setdefault(key, []).append(Holder(pid, comm, fds, maps))


def _fds(process: int) -> list[tuple[int, int]]:
    seen = []
    with open_at(process, "fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC) as directory:
        for name in os.listdir(directory.number):
            try:
                if os.readlink(name, dir_fd=directory.number).startswith(("/memfd:dmabuf:", "/dmabuf:")):
                    st = os.stat(name, dir_fd=directory.number)
                    seen.append((st.st_dev, st.st_ino))
            except OSError:
                continue  # closed meanwhile
    return seen


def _maps(process: int) -> list[tuple[int, int]]:
    seen = []
    with open_at(process, "maps", os.O_RDONLY | os.O_CLOEXEC) as own, open(own.number, "rb", closefd=False) as f:
        for line in f:
            if b"/memfd:dmabuf:" in line or b"/dmabuf:" in line:
                fields = line.split(maxsplit=5)
                major, minor = fields[3].split(b":")
                seen.append((os.makedev(int(major, 16), int(minor, 16)), int(fields[4])))
    return seen
