"""A circle of accesses ends with EDEADLK in one of them, whatever else this process used, opened or closed before.

The search for circles runs at ticks, as other parts of the library do that watch something. Each of those is a user here, alone and in
orders by a seed: used, and left open or closed, before the two accesses that wait for each other. Every run has a domain of its own,
because what is installed in a domain stays there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import select
import threading
from collections.abc import Callable

import pytest

import dmabuf
from dmabuf import DmaBuf, Domain, SwSync, SyncFile, Timeline, TimelineSemaphore, Usage
from tests.support.children import Child, Parent, Spawn
from tests.support.drivers import Bare
from tests.support.fences import attach
from tests.support.waiting import Background, until

SIZE = 4096
Shared = DmaBuf | SwSync | SyncFile


class World:
    """What a user of the library is given: a domain, another process to share with, and a place for what stays open."""

    def __init__(self, stack: contextlib.ExitStack, holder: Parent) -> None:
        assert "cycles" not in Domain.default().tick_hooks, "installed before the first user"
        self.stack, self.holder = stack, holder

    def share(self, thing: Shared) -> None:
        """Until the other process has it too."""
        self.holder.send("take")
        dmabuf.send(self.holder.sock, thing)
        assert self.holder.recv() == "taken"

    def take_back(self) -> None:
        """Until the other process has closed all that it has."""
        self.holder.send("close")
        assert self.holder.recv() == "closed"

    def buffer(self) -> DmaBuf:
        return self.stack.enter_context(dmabuf.allocate(SIZE))


class Keeper:
    """The test's side of `World`, for one child."""

    def __init__(self, child: Child) -> None:
        self.child, self.kept = child, contextlib.ExitStack()

    def until(self, message: str) -> None:
        """Do what the child asks for until it says this."""
        while (order := self.child.recv()) != message:
            if order == "take":
                for thing in dmabuf.recv(self.child.sock):
                    self.kept.enter_context(thing)
                    del thing
                self.child.send("taken")
            else:
                assert order == "close"
                self.kept.close()
                self.child.send("closed")

    def end(self) -> None:
        self.until("over")
        self.child.result()
        self.kept.close()


def shared_sw_sync_closed(world: World) -> None:
    """The other holder could die: its death is looked for at ticks."""
    sw = SwSync()
    world.stack.callback(until, lambda: not any(name.startswith("SwSync ") for name in Domain.default().tick_hooks))
    world.stack.callback(world.take_back)
    world.stack.enter_context(sw.create_fence(5))
    world.share(sw)
    sw.close()


def sw_sync_open(world: World) -> None:
    world.stack.enter_context(world.stack.enter_context(SwSync()).create_fence(5))


def sync_file_polled(world: World) -> None:
    line = world.stack.enter_context(Timeline("polled"))
    sync_file = world.stack.enter_context(SyncFile(line.fence()))
    select.select([sync_file], [], [], 0)


def sync_file_shared_and_closed(world: World) -> None:
    line = world.stack.enter_context(Timeline("shared"))
    fence = line.fence()
    with SyncFile(fence) as sync_file:
        world.share(sync_file)
    fence.signal()


def exported_held_elsewhere(world: World) -> None:
    """Closed here: the exporter's thread looks at every tick whether it can be released."""
    exporter = Bare()
    world.stack.callback(exporter.close)
    world.stack.callback(until, lambda: exporter.count("release"))
    world.stack.callback(world.take_back)
    with dmabuf.export(exporter, SIZE) as buf:
        world.share(buf)


def exported_and_released(world: World) -> None:
    exporter = Bare()
    dmabuf.export(exporter, SIZE).close()
    assert exporter.count("release")
    exporter.close()


def poll_armed(world: World) -> None:
    buf, line = world.buffer(), world.stack.enter_context(Timeline("armed"))
    fence = line.fence()
    attach(buf.resv, fence, Usage.WRITE)
    assert not buf.poll(select.POLLIN, 0)
    fence.signal()


def poll_descriptor(world: World) -> None:
    world.stack.callback(os.close, world.buffer().poll_fd(select.POLLIN))


def semaphore_waited_for(world: World) -> None:
    semaphore = world.stack.enter_context(TimelineSemaphore())
    with contextlib.suppress(dmabuf.DmaBufError):
        semaphore.wait(3, timeout=0.05, for_submit=True)


def fence_with_callback(world: World) -> None:
    line = world.stack.enter_context(Timeline("callback"))
    fence = line.fence()
    fence.add_callback(lambda _: None)
    fence.signal()


def buffer_sent_and_closed(world: World) -> None:
    with dmabuf.allocate(SIZE) as buf:
        world.share(buf)


def spilled(world: World) -> None:
    heap = dmabuf.SpillHeap(budget=SIZE)
    world.stack.callback(heap.close)
    for _ in range(2):
        with world.stack.enter_context(heap.allocate(SIZE)).write() as view:
            view[0] = 1


def listed(world: World) -> None:
    dmabuf.buffers()


def accessed(world: World) -> None:
    with world.buffer().write():
        pass


User = Callable[[World], None]
USERS: list[User] = [
    shared_sw_sync_closed,
    sw_sync_open,
    sync_file_polled,
    sync_file_shared_and_closed,
    exported_held_elsewhere,
    exported_and_released,
    poll_armed,
    poll_descriptor,
    semaphore_waited_for,
    fence_with_callback,
    buffer_sent_and_closed,
    spilled,
    listed,
    accessed,
]


def circle(a: DmaBuf, b: DmaBuf) -> list[int | str]:
    """How two threads end that each hold one buffer and want the other's."""
    both_in = threading.Barrier(2)

    def run(mine: DmaBuf, other: DmaBuf) -> int | str | None:
        try:
            with mine.write():
                both_in.wait()
                with other.write():
                    return "both"
        except OSError as error:
            return error.errno

    with Background(lambda: run(a, b)) as one, Background(lambda: run(b, a)) as two:
        return sorted([str(one.result()), str(two.result())])


def order(seed: int) -> list[User]:
    """All users, in some order."""
    chosen = USERS[:]
    random.Random(seed).shuffle(chosen)
    return chosen


EACH_ALONE = [pytest.param([user], id=user.__name__) for user in USERS]
ALL = [pytest.param(order(seed), id=f"all of them, seed {seed}") for seed in range(6)]


def has_a_circle(parent: Parent, users: list[User]) -> None:
    """Uses the library, and then has two threads that wait for each other."""
    with contextlib.ExitStack() as stack:
        world = World(stack, parent)
        for user in users:
            user(world)
        parent.send("used")
        parent.send(circle(world.buffer(), world.buffer()))
    parent.send("over")


def has_half_a_circle(parent: Parent, users: list[User]) -> None:
    """Uses the library, enters the first buffer that it is sent, and then wants the second."""
    with contextlib.ExitStack() as stack:
        world = World(stack, parent)
        for user in users:
            user(world)
        parent.send("used")
        mine, other = (stack.enter_context(buf) for buf in dmabuf.recv(parent.sock))
        try:
            with mine.write():
                parent.send("inside")
                parent.recv()
                with other.write():
                    end = "both"
        except OSError as error:
            end = str(error.errno)
        parent.send(end)
    parent.send("over")


@pytest.mark.parametrize("users", EACH_ALONE + ALL)
def test_circle_of_two_threads_is_edeadlk_after(child: Spawn, users: list[User]) -> None:
    keeper = Keeper(child(has_a_circle, users))
    keeper.until("used")
    assert keeper.child.recv() == [str(errno.EDEADLK), "both"]
    keeper.end()


@pytest.mark.parametrize("users", EACH_ALONE + ALL)
def test_circle_of_two_processes_is_edeadlk_after(child: Spawn, users: list[User]) -> None:
    keepers = [Keeper(child(has_half_a_circle, users)) for _ in range(2)]
    for keeper in keepers:
        keeper.until("used")
    with dmabuf.allocate(SIZE) as a, dmabuf.allocate(SIZE) as b:
        for keeper, bufs in zip(keepers, [(a, b), (b, a)], strict=True):
            dmabuf.send(keeper.child.sock, *bufs)
            keeper.until("inside")
        for keeper in keepers:
            keeper.child.send("go on")
        ends = [keeper.child.recv() for keeper in keepers]
    assert sorted(ends) == [str(errno.EDEADLK), "both"]
    for keeper in keepers:
        keeper.end()
