"""Software timelines: what they count, and what ends when; expected values are the kernel's (semantics 5.11)."""

import errno
import fcntl
import gc
import os
import select
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import dmabuf
from dmabuf import DmaBuf, SwSync, SyncFile, _native
from dmabuf.core.sync import sw_sync
from dmabuf.core.sync.sw_pending import PendingFences
from dmabuf.domain import shared_file
from dmabuf.domain.place import ofd_lock, reopen
from dmabuf.domain.shared_file import SharedFile
from tests.support.errnos import raises_errno
from tests.support.facts import FACTS
from tests.support.interrupts import Interrupt
from tests.support.waiting import Background

UINT_MAX = 0xFFFFFFFF
INT_MAX = 0x7FFFFFFF


@pytest.fixture
def sw() -> Iterator[SwSync]:
    with SwSync("sw") as made:
        yield made


def statuses(*files: SyncFile) -> list[int]:
    return [sf.status for sf in files]


def test_a_new_timeline_is_at_zero_and_named_after_the_process() -> None:
    with SwSync() as made:
        assert made.value == 0
        with open("/proc/self/comm") as f:
            assert made.name == f.read().strip()[:15]


def test_fences_end_when_the_count_reaches_them(sw: SwSync) -> None:
    files = [sw.create_fence(value) for value in (1, 2, 5)]
    assert statuses(*files) == FACTS["swsync/st-0"].ret
    sw.inc(1)
    assert statuses(*files) == FACTS["swsync/st-1"].ret
    sw.inc(4)
    assert statuses(*files) == FACTS["swsync/st-5"].ret
    assert statuses(sw.create_fence(3)) == FACTS["swsync/late"].ret
    assert sw.value == 5


def test_a_fence_at_the_count_is_born_ended(sw: SwSync) -> None:
    sf = sw.create_fence(0)
    assert sf.status == FACTS["swsync/fence-0"].ret
    assert sf.info().fences[0].timestamp_ns > 0


def test_a_later_fence_made_first_does_not_hide_an_earlier_one(sw: SwSync) -> None:
    later, earlier = sw.create_fence(3), sw.create_fence(1)
    sw.inc(2)
    assert statuses(earlier, later) == FACTS["swsync/unordered"].ret


def test_inc_of_zero_ends_nothing(sw: SwSync) -> None:
    sf = sw.create_fence(1)
    sw.inc(0)
    assert (sf.status, sw.value) == (0, 0)


def test_the_names_of_a_fence(sw: SwSync) -> None:
    with sw.create_fence(7) as sf:
        assert sf.name == f"sw_sync-sw{sw.context}-7"
        (one,) = sf.info().fences
        assert (one.driver_name, one.obj_name, one.status) == ("sw_sync", "sw", 0)


def test_the_same_pending_value_is_one_fence(sw: SwSync) -> None:
    a, b = sw.create_fence(5), sw.create_fence(5)
    assert a.fence is b.fence
    with a.merge(b) as both:
        assert both.info().num_fences == FACTS["swsync/same-value"].ret


def test_of_one_timeline_a_merge_keeps_the_later_fence(sw: SwSync) -> None:
    with sw.create_fence(6) as a, sw.create_fence(9) as b, a.merge(b, "st") as both:
        kernel = FACTS["swsync/merge-same-tl"].ret
        assert (both.info().num_fences, both.info().name) == (kernel["num_fences"], kernel["name"])
        sw.inc(6)
        assert statuses(a, b, both) == [1, 0, 0]


@pytest.mark.parametrize(
    ("value", "fact"), [(INT_MAX, "swsync/wrap-far"), (INT_MAX + 1, "swsync/wrap-far+1"), (UINT_MAX, "swsync/wrap-ffff")]
)
def test_values_are_compared_as_signed_32_bit_numbers(sw: SwSync, value: int, fact: str) -> None:
    assert statuses(sw.create_fence(value)) == FACTS[fact].ret


def test_the_count_wraps(sw: SwSync) -> None:
    near, far = sw.create_fence(10), sw.create_fence(0x7FFFFFF0)
    sw.inc(INT_MAX)
    assert statuses(near, far) == FACTS["swsync/inc-big"].ret
    beyond = sw.create_fence(0x80000005)
    before, none, after = FACTS["swsync/wrap-next"].ret
    assert statuses(beyond) == before
    assert none == 0
    sw.inc(6)
    assert statuses(beyond) == after
    sw.inc(INT_MAX)
    sw.inc(0)
    last = sw.create_fence(2)
    assert (sw.value, last.status) == (4, 1)


@pytest.mark.parametrize("n", [0x80000000, UINT_MAX])
def test_a_great_step_passes_over_no_fence(sw: SwSync, n: int) -> None:
    files = [sw.create_fence(value) for value in (1, 10, 0x7FFFFFFF)]
    sw.inc(n)
    assert statuses(*files) == [1, 1, 1]
    assert sw.value == n


def test_fences_end_in_the_order_of_their_values(sw: SwSync) -> None:
    seen: list[int] = []
    files = [sw.create_fence(value) for value in (5, 1, 3)]
    for sf in files:
        sf.fence.add_callback(lambda fence: seen.append(fence.seqno))
    with Background(files[0].wait) as job:
        sw.inc(5)
        job.result()
    assert seen == [1, 3, 5]


def test_timeline_closed(sw: SwSync) -> None:
    """IGT sw_sync: the wait returns, and the status says so."""
    sf = sw.create_fence(1)
    sf.fileno()
    with Background(sf.wait) as job:
        job.until_blocked()
        sw.close()
        assert job.result() > 0
    assert sf.info().status == FACTS["swsync/close-tl"].ret["status"] == -errno.ENOENT
    assert select.select([sf], [], [], 0)[0] == [sf]
    sf.close()


def test_what_has_ended_outlives_the_timeline(sw: SwSync) -> None:
    sf = sw.create_fence(1)
    sw.inc()
    sw.close()
    assert statuses(sf) == FACTS["swsync/fence-outlives"].ret


def test_another_handle_in_the_middle_of_a_call_is_edeadlk(sw: SwSync, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a signal handler finds it."""
    found: list[str] = []
    with SwSync.from_fd(sw.fileno()) as other, monkeypatch.context() as patched:
        settle = PendingFences.settle

        def interrupted(self: PendingFences) -> None:
            patched.undo()
            with raises_errno(errno.EDEADLK):
                other.inc()
            found.append("refused")
            settle(self)

        patched.setattr(PendingFences, "settle", interrupted)
        sw.inc()
        assert (found, other.value) == (["refused"], 1)


@pytest.mark.parametrize("end", ["inc", "close"])
def test_callbacks_run_when_the_lock_is_free(sw: SwSync, end: str) -> None:
    """Else another process waits for them, and a thread that a callback waits for never gets the lock."""
    found: list[object] = []
    files = [sw.create_fence(value) for value in (1, 2)]
    file = reopen(sw.fileno())

    def ended(fence: dmabuf.DmaFence) -> None:
        free = ofd_lock(file, fcntl.F_WRLCK, 0)
        found.append((fence.status, free, *statuses(*files)))
        ofd_lock(file, fcntl.F_UNLCK, 0)
        if end == "inc" and free:
            with Background(lambda: sw.value) as job:
                found.append(job.result())

    files[0].fence.add_callback(ended)
    sw.inc(2) if end == "inc" else sw.close()
    os.close(file)
    assert found == ([(1, True, 1, 1), 2] if end == "inc" else [(-errno.ENOENT, True, -errno.ENOENT, -errno.ENOENT)])


def test_a_signal_handler_that_raises_at_the_lock_leaves_it_free(sw: SwSync, monkeypatch: pytest.MonkeyPatch) -> None:
    def got_it(*args: Any) -> bool:
        patched.undo()
        shared_file.set_lock(*args)
        raise Interrupt

    with monkeypatch.context() as patched:
        patched.setattr(shared_file, "set_lock", got_it)
        with pytest.raises(Interrupt):
            sw.inc()
    other = reopen(sw.fileno())
    assert ofd_lock(other, fcntl.F_WRLCK, 0)
    os.close(other)
    assert sw.value == 0


def test_the_timeline_goes_on_without_its_sync_files(sw: SwSync) -> None:
    for _ in range(300):
        sw.create_fence(1).close()
    gc.collect()
    assert sw.statistics().pending == 0
    sw.inc()


def test_a_bare_descriptor_keeps_a_fence_alive(sw: SwSync) -> None:
    sf = sw.create_fence(1)
    fd = sf.dup()
    sf.close()
    del sf
    gc.collect()
    assert sw.statistics().pending == 1
    sw.inc()
    assert select.select([fd], [], [], 0)[0] == [fd]
    os.close(fd)


def test_a_reservation_keeps_a_fence_alive(sw: SwSync, buf: DmaBuf) -> None:
    sf = sw.create_fence(1)
    buf.import_sync_file(sf, write=True)
    sf.close()
    del sf
    gc.collect()
    states: list[Any] = [str(buf.poll(select.POLLIN | select.POLLOUT)), 0]
    sw.inc()
    assert buf.poll(select.POLLIN | select.POLLOUT) == select.POLLIN | select.POLLOUT
    assert [*states, "POLLIN|POLLOUT"] == FACTS["swsync/import-survives"].ret


def test_thousands_of_fences_on_one_timeline(sw: SwSync) -> None:
    files = [sw.create_fence(value) for value in range(1, 1001)]
    sw.inc(500)
    assert sum(statuses(*files)) == 500
    sw.inc(500)
    assert sum(statuses(*files)) == 1000


# ---- deadlines ----


def test_there_is_no_deadline_until_one_is_set(sw: SwSync) -> None:
    assert FACTS["swsync/deadline-none"].errno == errno.ENOENT
    with sw.create_fence(1) as sf, raises_errno(errno.ENOENT):
        sw.get_deadline(sf)


def test_the_earliest_deadline_is_kept(sw: SwSync) -> None:
    with sw.create_fence(1) as sf:
        seen = []
        for deadlines in ((5000, 9000), (3000,)):
            for ns in deadlines:
                sf.set_deadline(ns)
            seen.append(sw.get_deadline(sf))
        assert seen == FACTS["swsync/deadline-min"].ret


def test_a_deadline_on_a_merge_reaches_its_fences(sw: SwSync) -> None:
    with SwSync() as other, sw.create_fence(1) as a, other.create_fence(1) as b, a.merge(b) as both:
        both.set_deadline(7777)
        assert sw.get_deadline(a) == other.get_deadline(b) == FACTS["swsync/deadline-deep"].ret


def foreign() -> Iterator[tuple[str, Callable[[SwSync], Any]]]:
    yield "-1", lambda _: -1
    yield "None", lambda _: None
    yield "another fence's", lambda _: SyncFile(dmabuf.stub_fence())
    yield "a closed one", closed
    yield "a merge", lambda sw: sw.create_fence(1).merge(SyncFile(dmabuf.Timeline("other").fence()))


def closed(sw: SwSync) -> SyncFile:
    sf = sw.create_fence(1)
    sf.close()
    return sf


@pytest.mark.parametrize("make", [make for _, make in foreign()], ids=[name for name, _ in foreign()])
def test_the_deadline_of_another_thing_is_einval(sw: SwSync, make: Callable[[SwSync], Any]) -> None:
    assert FACTS["swsync/deadline-fd"].errno == errno.EINVAL
    other = make(sw)
    with raises_errno(errno.EINVAL):
        sw.get_deadline(other)


# ---- bad arguments ----


@pytest.mark.parametrize("value", [-1, UINT_MAX + 1])
def test_a_value_has_32_bits(sw: SwSync, value: int) -> None:
    with raises_errno(errno.EINVAL):
        sw.create_fence(value)


@pytest.mark.parametrize("n", [-1, UINT_MAX + 1])
def test_a_step_has_32_bits(sw: SwSync, n: int) -> None:
    with raises_errno(errno.EINVAL):
        sw.inc(n)


@pytest.mark.parametrize("name", ["n" * 16, "a\0b", b"\0"], ids=["long", "NUL", "only NUL"])
def test_a_name_has_15_bytes(name: str) -> None:
    with raises_errno(errno.EINVAL):
        SwSync(name)


USES: dict[str, Callable[[SwSync], object]] = {
    "create_fence": lambda sw: sw.create_fence(1),
    "inc": lambda sw: sw.inc(),
    "value": lambda sw: sw.value,
    "fileno": lambda sw: sw.fileno(),
    "dup": lambda sw: sw.dup(),
    "statistics": lambda sw: sw.statistics(),
    "get_deadline": lambda sw: sw.get_deadline(SyncFile(dmabuf.stub_fence())),
    "with": lambda sw: sw.__enter__(),
}


@pytest.mark.parametrize("use", list(USES.values()), ids=list(USES))
def test_a_closed_timeline_is_ebadf(sw: SwSync, use: Callable[[SwSync], object]) -> None:
    sw.close()
    sw.close()
    with raises_errno(errno.EBADF):
        use(sw)


@pytest.mark.parametrize(("fd", "number"), [(-1, errno.EBADF), (99999, errno.EBADF)], ids=["-1", "closed"])
def test_from_fd_of_no_descriptor_is_ebadf(fd: int, number: int) -> None:
    with raises_errno(number):
        SwSync.from_fd(fd)


def test_from_fd_of_another_descriptor_is_einval(buf: DmaBuf) -> None:
    with raises_errno(errno.EINVAL):
        SwSync.from_fd(buf.fileno())


def test_from_fd_of_another_domains_is_exdev() -> None:
    elsewhere = SwSync(domain=dmabuf.Domain.private())
    fd = elsewhere.dup()
    domain = elsewhere.domain.id
    elsewhere.close()
    del elsewhere
    gc.collect()
    if dmabuf.domain.domain.known(domain) is None:
        with raises_errno(errno.EXDEV):
            SwSync.from_fd(fd)
    os.close(fd)


@pytest.mark.parametrize("content", [b"", b"nonsense" * 8], ids=["empty", "nonsense"])
def test_from_fd_of_spoilt_content_is_euclean(sw: SwSync, content: bytes) -> None:
    os.ftruncate(sw.fileno(), 0)
    os.pwrite(sw.fileno(), content, 0)
    with raises_errno(errno.EUCLEAN):
        SwSync.from_fd(sw.fileno())
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with here, there:
        dmabuf.send(here, sw)
        with raises_errno(errno.EUCLEAN):
            dmabuf.recv(there)
    os.pwrite(sw.fileno(), b"dmabufW\1" + bytes(56), 0)


def test_timeline_that_a_peer_cuts_off_is_euclean_and_leaves_nothing_open() -> None:
    sw = SwSync()
    before = len(os.listdir("/proc/self/fd"))
    sw.create_fence(1).close()
    os.ftruncate(sw.fileno(), 0)
    for use in (sw.inc, sw.statistics, sw.close):
        with raises_errno(errno.EUCLEAN):
            use()
    assert len(os.listdir("/proc/self/fd")) == before - 2  # the descriptor that travels, and this process's own


def test_it_is_not_pickled_to_bytes(sw: SwSync) -> None:
    import pickle

    with pytest.raises(TypeError, match="multiprocessing"):
        pickle.dumps(sw)


# ---- seeing ----


def test_sync_info_is_the_text_of_debugfs(sw: SwSync) -> None:
    with SwSync("other") as other:
        files = [sw.create_fence(value) for value in (9, 6, 7)]
        sw.inc(5)
        other.inc(0x80000000)
        assert dmabuf.sync_info() == (
            "objs:\n--------------\n"
            "sw: 5\n  fence active: 6 / 5\n  fence active: 7 / 5\n  fence active: 9 / 5\n\n"
            "other: -2147483648\n\n"
            "fences:\n--------------\n"
        )
        del files


def test_statistics(sw: SwSync) -> None:
    sf = sw.create_fence(2)
    sw.inc()
    assert sw.statistics() == dmabuf.core.sync.sw_sync.SwSyncStatistics("sw", sw.context, 1, 1)
    assert repr(sw) == "<dmabuf.SwSync 'sw' at 1>"
    sf.close()


def test_fence_without_error_is_not_taken_for_failed_one_of_same_value() -> None:
    domain = dmabuf.Domain.private()
    shm = domain.join()
    with SwSync(domain=domain) as timeline:
        timeline.create_fence(5).close()  # nobody has it: it ends with -ENOENT
        with timeline.create_fence(5) as second:
            (old,) = second.record().leaves
            timeline.inc(5)
        with dmabuf.Timeline("others", domain=domain) as others:
            while shm.fence_info(old.handle) is not None:  # until its slot is used again
                others.fence().signal()
        assert _native.Fence(shm, old.handle, False, old.context, old.seqno, old.timeline).status == 1


# ---- how much work it is ----


class Counted(SharedFile):
    """A file that counts the bytes that are read."""

    read_bytes = 0

    def read(self, offset: int, n: int) -> bytes:
        data = super().read(offset, n)
        Counted.read_bytes += len(data)
        return data


def bytes_read(monkeypatch: pytest.MonkeyPatch, work: Callable[[SwSync], None]) -> int:
    with monkeypatch.context() as patch:
        patch.setattr(sw_sync, "SharedFile", Counted)
        Counted.read_bytes = 0
        with SwSync() as sw:
            work(sw)
        return Counted.read_bytes


def one_by_one(n: int) -> Callable[[SwSync], None]:
    def work(sw: SwSync) -> None:
        files = [sw.create_fence(i + 1) for i in range(n)]
        for _ in range(n):
            sw.inc()
        assert all(sf.status == 1 for sf in files)

    return work


def all_at_the_close(n: int) -> Callable[[SwSync], None]:
    def work(sw: SwSync) -> None:
        files = [sw.create_fence(n - i) for i in range(n)]
        sw.close()
        assert all(sf.status == -errno.ENOENT for sf in files)

    return work


def a_few_at_a_time(n: int) -> Callable[[SwSync], None]:
    def work(sw: SwSync) -> None:
        for i in range(n):
            sf = sw.create_fence(i + 3)
            sw.inc()
            assert sf.status == 0

    return work


@pytest.mark.parametrize("work", [one_by_one, all_at_the_close, a_few_at_a_time])
def test_work_is_in_proportion_to_the_fences(work: Callable[[int], Callable[[SwSync], None]], monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = bytes_read(monkeypatch, work(250)), bytes_read(monkeypatch, work(1000))
    assert many < 4.6 * few


@pytest.mark.parametrize("start", [0, 0xFFFFFFF0])
def test_order_is_kept_where_the_count_wraps_and_others_change_it(start: int) -> None:
    """Two objects of one timeline, each of which reads what the other has done."""
    with SwSync() as sw, SwSync.from_fd(sw.fileno()) as other:
        sw.inc(start)
        values = [(start + i) & 0xFFFFFFFF for i in range(1, 200)]
        files = {value: (sw, other)[value % 2].create_fence(value) for value in values[::-1]}
        for i, value in enumerate(values):
            (sw, other)[i % 3 == 0].inc()
            assert [files[one].status for one in values[max(0, i - 1) : i + 2]] == [1] * min(i + 1, 2) + [0] * min(1, len(values) - 1 - i)
            assert files[value].status == 1
        assert sw.statistics().pending == other.statistics().pending == 0
