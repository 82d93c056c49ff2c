"""One process of the soak: does what its seed says until it goes, and answers for each error it meets."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import random
import signal
import socket
import sys
import threading
import traceback
import warnings
from pathlib import Path
from typing import Any, NoReturn

import dmabuf
from dmabuf import DmaBuf, DmaFence, SwSync, SyncFile, Timeline, TimelineSemaphore
from tests.soak.board import Line
from tests.soak.signaller import Signaller

BUFFERS, FENCES, FILES, SHARED = 10, 8, 5, 2  # how many of each a worker keeps
LINGER = 0.01  # s, at most
FAILED = 70  # exit status of a process that found a fault
_PR_SET_NAME = 15  # linux/prctl.h


class Worker:
    """What one process has. ``where``: the directory of the run. ``line``: None in a forked child."""

    def __init__(self, where: Path, seed: str, line: Line | None) -> None:
        self.where, self.seed, self.line = where, seed, line
        self.rng = random.Random(seed)
        self.signaller = Signaller(seed)
        self.bufs: list[DmaBuf] = []
        self.fences: list[DmaFence] = []
        self.files: list[SyncFile] = []
        self.timelines: list[Timeline] = []
        self.shared: list[SwSync] = []
        self.semaphores: list[TimelineSemaphore] = []
        self.grown: list[Any] = []
        self.heap: dmabuf.SpillHeap | None = None
        self.children: list[int] = []
        self.used: list[DmaBuf] = []  # in the operation that runs
        self.listener = self._listen()

    # ---- meeting others ----

    def _listen(self) -> socket.socket:
        made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        path = self.where / "peers" / str(os.getpid())
        with contextlib.suppress(FileNotFoundError):  # a killed worker had the same pid
            path.unlink()
        made.bind(str(path))
        made.listen(8)
        made.setblocking(False)
        return made

    def peer(self) -> socket.socket | None:
        """A connection to some other worker; None if the one that was chosen has gone, or has too many already."""
        others = [name for name in os.listdir(self.where / "peers") if name != str(os.getpid())]
        if not others:
            return None
        made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        made.setblocking(False)
        try:
            made.connect(str(self.where / "peers" / self.rng.choice(sorted(others))))
        except (ConnectionRefusedError, FileNotFoundError, BlockingIOError):
            made.close()
            return None
        made.setblocking(True)
        return made

    def guest(self) -> socket.socket | None:
        """A connection that another worker has made, if there is one."""
        try:
            made, _ = self.listener.accept()
        except BlockingIOError:
            return None
        made.setblocking(True)
        return made

    # ---- keeping and choosing ----

    def keep(self, thing: Any) -> None:
        """Keep it; the oldest of its kind goes for it, closed or just dropped."""
        kinds: list[tuple[type, list[Any], int]] = [
            (DmaBuf, self.bufs, BUFFERS),
            (DmaFence, self.fences, FENCES),
            (SyncFile, self.files, FILES),
            (SwSync, self.shared, SHARED),
            (TimelineSemaphore, self.semaphores, SHARED),
        ]
        for kind, kept, most in kinds:
            if isinstance(thing, kind):
                kept.append(thing)
                if len(kept) > most:
                    old = kept.pop(self.rng.randrange(most))
                    if not isinstance(old, DmaFence) and self.rng.random() < 0.7:
                        old.close()
                return

    def buf(self) -> DmaBuf:
        """One of its buffers; a new one if it has none."""
        if not self.bufs:
            self.bufs.append(dmabuf.allocate(4096))
        # The oldest, more often than its turn: most others have it too, so they meet there.
        chosen = min(self.bufs, key=lambda buf: buf.ino) if self.chance(0.25) else self.rng.choice(self.bufs)
        self.used.append(chosen)
        return chosen

    def oldest(self, count: int) -> list[DmaBuf]:
        """So many different buffers that most others have too, in some order; one at least."""
        found = {buf.ino: buf for buf in (self.buf(), *self.bufs)}
        chosen = [found[ino] for ino in sorted(found)[:count]]
        self.rng.shuffle(chosen)
        self.used += chosen
        return chosen

    def some(self, count: int) -> list[DmaBuf]:
        """So many different buffers, or fewer."""
        found: dict[int, DmaBuf] = {}
        for _ in range(count):
            buf = self.buf()
            found.setdefault(buf.ino, buf)
        return list(found.values())

    def timeline(self) -> Timeline:
        if len(self.timelines) < 3:
            self.timelines.append(Timeline(f"soak {os.getpid()}"))
        return self.rng.choice(self.timelines)

    def linger(self) -> None:
        """Stay for a moment, sometimes: others then wait for this worker, or it dies here."""
        if self.chance(0.3):
            threading.Event().wait(self.rng.uniform(0, LINGER))

    def chance(self, of: float) -> bool:
        return self.rng.random() < of

    # ---- children ----

    def reap(self, *, block: bool = False) -> None:
        """Look after forked children that have ended."""
        for pid in list(self.children):
            found, status = os.waitpid(pid, 0 if block else os.WNOHANG)
            if found:
                self.children.remove(pid)
                code = os.waitstatus_to_exitcode(status)
                if code not in (0, -signal.SIGKILL):
                    raise AssertionError(f"a forked child ended with {code}")

    def in_child(self) -> None:
        """Become a worker of one's own: what was inherited can be used, what is the parent's alone is forgotten."""
        self.line = None
        self.seed += f" child {os.getpid()}"
        self.rng = random.Random(self.seed)
        self.signaller = Signaller(self.seed)
        self.timelines, self.grown, self.children, self.heap = [], [], [], None
        # The parent's fences are the parent's to signal; here they are only waited for.
        self.listener.close()
        self.listener = self._listen()

    # ---- the end ----

    def go(self) -> None:
        """Leave as a program leaves: signal what is pending, wait for the children, and close some of what is open."""
        self.reap(block=True)
        self.signaller.end()
        (self.where / "peers" / str(os.getpid())).unlink()
        self.listener.close()
        things: list[Any] = [*self.bufs, *self.files, *self.shared, *self.semaphores, *self.timelines]
        for thing in things:
            if self.chance(0.5):
                thing.close()
        if self.heap is not None and self.chance(0.5):
            self.heap.close()


def prepare(name: str) -> None:
    """What is a fault of its own is told as one: warnings, and exceptions that nobody could catch."""
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode()[:15], 0, 0, 0)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    warnings.simplefilter("error")
    warnings.simplefilter("ignore", ResourceWarning)  # some are dropped on purpose
    warnings.simplefilter("ignore", DeprecationWarning)  # of forks with threads, from Python 3.12 on
    sys.unraisablehook = lambda unraisable: fail(unraisable.exc_value)
    threading.excepthook = lambda args: fail(args.exc_value)


def fail(error: BaseException | None) -> NoReturn:
    """A fault was found: say so, and end at once."""
    with contextlib.suppress(BaseException):
        if error is not None:
            traceback.print_exception(error)
        sys.stderr.flush()
    os._exit(FAILED)
