"""What a process holds, before and after a test.

A test leaves nothing behind: no descriptor, shared mapping, child process, thread, or file. `Holdings.now()` looks; `before.lost(after)`
names the difference in words that lead to the line that forgot to close. A `LeakCheck` does that around each test of a run.

Threads that stay (the dispatcher, the service, the releaser) open descriptors for a moment: they look after the dead, and accept
connections of processes that have gone. One such, seen after a test, is gone at a later look, which comes when they have come to rest.
One seen before a test is gone after it; so only what has been there for a whole test is missed when it goes.

Of files only those in the run's own domain count. What is in `/dev/shm` and `/run/user` says nothing of who made it: another run, a bench
or a user's program puts a domain there at any time. So that no test does, it must leave `DMABUF_DOMAIN` as it was.
"""

import contextlib
import gc
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tests.support.children import prepare
from tests.support.mappings import shared_mappings
from tests.support.waiting import until, until_others_sleep

SHM = Path("/dev/shm")
# A test run's own directory; those of other runs on this machine come and go.
DIRECTORY_PREFIX = "dmabuf-test-"
# Tests between two times when what exists is hidden from the collector.
_FREEZE_EVERY = 8
# Looks after a test before what is there counts as left, each with all threads at rest.
_LOOKS = 20
# For a thread that never comes to rest, in ns: somebody left it running. All the looks are over before the watchdog bites.
_PATIENCE_NS = 3_000_000_000


def _default_domain() -> Any:
    """The process's default domain, opened; None while the package can't be imported."""
    try:
        from dmabuf import Domain  # type: ignore[attr-defined, unused-ignore]
    except ImportError:
        return None
    return Domain.default()


def warm_up() -> None:
    """Start what a process has once and keeps until it ends, so that the first test to need it doesn't seem to leak it."""
    multiprocessing.resource_tracker.ensure_running()
    # Its children import the modules of tests, and what those need: it does so for all of them. With "spawn" each imports all itself.
    multiprocessing.forkserver.set_forkserver_preload(["__main__", "pytest", "tests.support.preloaded"])
    multiprocessing.forkserver.ensure_running()
    if _default_domain() is not None:
        import dmabuf

        # A module that is imported at first use would be imported in each fork again.
        prepare()
        from dmabuf.sharing.server import serve

        # The first buffer to go opens what the process watches such ends with.
        dmabuf.allocate(1).close()
        # And the first exported one starts what answers other processes, until the process ends.
        serve(dmabuf.Domain.default())


def _give_up_scaler() -> None:
    """Give up what PyAV 19 and newer keep for the thread that has converted a picture.

    A child that another thread forks ends it, and FFmpeg waits there for threads that it has only in the parent.
    """
    module = sys.modules.get("av.video.frame")
    if module is not None:
        vars(getattr(module, "_thread_local", threading.local())).clear()


def settle() -> None:
    """Bring forward what would happen by itself a little later: garbage, and the repair of what dead processes left in the domain."""
    _give_up_scaler()
    gc.collect()
    domain = _default_domain()
    sweep = getattr(domain, "sweep", None)
    if sweep is not None:
        sweep()
    if domain is None:
        return
    from dmabuf.domain.dispatcher import DISPATCHER
    from dmabuf.sharing.server import SERVER

    watched = DISPATCHER.peek(domain)
    if watched is not None and watched.life == domain.shm.life:
        # That a fence of another process has ended is about to be told to who registered for it here.
        until(lambda: all(map(domain.shm.fence_pending, [*list(watched._foreign.values()), *watched._past])))
    service = SERVER.peek(domain)
    if service is not None:  # what served processes that have ended is about to notice
        until(lambda: not any(map(_ended, list(service._connections))))
        until(lambda: sum(thread.name == "dmabuf-server" for thread in threading.enumerate()) <= len(service._connections))


def _ended(conn: socket.socket) -> bool:
    """Is the other end of the connection gone, or ours being closed?"""
    try:
        return conn.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def rest() -> None:
    """Until every other thread of this process sleeps, so that what one of them is in the middle of has come to its end."""
    end = time.monotonic_ns() + _PATIENCE_NS
    until_others_sleep(over=lambda: time.monotonic_ns() > end)


def descriptors() -> int:
    """How many descriptors this process has open, when the threads that stay are done with theirs."""
    gc.collect()
    rest()
    return len(os.listdir("/proc/self/fd"))


@dataclass(frozen=True)
class Holdings:
    """What this process, and the directories it writes to, hold at one moment."""

    descriptors: dict[int, str]
    mappings: Counter[str]
    children: frozenset[int]
    threads: frozenset[str]
    files: frozenset[str]
    domain_size: int
    named: str | None  # the domain that the environment names

    @classmethod
    def now(cls, domain: Path) -> Self:
        """Look at this process, and at the files of the domain in this directory."""
        files = dict(_files(domain))
        return cls(
            descriptors=dict(_descriptors()),
            mappings=Counter(shared_mappings()),
            children=frozenset(_children()),
            threads=frozenset(f"{t.name} ({t.ident})" for t in threading.enumerate() if not t.daemon),
            files=frozenset(files),
            domain_size=sum(size for path, size in files.items() if os.path.dirname(path) == str(domain)),
            named=os.environ.get("DMABUF_DOMAIN"),
        )

    def lost(self, after: Self, domain: Path, standing: dict[int, str] | None = None) -> list[str]:
        """What changed between this look and a later one, a line each; empty if nothing did.

        ``standing``: the descriptors that are missed when they are gone; None: all that this look has seen.
        """
        lines = []
        for fd in sorted(self.descriptors.keys() | after.descriptors.keys()):
            old, new = self.descriptors.get(fd), after.descriptors.get(fd)
            if old != new and standing is not None and old != standing.get(fd):
                old = None
            if old != new:
                # A descriptor that was there before and is gone was closed by somebody who didn't own it.
                lines.append(f"fd {fd}: left open: {new}" if old is None else f"fd {fd}: was {old}, is {new or 'closed'}")
        for name, more in sorted((after.mappings - self.mappings).items()):
            # The default domain grows by extents, each a mapping that stays.
            if not (name.startswith(f"{domain}/") and after.domain_size > self.domain_size):
                lines.append(f"mapping left: {name}" + (f" ({more} times)" if more > 1 else ""))
        lines += [f"child left: {pid}: {_command(pid)}" for pid in sorted(after.children - self.children)]
        lines += [f"thread left: {name}" for name in sorted(after.threads - self.threads)]
        lines += [f"file left: {name}" for name in sorted(after.files - self.files)]
        if after.named != self.named:
            lines.append(f"DMABUF_DOMAIN: was {self.named}, is {after.named}")
        return lines


class LeakCheck:
    """The looks around each test of a run. ``domain``: the directory of the run's domain.

    The last look after a test is the first look of the next test, unless `forget` is called in between.
    """

    def __init__(self, domain: Path) -> None:
        self._domain = domain
        self._standing = dict(_descriptors())
        self._before: Holdings | None = None
        self._tests = 0

    def begin(self) -> None:
        """A test is about to start."""
        if self._before is None:
            settle()
            self._before = Holdings.now(self._domain)

    def end(self) -> list[str]:
        """The test is over. Return what it left, a line each."""
        before, self._before = self._before, None
        assert before is not None, "begin() comes first"
        lost: list[str] = []
        for _ in range(_LOOKS):
            settle()
            after = Holdings.now(self._domain)
            lost = before.lost(after, self._domain, self._standing)
            if not lost:
                self._standing = dict(before.descriptors.items() & after.descriptors.items())
                self._before = after
                break
            rest()
        self._freeze()
        return lost

    def forget(self) -> None:
        """Something other than a test has changed, or is about to change, what this process holds."""
        self._before = None

    def _freeze(self) -> None:
        # pytest keeps the item and the reports of every test, and each collection visits all of them: after thousands of tests the
        # collections took most of the run. None of it is garbage, because settle() has just collected that.
        self._tests += 1
        if self._tests % _FREEZE_EVERY == 0:
            gc.freeze()


def _descriptors() -> Iterator[tuple[int, str]]:
    for name in os.listdir("/proc/self/fd"):
        try:
            yield int(name), os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            # The descriptor of the listing itself.
            continue


def _files(directory: Path) -> Iterator[tuple[str, int]]:
    """Path of all that is in a directory, at any depth, and bytes of what is a file."""
    waiting: list[str | Path] = [directory]
    while waiting:
        # What was removed since its directory was read is not there.
        with contextlib.suppress(FileNotFoundError), os.scandir(waiting.pop()) as found:
            for entry in found:
                with contextlib.suppress(FileNotFoundError):
                    is_directory = entry.is_dir(follow_symlinks=False)
                    yield entry.path, 0 if is_directory else entry.stat(follow_symlinks=False).st_size
                    if is_directory:
                        waiting.append(entry.path)


def _children() -> Iterator[int]:
    """Children of every thread, zombies too."""
    for tid in os.listdir("/proc/self/task"):
        # The thread may have ended since the directory was read.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/self/task/{tid}/children", "rb", buffering=0) as file:
            yield from map(int, file.readall().split())


def _command(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").replace("\0", " ").strip()
    except (FileNotFoundError, ProcessLookupError):
        return "gone"
    return words or "zombie"
