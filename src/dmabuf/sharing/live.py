"""``Elsewhere``: a buffer whose exporter is another process. What needs the exporter is carried there, with the same results and errors.

It stands where the exporter's own side would (``record.live``), with an exporter whose ops are calls: so every rule of a buffer and of
an attachment, its checks, its unwinding and its counts, is the same code in every process, and only the ops travel. Memory comes as
descriptors and ranges, and is mapped here.

A dead exporter is ENODEV for everything that needs it. In a forked child the inherited state is the parent's; the buffer is used as by
any other process.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from dmabuf import _native
from dmabuf.core import backing
from dmabuf.core.backing import OPS, Backing
from dmabuf.core.buffer import DmaBuf
from dmabuf.core.exporter import Exporter
from dmabuf.core.usage import Direction
from dmabuf.domain.records import Record
from dmabuf.sharing.service import Body, Line, Progress, flag, line_to, number, serve


class Elsewhere(Backing):
    """The driver side, in this process, of a buffer that another one exports. ``peer``: that process's life; ``in_file``: as Backing."""

    def __init__(self, record: Record, peer: int, in_file: bool) -> None:
        super().__init__(_Carried(self), frozenset(), record, False)
        self.peer, self.in_file = peer, in_file
        self.life = record.shm.life
        self.line: Line | None = None
        self.asked = False
        self.held = 0  # mappings of this process's

    def here(self, operation: str) -> None:
        """Errors: ENODEV the exporter's process is gone."""
        if self.life != self.record.shm.life or not self.life:
            self._anew()
        if not self.asked:
            answer, _ = self.call("exporter", operation=operation)
            ops = answer.get("ops")
            self.ops = frozenset(ops if isinstance(ops, list) else ()) & frozenset(OPS)
            self.cache, self.dynamic = flag(answer, "cache"), "pin" in self.ops
            self.asked = True
        elif not self.record.shm.life_current(self.peer):
            raise self._line().gone(operation, f"buffer ino {self.record.ino}")

    def _anew(self) -> None:
        """In a forked child: attachments, vmaps and mappings are the parent's."""
        self.record.ensure()
        self.life = self.record.shm.life
        self.line, self.held, self.attachments, self.vmaps, self.mapped, self.brackets = None, 0, [], 0, None, 0

    def _line(self) -> Line:
        if self.line is None:
            self.line = line_to(self.record.domain, self.peer, self)
        return self.line

    def call(
        self, kind: str, buf: DmaBuf | None = None, body: Body | None = None, *, operation: str = "", progress: Progress | None = None
    ) -> tuple[Body, list[int]]:
        """Carry a call about this buffer."""
        named = {"dev": self.record.dev, "ino": self.record.ino, **(body or {})}
        fds: Iterable[int] = () if buf is None or buf._fd < 0 else (buf._fd,)
        about = buf or f"buffer ino {self.record.ino}"
        try:
            return self._line().call(kind, named, fds, operation=operation, obj=about, progress=progress)
        finally:
            self.settle()

    def leaving(self) -> None:
        """Nothing to remember."""

    def departed(self, quiet: bool) -> None:
        """A handle of this process was closed."""
        self.settle()

    def settle(self) -> None:
        """With nothing of the buffer left in this process, the exporter's process forgets us."""
        line = self.line
        if line is not None and not (self.record.handles or self.held or self.attachments):
            self.line = None
            line.leave(self)

    def unmapped(self, life: int, mapping: int) -> None:
        """A mapping of this process is closed, perhaps by the garbage collector."""
        if life != self.life or life != self.record.shm.life:
            return  # the parent's
        self.held -= 1
        if self.line is not None:
            self.line.note("unmapped", {"dev": self.record.dev, "ino": self.record.ino, "mapping": mapping})
        self.settle()


class _Carried(Exporter):
    """An exporter whose ops are calls to the process of the real one."""

    __slots__ = ("away",)

    def __init__(self, away: Elsewhere) -> None:
        self.away = away

    def begin_cpu_access(self, buf: DmaBuf, direction: Direction) -> None:
        self.away.call("begin", buf, {"direction": int(direction)}, operation="begin_cpu_access")

    def end_cpu_access(self, buf: DmaBuf, direction: Direction) -> None:
        self.away.call("end", buf, {"direction": int(direction)}, operation="end_cpu_access")

    def mmap(self, buf: DmaBuf, offset: int, length: int) -> _native.Mapping:
        away = self.away
        answer, fds = away.call("mmap", buf, {"offset": offset, "length": length}, operation="mmap")
        life, n = away.life, number(answer, "mapping")
        try:
            away.held += 1
            return _native.Mapping(
                fds[0],
                number(answer, "length", (1 << 63) - 1),
                offset=number(answer, "offset", (1 << 63) - 1),
                writable=flag(answer, "writable"),
                on_close=lambda: away.unmapped(life, n),
            )
        except BaseException:
            away.unmapped(life, n)
            raise
        finally:
            for fd in fds:
                os.close(fd)

    def map(self, attachment: Any, direction: Direction) -> Any:
        raise NotImplementedError

    def unmap(self, attachment: Any, sgt: Any, direction: Direction) -> None:
        raise NotImplementedError

    def release(self, buf: DmaBuf) -> None:
        """Happens in the exporter's process."""


backing.elsewhere = Elsewhere
backing.serve = serve
