"""Who only polls notices a death too: nobody here ever waits, so no wait can do the repair for them."""

import errno
import select
from collections.abc import Callable

import pytest

import dmabuf
from dmabuf import DmaBuf, Timeline, Usage, WwAcquireContext
from tests.support.children import Child, Parent, Spawn
from tests.support.errnos import raises_errno
from tests.support.fences import attach, keys, the_fence
from tests.support.waiting import until


def owns(parent: Parent, what: str) -> None:
    """A fence, the lock, or a write access, until killed."""
    (buf,) = dmabuf.recv(parent.sock)
    fence = Timeline("owner").fence()
    ctx, block = WwAcquireContext(), buf.write()
    match what:
        case "fence":
            attach(buf.resv, fence, Usage.WRITE)
        case "lock":
            buf.resv.lock()
        case "lock with a context":
            buf.resv.lock(ctx)
        case "access":
            block.__enter__()
    parent.send("has it")
    parent.recv()


def killed_owner(child: Spawn, buf: DmaBuf, what: str) -> Child:
    owner = child(owns, what)
    dmabuf.send(owner.sock, buf)
    assert owner.recv() == "has it"
    return owner


POLLS: dict[str, Callable[[DmaBuf], object]] = {
    "test_signaled": lambda buf: buf.resv.test_signaled(Usage.BOOKKEEP),
    "fences": lambda buf: not keys(buf.resv),
    "iterate_unlocked": lambda buf: not list(buf.resv.iterate_unlocked(Usage.BOOKKEEP)),
    "wait 0": lambda buf: buf.resv.wait(Usage.BOOKKEEP, 0),
    "poll": lambda buf: buf.poll(select.POLLIN | select.POLLOUT) == select.POLLIN | select.POLLOUT,
}


@pytest.mark.parametrize("poll", list(POLLS.values()), ids=list(POLLS))
@pytest.mark.parametrize("what", ["fence", "access"])
def test_the_fence_of_a_killed_process_is_seen_to_end(child: Spawn, buf: DmaBuf, what: str, poll: Callable[[DmaBuf], object]) -> None:
    owner = killed_owner(child, buf, what)
    assert not poll(buf)
    owner.kill()
    until(lambda: poll(buf))


@pytest.mark.parametrize("how", ["is_signaled", "status", "wait"])
def test_the_status_of_a_killed_processs_fence_is_seen_to_change(child: Spawn, buf: DmaBuf, how: str) -> None:
    owner = killed_owner(child, buf, "fence")
    fence = the_fence(buf)
    owner.kill()
    polls: dict[str, Callable[[], object]] = {
        "is_signaled": fence.is_signaled,
        "status": lambda: fence.status,
        "wait": lambda: fence.wait(0),
    }
    until(polls[how])
    assert fence.status == -errno.EOWNERDEAD


@pytest.mark.parametrize("what", ["lock", "lock with a context"])
def test_the_lock_of_a_killed_process_is_taken_by_trylock(child: Spawn, buf: DmaBuf, what: str) -> None:
    owner = killed_owner(child, buf, what)
    assert buf.resv.trylock() is False
    owner.kill()
    until(buf.resv.trylock)
    buf.resv.unlock()


def test_the_lock_of_a_killed_process_is_seen_to_be_free(child: Spawn, buf: DmaBuf) -> None:
    owner = killed_owner(child, buf, "lock")
    owner.kill()
    until(lambda: not buf.resv.is_locked())


def test_a_read_that_never_waits_is_told_of_a_killed_writer(child: Spawn, buf: DmaBuf) -> None:
    owner = killed_owner(child, buf, "access")
    owner.kill()

    def told() -> bool:
        try:
            with buf.read(timeout=0):
                return True
        except TimeoutError:
            return False
        except OSError as error:
            return error.errno == errno.EOWNERDEAD

    until(told)
    with raises_errno(errno.EOWNERDEAD), buf.read():
        pass


def test_a_write_that_never_waits_gets_in_after_a_killed_writer(child: Spawn, buf: DmaBuf) -> None:
    owner = killed_owner(child, buf, "access")
    owner.kill()

    def got_in() -> bool:
        try:
            with buf.write(timeout=0):
                return True
        except TimeoutError:
            return False

    until(got_in)
