"""Arrays, chains and custom fences across processes: how they travel, who ends them, and what deaths do."""

import errno
import gc
import math
import multiprocessing
import os
import queue
import threading
from typing import Any

import pytest

import dmabuf
from dmabuf import (
    ContractWarning,
    DmaBuf,
    DmaFence,
    DmaFenceArray,
    DmaFenceChain,
    DmaResv,
    FenceOps,
    Timeline,
    Usage,
    merge,
    unwrap,
    wait_any,
)
from dmabuf.core.fence.travel import pack, unpack
from tests.support.children import Parent, Spawn
from tests.support.errnos import raises_errno
from tests.support.fences import attach, key, the_fence
from tests.support.lines import There
from tests.support.partners import handed
from tests.support.waiting import until_asleep


def shape(fence: DmaFence) -> Any:
    """What a fence is made of, by the names that all processes share."""
    if isinstance(fence, DmaFenceArray):
        return "array", fence.context, fence.seqno, fence.signal_on_any, [shape(member) for member in fence.fences]
    if isinstance(fence, DmaFenceChain):
        return "chain", [(p.context, p.seqno, p.prev_seqno, shape(p.fence)) if isinstance(p, DmaFenceChain) else shape(p) for p in fence]
    return key(fence)


def waits(parent: Parent) -> tuple[Any, float, int, int]:
    (fence,) = dmabuf.recv(parent.sock)
    made_of = shape(fence)
    parent.send("waiting")
    return made_of, fence.wait(), fence.status, fence.error


def makes(parent: Parent, kind: str) -> None:
    """Sends a container over fences that it got, and its own handle of it, and stays until it is killed."""
    fences = dmabuf.recv(parent.sock)
    made = container(kind, fences)
    dmabuf.send(parent.sock, made)
    parent.send("made")
    parent.recv()


def container(kind: str, fences: list[DmaFence]) -> DmaFence:
    if kind == "merge":
        return merge(*fences)
    if kind != "chain":
        return DmaFenceArray(fences, signal_on_any=kind == "any")
    chain: DmaFenceChain | None = None
    for i, fence in enumerate(fences):
        chain = DmaFenceChain(chain, fence, 10 * (i + 1))
    assert chain is not None
    return chain


KINDS = pytest.mark.parametrize("kind", ["all", "any", "chain"])


@pytest.mark.parametrize("kind", ["all", "any", "chain", "merge"])
def test_a_container_of_another_processs_fences_ends_with_them(child: Spawn, kind: str) -> None:
    line = There(child)
    made = container(kind, line.make(3))
    ended = threading.Event()
    made.add_callback(lambda _: ended.set())
    line.signal(*range(1 if kind == "any" else 3))
    ended.wait()
    assert made.status == 1
    line.end()


@KINDS
def test_sent_container_has_same_parts_and_is_signaled_with_members(child: Spawn, tl: Timeline, kind: str) -> None:
    fences = [tl.fence() for _ in range(3)]
    made = container(kind, fences)
    expected = shape(made)
    other = handed(child(waits), made, says="waiting")
    until_asleep(other.pid)
    for fence in fences:
        fence.signal()
    assert other.result()[:3] == (expected, math.inf, 1)


def test_error_of_an_array_reaches_its_copy_in_a_child(child: Spawn, tl: Timeline) -> None:
    fences = [tl.fence() for _ in range(2)]
    other = handed(child(waits), DmaFenceArray(fences), says="waiting")
    fences[0].signal(error=-errno.EIO)
    fences[1].signal()
    assert other.result()[2:] == (-errno.EIO, -errno.EIO)


@KINDS
def test_a_container_outlives_the_process_that_made_it(child: Spawn, tl: Timeline, kind: str) -> None:
    fences = [tl.fence() for _ in range(2)]
    maker = handed(child(makes, kind), *fences)
    (made,) = dmabuf.recv(maker.sock)
    assert maker.recv() == "made"
    made.enable_signaling()
    maker.kill()
    assert made.wait(0) == 0.0
    for fence in fences:
        fence.signal()
    assert made.wait() == math.inf
    assert made.status == 1


@pytest.mark.parametrize("kind", ["all", "chain"])
def test_a_container_ends_when_the_owner_of_its_last_member_dies(child: Spawn, kind: str) -> None:
    line = There(child)
    made = container(kind, line.make(2))
    made.enable_signaling()
    line.other.kill()
    assert made.wait() == math.inf
    assert made.status == (-errno.EOWNERDEAD if kind == "all" else 1)


@KINDS
def test_an_ended_container_arrives_ended(child: Spawn, tl: Timeline, kind: str) -> None:
    fences = [tl.fence() for _ in range(2)]
    made = container(kind, fences)
    made.enable_signaling()
    for fence in fences:
        fence.signal(error=-errno.EIO)
    again = unpack(made.domain, pack(made) or b"")
    assert again != made
    assert (again.status, again.timestamp) == (made.status, made.timestamp)


@pytest.mark.parametrize("enabled", [False, True])
@KINDS
def test_a_container_arrives_enabled_if_it_was(tl: Timeline, kind: str, enabled: bool) -> None:
    made = container(kind, [tl.fence() for _ in range(2)])
    if enabled:
        made.enable_signaling()
    again = unpack(made.domain, pack(made) or b"")
    assert isinstance(again, DmaFenceArray | DmaFenceChain)
    assert again.enabled == enabled
    tl.close()


def test_sent_chain_has_pending_points_and_what_stood_before_them(tl: Timeline) -> None:
    before, first, second, third = (tl.fence() for _ in range(4))
    chain = DmaFenceChain(before, first, 1)
    tail = DmaFenceChain(DmaFenceChain(chain, second, 2), DmaFenceArray([third]), 3)
    second.signal()
    again = unpack(tail.domain, pack(tail) or b"")
    assert shape(again) == shape(tail)
    assert list(unwrap(again)) == [third, first, before]
    tl.close()


def test_a_chain_of_10_000_points_travels(child: Spawn, tl: Timeline) -> None:
    fence = tl.fence()
    tail: DmaFenceChain | None = None
    for i in range(10_000):
        tail = DmaFenceChain(tail, fence, i + 1)
    assert tail is not None
    other = handed(child(counts), tail)
    assert other.recv() == 10_000
    fence.signal()
    assert other.result() == 1


def counts(parent: Parent) -> int:
    (chain,) = dmabuf.recv(parent.sock)
    parent.send(sum(1 for _ in chain))
    chain.wait()
    return int(chain.status)


@KINDS
def test_containers_go_through_multiprocessing(tl: Timeline, kind: str) -> None:
    fences = [tl.fence() for _ in range(2)]
    made = container(kind, fences)
    expected = shape(made)
    here, there = multiprocessing.Pipe()
    with here, there:
        there.send(made)
        again = here.recv()
    assert shape(again) == expected
    assert again != made
    tl.close()


@pytest.mark.parametrize(
    "data", [b"", b"x", bytes(40), bytes(39) + b"\x01", b"\x01" + bytes(39), b"\x02" + bytes(7) + b"\xff" * 8 + bytes(24)]
)
def test_nonsense_is_no_container(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"fence|kind"):
        unpack(dmabuf.Domain.default(), data)


@pytest.mark.parametrize("cut", [1, 40, 80])
def test_a_container_that_is_cut_short_is_refused(tl: Timeline, cut: int) -> None:
    fences = [tl.fence(), tl.fence()]
    data = pack(DmaFenceArray(fences)) or b""
    for wrong in (data[:-cut], data + bytes(cut)):
        with pytest.raises(ValueError, match="fence"):
            unpack(tl.domain, wrong)
    tl.close()


# -- what a fork inherits


@KINDS
def test_a_forked_child_waits_for_a_container_that_nobody_enabled(child: Spawn, kind: str) -> None:
    assert child(forks, kind).result() == (0, 0, 1)


def forks(parent: Parent, kind: str) -> tuple[int, int, int]:
    line = dmabuf.Timeline("forked")
    fences = [line.fence() for _ in range(2)]
    made = container(kind, fences)
    ready = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            assert made.status == 0
            seen: list[int] = []
            token = made.add_callback(lambda _: seen.append(1))
            assert made.remove_callback(token)
            os.write(ready[1], b"r")
            assert made.wait() == math.inf
            assert (made.status, seen) == (1, [])
        except BaseException:
            os._exit(1)
        os._exit(0)
    os.read(ready[0], 1)
    before = made.status
    for fence in fences:
        fence.signal()
    _, status = os.waitpid(pid, 0)
    after = made.wait()
    for fd in ready:
        os.close(fd)
    line.close()
    return os.waitstatus_to_exitcode(status), before, int(after > 0)


# -- on a reservation object


@KINDS
@pytest.mark.parametrize("call", ["add", "replace"])
def test_a_container_on_a_reservation_object_is_a_contract_warning(tl: Timeline, kind: str, call: str) -> None:
    made, resv = container(kind, [tl.fence()]), DmaResv()
    with resv.locked():
        resv.reserve(1)
        with pytest.raises(ContractWarning):
            resv.add(made, Usage.READ) if call == "add" else resv.replace(tl.context, made, Usage.READ)
    assert resv.fences(Usage.BOOKKEEP) == []
    tl.close()


def test_a_container_that_is_added_all_the_same_is_enabled_and_waited_for(child: Spawn, buf: DmaBuf, tl: Timeline) -> None:
    fences = [tl.fence() for _ in range(2)]
    made = DmaFenceArray(fences)
    with pytest.warns(ContractWarning):
        attach(buf.resv, made, Usage.WRITE)
    assert made.enabled
    other = handed(child(waits_for_the_buffer), buf, says="waiting")
    until_asleep(other.pid)
    for fence in fences:
        fence.signal()
    assert other.result() > 0


def waits_for_the_buffer(parent: Parent) -> float:
    (buf,) = dmabuf.recv(parent.sock)
    parent.send("waiting")
    return float(buf.resv.wait(Usage.BOOKKEEP))


# -- custom fences


class Watched(FenceOps):
    """Counts what is asked of it."""

    def __init__(self) -> None:
        self.enabled = 0

    def enable_signaling(self, fence: DmaFence) -> bool:
        self.enabled += 1
        return True


@pytest.mark.parametrize("how", ["send", "resv", "multiprocessing", "in an array"])
def test_a_custom_fence_is_enabled_when_it_becomes_known_elsewhere(child: Spawn, buf: DmaBuf, tl: Timeline, how: str) -> None:
    ops = Watched()
    fence = tl.fence(ops=ops)
    other = child(waits_for_what_comes, how)
    if how == "send":
        dmabuf.send(other.sock, fence)
    elif how == "resv":
        attach(buf.resv, fence, Usage.WRITE)
        dmabuf.send(other.sock, buf)
    elif how == "in an array":
        dmabuf.send(other.sock, DmaFenceArray([fence]))
    else:
        other.send(fence)
    assert ops.enabled == 1
    assert other.recv() == "waiting"
    until_asleep(other.pid)
    fence.signal(error=-errno.EIO)
    assert other.result() == -errno.EIO
    assert ops.enabled == 1


def waits_for_what_comes(parent: Parent, how: str) -> int:
    if how == "multiprocessing":
        fence = parent.recv()
    else:
        (fence,) = dmabuf.recv(parent.sock)
        if how == "resv":
            fence = the_fence(fence)
    parent.send("waiting")
    fence.wait()
    return int(fence.status)


class Hurried(FenceOps):
    """Writes down deadlines."""

    def __init__(self) -> None:
        self.heard: queue.SimpleQueue[int] = queue.SimpleQueue()

    def set_deadline(self, fence: DmaFence, ns: int) -> None:
        self.heard.put(ns)


@pytest.mark.parametrize("how", ["resv", "array"])
def test_deadlines_of_another_process_reach_a_custom_fence(child: Spawn, buf: DmaBuf, tl: Timeline, how: str) -> None:
    ops = Hurried()
    fence, plain = tl.fence(ops=ops), tl.fence()
    other = child(hurries, how)
    if how == "resv":
        attach(buf.resv, fence, Usage.WRITE)
        dmabuf.send(other.sock, buf)
    else:
        dmabuf.send(other.sock, DmaFenceArray([fence, plain]))
    for given, heard in ((9000, 9000), (5000, 5000), (7000, None), (3000, 3000)):
        other.send(given)
        assert other.recv() == "set"
        if heard is not None:
            assert ops.heard.get() == heard
    fence.set_deadline(2000)
    fence.set_deadline(4000)
    assert [ops.heard.get(), ops.heard.get()] == [2000, 4000]  # of this process's own it hears all
    assert fence.deadline == 2000
    other.send(None)
    other.result()
    assert ops.heard.empty()
    tl.close()


def hurries(parent: Parent, how: str) -> None:
    (got,) = dmabuf.recv(parent.sock)
    while (ns := parent.recv()) is not None:
        if how == "resv":
            got.resv.set_deadline(Usage.BOOKKEEP, ns)
        else:
            got.set_deadline(ns)
        parent.send("set")


# -- wait_any


def test_wait_any_among_fences_of_other_processes(child: Spawn, tl: Timeline) -> None:
    line = There(child)
    fences = [tl.fence(), *line.make(2)]
    line.signal(1)
    index, left = wait_any(fences, 60)
    assert index == 2
    assert 0 < left <= 60
    line.end()
    tl.close()


def test_wait_any_ends_when_an_owner_dies(child: Spawn, tl: Timeline) -> None:
    line = There(child)
    (theirs,) = line.make(1)
    line.other.kill()
    assert wait_any([tl.fence(), theirs], None) == (1, math.inf)
    assert theirs.status == -errno.EOWNERDEAD
    tl.close()


def test_wait_any_among_fences_of_several_domains(tl: Timeline) -> None:
    elsewhere = Timeline("elsewhere", domain=dmabuf.Domain.private())
    fences = [tl.fence(), elsewhere.fence()]
    timer = threading.Thread(target=fences[1].signal)
    timer.start()
    assert wait_any(fences) == (1, math.inf)
    timer.join()
    tl.close()
    elsewhere.close()
    del fences
    gc.collect()


def test_a_container_of_two_domains_does_not_exist(tl: Timeline) -> None:
    elsewhere = Timeline("elsewhere", domain=dmabuf.Domain.private())
    with raises_errno(errno.EXDEV):
        DmaFenceArray([tl.fence(), elsewhere.fence()])
    tl.close()
    elsewhere.close()
