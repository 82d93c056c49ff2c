"""A wait that lasts costs next to nothing, and hears of a death all the same, by whichever way there is."""

import asyncio
import errno
import os
import select
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import dmabuf
from dmabuf import TimelineSemaphore, wait_semaphores
from dmabuf._native import closes_heard
from tests.support.budget import budget
from tests.support.children import Child, Parent, Spawn
from tests.support.namespaces import program
from tests.support.seccomp import needs_filters, refuse
from tests.support.waiting import thread_state, until, until_asleep

WINDOW_S = 1.5 if budget() == "full" else 0.6
A_SECOND = 5  # wake-ups of all threads of a process that waits
MANY = 12


def wakes(pid: int) -> int:
    """How often the threads of a process have gone to sleep so far."""
    found = 0
    for tid in os.listdir(f"/proc/{pid}/task"):
        fd = os.open(f"/proc/{pid}/task/{tid}/status", os.O_RDONLY)
        try:
            state = thread_state(fd)
        finally:
            os.close(fd)
        found += int(state[1]) if state is not None else 0
    return found


def in_a_window(pid: int) -> int:
    """How often they wake up while nothing happens. The time is what is measured: nothing else is waited for."""
    before = wakes(pid)
    select.select([], [], [], WINDOW_S)
    return wakes(pid) - before


def until_idle(pid: int) -> None:
    """Until a process rests as it should. The first waits of a process and what else has just been done there are in earlier windows."""
    found: list[int] = []

    def rests() -> bool:
        found.append(in_a_window(pid))
        return found[-1] <= A_SECOND * WINDOW_S

    until(rests, left=lambda: f"{found} wake-ups in {WINDOW_S} s each", limit_s=20.0)


# ---- waits, each for what the test's process holds ----


def write(buf: dmabuf.DmaBuf, fence: dmabuf.DmaFence, sem: TimelineSemaphore) -> None:
    with buf.write():
        pass


def fence_wait(buf: dmabuf.DmaBuf, fence: dmabuf.DmaFence, sem: TimelineSemaphore) -> None:
    fence.wait()


def poll(buf: dmabuf.DmaBuf, fence: dmabuf.DmaFence, sem: TimelineSemaphore) -> None:
    buf.poll(select.POLLIN, None)


def resv_lock(buf: dmabuf.DmaBuf, fence: dmabuf.DmaFence, sem: TimelineSemaphore) -> None:
    with buf.resv.locked():
        pass


def any_of_several(buf: dmabuf.DmaBuf, fence: dmabuf.DmaFence, sem: TimelineSemaphore) -> None:
    dmabuf.wait_any([fence, dmabuf.DmaFenceArray([fence])])


def callback(buf: dmabuf.DmaBuf, fence: dmabuf.DmaFence, sem: TimelineSemaphore) -> None:
    over = threading.Event()
    fence.add_callback(lambda _: over.set())
    over.wait()


def await_fence(buf: dmabuf.DmaBuf, fence: dmabuf.DmaFence, sem: TimelineSemaphore) -> None:
    async def waits() -> None:
        await fence

    asyncio.run(waits())


def await_access(buf: dmabuf.DmaBuf, fence: dmabuf.DmaFence, sem: TimelineSemaphore) -> None:
    async def waits() -> None:
        async with buf.write():
            pass

    asyncio.run(waits())


def submission(buf: dmabuf.DmaBuf, fence: dmabuf.DmaFence, sem: TimelineSemaphore) -> None:
    sem.wait(1, for_submit=True)


def submission_to_one_of_two(buf: dmabuf.DmaBuf, fence: dmabuf.DmaFence, sem: TimelineSemaphore) -> None:
    wait_semaphores([sem, sem], [1, 2], all=False, for_submit=True)


def many(buf: dmabuf.DmaBuf, fence: dmabuf.DmaFence, sem: TimelineSemaphore) -> None:
    waits = [*[fence_wait] * MANY, write, resv_lock, any_of_several]
    threads = [threading.Thread(target=wait, args=(buf, fence, sem)) for wait in waits]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


Wait = Callable[[dmabuf.DmaBuf, dmabuf.DmaFence, TimelineSemaphore], None]
WAITS = [
    write,
    fence_wait,
    poll,
    resv_lock,
    any_of_several,
    callback,
    await_fence,
    await_access,
    submission,
    submission_to_one_of_two,
    many,
]


def waits(parent: Parent, wait: Wait, deaf: str | None = None) -> tuple[bool, int]:
    """Wait. Return whether a tick came meanwhile because of news of a death, and the errno with which the wait ended, or 0."""
    if deaf is not None:
        refuse(deaf, errno.EPERM)
    buf, fence, sem = dmabuf.recv(parent.sock)
    before, ended = closes_heard(), 0
    parent.send("waits")
    try:
        wait(buf, fence, sem)
    except OSError as e:
        ended = e.errno or -1
    # Another process may have heard first and ended what is waited for, so the own news may come a moment later.
    if deaf is None:
        until(lambda: closes_heard() != before)
    heard = closes_heard() != before
    for one in (sem, buf):
        one.close()
    return heard, ended


def holds(parent: Parent) -> None:
    """Hold all that the others wait for, until this process is killed, or runs another program."""
    timeline = dmabuf.Timeline("doomed")
    buf, sem, fence = dmabuf.allocate(1), TimelineSemaphore(), timeline.fence()
    with buf.write(), buf.resv.locked():
        dmabuf.send(parent.sock, buf, fence, sem)
        if parent.recv() == "exec":
            os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(1000)"])


def held_and_waited_for(child: Spawn, wait: Wait, deaf: str | None = None) -> tuple[Child, Child]:
    owner, waiter = child(holds), child(waits, wait, deaf)
    buf, fence, sem = dmabuf.recv(owner.sock)
    dmabuf.send(waiter.sock, buf, fence, sem)
    for one in (sem, buf):
        one.close()
    assert waiter.recv() == "waits"
    return owner, waiter


def end(owner: Child) -> None:
    owner.kill()


def end_by_exec(owner: Child) -> None:
    """The process goes on, and only the life in the domain ends."""
    owner.send("exec")


def endings(wait: Wait) -> set[int]:
    """How a wait ends when the one for which it waits dies: after a write() that didn't end, what is there is torn."""
    return {errno.EDEADLK} if wait in (submission, submission_to_one_of_two) else {0, errno.EOWNERDEAD}


@pytest.mark.parametrize(("wait", "how"), [*((wait, end) for wait in WAITS), (fence_wait, end_by_exec)])
def test_idle_waiter_hardly_wakes_up_and_hears_of_the_end_of_a_life(child: Spawn, wait: Wait, how: Callable[[Child], None]) -> None:
    owner, waiter = held_and_waited_for(child, wait)
    until_idle(waiter.pid)
    how(owner)
    heard, ended = waiter.result()
    assert heard
    assert ended in endings(wait)


@needs_filters
@pytest.mark.parametrize("refused", ["inotify_init1", "close_range"])
@pytest.mark.parametrize("wait", [write, await_fence, submission])
def test_waiter_that_can_not_hear_looks_at_every_tick(child: Spawn, wait: Wait, refused: str) -> None:
    owner, waiter = held_and_waited_for(child, wait, refused)
    # More than an idle one makes in all, but less than one that turns round and round.
    until(lambda: in_a_window(waiter.pid) > A_SECOND * WINDOW_S)
    owner.kill()
    heard, ended = waiter.result()
    assert not heard
    assert ended in endings(wait)


_INSIDE = """
import os
import dmabuf
from dmabuf._native import closes_heard
with dmabuf.open("frame") as buf:
    print(os.getpid(), flush=True)
    try:
        with buf.write():
            print("well", closes_heard() > 0)
    except OSError as e:
        print(e)
"""


def holds_named(parent: Parent) -> None:
    with dmabuf.allocate(1, name="frame") as buf, buf.read():
        parent.send()
        parent.recv()


def test_waiter_in_a_pid_namespace_hears_of_a_death_outside(child: Spawn) -> None:
    """To it the number of the process outside means nothing."""
    owner = child(holds_named)
    owner.recv()
    with dmabuf.open("frame"), program(_INSIDE) as inside:
        assert int(inside.line()) < os.getpid()
        top = inside.process.pid  # unshare(1), whose child is Python
        (pid,) = map(int, Path(f"/proc/{top}/task/{top}/children").read_text().split())
        until_idle(pid)
        owner.kill()
        assert inside.line() == "well True"


def ticks() -> bool:
    """Whether the thread runs that ticks."""
    return any(Path(f"/proc/self/task/{tid}/comm").read_text() == "dmabuf-tick\n" for tid in os.listdir("/proc/self/task"))


def forks_between_waits(parent: Parent) -> list[bool]:
    found = []
    for _ in range(2):
        (fence,) = dmabuf.recv(parent.sock)
        parent.send("waits")
        fence.wait()
        found.append(ticks())
        if not (pid := os.fork()):
            os._exit(0)
        found.append(ticks())
        os.waitpid(pid, 0)
    return found


def test_fork_after_a_wait_finds_no_thread_of_the_wait(child: Spawn) -> None:
    """Of which Python 3.12 would warn. The next wait starts it again."""
    timeline, waiter = dmabuf.Timeline("here"), child(forks_between_waits)
    for _ in range(2):
        fence = timeline.fence()
        dmabuf.send(waiter.sock, fence)
        assert waiter.recv() == "waits"
        until_asleep(waiter.pid)
        fence.signal()
    assert waiter.result() == [True, False] * 2
