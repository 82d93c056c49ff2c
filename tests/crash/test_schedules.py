"""Threads of one process that use, leave and close the same things, in orders drawn from seeds (tests/support/explorer.py).

A failure prints its seed: `DMABUF_TEST_SEEDS=17 pytest tests/crash/test_schedules.py -k FirstDispatcher` runs that order again.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

import dmabuf
from dmabuf import Domain, SyncFile, Timeline
from dmabuf.core.buffer.handle import handle_of
from dmabuf.domain import domain as domains
from dmabuf.domain.dispatcher import dispatcher
from dmabuf.errors import BusyError
from tests.support.apart import Apart
from tests.support.budget import seeds, times
from tests.support.explorer import Program, explore, may_switch
from tests.support.steps import fork, reap
from tests.support.waiting import until_asleep

pytestmark = [pytest.mark.crash, pytest.mark.timeout(600)]

QUICK, FULL, LONG = 12, 200, 2000  # seeds for each program


@contextlib.contextmanager
def allowed(*kinds: type[BaseException]) -> Iterator[None]:
    """What a thread may get when another one takes away what it uses."""
    with contextlib.suppress(*kinds):
        yield


class Owner:
    """Another process, which sends what `makes` returns, does `then` when it is told to, and lives until it is killed."""

    def __init__(self, makes: Callable[[], Sequence[dmabuf.DmaBuf | dmabuf.DmaFence]], then: Callable[[], object] = lambda: None) -> None:
        self.sock, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        here = self.sock.fileno()

        def own() -> None:
            os.close(here)
            made = makes()
            dmabuf.send(there, *made)
            while there.recv(1):
                then()

        self.pid = fork(own)
        there.close()

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        reap(self.pid)


# ---- first use ----


class FirstDispatcher(Program):
    """The first callbacks of a process, on two fences: both run."""

    def bodies(self) -> list[Callable[[], object]]:
        self.fences = [Timeline("first").fence() for _ in range(2)]
        self.called: list[int] = []
        return [lambda i=i: self.fences[i].add_callback(lambda _: self.called.append(i)) for i in range(2)]  # type: ignore[misc]

    def check(self) -> None:
        for fence in self.fences:
            fence.signal()
        assert sorted(self.called) == [0, 1]


class FirstRecord(Program):
    """A buffer that this process doesn't know comes in twice: one record, which stays while one of the two is open."""

    def bodies(self) -> list[Callable[[], object]]:
        self.owner = Owner(lambda: [dmabuf.allocate(4096, name="twice")])
        (buf,) = dmabuf.recv(self.owner.sock)
        self.fds = [buf.dup() for _ in range(2)]
        buf.close()
        del buf
        self.got: dict[int, dmabuf.DmaBuf] = {}
        forget_records()
        return [lambda i=i: self.got.__setitem__(i, dmabuf.get(self.fds[i])) for i in range(2)]  # type: ignore[misc]

    def check(self) -> None:
        one, two = self.got[0], self.got[1]
        with one.resv.locked():
            two.resv.reserve(1)
        index = handle_of(two).shared.index
        one.close()
        assert len(Domain.default().shm.rec_holders(index)) == 2  # the owner, and this process
        assert two.name == "twice"
        with two.read():
            pass
        self.owner.kill()


def forget_records() -> None:
    """Let this process know no record any more, as if it had never had one."""
    from dmabuf.domain import records

    for value in list(Domain.default().local.values()):
        if isinstance(value, records.deque):
            value.clear()
    gc.collect()


class FirstDomain(Program):
    """A domain that nobody has opened: all threads get the same object, and one life."""

    def bodies(self) -> list[Callable[[], object]]:
        self.directory = tempfile.TemporaryDirectory()
        self.opened: list[Domain] = []
        where = Path(self.directory.name) / "domain"

        def opens() -> None:
            domain = Domain.open(where)
            domain.join()
            self.opened.append(domain)

        return [opens] * 3

    def check(self) -> None:
        first, *others = self.opened
        assert all(other is first for other in others)
        first.leave()
        self.directory.cleanup()


class FirstSyncFile(Program):
    """The descriptor of a sync file is asked for twice while the fence is signaled: both become readable."""

    def bodies(self) -> list[Callable[[], object]]:
        self.fence = Timeline("file").fence()
        self.file = SyncFile(self.fence)
        self.fds: list[int] = []

        def asks() -> None:
            self.fds.append(os.dup(self.file.fileno()))

        return [asks, asks, self.fence.signal]

    def check(self) -> None:
        assert len(self.fds) == 2
        for fd in self.fds:
            assert select.select([fd], [], [], 10)[0]
            os.close(fd)
        self.file.close()


# ---- registries ----


class DomainsAreMade(Program):
    """Domains are made while another thread looks for one."""

    def bodies(self) -> list[Callable[[], object]]:
        Domain.default()
        kept: list[Domain] = []

        def makes() -> None:
            kept.extend(Domain.private() for _ in range(2))

        def looks() -> None:
            for _ in range(3):
                assert domains.known("nobody's") is None

        return [makes, looks]

    def check(self) -> None:
        pass


class BuffersComeAndGo(Program):
    """Buffers are received, dropped as garbage and closed at once."""

    def bodies(self) -> list[Callable[[], object]]:
        self.here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.bufs = [dmabuf.allocate(4096, name=f"goes {i}") for i in range(3)]
        for _ in range(2):
            dmabuf.send(there, *self.bufs)
        there.close()
        self.got: list[dmabuf.DmaBuf] = []

        def receives() -> None:
            self.got.extend(dmabuf.recv(self.here))

        def drops() -> None:
            circle: list[object] = list(dmabuf.recv(self.here))
            circle.append(circle)
            del circle
            gc.collect()

        def closes() -> None:
            for buf in self.bufs:
                buf.close()

        return [receives, drops, closes]

    def check(self) -> None:
        assert [buf.name for buf in self.got] == [f"goes {i}" for i in range(3)]
        for buf in self.got:
            with buf.write(timeout=10):
                pass
            buf.close()


class DispatcherSleeps(Program):
    """Fences of another process are watched while the dispatcher sleeps with nothing to watch: it sees their owner's death."""

    def bodies(self) -> list[Callable[[], object]]:
        def makes() -> list[dmabuf.DmaFence]:
            self.fences = [Timeline("owner").fence() for _ in range(3)]
            self.fences[0].signal()
            return self.fences

        self.owner = Owner(makes, lambda: self.fences[2].signal())
        self.ended, self.lives, other = dmabuf.recv(self.owner.sock)
        self.came, over = threading.Event(), threading.Event()
        other.add_callback(lambda _: over.set())
        self.owner.sock.send(b"s")
        over.wait()
        (tid,) = (thread.native_id for thread in threading.enumerate() if thread.name == "dmabuf-dispatcher")
        until_asleep(os.getpid(), tid)

        def one() -> None:
            # What add_callback() does if the fence ends just after it has looked.
            dispatcher(Domain.default()).watch(self.ended.handle, lambda _: None, foreign=True)

        def two() -> None:
            self.lives.add_callback(lambda _: self.came.set())

        return [one, two]

    def check(self) -> None:
        self.owner.kill()
        assert self.came.wait(10), "nobody sees that the owner of a watched fence is dead"


class SignalsWhileWatched(Program):
    """A callback is registered, another taken back, and the fence signaled, at once: one runs if it was registered, none twice."""

    def bodies(self) -> list[Callable[[], object]]:
        self.fence = Timeline("watched").fence()
        self.called: list[str] = []
        early = self.fence.add_callback(lambda _: self.called.append("early"))
        self.added = self.removed = False

        def adds() -> None:
            with allowed(FileNotFoundError):
                self.fence.add_callback(lambda _: self.called.append("late"))
                self.added = True

        def removes() -> None:
            self.removed = self.fence.remove_callback(early)

        return [adds, removes, self.fence.signal]

    def check(self) -> None:
        assert self.called.count("late") == self.added
        assert self.called.count("early") == (not self.removed)


# ---- leaving, closing, forking ----


class LeavesBesideAccess(Program):
    """A thread leaves the domain beside another's accesses: nothing stays locked or pending."""

    def bodies(self) -> list[Callable[[], object]]:
        self.owner = Owner(lambda: [dmabuf.allocate(4096)])
        (self.buf,) = dmabuf.recv(self.owner.sock)
        with self.buf.read():
            pass

        def reads() -> None:
            for _ in range(2):
                with allowed(OSError), self.buf.read():
                    may_switch()

        return [Domain.default().leave, reads]

    def check(self) -> None:
        Domain.default().leave()
        assert reap(fork(self.other)) == 0
        with allowed(OSError), self.buf.read(timeout=5):
            pass
        self.owner.kill()

    def other(self) -> None:
        with self.buf.write(timeout=5) as view:
            view[0] = 1
        assert not self.buf.resv.is_locked()


class LeavesBesideLocks(LeavesBesideAccess):
    """The same with locks and fences."""

    def bodies(self) -> list[Callable[[], object]]:
        leave, _ = super().bodies()

        def locks() -> None:
            with allowed(OSError, dmabuf.ContractError), dmabuf.lock_all([self.buf.resv]):
                may_switch()
                fence = Timeline("leaves").fence()
                self.buf.resv.reserve(1)
                self.buf.resv.add(fence, dmabuf.Usage.READ)
                fence.signal()

        return [leave, locks]


class ForksBesideLeave(LeavesBesideAccess):
    """A thread forks while another one leaves: the child can use what it inherits, and its parent too."""

    def bodies(self) -> list[Callable[[], object]]:
        leave, _ = super().bodies()
        self.codes: list[int] = []

        def forks() -> None:
            self.codes.append(reap(fork(self.other)))

        return [leave, forks]

    def check(self) -> None:
        assert self.codes == [0]
        super().check()


class ClosesTwice(Program):
    """Two threads close a buffer and a third reads it: each descriptor is closed once, and the record is free."""

    def bodies(self) -> list[Callable[[], object]]:
        dmabuf.allocate(4096).close()
        self.before = len(os.listdir("/proc/self/fd"))
        self.buf = dmabuf.allocate(4096)
        self.index = handle_of(self.buf).shared.index

        def reads() -> None:
            with allowed(OSError, ValueError), self.buf.read():
                may_switch()

        def closes() -> None:
            with allowed(BusyError):
                self.buf.close()

        return [closes, closes, reads]

    def check(self) -> None:
        self.buf.close()
        del self.buf
        forget_records()  # a read() that had begun may have taken the reference once more
        shm = Domain.default().shm
        assert self.index not in shm.rec_list() or not shm.rec_holders(self.index)
        assert len(os.listdir("/proc/self/fd")) == self.before


class ClosesSyncFileTwice(Program):
    """Two threads close a sync file beside its fence's end."""

    def bodies(self) -> list[Callable[[], object]]:
        with SyncFile(Timeline("before").fence()) as file:
            file.fileno()
        gc.collect()
        self.before = len(os.listdir("/proc/self/fd"))
        self.fence = Timeline("file").fence()
        self.file = SyncFile(self.fence)
        self.file.fileno()
        return [self.file.close, self.file.close, self.fence.signal]

    def check(self) -> None:
        gc.collect()
        assert len(os.listdir("/proc/self/fd")) == self.before


class LockAllEndsElsewhere(Program):
    """The generator that holds `lock_all` is closed by another thread: the lock is free, for both."""

    def bodies(self) -> list[Callable[[], object]]:
        self.buf = dmabuf.allocate(4096)
        begun = threading.Event()

        def holds() -> Iterator[None]:
            with dmabuf.lock_all([self.buf.resv]):
                yield

        held = holds()

        def opens() -> None:
            next(held)
            begun.set()

        def closes() -> None:
            begun.wait()
            held.close()  # type: ignore[attr-defined]

        return [opens, closes]

    def check(self) -> None:
        assert not self.buf.resv.is_locked()
        with self.buf.write(timeout=5):
            pass


PROGRAMS: list[type[Program]] = [
    FirstDispatcher, FirstRecord, FirstDomain, FirstSyncFile, DomainsAreMade, BuffersComeAndGo, DispatcherSleeps, SignalsWhileWatched,
    LeavesBesideAccess, LeavesBesideLocks, ForksBesideLeave, ClosesTwice, ClosesSyncFileTwice, LockAllEndsElsewhere,
]  # fmt: skip


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.__name__)
def test_orders_of_threads(program: type[Program], apart: Apart) -> None:
    apart(explore, program, seeds(FULL, times(quick=QUICK, full=FULL)))


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.__name__)
def test_many_orders_of_threads(program: type[Program], apart: Apart) -> None:
    apart(explore, program, range(LONG))
