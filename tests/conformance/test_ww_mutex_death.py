"""The lock of reservations when its holder, or who waits for it, is killed; and rules that hold across processes."""

import errno

import pytest

import dmabuf
from dmabuf import ContractError, WwAcquireContext
from tests.support.children import Parent, Spawn
from tests.support.errnos import raises_errno
from tests.support.partners import handed
from tests.support.waiting import Background, until_asleep


def holds(parent: Parent, with_context: bool) -> None:
    bufs = dmabuf.recv(parent.sock)
    ctx = WwAcquireContext() if with_context else None
    for buf in bufs:
        buf.resv.lock(ctx)
    parent.send("locked")
    parent.recv()
    for buf in bufs:
        buf.resv.unlock()
    if ctx is not None:
        ctx.fini()


def takes(parent: Parent) -> str:
    bufs = dmabuf.recv(parent.sock)
    parent.send("ready")
    with dmabuf.lock_all([buf.resv for buf in bufs]):
        pass
    return "taken"


PLAIN_OR_CONTEXT = pytest.mark.parametrize("with_context", [False, True], ids=["plain", "ctx"])


@PLAIN_OR_CONTEXT
def test_the_lock_of_another_process_is_seen_and_excludes(child: Spawn, buf: dmabuf.DmaBuf, with_context: bool) -> None:
    holder = handed(child(holds, with_context), buf, says="locked")
    assert buf.resv.is_locked()
    assert buf.resv.locking_ctx() is None
    assert buf.resv.trylock() is False
    with pytest.raises(ContractError):
        buf.resv.unlock()
    with Background(buf.resv.lock) as job:
        job.until_blocked()
        assert not job.done
        holder.send("unlock")
        job.result()


def test_wait_die_goes_by_age_across_processes(child: Spawn, buf: dmabuf.DmaBuf, other_buf: dmabuf.DmaBuf) -> None:
    holder = handed(child(holds, True), buf, says="locked")
    younger = WwAcquireContext()
    other_buf.resv.lock(younger)
    with raises_errno(errno.EDEADLK):
        buf.resv.lock(younger)
    other_buf.resv.unlock()
    holder.send("unlock")
    buf.resv.lock_slow(younger)
    buf.resv.unlock()
    younger.fini()


@PLAIN_OR_CONTEXT
def test_the_lock_of_a_killed_process_is_free(child: Spawn, buf: dmabuf.DmaBuf, with_context: bool) -> None:
    holder = handed(child(holds, with_context), buf, says="locked")
    holder.kill()
    buf.resv.lock()
    buf.resv.reserve(1)
    buf.resv.unlock()


@PLAIN_OR_CONTEXT
def test_waiter_gets_lock_of_killed_process(child: Spawn, buf: dmabuf.DmaBuf, with_context: bool) -> None:
    holder, waiter = child(holds, with_context), child(takes)
    for other in (holder, waiter):
        dmabuf.send(other.sock, buf)
    assert holder.recv() == "locked"
    assert waiter.recv() == "ready"
    until_asleep(waiter.pid)
    holder.kill()
    assert waiter.result() == "taken"


@PLAIN_OR_CONTEXT
def test_all_locks_of_a_killed_process_are_free(child: Spawn, buf: dmabuf.DmaBuf, other_buf: dmabuf.DmaBuf, with_context: bool) -> None:
    holder = handed(child(holds, with_context), buf, other_buf, says="locked")
    with Background(lambda: takes_all(buf, other_buf)) as job:
        job.until_blocked()
        assert not job.done
        holder.kill()
        assert job.result()
    assert not buf.resv.is_locked()
    assert not other_buf.resv.is_locked()


def takes_all(*bufs: dmabuf.DmaBuf) -> bool:
    with dmabuf.lock_all([buf.resv for buf in bufs]):
        return all(buf.resv.is_locked() for buf in bufs)


def test_a_killed_waiter_is_passed_over(child: Spawn, buf: dmabuf.DmaBuf) -> None:
    """The older of two waiters is killed; the other one gets the lock."""
    buf.resv.lock()
    waiters = []
    for _ in range(2):
        waiter = handed(child(takes), buf, says="ready")
        until_asleep(waiter.pid)
        waiters.append(waiter)
    waiters[0].kill()
    buf.resv.unlock()
    assert waiters[1].result() == "taken"
    assert buf.resv.trylock()
    buf.resv.unlock()


def test_a_stopped_holder_keeps_the_lock(child: Spawn, buf: dmabuf.DmaBuf) -> None:
    holder = handed(child(holds, False), buf, says="locked")
    holder.stop()
    assert buf.resv.trylock() is False
    assert buf.resv.is_locked()
    holder.resume()
    holder.send("unlock")
    assert holder.result() is None
    assert buf.resv.trylock()
    buf.resv.unlock()


def test_a_dead_process_is_no_older_context(child: Spawn, buf: dmabuf.DmaBuf, other_buf: dmabuf.DmaBuf) -> None:
    """A context with locks waits for, and takes, what a killed older one held: no EDEADLK from the dead."""
    holder = handed(child(holds, True), buf, says="locked")
    younger = WwAcquireContext()
    other_buf.resv.lock(younger)
    holder.kill()
    buf.resv.lock(younger)
    buf.resv.unlock()
    other_buf.resv.unlock()
    younger.fini()
