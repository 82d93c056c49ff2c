"""Sync files out of buffers and into them: IGT's dmabuf_sync_file by its names (semantics 7.7), in one process and across two.

One process has the timelines and moves them on, one has the fences put on the buffer and takes sync files out of it; both look at it.
"""

import select
from collections.abc import Iterator
from typing import Any

import pytest

import dmabuf
from dmabuf import DmaBuf, SwSync, SyncFile, Usage
from tests.support.children import Child, Parent, Spawn
from tests.support.fences import attach

READ, WRITE, RW = 1, 2, 3
EVENT = {READ: select.POLLIN, WRITE: select.POLLOUT, RW: select.POLLIN | select.POLLOUT}


class Side:
    """One process, which has the buffer."""

    def __init__(self, buf: DmaBuf) -> None:
        self.buf = buf
        self.timelines: list[SwSync] = []

    def make(self) -> SyncFile:
        """A fence with the value 1 of a new timeline."""
        self.timelines.append(SwSync(f"t{len(self.timelines)}"))
        return self.timelines[-1].create_fence(1)

    def inc(self, at: int = 0) -> None:
        self.timelines[at].inc()

    def attach(self, sf: SyncFile, usage: Usage) -> None:
        attach(self.buf.resv, sf.fence, usage)

    def put(self, sf: SyncFile, flags: int) -> None:
        self.buf.import_sync_file(sf, flags=flags)

    def take(self, flags: int) -> SyncFile:
        return self.buf.export_sync_file(flags=flags)

    def end(self) -> None:
        for timeline in self.timelines:
            timeline.close()


class Other(Side):
    """Another process does it. Sync files go there and come from there as descriptors."""

    def __init__(self, other: Child, buf: DmaBuf) -> None:
        self.other = other
        dmabuf.send(other.sock, buf)

    def _tell(self, what: str, *arguments: Any) -> Any:
        sent = [each for each in arguments if isinstance(each, SyncFile)]
        self.other.send((what, len(sent), [each for each in arguments if not isinstance(each, SyncFile)]))
        if sent:
            dmabuf.send(self.other.sock, *sent)
        if not self.other.recv():
            return None
        (back,) = dmabuf.recv(self.other.sock)
        return back

    def make(self) -> SyncFile:
        made: SyncFile = self._tell("make")
        return made

    def inc(self, at: int = 0) -> None:
        self._tell("inc", at)

    def attach(self, sf: SyncFile, usage: Usage) -> None:
        self._tell("attach", sf, usage)

    def put(self, sf: SyncFile, flags: int) -> None:
        self._tell("put", sf, flags)

    def take(self, flags: int) -> SyncFile:
        taken: SyncFile = self._tell("take", flags)
        return taken

    def end(self) -> None:
        self.other.send(None)
        self.other.result()


def obeys(parent: Parent) -> None:
    """The other process's part."""
    (buf,) = dmabuf.recv(parent.sock)
    side = Side(buf)
    while (order := parent.recv()) is not None:
        what, sent, arguments = order
        files = dmabuf.recv(parent.sock) if sent else ()
        back = getattr(side, what)(*files, *arguments)
        parent.send(back is not None)
        if back is not None:
            dmabuf.send(parent.sock, back)
            back.close()
        for each in files:
            each.close()
    side.end()
    buf.close()


class World:
    """``owner``: who has the timelines; ``user``: who puts fences on the buffer and takes sync files out."""

    def __init__(self, buf: DmaBuf, owner: Side, user: Side) -> None:
        self.buf, self.owner, self.user = buf, owner, user

    def busy(self, flags: int) -> bool:
        """By poll, and by sync files exported here and there, which must agree."""
        polled = self.buf.poll(EVENT[flags]) != EVENT[flags]
        for sf in (self.user.take(flags), self.buf.export_sync_file(flags=flags)):
            with sf:
                assert bool(select.select([sf], [], [], 0)[0]) is not polled
                assert (sf.status == 0) is polled
        return polled

    def state(self) -> list[bool]:
        return [self.busy(flags) for flags in (READ, WRITE, RW)]

    def attach(self, usage: Usage) -> None:
        """A fence of a timeline of its own."""
        with self.owner.make() as sf:
            self.user.attach(sf, usage)

    def put(self, flags: int) -> None:
        """The same by way of a sync file."""
        with self.owner.make() as sf:
            self.user.put(sf, flags)


@pytest.fixture(params=["one process", "exported elsewhere", "ended elsewhere"])
def world(request: pytest.FixtureRequest, child: Spawn, buf: DmaBuf) -> Iterator[World]:
    here = Side(buf)
    other = here if request.param == "one process" else Other(child(obeys), buf)
    yield World(buf, other if request.param == "ended elsewhere" else here, other if request.param == "exported elsewhere" else here)
    here.end()
    if other is not here:
        other.end()


def statuses(*files: SyncFile) -> list[int]:
    return [sf.status for sf in files]


@pytest.mark.parametrize(("write", "expected"), [(False, [False, True, True]), (True, [True, True, True])], ids=["read", "write"])
def test_export_basic(world: World, write: bool, expected: list[bool]) -> None:
    world.attach(Usage.WRITE if write else Usage.READ)
    assert world.state() == expected
    world.owner.inc()
    assert world.state() == [False] * 3


def test_export_before_signal(world: World) -> None:
    world.attach(Usage.WRITE)
    out = [world.user.take(flags) for flags in (READ, WRITE, RW)]
    assert select.select(out, [], [], 0)[0] == []
    world.owner.inc()
    assert select.select(out, [], [], 0)[0] == out
    for each in out:
        each.close()


def test_export_multiwait(world: World) -> None:
    world.attach(Usage.READ)
    world.attach(Usage.READ)
    with world.user.take(WRITE) as out:
        world.attach(Usage.READ)
        for at, expected in enumerate((0, 1)):
            world.owner.inc(at)
            assert (out.status, len(select.select([out], [], [], 0)[0])) == (expected, expected)
        assert world.busy(WRITE)
    world.owner.inc(2)
    assert not world.busy(WRITE)


def test_export_wait_after_attach(world: World) -> None:
    with world.user.take(WRITE) as before:
        world.attach(Usage.WRITE)
        with world.user.take(WRITE) as after:
            assert statuses(before, after) == [1, 0]
            world.owner.inc()
            assert statuses(before, after) == [1, 1]


@pytest.mark.parametrize(
    ("flags", "expected"), [(READ, [False, True, True]), (WRITE, [True] * 3), (RW, [True] * 3)], ids=["READ", "WRITE", "RW"]
)
def test_import_basic(world: World, flags: int, expected: list[bool]) -> None:
    world.put(flags)
    assert world.state() == expected
    world.owner.inc()
    assert world.state() == [False] * 3


@pytest.mark.parametrize("write", [False, True], ids=["read_only", "read_write"])
def test_import_multiple(world: World, write: bool) -> None:
    for _ in range(32):
        world.put(READ)
    if write:
        world.put(WRITE)
    for at in range(32):
        assert world.state() == [write, True, True]
        world.owner.inc(at)
    assert world.state() == [write] * 3
    if write:
        world.owner.inc(32)
    assert world.state() == [False] * 3
