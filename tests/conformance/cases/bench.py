"""What a case works with: buffers and fences of one home, cleared away at its end; and the table that cases enter themselves in."""

import contextlib
import errno
import fcntl
import os
import resource
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import dmabuf
from dmabuf import DmaBuf, SwSync, SyncFile, Usage

SIZE = 16384  # of the buffers that the kernels were asked about (bytes)
PAGE = 4096
CASES: dict[str, Callable[["Bench"], Any]] = {}
_Case = TypeVar("_Case", bound=Callable[["Bench"], Any])


def case(*names: str) -> Callable[[_Case], _Case]:
    """Enter a function as the case of these names."""

    def enter(function: _Case) -> _Case:
        for name in names:
            add(name, function)
        return function

    return enter


def add(name: str, function: Callable[["Bench"], Any]) -> None:
    """Enter a case."""
    assert name not in CASES, name
    CASES[name] = function


class NotHere(Exception):
    """The home has no such thing."""


class Bench:
    """One home's way to make things. ``heap``: None for the recommended one of this machine, which is plain memory."""

    def __init__(self, heap: str | None = "memfd") -> None:
        self.heap = heap
        self._open: list[Callable[[], object]] = []

    def answer(self, function: Callable[["Bench"], Any]) -> Any:
        """What a case gives: its value, or the errno's name. Everything it made is closed."""
        try:
            return function(self)
        except OSError as e:
            return errno.errorcode.get(e.errno or 0, str(e))
        finally:
            while self._open:
                self._open.pop()()

    def keep(self, close: Callable[[], object]) -> None:
        """Call this at the end of the case, the last first."""
        self._open.append(close)

    def buffer(self, size: int = SIZE) -> DmaBuf:
        """A new buffer without a name."""
        made = dmabuf.allocate(size, heap=self.heap)
        self.keep(made.close)
        return made

    def written_by_a_child(self, what: bytes) -> tuple[int, bytes]:
        """Of a forked child that writes into a mapping that it inherits: how it ended (waitpid(2)), and what is read here afterwards."""
        mapping = self.buffer().mmap()
        self.keep(mapping.close)
        with memoryview(mapping) as view:
            pid = os.fork()
            if pid == 0:
                view[: len(what)] = what
                os._exit(0)
            return os.waitpid(pid, 0)[1], bytes(view[: len(what)])

    def opened(self, mode: int) -> int | None:
        """A descriptor with that access mode of a new buffer of a page, for the caller to close; None where there is none."""
        return os.open(f"/proc/self/fd/{self.buffer(PAGE).fileno()}", mode | os.O_CLOEXEC)

    def timeline(self) -> Any:
        """A software timeline: `create_fence(value)`, `inc(n)`, `get_deadline(file)`, `close()`; closed at the end."""
        made = SwSync("python3")
        self.keep(made.close)
        return made

    def fence(self, timeline: Any, value: int) -> SyncFile:
        """A fence of a timeline, closed at the end."""
        made: SyncFile = timeline.create_fence(value)
        self.keep(made.close)
        return made

    def pending(self) -> "Pending":
        """A pending fence on a timeline of its own; signalled at the end, if it is not before."""
        made = Pending(self)
        self.keep(made.signal)
        return made

    def add(self, buf: DmaBuf, pending: "Pending", usage: Usage) -> None:
        """Put the fence on a buffer."""
        buf.import_sync_file(pending.file, usage == Usage.WRITE)

    def busy(self, buf: DmaBuf, usage: Usage) -> Callable[[], object]:
        """Put a pending fence on a buffer; what signals it."""
        made = self.pending()
        self.add(buf, made, usage)
        return made.signal


class Pending:
    """A fence that somebody can end. ``file``: its sync file."""

    def __init__(self, bench: Bench) -> None:
        self.timeline = bench.timeline()
        self.file = bench.fence(self.timeline, 1)

    def signal(self) -> None:
        """End it; again: nothing."""
        if not self.file.closed and not self.file.is_signaled():
            self.timeline.inc(1)


def flags_of(fd: int) -> str:
    """F_GETFL and FD_CLOEXEC, as the questions show them."""
    value = fcntl.fcntl(fd, fcntl.F_GETFL)
    mode = {0: "O_RDONLY", 1: "O_WRONLY", 2: "O_RDWR", 3: "O_ACCMODE(3)"}[value & 3]
    rest = value & ~3 & ~0o100000
    return mode + (f"|{rest:#o}" if rest else "") + ("|FD_CLOEXEC" if fcntl.fcntl(fd, fcntl.F_GETFD) & 1 else "")


@contextlib.contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    """(read end, write end), closed at the end."""
    ends = os.pipe()
    try:
        yield ends
    finally:
        for end in ends:
            os.close(end)


@contextlib.contextmanager
def no_descriptor_left() -> Iterator[None]:
    """A block in which every new descriptor is EMFILE."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, max(map(int, os.listdir("/proc/self/fd"))) + 8), hard))
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.dup(0))
        yield
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
