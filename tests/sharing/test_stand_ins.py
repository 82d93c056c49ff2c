"""What stands for an object that a pool or a manager could not receive: its first use asks again, and raises what happened."""

import concurrent.futures
import errno
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import dmabuf
from dmabuf.sharing.pending import stand_in
from tests.sharing.conftest import SIZE
from tests.support.errnos import raises_errno
from tests.support.queues import ANEW, asks_sender, hoard, leave_room, without_answers
from tests.support.waiting import until, until_asleep

pytestmark = pytest.mark.usefixtures("keepers_are_reaped")


class World:
    """One object of each kind that a worker without a descriptor can't receive."""

    def __init__(self, directory: Path) -> None:
        self.private = dmabuf.Domain.private()
        self.elsewhere = dmabuf.Domain.open(directory)
        self.tl, self.secret_tl = dmabuf.Timeline("frames"), dmabuf.Timeline("secret frames", domain=self.private)
        self.buf, self.secret = dmabuf.allocate(SIZE, name="open"), dmabuf.allocate(SIZE, name="secret", domain=self.private)
        self.one, self.two = self.secret_tl.fence(), self.secret_tl.fence()
        self.fence = self.tl.fence()
        self.opened: list[Any] = [self.buf, self.secret, self.tl, self.secret_tl]

    def make(self, kind: str) -> Any:
        made: Any = {
            "buffer": lambda: self.buf,
            "buffer in a private domain": lambda: self.secret,
            "range": lambda: self.buf.export_range(16, 8),
            "sync file": lambda: dmabuf.SyncFile(self.fence, "sync"),
            "sync file in a private domain": lambda: dmabuf.SyncFile(self.one, "secret sync"),
            "software timeline": lambda: dmabuf.SwSync("sw"),
            "semaphore": dmabuf.TimelineSemaphore,
            "semaphore in a private domain": lambda: dmabuf.TimelineSemaphore(domain=self.private),
            "fence in a private domain": lambda: self.one,
            "array in a private domain": lambda: dmabuf.DmaFenceArray([self.one, self.two]),
            "chain in a private domain": lambda: dmabuf.DmaFenceChain(self.one, self.two, 7),
            "timeline in a private domain": lambda: self.secret_tl,
            "private domain": lambda: self.private,
            "domain of another directory": lambda: self.elsewhere,
        }[kind]()
        if hasattr(made, "close"):
            self.opened.append(made)
        return made

    def close(self) -> None:
        for fence in (self.one, self.two, self.fence):
            fence.signal()
        for one in reversed(self.opened):
            one.close()


# What a use of each kind returns.
FACTS: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "buffer": (lambda it: it.name, "open"),
    "buffer in a private domain": (lambda it: it.name, "secret"),
    "range": (lambda it: (it.buf.name, it.offset, it.length), ("open", 16, 8)),
    "sync file": (lambda it: it.name, "sync"),
    "sync file in a private domain": (lambda it: it.name, "secret sync"),
    "software timeline": (lambda it: it.name, "sw"),
    "semaphore": (lambda it: it.query(), 0),
    "semaphore in a private domain": (lambda it: it.query(), 0),
    "fence in a private domain": (lambda it: it.timeline_name, "secret frames"),
    "array in a private domain": (lambda it: len(it.fences), 2),
    "chain in a private domain": (lambda it: it.seqno, 7),
    "timeline in a private domain": (lambda it: it.name, "secret frames"),
    "private domain": (lambda it: it.path, None),
    "domain of another directory": (lambda it: it.path.name, "elsewhere"),
}


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path / "elsewhere")
    yield made
    made.close()


def _hoard(_: int) -> int:
    return hoard()  # not hoard itself: the worker has imported this file before it has no descriptor left


def _use_with_room(kind: str, it: Any) -> tuple[int | None, Any]:
    use, _ = FACTS[kind]
    try:
        use(it)
    except OSError as e:
        first = e.errno
    else:
        first = None
    leave_room()
    return first, use(it)


def _same(it: Any) -> Any:
    return it


@pytest.mark.parametrize("kind", FACTS)
def test_argument_is_received_at_its_first_use_with_room(world: World, kind: str) -> None:
    thing, (use, expected) = world.make(kind), FACTS[kind]
    with ANEW.Pool(1) as pool:
        assert pool.apply(_hoard, (0,))
        assert pool.apply_async(_use_with_room, (kind, thing)).get() == (errno.EMFILE, expected)
        assert pool.apply(_hoard, (0,))
        back = pool.apply_async(_same, (thing,)).get()  # the worker never had it
        assert use(back) == expected
        if hasattr(back, "close") and back is not thing:
            back.close()
        pool.close()
        pool.join()


@pytest.mark.parametrize("kind", ["sync file", "semaphore", "private domain"])
def test_executor_with_a_worker_without_room_goes_on(world: World, kind: str) -> None:
    thing = world.make(kind)
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=ANEW) as pool:
        assert pool.submit(_hoard, 0).result()
        assert pool.submit(_use_with_room, kind, thing).result() == (errno.EMFILE, FACTS[kind][1])
        assert pool.submit(abs, -3).result() == 3


def _sync_file(_: int) -> dmabuf.SyncFile:
    return dmabuf.SyncFile(dmabuf.stub_fence(), "late")


def test_result_of_a_killed_worker_names_it_when_it_is_used() -> None:
    with ANEW.Pool(1, without_answers, maxtasksperchild=1) as pool:
        result = pool.apply_async(_sync_file, (1,))
        until(asks_sender)
        worker = pool._pool[0].pid  # type: ignore[attr-defined]
        until_asleep(worker)
        os.kill(worker, signal.SIGKILL)
        got = result.get()
        assert isinstance(got, dmabuf.SyncFile)
        assert "not received yet" in repr(got)
        for use in (got.__enter__, lambda: got.fileno(), lambda: got.status, lambda: got.closed):
            with raises_errno(errno.EOWNERDEAD) as caught:
                use()
            assert "), which sent it, ended before it was received" in str(caught.value)
        got.close()
        assert got.closed
        with raises_errno(errno.EBADF):
            got.fileno()


# ---- as an argument of the library ----


def _standing(kind: Any, thing: Any) -> Any:
    return stand_in(kind, "a thing", lambda: thing, (print, ()))


def test_stand_in_of_a_fence_goes_where_fences_go(tl: dmabuf.Timeline, buf: dmabuf.DmaBuf) -> None:
    fence, other = tl.fence(), tl.fence()
    assert _standing(dmabuf.DmaFence, fence) == fence
    assert hash(_standing(dmabuf.DmaFence, fence)) == hash(fence)
    assert dmabuf.DmaFenceArray([_standing(dmabuf.DmaFence, fence), other]).fences == (fence, other)
    with buf.resv.locked():
        buf.resv.reserve(1)
        buf.resv.add(_standing(dmabuf.DmaFence, fence), dmabuf.Usage.READ)
    assert buf.resv.fences(dmabuf.Usage.READ) == [fence]
    with dmabuf.SyncFile(_standing(dmabuf.DmaFence, fence)) as sync_file:
        before = sync_file.status
        fence.signal()
        assert (before, sync_file.status) == (0, 1)
    assert dmabuf.wait_any([_standing(dmabuf.DmaFence, fence)], 0)[0] == 0


def test_stand_ins_are_sent_over_a_socket(seqpacket: Any, buf: dmabuf.DmaBuf) -> None:
    domain = dmabuf.Domain.private()
    with dmabuf.SwSync("sw") as sw:
        dmabuf.send(seqpacket[0], _standing(dmabuf.SwSync, sw), _standing(dmabuf.Domain, domain), _standing(dmabuf.DmaBuf, buf))
        got, same, other = dmabuf.recv(seqpacket[1])
    with got, other:
        assert (got.name, same, other) == ("sw", domain, buf)


def test_stand_in_of_a_domain_is_allocated_in() -> None:
    domain = dmabuf.Domain.private()
    with dmabuf.allocate(SIZE, domain=_standing(dmabuf.Domain, domain)) as buf, dmabuf.get(buf.fileno(), domain=domain) as same:
        assert buf == same
