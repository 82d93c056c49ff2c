"""The log of the named steps that all processes of a test pass, in order (`step_log` in native/domain/step.c).

    with Tracing() as tracing:
        …                                  # this process, and those that it forks
        tracing.path                       # for others: `log_to(path)`
    entries = tracing.entries()

An entry is written just after the change of its step. What gives something away is noted just before. `Entry.process` and `Entry.thread`
are numbered in the log; `object` is the offset in the file of the domain, and `number` says more (see the steps in native/domain).
"""

from __future__ import annotations

import os
import struct
import tempfile
from pathlib import Path
from typing import NamedTuple, Self

from dmabuf import _native

_ENTRY = struct.Struct("=IIIIQQI28s")
_BYTES = 64
CAPACITY = 1 << 20  # entries; the pages of those that are not used are never made
_BASE = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


class Entry(NamedTuple):
    """One step, or one note."""

    name: str
    pid: int
    process: int
    thread: int
    domain: int
    object: int
    number: int

    def __str__(self) -> str:
        where = f" of {self.domain:x}+{self.object:#x}" if self.domain else ""
        return f"{self.name}{where} {self.number:#x} by {self.pid} ({self.process}/{self.thread})"


class Tracing:
    """A log, and this process writes to it for the block."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity

    def __enter__(self) -> Self:
        fd, name = tempfile.mkstemp(prefix="steps-", dir=_BASE)
        self.path = Path(name)
        os.truncate(fd, self._capacity * _BYTES)
        os.close(fd)
        log_to(self.path)
        return self

    def __exit__(self, *_: object) -> None:
        _native.step_log(-1)
        self._text = self._read()
        self.path.unlink()

    def _used(self) -> int:
        with self.path.open("rb") as f:
            return min(int.from_bytes(f.read(8), "little") + 1, self._capacity)

    def _read(self) -> bytes:
        with self.path.open("rb") as f:
            return f.read(self._used() * _BYTES)

    def entries(self) -> list[Entry]:
        """What was logged, until the log was full. An entry that a killed process had begun is left out."""
        found = []
        for at in range(_BYTES, len(self._text), _BYTES):
            ready, pid, process, thread, where, number, domain, name = _ENTRY.unpack_from(self._text, at)
            if ready:
                found.append(Entry(name.partition(b"\0")[0].decode(), pid, process, thread, domain, where, number))
        return found


def log_to(path: Path) -> None:
    """Let this process, and those that it forks from now on, write to a log."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        _native.step_log(fd)
    finally:
        os.close(fd)
