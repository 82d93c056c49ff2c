"""A sync file: one fence, or several, as a descriptor; expected values are the kernel's (spec 5.5, 5.10)."""

import asyncio
import errno
import gc
import math
import os
import select
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import dmabuf
from dmabuf import DmaBuf, DmaFence, DmaFenceArray, DmaFenceChain, SyncFile, Timeline, Usage
from tests.support.errnos import raises_errno
from tests.support.facts import FACTS, Fact, fact_id, facts
from tests.support.fences import attach, key, keys
from tests.support.waiting import Background

ALL_EVENTS = select.POLLIN | select.POLLOUT | select.POLLPRI | select.POLLRDNORM | select.POLLWRNORM | select.POLLRDHUP


def polled(fd: Any, events: int = select.POLLIN | select.POLLOUT) -> int:
    """What poll(2) says of a descriptor at once."""
    asked = select.poll()
    asked.register(fd, events)
    found = asked.poll(0)
    return found[0][1] if found else 0


def names_in_domain() -> list[str]:
    path = dmabuf.Domain.default().path
    assert path is not None
    return [name for name in os.listdir(path) if name.startswith("sync-")]


@pytest.fixture
def fence(tl: Timeline) -> DmaFence:
    return tl.fence()


@pytest.fixture
def sf(fence: DmaFence) -> Iterator[SyncFile]:
    with SyncFile(fence) as made:
        yield made


@pytest.fixture
def merged(tl: Timeline, other_tl: Timeline) -> Iterator[tuple[SyncFile, DmaFence, DmaFence]]:
    a, b = tl.fence(), other_tl.fence()
    with SyncFile(a) as one, SyncFile(b) as two, one.merge(two, "both") as both:
        yield both, a, b


# ---- the descriptor ----


def test_the_descriptor_is_readable_once_the_fence_has_ended_and_stays_so(sf: SyncFile, fence: DmaFence) -> None:
    assert polled(sf) == 0
    fence.signal()
    assert [polled(sf), polled(sf)] == [select.POLLIN] * 2


def test_of_every_event_only_reading_is_ever_reported(sf: SyncFile, fence: DmaFence) -> None:
    assert polled(sf, ALL_EVENTS) == 0
    fence.signal(-errno.EIO)
    assert polled(sf, ALL_EVENTS) == select.POLLIN | select.POLLRDNORM
    assert polled(sf, select.POLLOUT) == 0


def test_a_fence_that_failed_makes_it_readable(sf: SyncFile, fence: DmaFence) -> None:
    sf.fileno()
    fence.signal(-errno.EIO)
    assert (polled(sf), sf.status) == (select.POLLIN, -errno.EIO)


def test_made_of_an_ended_fence_it_is_readable_at_once(fence: DmaFence) -> None:
    fence.signal()
    with SyncFile(fence) as sf:
        assert polled(sf) == select.POLLIN


def test_select_waits_for_it(sf: SyncFile, fence: DmaFence) -> None:
    with Background(lambda: select.select([sf], [], [])[0]) as job:
        job.until_blocked()
        assert not job.done
        fence.signal()
        assert job.result() == [sf]


@pytest.mark.parametrize("flags", [0, select.EPOLLET, select.EPOLLONESHOT], ids=["level", "edge", "oneshot"])
def test_epoll_reports_it(sf: SyncFile, fence: DmaFence, flags: int) -> None:
    with select.epoll() as waiting:
        waiting.register(sf.fileno(), select.EPOLLIN | select.EPOLLOUT | flags)
        assert waiting.poll(0) == []
        fence.signal()
        assert waiting.poll(0) == [(sf.fileno(), select.EPOLLIN)]
        assert waiting.poll(0) == ([] if flags else [(sf.fileno(), select.EPOLLIN)])


def test_an_event_loop_calls_its_reader(sf: SyncFile, fence: DmaFence) -> None:
    async def main() -> None:
        loop, seen = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(sf.fileno(), seen.set)
        loop.call_soon(fence.signal)
        await seen.wait()
        loop.remove_reader(sf.fileno())

    asyncio.run(main())


def test_a_merge_is_readable_only_when_all_its_fences_have_ended(merged: tuple[SyncFile, DmaFence, DmaFence]) -> None:
    both, a, b = merged
    assert polled(both) == 0
    b.signal()
    assert polled(both) == 0
    a.signal()
    assert polled(both) == select.POLLIN


def test_fences_that_end_in_any_order_ring_once_the_last_has_ended() -> None:
    timelines = [Timeline(f"t{i}") for i in range(5)]
    fences = [timeline.fence() for timeline in timelines]
    with SyncFile(DmaFenceArray(fences)) as sf:
        sf.fileno()
        for i in (2, 0, 4, 3):
            fences[i].signal()
            assert polled(sf) == 0
        fences[1].signal()
        assert polled(sf) == select.POLLIN


def test_an_array_that_any_member_ends_rings_with_the_first(tl: Timeline, other_tl: Timeline) -> None:
    a, b = tl.fence(), other_tl.fence()
    with SyncFile(DmaFenceArray([a, b], signal_on_any=True)) as sf:
        assert polled(sf) == 0
        b.signal()
        assert polled(sf) == select.POLLIN
        a.signal()


def test_a_chain_rings_when_every_point_has_ended(tl: Timeline, other_tl: Timeline) -> None:
    a, b = tl.fence(), other_tl.fence()
    with SyncFile(DmaFenceChain(DmaFenceChain(None, a, 1), b, 2)) as sf:
        sf.fileno()
        b.signal()
        assert polled(sf) == 0
        a.signal()
        assert polled(sf) == select.POLLIN


@pytest.mark.parametrize(
    ("operation", "number"),
    [
        pytest.param(lambda fd: os.read(fd, 1), FACTS["syncfile/empty-read"].errno, id="read"),
        pytest.param(lambda fd: os.lseek(fd, 0, os.SEEK_SET), FACTS["syncfile/empty-lseek"].errno, id="lseek"),
        pytest.param(lambda fd: dmabuf._native.Mapping(fd, 4096), FACTS["syncfile/empty-mmap"].errno, id="mmap"),
        pytest.param(lambda fd: os.write(fd, b"x"), errno.ENOTCONN, id="write, EBADF in the kernel"),
    ],
)
def test_it_is_for_waiting_only(sf: SyncFile, operation: Callable[[int], object], number: int) -> None:
    with raises_errno(number):
        operation(sf.fileno())


def test_the_descriptor_is_not_inherited_by_exec(sf: SyncFile) -> None:
    assert not os.get_inheritable(sf.fileno())
    copy = sf.dup()
    assert not os.get_inheritable(copy)
    os.close(copy)


def test_the_descriptor_is_made_once_and_closed_with_the_sync_file(sf: SyncFile) -> None:
    fd = sf.fileno()
    assert sf.fileno() == fd
    sf.close()
    sf.close()
    with raises_errno(errno.EBADF):
        os.fstat(fd)


def test_a_duplicate_outlives_the_sync_file_and_is_rung(tl: Timeline) -> None:
    fence = tl.fence()
    sf = SyncFile(fence)
    fd = sf.dup()
    sf.close()
    assert polled(fd) == 0
    fence.signal()
    assert polled(fd) == select.POLLIN
    os.close(fd)


def test_what_is_forgotten_closes_its_descriptor(tl: Timeline) -> None:
    fence = tl.fence()
    fd = SyncFile(fence).fileno()
    with raises_errno(errno.EBADF):
        os.fstat(fd)
    assert not names_in_domain()


def test_nothing_is_left_in_the_domain_after_the_last_descriptor(sf: SyncFile, fence: DmaFence) -> None:
    assert not names_in_domain()  # nobody has asked for a descriptor
    copy = sf.dup()
    sf.close()
    assert names_in_domain()
    fence.signal()
    os.close(copy)
    dmabuf.Domain.default().sweep()
    assert not names_in_domain()


def test_names_that_nobody_holds_are_removed_as_new_ones_are_made(tl: Timeline) -> None:
    fence = tl.fence()
    for _ in range(100):
        sf = SyncFile(fence)
        fd = sf.dup()
        sf.close()
        os.close(fd)  # by somebody who doesn't know what it is
    assert 0 < len({name.rpartition(".")[0] for name in names_in_domain()}) < 70
    dmabuf.Domain.default().sweep()
    fence.signal()


def test_without_a_free_descriptor_there_is_a_clear_error(sf: SyncFile, fence: DmaFence, few_descriptors: Callable[[], None]) -> None:
    few_descriptors()
    with raises_errno(FACTS["limits/emfile-export"].errno or 0):
        sf.fileno()


def test_it_rings_although_no_descriptor_was_free_when_the_fence_ended(
    sf: SyncFile, fence: DmaFence, few_descriptors: Callable[[], Callable[[], None]]
) -> None:
    fd = sf.fileno()
    free = few_descriptors()
    fence.signal()
    assert polled(fd) == 0
    free()
    select.select([fd], [], [])


@pytest.fixture
def few_descriptors() -> Iterator[Callable[[], Callable[[], None]]]:
    """Use up every descriptor; the answer gives them back."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []

    def free() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        while taken:
            os.close(taken.pop())

    def use_up() -> Callable[[], None]:
        top = max(map(int, os.listdir("/proc/self/fd")))
        resource.setrlimit(resource.RLIMIT_NOFILE, (top + 8, hard))
        try:
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY))
        except OSError:
            return free

    yield use_up
    free()


# ---- what it is ----


@pytest.mark.parametrize("name", [None, ""], ids=["none", "empty"])
def test_without_a_name_it_has_its_fences(fence: DmaFence, name: str | None) -> None:
    with SyncFile(fence, name) as sf:
        assert sf.name == f"dmabuf-test{fence.context}-{fence.seqno}"


def test_a_name_is_cut_to_31_bytes(fence: DmaFence) -> None:
    with SyncFile(fence, "n" * 32) as sf, sf.merge(sf, "m" * 40) as merged:
        assert sf.name == FACTS["syncfile/merge-name32"].ret
        assert merged.info().name == "m" * 31


def test_a_generated_name_is_cut_to_31_bytes() -> None:
    with Timeline("t" * 40, driver="d" * 20) as timeline, SyncFile(timeline.fence()) as sf:
        assert sf.name == "d" * 20 + "-" + "t" * 10


def test_info_of_a_pending_fence(sf: SyncFile, fence: DmaFence) -> None:
    info = sf.info()
    assert (info.name, info.status, info.flags, info.num_fences) == (sf.name, 0, 0, 1)
    (one,) = info.fences
    assert (one.obj_name, one.driver_name, one.status, one.flags, one.timestamp_ns) == ("test", "dmabuf", 0, 0, 0)


@pytest.mark.parametrize(("error", "status"), [(0, 1), (-errno.EIO, -errno.EIO)], ids=["signalled", "failed"])
def test_info_of_an_ended_fence(sf: SyncFile, fence: DmaFence, error: int, status: int) -> None:
    fence.signal(error)
    info = sf.info()
    assert (info.status, info.fences[0].status) == (status, status)
    assert info.fences[0].timestamp_ns == fence.timestamp > 0


def test_long_names_are_cut_in_info() -> None:
    with Timeline("t" * 40, driver="d" * 40) as timeline, SyncFile(timeline.fence(), "x") as sf:
        (one,) = sf.info().fences
        assert (one.obj_name, one.driver_name) == ("t" * 31, "d" * 31)


def test_the_whole_is_pending_until_the_first_fence_that_failed(merged: tuple[SyncFile, DmaFence, DmaFence]) -> None:
    both, a, b = merged
    states = []
    a.signal()
    states.append(both.info().status)
    b.signal(-errno.EIO)
    states.append(both.info().status)
    assert states == [FACTS["syncfile/m-1-info"].ret["status"], -errno.EIO]


def test_a_merge_with_a_failed_and_a_pending_fence_says_which_comes_first(merged: tuple[SyncFile, DmaFence, DmaFence]) -> None:
    both, a, b = merged
    a.signal(-errno.ENOENT)
    info = both.info()
    kernel = FACTS["swsync/err-merge-half"].ret
    assert (info.status, info.num_fences) == (kernel["status"], kernel["num_fences"])
    assert [one.status for one in info.fences] == [one["status"] for one in kernel["fences"]]
    b.signal()
    assert both.info().status == FACTS["swsync/err-merge-done"].ret["status"]


def test_info_with_no_room_gives_the_count_and_the_whole_alone(merged: tuple[SyncFile, DmaFence, DmaFence]) -> None:
    both, _, _ = merged
    info = both.info(0)
    assert (info.num_fences, info.fences, info.status, info.name) == (2, (), 0, "both")


def test_info_with_more_room_than_needed_gives_all(sf: SyncFile) -> None:
    assert sf.info(5) == sf.info()


def test_info_with_too_little_room_is_refused(merged: tuple[SyncFile, DmaFence, DmaFence]) -> None:
    assert FACTS["syncfile/n-too-small"].errno == errno.EINVAL
    with raises_errno(errno.EINVAL):
        merged[0].info(1)


def test_info_with_negative_room_is_refused(sf: SyncFile) -> None:
    with raises_errno(errno.EINVAL):
        sf.info(-1)


def test_info_goes_on_after_the_names_slot_was_used_again(tl: Timeline) -> None:
    fences = [tl.fence() for _ in range(3)]
    with SyncFile(fences[0]) as sf:
        fences[0].signal(-errno.EIO)
        before = sf.info()
        assert sf.info() == before


def test_statistics(merged: tuple[SyncFile, DmaFence, DmaFence]) -> None:
    both, a, _ = merged
    a.signal()
    assert both.statistics() == dmabuf.core.sync_file.SyncFileStatistics("both", 0, 2, 1, False, False)
    both.fileno()
    assert both.statistics().descriptor


@pytest.mark.parametrize(
    ("state", "end"), [("pending", None), ("signalled", 0), (str(-errno.EIO), -errno.EIO)], ids=["pending", "signalled", "failed"]
)
def test_its_repr_says_its_state(sf: SyncFile, fence: DmaFence, state: str, end: int | None) -> None:
    if end is not None:
        fence.signal(end)
    assert repr(sf) == f"<dmabuf.SyncFile {sf.name!r} {state}>"
    sf.close()
    assert "closed" in repr(sf)


def test_its_fence_is_the_one_that_it_was_made_of(sf: SyncFile, fence: DmaFence) -> None:
    assert sf.fence is fence


# ---- bad arguments ----

USES: dict[str, Callable[[SyncFile], object]] = {
    "fileno": lambda sf: sf.fileno(),
    "dup": lambda sf: sf.dup(),
    "name": lambda sf: sf.name,
    "fence": lambda sf: sf.fence,
    "status": lambda sf: sf.status,
    "is_signaled": lambda sf: sf.is_signaled(),
    "info": lambda sf: sf.info(),
    "statistics": lambda sf: sf.statistics(),
    "merge": lambda sf: sf.merge(sf),
    "set_deadline": lambda sf: sf.set_deadline(1),
    "wait": lambda sf: sf.wait(0),
    "await": lambda sf: next(sf.__await__()),
    "with": lambda sf: sf.__enter__(),
    "kernel_fileno": lambda sf: sf.kernel_fileno(),
}


@pytest.mark.parametrize("use", list(USES.values()), ids=list(USES))
def test_a_closed_one_is_ebadf(sf: SyncFile, use: Callable[[SyncFile], object]) -> None:
    sf.close()
    with raises_errno(errno.EBADF):
        use(sf)


@pytest.mark.parametrize("what", [None, 3, "fence", object()], ids=["None", "int", "str", "object"])
def test_it_is_made_of_a_fence_only(what: Any) -> None:
    with pytest.raises(TypeError, match="DmaFence"):
        SyncFile(what)


def test_a_name_with_a_nul_is_refused(fence: DmaFence) -> None:
    with raises_errno(errno.EINVAL):
        SyncFile(fence, "a\0b")


def test_a_merge_with_a_name_with_a_nul_is_refused(sf: SyncFile) -> None:
    with raises_errno(errno.EINVAL):
        sf.merge(sf, b"a\0b")


@pytest.mark.parametrize("fact", [FACTS[f"syncfile/merge-{what}"] for what in ("fd-1", "closed", "dmabuf")], ids=fact_id)
def test_merge_with_what_is_no_sync_file_answers_as_the_kernel(sf: SyncFile, buf: DmaBuf, fact: Fact) -> None:
    other = {"syncfile/merge-fd-1": -1, "syncfile/merge-closed": 99999, "syncfile/merge-dmabuf": buf.fileno()}[fact.id]
    with raises_errno(errno.ENOENT):
        sf.merge(other)


def test_sync_merge_invalid(sf: SyncFile) -> None:
    """IGT sw_sync: merging with -1, a device's descriptor, a plain file's."""
    with open("/dev/null") as device, open(__file__) as plain:
        for other in (-1, device.fileno(), plain.fileno()):
            with raises_errno(errno.ENOENT):
                sf.merge(other)


@pytest.mark.parametrize("other", [None, "x", 1.5, True], ids=["None", "str", "float", "bool"])
def test_merge_with_another_thing_is_enoent(sf: SyncFile, other: Any) -> None:
    with raises_errno(errno.ENOENT):
        sf.merge(other)


def test_merge_with_a_closed_one_is_enoent(sf: SyncFile, tl: Timeline) -> None:
    other = SyncFile(tl.fence())
    other.close()
    with raises_errno(errno.ENOENT):
        sf.merge(other)


def test_merge_across_domains_is_refused(sf: SyncFile) -> None:
    elsewhere = Timeline("elsewhere", domain=dmabuf.Domain.private())
    with SyncFile(elsewhere.fence()) as other, raises_errno(errno.EXDEV):
        sf.merge(other)


def test_a_negative_deadline_is_refused(sf: SyncFile) -> None:
    with raises_errno(errno.EINVAL):
        sf.set_deadline(-1)


@pytest.mark.parametrize("timeout", [-1, -0.001, math.nan, -math.inf])
def test_a_negative_timeout_is_refused(sf: SyncFile, timeout: float) -> None:
    with raises_errno(errno.EINVAL):
        sf.wait(timeout)


@pytest.mark.parametrize("fd", [-1, 99999, 1 << 40], ids=["-1", "closed", "huge"])
def test_from_fd_of_no_descriptor_is_ebadf(fd: int) -> None:
    with raises_errno(errno.EBADF):
        SyncFile.from_fd(fd)


def not_sync_files() -> Iterator[tuple[str, Callable[[], Any]]]:
    yield "a file", lambda: open(__file__)
    yield "a device", lambda: open("/dev/null")
    yield "a buffer", lambda: dmabuf.allocate(4096)
    yield "a socket", lambda: socket.socket(socket.AF_UNIX)
    yield "a listening socket of somebody's", _listener
    yield "an internet socket", lambda: socket.socket(socket.AF_INET)


def _listener() -> socket.socket:
    made = socket.socket(socket.AF_UNIX)
    made.bind(b"\0nothing of ours" + os.urandom(8))
    made.listen()
    return made


@pytest.mark.parametrize("make", [make for _, make in not_sync_files()], ids=[name for name, _ in not_sync_files()])
def test_from_fd_of_another_descriptor_is_einval_and_leaves_it_open(make: Callable[[], Any]) -> None:
    with make() as other:
        with raises_errno(errno.EINVAL):
            dmabuf.get_sync_file(other.fileno())
        os.fstat(other.fileno())


def test_a_sync_file_of_ours_is_not_for_the_kernel(sf: SyncFile) -> None:
    with raises_errno(errno.EINVAL) as caught:
        sf.kernel_fileno()
    assert "must not wait" in str(caught.value)
    assert not sf.kernel


@pytest.mark.parametrize("pickle", ["pickle", "copy"])
def test_it_is_not_pickled_to_bytes(sf: SyncFile, pickle: str) -> None:
    import copy
    import pickle as pickling

    with pytest.raises(TypeError, match="multiprocessing"):
        pickling.dumps(sf) if pickle == "pickle" else copy.copy(sf)


# ---- from a descriptor ----


def test_from_fd_names_the_descriptor_that_it_was_given() -> None:
    with open(os.devnull) as other, pytest.raises(OSError, match=rf"from_fd: fd {other.fileno()}: it is no sync file"):
        SyncFile.from_fd(other.fileno())


def test_import_of_a_fence_is_a_typeerror_that_says_how_to_make_a_sync_file(buf: DmaBuf, fence: Any) -> None:
    with pytest.raises(TypeError, match=r"dmabuf\.SyncFile\(fence\) makes one"):
        buf.import_sync_file(fence)


def test_from_fd_gives_the_same_fence(sf: SyncFile, fence: DmaFence) -> None:
    with SyncFile.from_fd(sf.fileno()) as again:
        assert (again.fence, again.name, again.info()) == (fence, sf.name, sf.info())
        assert again.fileno() != sf.fileno()
        fence.signal()
        assert again.status == 1


def test_from_fd_gives_every_fence_of_a_merge(merged: tuple[SyncFile, DmaFence, DmaFence]) -> None:
    both, a, b = merged
    with SyncFile.from_fd(both.fileno()) as again:
        assert [key(fence) for fence in dmabuf.unwrap(again.fence)] == sorted([key(a), key(b)])
        a.signal()
        b.signal()
        assert again.wait() == math.inf
        assert again.info() == both.info()


def test_the_results_are_known_from_the_bare_descriptor_long_after(tl: Timeline) -> None:
    fence = tl.fence()
    sf = SyncFile(fence)
    fd = sf.dup()
    fence.signal(-errno.EIO)
    told = sf.info()
    sf.close()
    tl.close()
    del fence, sf
    gc.collect()
    for _ in range(600):  # every slot that the fence may have had is used again
        Timeline("other").fence().signal()
    with SyncFile.from_fd(fd) as late:
        assert late.info() == told
        assert late.status == -errno.EIO
    os.close(fd)


def test_from_fd_of_a_sync_file_of_a_private_domain_is_refused() -> None:
    with Timeline("alone", domain=dmabuf.Domain.private()) as timeline, SyncFile(timeline.fence()) as sf:
        with raises_errno(errno.EXDEV):
            SyncFile.from_fd(sf.fileno())
        sf.fence.signal()


def test_in_a_private_domain_it_is_rung() -> None:
    domain = dmabuf.Domain.private()
    a, b = Timeline("a", domain=domain).fence(), Timeline("b", domain=domain).fence()
    with SyncFile(DmaFenceArray([a, b])) as sf:
        assert polled(sf) == 0
        a.signal()
        assert polled(sf) == 0
        b.signal()
        assert polled(sf) == select.POLLIN
    assert not names_in_domain()


def test_facts_that_make_no_sense_are_said_to_be_so(sf: SyncFile) -> None:
    fd = sf.fileno()
    path = dmabuf.Domain.default().path
    assert path is not None
    (name,) = [name for name in names_in_domain() if not name.endswith(".sock")]
    (path / name).write_bytes(b"nonsense")
    with raises_errno(errno.EUCLEAN):
        SyncFile.from_fd(fd)


@pytest.mark.parametrize("bytes_", [b"", b"nonsense", b"dmabufS\1" + b"\xff" * 36, b"dmabufS\1" + bytes(36)])
def test_facts_that_make_no_sense_ring(sf: SyncFile, fence: DmaFence, bytes_: bytes) -> None:
    fd = sf.dup()
    path = dmabuf.Domain.default().path
    assert path is not None
    (name,) = [name for name in names_in_domain() if not name.endswith(".sock")]
    (path / name).write_bytes(bytes_)
    sf.close()
    fence.signal()
    assert polled(fd) == select.POLLIN
    os.close(fd)
    dmabuf.Domain.default().sweep()


# ---- merging ----


def test_merge_takes_only_what_is_pending(sf: SyncFile, fence: DmaFence, other_tl: Timeline) -> None:
    done = other_tl.fence()
    done.signal(-errno.EIO)
    with SyncFile(done) as ended, sf.merge(ended, "rm") as half:
        info, kernel = half.info(), FACTS["swsync/err-remerge"].ret
        assert (info.status, info.num_fences) == (kernel["status"], kernel["num_fences"])
        assert half.fence is fence


def test_merge_of_what_has_ended_has_ended(tl: Timeline, other_tl: Timeline) -> None:
    a, b = tl.fence(), other_tl.fence()
    a.signal()
    b.signal()
    with SyncFile(a) as one, SyncFile(b) as two, one.merge(two, "sig") as both:
        info, kernel = both.info(), FACTS["syncfile/m-sig-info"].ret
        assert (info.name, info.status, info.num_fences) == (kernel["name"], kernel["status"], kernel["num_fences"])
        assert (info.fences[0].obj_name, info.fences[0].driver_name) == ("stub", "stub")
        assert info.fences[0].timestamp_ns == b.timestamp
        assert polled(both) == select.POLLIN


def test_merge_of_merges_holds_each_fence_once(tl: Timeline, other_tl: Timeline) -> None:
    third = Timeline("third")
    a, b, c = tl.fence(), other_tl.fence(), third.fence()
    with SyncFile(a) as fa, SyncFile(b) as fb, SyncFile(c) as fc, fa.merge(fb) as ab, ab.merge(fc) as abc, abc.merge(fb, "dup") as dup:
        assert (abc.info().num_fences, dup.info().num_fences) == (FACTS["syncfile/m-nest"].ret, 3)


def test_merge_leaves_both_as_they_were(merged: tuple[SyncFile, DmaFence, DmaFence], fence: DmaFence) -> None:
    with SyncFile(fence) as one, one.merge(one.fileno()) as again:
        assert again.fence is fence
        again.close()
        assert (one.status, polled(one)) == (0, 0)


def test_a_merge_is_called_by_its_array(merged: tuple[SyncFile, DmaFence, DmaFence]) -> None:
    both, _, _ = merged
    with both.merge(both) as nameless:
        assert nameless.name == f"dma_fence_array-unbound{nameless.fence.context}-1"[:31]


# ---- deadlines ----


def test_the_earliest_deadline_reaches_every_fence(merged: tuple[SyncFile, DmaFence, DmaFence]) -> None:
    both, a, b = merged
    both.set_deadline(9000)
    both.set_deadline(5000)
    both.set_deadline(7000)
    assert (a.deadline, b.deadline) == (5000, 5000)


def test_a_deadline_for_what_has_ended_is_no_error(sf: SyncFile, fence: DmaFence) -> None:
    fence.signal()
    sf.set_deadline(0)
    assert fence.deadline is None


# ---- waiting ----


def test_wait_returns_what_is_left(sf: SyncFile, fence: DmaFence) -> None:
    assert sf.wait(0) == 0.0
    fence.signal()
    assert sf.wait() == math.inf
    assert 0 < sf.wait(5) <= 5


def test_wait_for_a_merge_ends_with_its_last_fence(merged: tuple[SyncFile, DmaFence, DmaFence]) -> None:
    both, a, b = merged
    with Background(both.wait) as job:
        a.signal()
        job.until_blocked()
        assert not job.done
        b.signal(-errno.EIO)
        assert job.result() == math.inf
    assert both.status == -errno.EIO


def test_wait_is_interrupted_by_a_signal_if_asked(sf: SyncFile) -> None:
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        here, pid = threading.get_ident(), os.getpid()
        from tests.support.waiting import until_asleep

        def interrupt() -> None:
            until_asleep(pid)
            signal.pthread_kill(here, signal.SIGUSR1)

        with Background(interrupt), raises_errno(errno.EINTR):
            sf.wait(interruptible=True)
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_await_gives_the_status(sf: SyncFile, fence: DmaFence) -> None:
    async def main() -> int:
        asyncio.get_running_loop().call_soon(fence.signal, -errno.EIO)
        return await sf

    assert asyncio.run(main()) == -errno.EIO


def test_a_cancelled_await_leaves_nothing_registered(sf: SyncFile, fence: DmaFence) -> None:
    async def main() -> None:
        task = asyncio.create_task(asyncio.wait_for(_awaited(sf), None))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert fence.statistics().callbacks == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert fence.statistics().callbacks == 0

    asyncio.run(main())


async def _awaited(sf: SyncFile) -> int:
    return await sf


def test_closing_leaves_nothing_registered() -> None:
    with Timeline("alone", domain=dmabuf.Domain.private()) as timeline:
        fence = timeline.fence()
        sf = SyncFile(fence)
        sf.fileno()
        assert fence.statistics().callbacks == 1
        sf.close()
        assert fence.statistics().callbacks == 0


class Watched(dmabuf.FenceOps):
    """A fence that does nothing until it is enabled."""

    def __init__(self) -> None:
        self.enabled = 0

    def enable_signaling(self, fence: DmaFence) -> bool:
        self.enabled += 1
        return True


def test_the_first_look_at_the_descriptor_enables_a_custom_fence_once(tl: Timeline) -> None:
    ops = Watched()
    fence = tl.fence(ops=ops)
    with SyncFile(fence) as sf:
        assert ops.enabled == 0
        assert polled(sf) == polled(sf) == 0
        assert ops.enabled == 1
        fence.signal()
        assert polled(sf) == select.POLLIN


def test_trio_waits_for_it(sf: SyncFile, fence: DmaFence) -> None:
    trio = pytest.importorskip("trio")
    pytest.importorskip("trio.testing")
    seen: list[int] = []

    async def wait() -> None:
        seen.append(await sf)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            fence.signal(-errno.EIO)
        with trio.move_on_after(0.01) as scope:
            await trio.lowlevel.wait_readable(sf)
        assert not scope.cancelled_caught

    trio.run(main)
    assert seen == [-errno.EIO]


@pytest.mark.parametrize("make", [dmabuf.SwSync, dmabuf.TimelineSemaphore], ids=["SwSync", "TimelineSemaphore"])
def test_without_a_free_descriptor_no_timeline_is_made(make: Callable[[], Any], few_descriptors: Callable[[], Callable[[], None]]) -> None:
    with make() as there:
        free = few_descriptors()
        for use in (make, there.dup, lambda: type(there).from_fd(there.fileno())):
            with raises_errno(errno.EMFILE):
                use()
        free()


# ---- buffers ----


def test_an_idle_buffer_exports_what_has_ended(buf: DmaBuf) -> None:
    with buf.export_sync_file() as sf:
        info, kernel = sf.info(), FACTS["syncfile/empty-info"].ret
        assert (info.status, info.num_fences) == (kernel["status"], kernel["num_fences"])
        assert (info.fences[0].obj_name, info.fences[0].driver_name) == ("stub", "stub")
        assert info.fences[0].timestamp_ns > 0
        assert sf.name.startswith("stub-stub")
        assert polled(sf) == select.POLLIN


@pytest.mark.parametrize("fact", facts("syncfile/export-0x"), ids=fact_id)
def test_export_flags_answer_as_the_kernel(buf: DmaBuf, fact: Fact) -> None:
    flags = int(fact.id.rpartition("-")[2], 16)
    if fact.errno:
        with raises_errno(fact.errno):
            buf.export_sync_file(flags=flags)
    else:
        buf.export_sync_file(flags=flags).close()


@pytest.mark.parametrize("fact", facts("syncfile/import-0x"), ids=fact_id)
def test_import_flags_answer_as_the_kernel(buf: DmaBuf, fact: Fact) -> None:
    flags = int(fact.id.rpartition("-")[2], 16)
    with buf.export_sync_file() as sf:
        if fact.errno:
            with raises_errno(fact.errno):
                buf.import_sync_file(sf, flags=flags)
        else:
            buf.import_sync_file(sf, flags=flags)


@pytest.mark.parametrize("fact", [FACTS[f"syncfile/import-{what}"] for what in ("fd-1", "closed", "dmabuf", "memfd", "pipe")], ids=fact_id)
def test_import_of_what_is_no_sync_file_answers_as_the_kernel(buf: DmaBuf, fact: Fact) -> None:
    reading, writing = os.pipe()
    memfd = os.memfd_create("x")
    fd = {"fd-1": -1, "closed": 99999, "dmabuf": buf.fileno(), "memfd": memfd, "pipe": reading}[fact.id.partition("import-")[2]]
    assert fact.errno is not None
    try:
        with raises_errno(fact.errno):
            buf.import_sync_file(fd)
    finally:
        for number in (reading, writing, memfd):
            os.close(number)


def test_import_of_a_closed_sync_file_is_einval(buf: DmaBuf, sf: SyncFile) -> None:
    sf.close()
    with raises_errno(errno.EINVAL):
        buf.import_sync_file(sf)


def test_import_of_another_domain_is_exdev(buf: DmaBuf) -> None:
    elsewhere = Timeline("elsewhere", domain=dmabuf.Domain.private())
    with SyncFile(elsewhere.fence()) as sf, raises_errno(errno.EXDEV):
        buf.import_sync_file(sf)


@pytest.mark.parametrize("operation", ["export_sync_file", "import_sync_file"])
def test_a_closed_buffer_is_ebadf(sf: SyncFile, operation: str) -> None:
    buf = dmabuf.allocate(4096)
    buf.close()
    with raises_errno(errno.EBADF):
        getattr(buf, operation)(*([sf] if operation == "import_sync_file" else []))


def test_import_with_the_lock_held_is_diagnosed(buf: DmaBuf, sf: SyncFile) -> None:
    with buf.resv.locked(), pytest.warns(dmabuf.ContractWarning), raises_errno(errno.EDEADLK):
        buf.import_sync_file(sf)


@pytest.mark.parametrize("fact", facts("syncfile/imp-READ-exp") + facts("syncfile/imp-WRITE-exp"), ids=fact_id)
def test_an_export_holds_what_was_imported_as_the_kernels(buf: DmaBuf, sf: SyncFile, fact: Fact) -> None:
    buf.import_sync_file(sf, write="WRITE" in fact.id)
    with buf.export_sync_file(flags=int(fact.id[-1])) as out:
        assert ("pending", "signalled")[out.status] == fact.ret


def test_exports_hold_writes_or_all(buf: DmaBuf) -> None:
    timelines = [Timeline(f"t{i}") for i in range(3)]
    fences = [timeline.fence() for timeline in timelines]
    for fence, usage in zip(fences, (Usage.READ, Usage.READ, Usage.WRITE), strict=True):
        attach(buf.resv, fence, usage)
    counts = []
    for flags in (1, 2, 3):
        with buf.export_sync_file(flags=flags) as sf:
            counts.append(sf.info().num_fences)
    assert counts == FACTS["syncfile/exp-counts"].ret
    for timeline in timelines:
        timeline.close()


@pytest.mark.parametrize("usage", [Usage.KERNEL, Usage.BOOKKEEP])
def test_kernel_fences_are_exported_and_bookkeeping_is_not(buf: DmaBuf, fence: DmaFence, usage: Usage) -> None:
    attach(buf.resv, fence, usage)
    for write in (False, True):
        with buf.export_sync_file(write) as sf:
            assert sf.status == (0 if usage == Usage.KERNEL else 1)


def test_an_export_is_a_snapshot(buf: DmaBuf, fence: DmaFence, other_tl: Timeline) -> None:
    attach(buf.resv, fence, Usage.WRITE)
    with buf.export_sync_file() as before:
        attach(buf.resv, later := other_tl.fence(), Usage.WRITE)
        with buf.export_sync_file() as after:
            assert [before.info().num_fences, after.info().num_fences] == [1, 2]
            fence.signal()
            assert (before.status, after.status) == (1, 0)
        later.signal()


def test_ended_fences_are_left_out_failed_ones_too(buf: DmaBuf, fence: DmaFence, other_tl: Timeline) -> None:
    attach(buf.resv, fence, Usage.WRITE)
    attach(buf.resv, other := other_tl.fence(), Usage.WRITE)
    fence.signal(-errno.EIO)
    with buf.export_sync_file() as sf:
        assert (sf.info().num_fences, sf.fence) == (FACTS["syncfile/exp-pruned"].ret, other)
    other.signal(-errno.EIO)
    with buf.export_sync_file() as sf:
        assert sf.info().status == FACTS["swsync/err-export"].ret["status"]


def test_an_import_takes_a_merge_apart(buf: DmaBuf, merged: tuple[SyncFile, DmaFence, DmaFence]) -> None:
    both, a, b = merged
    buf.import_sync_file(both.fileno(), write=True)
    assert sorted(keys(buf.resv)) == sorted([key(a), key(b)])
    with buf.export_sync_file() as sf:
        assert sf.info().num_fences == FACTS["syncfile/imp-merged"].ret


def test_the_same_fence_imported_for_reading_then_writing_is_one(buf: DmaBuf, sf: SyncFile) -> None:
    buf.import_sync_file(sf)
    buf.import_sync_file(sf, write=True)
    counts = []
    for flags in (1, 3):
        with buf.export_sync_file(flags=flags) as out:
            counts.append(out.info().num_fences)
    assert counts == FACTS["syncfile/imp-same-twice"].ret
    assert buf.poll(select.POLLIN | select.POLLOUT) == 0


def test_importing_it_for_reading_does_not_weaken_a_write(buf: DmaBuf, sf: SyncFile) -> None:
    buf.import_sync_file(sf, write=True)
    buf.import_sync_file(sf)
    assert buf.poll(select.POLLIN | select.POLLOUT) == int(FACTS["syncfile/imp-same-twice-b"].ret)


def test_what_was_imported_outlives_the_sync_file(buf: DmaBuf, fence: DmaFence) -> None:
    sf = SyncFile(fence)
    buf.import_sync_file(sf, write=True)
    sf.close()
    assert buf.poll(select.POLLIN) == 0
    fence.signal()
    assert buf.poll(select.POLLIN | select.POLLOUT) == select.POLLIN | select.POLLOUT


def test_a_hundred_timelines_are_imported(buf: DmaBuf) -> None:
    fences = [Timeline(f"t{i}").fence() for i in range(100)]
    for fence in fences:
        with SyncFile(fence) as sf:
            buf.import_sync_file(sf)
    with buf.export_sync_file(write=True) as out:
        assert out.info().num_fences == FACTS["syncfile/imp-100"].ret
    for fence in fences:
        fence.signal()
