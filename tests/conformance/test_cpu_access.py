"""begin_cpu_access, end_cpu_access and SYNC (semantics 2.15, 2.16, 5.3): who waits for what, and what is refused."""

import errno
import os
import signal
import threading
from typing import Any

import pytest

import dmabuf
from dmabuf import ContractWarning, Direction, DmaBuf, Timeline, Usage
from tests.support.children import Parent, Spawn
from tests.support.errnos import raises_errno
from tests.support.facts import FACTS, Fact, fact_id, facts
from tests.support.fences import USAGES, attach
from tests.support.waiting import Background, until_asleep

# include/uapi/linux/dma-buf.h
READ, WRITE, END = 1, 2, 4
FLAGS = {"r": READ, "w": WRITE, "rw": READ | WRITE, "READ": READ, "WRITE": WRITE, "RW": READ | WRITE}

DIRECTIONS = pytest.mark.parametrize("direction", list(Direction), ids=lambda direction: direction.name)
WRITES = {Direction.TO_DEVICE, Direction.BIDIRECTIONAL}


def waits(direction: Direction, usage: Usage) -> bool:
    """Semantics 2.15: a write waits for all up to READ, everything else up to WRITE."""
    return usage <= (Usage.READ if direction in WRITES else Usage.WRITE)


@pytest.mark.parametrize(("name", "value"), [("BIDIRECTIONAL", 0), ("TO_DEVICE", 1), ("FROM_DEVICE", 2), ("NONE", 3)])
def test_the_directions_have_the_numbers_of_the_kernel(name: str, value: int) -> None:
    assert Direction[name] == value


@DIRECTIONS
@USAGES
def test_begin_waits_for_what_is_in_the_way_of_its_direction(buf: DmaBuf, tl: Timeline, direction: Direction, usage: Usage) -> None:
    fence = tl.fence()
    attach(buf.resv, fence, usage)
    if waits(direction, usage):
        with Background(lambda: buf.begin_cpu_access(direction)) as job:
            job.until_blocked()
            assert not job.done
            fence.signal()
            job.result()
    else:
        buf.begin_cpu_access(direction)
        assert not fence.is_signaled()
        fence.signal()
    buf.end_cpu_access(direction)


@DIRECTIONS
def test_begin_waits_for_several_fences(buf: DmaBuf, tl: Timeline, other_tl: Timeline, direction: Direction) -> None:
    fences = tl.fence(), other_tl.fence()
    attach(buf.resv, fences[0], Usage.KERNEL)
    attach(buf.resv, fences[1], Usage.WRITE)
    with Background(lambda: buf.begin_cpu_access(direction)) as job:
        for fence in reversed(fences):
            job.until_blocked()
            assert not job.done
            fence.signal()
        job.result()
    buf.end_cpu_access(direction)


@DIRECTIONS
@pytest.mark.parametrize("error", [-errno.EIO, -errno.ECANCELED, -errno.EOWNERDEAD])
def test_begin_goes_on_after_a_failed_fence(buf: DmaBuf, tl: Timeline, direction: Direction, error: int) -> None:
    fence = tl.fence()
    attach(buf.resv, fence, Usage.WRITE)
    with Background(lambda: buf.begin_cpu_access(direction)) as job:
        job.until_blocked()
        fence.signal(error=error)
        job.result()
    buf.end_cpu_access(direction)


@DIRECTIONS
@USAGES
def test_end_never_waits(buf: DmaBuf, tl: Timeline, direction: Direction, usage: Usage) -> None:
    fence = tl.fence()
    buf.begin_cpu_access(direction)
    attach(buf.resv, fence, usage)
    buf.end_cpu_access(direction)
    assert not fence.is_signaled()
    fence.signal()


def test_begin_and_end_exclude_nobody_and_add_no_fence(buf: DmaBuf) -> None:
    buf.begin_cpu_access(Direction.TO_DEVICE)
    assert buf.resv.fences(Usage.BOOKKEEP) == []
    with Background(lambda: buf.begin_cpu_access(Direction.TO_DEVICE)) as job:
        job.result()
    buf.end_cpu_access(Direction.TO_DEVICE)


# -- no pairing is enforced (2.16)


@DIRECTIONS
def test_end_without_a_begin_is_allowed(buf: DmaBuf, direction: Direction) -> None:
    buf.end_cpu_access(direction)
    buf.end_cpu_access(direction)


@DIRECTIONS
def test_begin_twice_and_end_once_is_allowed(buf: DmaBuf, direction: Direction) -> None:
    buf.begin_cpu_access(direction)
    buf.begin_cpu_access(direction)
    buf.end_cpu_access(direction)


def test_begin_and_end_with_different_directions_is_allowed(buf: DmaBuf) -> None:
    buf.begin_cpu_access(Direction.TO_DEVICE)
    buf.end_cpu_access(Direction.FROM_DEVICE)


# -- what is refused

BEGIN_OR_END = pytest.mark.parametrize("call", ["begin_cpu_access", "end_cpu_access"])


@BEGIN_OR_END
def test_with_the_lock_held_it_is_edeadlk_and_a_contract_warning(buf: DmaBuf, call: str) -> None:
    with buf.resv.locked(), pytest.warns(ContractWarning), raises_errno(errno.EDEADLK):
        getattr(buf, call)(Direction.TO_DEVICE)


@BEGIN_OR_END
def test_the_warning_about_the_lock_comes_before_any_effect(buf: DmaBuf, call: str) -> None:
    with buf.resv.locked(), pytest.raises(ContractWarning):
        getattr(buf, call)(Direction.TO_DEVICE)


@BEGIN_OR_END
def test_a_closed_buffer_is_ebadf(call: str) -> None:
    buf = dmabuf.allocate(4096)
    buf.close()
    with raises_errno(errno.EBADF):
        getattr(buf, call)(Direction.TO_DEVICE)


@BEGIN_OR_END
@pytest.mark.parametrize("direction", [-1, 4, 255])
def test_an_unknown_direction_is_einval(buf: DmaBuf, call: str, direction: Any) -> None:
    with raises_errno(errno.EINVAL):
        getattr(buf, call)(direction)


# -- SYNC, by the kernel's answers (5.3)


@pytest.mark.parametrize("fact", facts("sync/heap:system-flags-"), ids=fact_id)
def test_sync_refuses_the_flags_that_the_kernel_refuses(buf: DmaBuf, fact: Fact) -> None:
    assert fact.errno is not None
    with raises_errno(fact.errno):
        buf.sync(int(fact.id.rpartition("-")[2], 16))


@pytest.mark.parametrize("flags", [-1, 5 - 2**64])
def test_sync_with_negative_flags_is_einval(buf: DmaBuf, flags: int) -> None:
    with raises_errno(errno.EINVAL):
        buf.sync(flags)


@pytest.mark.parametrize("flags", [READ, WRITE, READ | WRITE, END | READ, END | WRITE, END | READ | WRITE])
def test_sync_takes_every_direction_with_and_without_end(buf: DmaBuf, flags: int) -> None:
    buf.sync(flags)


def test_sync_counts_nothing_in_the_order_the_kernel_was_asked(buf: DmaBuf) -> None:
    prefix = "sync/heap:system-"
    for name in ("end-first", "start-r", "end-r", "end-r-again", "start-w", "start-w-again", "end-rw-mismatch", "start-rw", "end-w"):
        assert FACTS[prefix + name].ret == 0
        what, direction = name.split("-")[:2]
        buf.sync(FLAGS.get(direction, READ) | (END if what == "end" else 0))


@pytest.mark.parametrize("fact", facts("sync/heap:system-block-"), ids=fact_id)
def test_sync_start_blocks_where_the_kernel_blocks(buf: DmaBuf, tl: Timeline, fact: Fact) -> None:
    kind, flags = fact.id.split("-")[-2:]
    fence = tl.fence()
    attach(buf.resv, fence, Usage.WRITE if kind == "write" else Usage.READ)
    with Background(lambda: buf.sync(FLAGS[flags])) as job:
        job.until_blocked()
        if fact.ret[1] == "blocked":
            assert not job.done
            fence.signal()
        job.result()
    if not fence.is_signaled():
        fence.signal()


def test_sync_end_does_not_block(buf: DmaBuf, tl: Timeline) -> None:
    assert FACTS["sync/heap:system-end-noblock"].ret == [0, "did not block"]
    fence = tl.fence()
    attach(buf.resv, fence, Usage.WRITE)
    buf.sync(END | READ | WRITE)
    assert not fence.is_signaled()
    fence.signal()


def test_sync_after_a_failed_fence_is_no_error(buf: DmaBuf, tl: Timeline) -> None:
    assert FACTS["swsync/err-sync"].ret == 0
    fence = tl.fence()
    attach(buf.resv, fence, Usage.WRITE)
    fence.signal(error=-errno.ENOENT)
    buf.sync(READ | WRITE)


def test_sync_of_a_closed_buffer_is_ebadf() -> None:
    assert FACTS["sync/closed"].errno == errno.EBADF
    buf = dmabuf.allocate(4096)
    buf.close()
    with raises_errno(errno.EBADF):
        buf.sync(READ)


# -- signals: as a system call that is restarted


def poke_when_asleep(then: Any) -> None:
    main = threading.main_thread()
    assert main.ident is not None
    until_asleep(os.getpid(), main.native_id)
    signal.pthread_kill(main.ident, signal.SIGUSR1)
    until_asleep(os.getpid(), main.native_id)
    then()


def test_begin_goes_on_after_a_signal(buf: DmaBuf, tl: Timeline) -> None:
    assert FACTS["sync/heap:system-restart"].ret == [0, "until the fence"]
    fence, handled = tl.fence(), []
    attach(buf.resv, fence, Usage.WRITE)
    old = signal.signal(signal.SIGUSR1, lambda number, _: handled.append(number))
    try:
        with Background(lambda: poke_when_asleep(fence.signal)):
            buf.begin_cpu_access(Direction.FROM_DEVICE)
            assert fence.is_signaled()
    finally:
        signal.signal(signal.SIGUSR1, old)
    assert handled


def test_begin_ends_when_the_signal_handler_raises(buf: DmaBuf, tl: Timeline) -> None:
    def handler(*_: object) -> None:
        raise KeyError

    fence = tl.fence()
    attach(buf.resv, fence, Usage.WRITE)
    old = signal.signal(signal.SIGUSR1, handler)
    try:
        with Background(lambda: poke_when_asleep(lambda: None)), pytest.raises(KeyError):
            buf.begin_cpu_access(Direction.FROM_DEVICE)
    finally:
        signal.signal(signal.SIGUSR1, old)
    assert not fence.is_signaled()
    fence.signal()


# -- beside read() and write()


def test_begin_inside_the_own_access_ignores_it(buf: DmaBuf) -> None:
    with buf.write() as view:
        buf.begin_cpu_access(Direction.BIDIRECTIONAL)
        view[0] = 1
        buf.end_cpu_access(Direction.BIDIRECTIONAL)
    with buf.read():
        buf.begin_cpu_access(Direction.TO_DEVICE)
        buf.end_cpu_access(Direction.TO_DEVICE)


def test_begin_inside_the_own_access_still_waits_for_other_fences(buf: DmaBuf, tl: Timeline) -> None:
    fence = tl.fence()

    def job() -> None:
        with buf.write():
            attach(buf.resv, fence, Usage.READ)
            buf.begin_cpu_access(Direction.TO_DEVICE)
            assert fence.is_signaled()

    with Background(job) as running:
        running.until_blocked()
        assert not running.done
        fence.signal()
        running.result()


def accesses(parent: Parent, mode: str) -> None:
    (buf,) = dmabuf.recv(parent.sock)
    with getattr(buf, mode)():
        parent.send("in")
        parent.recv()


@DIRECTIONS
@pytest.mark.parametrize("mode", ["read", "write"])
@pytest.mark.parametrize("killed", [False, True], ids=["leaves", "killed"])
def test_begin_waits_for_the_access_of_another_process(child: Spawn, buf: DmaBuf, direction: Direction, mode: str, killed: bool) -> None:
    other = child(accesses, mode)
    dmabuf.send(other.sock, buf)
    assert other.recv() == "in"
    blocks = waits(direction, Usage.WRITE if mode == "write" else Usage.READ)
    with Background(lambda: buf.begin_cpu_access(direction)) as job:
        job.until_blocked()
        assert job.done is not blocks
        if killed:
            other.kill()
        else:
            other.send("leave")
        job.result()
