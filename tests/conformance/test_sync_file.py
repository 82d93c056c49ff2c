"""A sync file: one fence, or several, as a descriptor; expected values are the kernel's (semantics 5.5, 5.10)."""

import errno
import gc
import math
import os
import select
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import dmabuf
from dmabuf import DmaBuf, DmaFence, DmaFenceArray, SyncFile, Timeline
from tests.support.errnos import raises_errno
from tests.support.facts import FACTS, Fact, fact_id
from tests.support.fences import key
from tests.support.sync_files import FIRST, open_in_domain, polled, scribble

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


@pytest.mark.parametrize(("error", "status"), [(0, 1), (-errno.EIO, -errno.EIO)], ids=["signaled", "failed"])
def test_info_of_an_ended_fence(sf: SyncFile, fence: DmaFence, error: int, status: int) -> None:
    fence.signal(error)
    info = sf.info()
    assert (info.status, info.fences[0].status) == (status, status)
    assert info.fences[0].timestamp_ns == fence.timestamp > 0


def test_long_names_are_cut_in_info() -> None:
    with Timeline("t" * 40, driver="d" * 40) as timeline, SyncFile(timeline.fence(), "x") as sf:
        (one,) = sf.info().fences
        assert (one.obj_name, one.driver_name) == ("t" * 31, "d" * 31)


def test_info_status_is_that_of_the_first_failed_or_pending_fence(merged: tuple[SyncFile, DmaFence, DmaFence]) -> None:
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


def test_info_without_room_has_count_and_status_of_the_whole(merged: tuple[SyncFile, DmaFence, DmaFence]) -> None:
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
    assert both.statistics() == dmabuf.core.sync.sync_file.SyncFileStatistics("both", 0, 2, 1, False, False)
    both.fileno()
    assert both.statistics().descriptor


@pytest.mark.parametrize(
    ("state", "end"), [("pending", None), ("signaled", 0), (str(-errno.EIO), -errno.EIO)], ids=["pending", "signaled", "failed"]
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


def test_kernel_fileno_of_own_sync_file_is_einval(sf: SyncFile) -> None:
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
    with open(os.devnull) as other, pytest.raises(OSError, match=rf"from_fd: fd {other.fileno()}: not a sync file"):
        SyncFile.from_fd(other.fileno())


def test_import_of_fence_is_typeerror_that_names_the_sync_file(buf: DmaBuf, fence: Any) -> None:
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


def test_descriptor_of_private_domain_becomes_readable() -> None:
    domain = dmabuf.Domain.private()
    a, b = Timeline("a", domain=domain).fence(), Timeline("b", domain=domain).fence()
    with SyncFile(DmaFenceArray([a, b])) as sf:
        assert polled(sf) == 0
        a.signal()
        assert polled(sf) == 0
        b.signal()
        assert polled(sf) == select.POLLIN
    assert open_in_domain(domain) == 0


NONSENSE = [  # whether in the slot of the fence, byte, value
    pytest.param(False, FIRST, 0, id="no first fence"),
    pytest.param(False, FIRST, 0xFFFFFFFF, id="a first fence outside"),
    pytest.param(False, 4, 7, id="more fences than there are"),
    pytest.param(True, 8, 0, id="a fence of none"),
    pytest.param(True, 16, 3, id="a fence at another place"),
]


@pytest.mark.parametrize(("of_fence", "at", "value"), NONSENSE)
def test_slots_that_make_no_sense_are_said_to_be_so(sf: SyncFile, of_fence: bool, at: int, value: int) -> None:
    fd = sf.fileno()
    scribble(fd, of_fence, at, value)
    with raises_errno(errno.EUCLEAN):
        SyncFile.from_fd(fd)


@pytest.mark.parametrize(("of_fence", "at", "value"), NONSENSE)
def test_descriptor_of_nonsense_becomes_readable(sf: SyncFile, fence: DmaFence, of_fence: bool, at: int, value: int) -> None:
    fd = sf.dup()
    scribble(fd, of_fence, at, value)
    sf.close()
    fence.signal()
    assert polled(fd) == select.POLLIN
    os.close(fd)


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
