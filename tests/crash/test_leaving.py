"""Leaving and reaping: what runs under which lock, and what is left when a part of it fails."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Callable

import pytest

import dmabuf
from dmabuf import _native
from dmabuf.domain import lives
from tests.support.apart import Apart
from tests.support.steps import fork, reap
from tests.support.waiting import Background, held_by_another_thread, until

pytestmark = [pytest.mark.crash, pytest.mark.timeout(200)]


def pending_in_free_chunks(shm: _native.Shm) -> int:
    """How many fences are pending in chunks that belong to no life."""
    count = 0
    for chunk in range(shm.load32(_native.OFF_NCHUNKS)):
        entry = shm.load64(_native.OFF_CHUNKTAB + 8 * chunk)
        if entry & 0xFF == _native.CH_FENCE and not entry >> 32:
            at = _native.HEADER_BYTES + chunk * _native.CHUNK_BYTES
            count += sum(not shm.load32(at + 128 * i) & 1 for i in range(_native.FENCES_PER))
    return count


def fence_with_a_dead_owner(domain: dmabuf.Domain, callback: Callable[[dmabuf.DmaFence], object]) -> dmabuf.DmaFence:
    """A fence of a process that dies when the callback is there."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def live() -> None:
        timeline = dmabuf.Timeline("dead", domain=domain)
        fence = timeline.fence()
        dmabuf.send(here, fence)
        here.recv(1)
        os.kill(os.getpid(), signal.SIGKILL)

    with here, there:
        pid = fork(live)
        (fence,) = dmabuf.recv(there)
        fence.add_callback(callback)
        there.send(b"g")
        assert reap(pid) == -signal.SIGKILL
    return fence


# ---- foreign code ----


def callback_and_leave() -> None:
    domain = dmabuf.Domain.default()
    domain.join()
    inside, go, over = threading.Event(), threading.Event(), threading.Event()

    def callback(_: object) -> None:
        inside.set()
        go.wait()
        dmabuf.Timeline("made in a callback").close()
        over.set()

    fence = fence_with_a_dead_owner(domain, callback)  # a thread reaps it at a tick
    inside.wait()
    others = [i for i in lives.alive_slots(domain.shm) if i != lives.index_of(domain.shm.life)]
    assert others == []  # the slot is CLEAN
    assert not domain.shm.locked(_native.LIFECYCLE_BYTE)
    domain.leave()
    domain.join()
    assert reap(fork(lambda: dmabuf.allocate(4096).close())) == 0  # forks, joins and leaves go on
    go.set()
    over.wait()
    assert fence.error == -errno.EOWNERDEAD
    domain.leave()


def test_callback_of_a_dead_fence_keeps_nobody_from_leaving(apart: Apart) -> None:
    apart(callback_and_leave)


def slow_callback() -> None:
    domain = dmabuf.Domain.default()
    domain.join()
    inside, go = threading.Event(), threading.Event()

    def callback(_: object) -> None:
        inside.set()
        go.wait()

    first = fence_with_a_dead_owner(domain, callback)
    inside.wait()  # in a thread that reaps
    second = fence_with_a_dead_owner(domain, lambda _: None)
    until(lambda: domain.reap_dead() or second.is_signaled())
    go.set()
    assert (first.error, second.error) == (-errno.EOWNERDEAD, -errno.EOWNERDEAD)
    domain.leave()


def test_slow_callback_keeps_nobody_from_the_fences_of_the_dead(apart: Apart) -> None:
    apart(slow_callback)


def callback_at_leave() -> None:
    domain = dmabuf.Domain.default()
    timeline = dmabuf.Timeline("work")
    fence = timeline.fence()
    seen: list[tuple[int, bool, int]] = []
    fence.add_callback(lambda f: seen.append((f.error, domain.shm.locked(_native.LIFECYCLE_BYTE), domain.shm.life)))
    domain.leave()
    assert seen == [(-errno.EOWNERDEAD, False, 0)]


def test_callbacks_of_own_fences_run_after_leaving_without_locks(apart: Apart) -> None:
    apart(callback_at_leave)


# ---- what fails, and what is left ----


def leave_without_descriptors() -> None:
    domain = dmabuf.Domain.default()
    domain.join()
    index = lives.index_of(domain.shm.life)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        domain.leave()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert domain.shm.life == 0
    assert not lives.is_alive(domain.shm, index)
    assert lives.alive_slots(domain.shm) == []
    assert not domain.shm.copied  # it stays present
    with dmabuf.allocate(4096) as buf, buf.write() as view:  # it joins again
        view[0] = 1
    domain.leave()
    assert domain.shm.copied


def test_leave_without_a_descriptor_ends_the_life(apart: Apart) -> None:
    apart(leave_without_descriptors)


def leave_beside_an_access() -> None:
    domain = dmabuf.Domain.default()
    with dmabuf.allocate(4096) as buf:
        inside, go = threading.Event(), threading.Event()

        def access() -> None:
            with buf.read():
                pass
            with buf.read():  # begins while the main thread leaves
                inside.set()
                go.wait()

        real = domain.forget_socket
        with contextlib.ExitStack() as stack:
            job = Background(access)

            def forget_socket(life: int) -> None:  # called in the middle of leave(), between the two parts of the life's end
                stack.enter_context(job).until_blocked()
                real(life)

            domain.forget_socket = forget_socket  # type: ignore[method-assign]
            domain.leave()
            del domain.forget_socket
            until(lambda: inside.is_set() or job.done)
            assert inside.is_set(), "the access failed"
            assert domain.shm.life  # the access joined again
            assert pending_in_free_chunks(domain.shm) == 0
            go.set()
        with buf.write(timeout=5):
            pass
    domain.leave()


def test_access_beside_leave_is_in_a_life_of_its_own(apart: Apart) -> None:
    apart(leave_beside_an_access)


def hooks_that_raise() -> None:
    domain = dmabuf.Domain.default()
    domain.join()
    seen: list[str] = []

    def raising() -> None:
        seen.append("raises")
        raise ValueError("a hook")

    domain.on_leave("first", raising)
    domain.on_leave("second", lambda: seen.append("second"))
    reported: list[object] = []
    sys.unraisablehook = lambda what: reported.append(what.exc_value)
    domain.leave()
    assert seen == ["raises", "second"]
    assert [str(e) for e in reported] == ["a hook"]
    assert domain.shm.life == 0


def test_hook_that_raises_stops_neither_leave_nor_other_hooks(apart: Apart) -> None:
    apart(hooks_that_raise)


def child_of_one_that_left() -> None:
    domain = dmabuf.Domain.default()
    domain.join()
    domain.local["mine"] = "the parent's"
    domain.leave()

    def look() -> None:
        domain.join()
        assert "mine" not in domain.local

    assert reap(fork(look)) == 0


def test_child_of_a_process_that_left_forgets_what_is_the_parents(apart: Apart) -> None:
    apart(child_of_one_that_left)


def leaves_amid_an_arrival() -> None:
    domain = dmabuf.Domain.default()
    first, second = dmabuf.allocate(4096), dmabuf.allocate(4096)
    with first.read(), second.read():
        pass
    left = []

    def leave(_: int, __: int) -> None:
        if not left:
            left.append(True)
            domain.leave()

    with held_by_another_thread(second.resv.locked()):
        domain.shm.store64(_native.OFF_SWEEP, 0)  # so that who finds the lock taken looks for deaths
        domain.on_tick("leave", leave)
        with pytest.raises(OSError, match=r"this process left the domain meanwhile .*EOWNERDEAD"):
            dmabuf.access(read=[first], write=[second]).__enter__()
    assert left
    with dmabuf.access(read=[first], write=[second], timeout=0) as (x, y):
        assert x == y


def test_leaving_while_several_locks_are_taken_takes_no_access(apart: Apart) -> None:
    apart(leaves_amid_an_arrival)
