"""One test for each feature that the history of dma-buf.h does not show (semantics 8b), in the words of its acceptance test.

Rows are named as in test_features.py; those of what other modules test at length have their test there, or here in short.
"""

import ast
import errno
import itertools
import os
import select
from pathlib import Path

import pytest

import dmabuf
from dmabuf import (
    ContractWarning,
    Device,
    Direction,
    DmaBuf,
    DmaFence,
    DmaFenceArray,
    DmaFenceChain,
    DmaResv,
    SwSync,
    SyncFile,
    Timeline,
    Usage,
    WwAcquireContext,
)
from dmabuf.uapi import table
from tests.support.drivers import Static
from tests.support.errnos import raises_errno
from tests.support.fences import USAGES
from tests.support.fences import attach as add
from tests.support.holder import Holder
from tests.support.interrupts import interrupted
from tests.support.waiting import Background
from tools.features import PAGE, page, rows

TO, FROM = Direction.TO_DEVICE, Direction.FROM_DEVICE
IN, OUT = 1, 4  # select.POLLIN, POLLOUT
SYNC_READ, SYNC_WRITE, SYNC_RW, SYNC_END = 1, 2, 3, 4  # include/uapi/linux/dma-buf.h
SIZE = 16384
WRITE = pytest.mark.parametrize("write", [False, True], ids=["read", "write"])

NOT_YET = {
    "S20": "not yet: tracing",
}


def has_the_list(names: str, *files: str) -> None:
    """The suite has tests with the names of the kernel's own."""
    here = Path(__file__).parent
    found = {node.name for file in files for node in ast.parse((here / file).read_text(encoding="utf-8")).body
             if isinstance(node, ast.FunctionDef)}  # fmt: skip
    assert {f"test_{name}" for name in names.split()} <= found


def test_S01_a_buffer_has_an_inode_of_its_own_and_lseek_tells_its_size(buf: DmaBuf, other_buf: DmaBuf) -> None:
    assert buf.ino != other_buf.ino
    for one in (buf, other_buf):
        told = os.fstat(one.fileno())
        assert (told.st_ino, told.st_size) == (one.ino, SIZE)
    assert buf.lseek(0, os.SEEK_END) == SIZE
    for offset, whence in ((1, os.SEEK_END), (0, os.SEEK_CUR)):
        with raises_errno(errno.EINVAL):
            buf.lseek(offset, whence)


@pytest.mark.parametrize("flags", [0, 8])
def test_S02_sync_refuses_what_is_no_access(buf: DmaBuf, flags: int) -> None:
    with raises_errno(errno.EINVAL):
        buf.sync(flags)


@pytest.mark.parametrize("flags", [SYNC_READ, SYNC_WRITE, SYNC_RW])
def test_S02_sync_start_blocks_while_a_write_is_pending(buf: DmaBuf, tl: Timeline, flags: int) -> None:
    fence = tl.fence()
    add(buf.resv, fence, Usage.WRITE)
    with Background(lambda: buf.sync(flags)) as job:
        job.until_blocked()
        assert not job.done
        fence.signal()
        job.result()
    buf.sync(flags | SYNC_END)


def test_S03_rename_while_attached_works_by_both_ioctl_numbers(buf: DmaBuf, dev: Device) -> None:
    att = buf.attach(dev)
    buf.name = "cam"
    with att.mapped(TO):
        buf.name = "cam0"
    att.detach()
    assert buf.name == "cam0"
    assert (table.DMA_BUF_SET_NAME_A.number, table.DMA_BUF_SET_NAME_B.number) == (0x40046201, 0x40086201)


@WRITE
def test_S04_an_exported_sync_file_is_what_an_access_waits_for(buf: DmaBuf, tl: Timeline, other_tl: Timeline, write: bool) -> None:
    """IGT export-basic, export-before-signal, export-multiwait, export-wait-after-attach."""
    fences = tl.fence(), other_tl.fence(), tl.fence()
    with buf.export_sync_file(write) as idle:
        add(buf.resv, fences[0], Usage.READ)
        with buf.export_sync_file(write) as one:
            assert one.is_signaled() is not write
            add(buf.resv, fences[1], Usage.READ if write else Usage.WRITE)
            with buf.export_sync_file(write) as two:
                add(buf.resv, fences[2], Usage.READ)
                assert (idle.is_signaled(), two.is_signaled()) == (True, False)
                fences[0].signal()
                assert (one.is_signaled(), two.is_signaled()) == (True, False)
                fences[1].signal()
                assert (two.is_signaled(), two.wait(0) > 0) == (True, True)
    fences[2].signal()


@WRITE
@pytest.mark.parametrize("count", [1, 32])
def test_S04_an_imported_sync_file_is_waited_for(buf: DmaBuf, write: bool, count: int) -> None:
    """IGT import-basic, import-multiple-read-only, import-multiple-read-write."""
    timelines = [Timeline(str(i)) for i in range(count)]
    fences = [timeline.fence() for timeline in timelines]
    for fence in fences:
        with SyncFile(fence) as sf:
            buf.import_sync_file(sf, write)
    for fence in fences:
        assert buf.poll(IN | OUT) == (0 if write else IN)
        fence.signal()
    assert buf.poll(IN | OUT) == IN | OUT
    for timeline in timelines:
        timeline.close()


@USAGES
def test_S05_kernel_fences_block_everybody_and_bookkeep_fences_nobody(buf: DmaBuf, tl: Timeline, usage: Usage) -> None:
    fence = tl.fence()
    add(buf.resv, fence, usage)
    assert buf.poll(IN | OUT) == {Usage.KERNEL: 0, Usage.WRITE: 0, Usage.READ: IN, Usage.BOOKKEEP: IN | OUT}[usage]
    fence.signal()
    assert buf.poll(IN | OUT) == IN | OUT


def test_S06_fdinfo_has_the_kernels_keys_and_counts_references(buf: DmaBuf) -> None:
    def told() -> dict[str, str]:
        return dict(line.split(":\t") for line in buf.fdinfo().splitlines())

    assert list(told()) == ["pos", "flags", "mnt_id", "ino", "size", "count", "exp_name"]
    assert (told()["pos"], told()["ino"], told()["size"], told()["count"]) == ("0", str(buf.ino), str(SIZE), "1")
    assert int(told()["flags"], 8) == os.O_RDWR | os.O_CLOEXEC
    buf.name = "cam"
    second = buf.dup()
    with buf.mmap():
        assert (list(told())[-1], told()["name"], told()["count"]) == ("name", "cam", "3")
    os.close(second)
    assert told()["count"] == "1"


def test_S07_a_fence_lives_as_the_kernels_own_tests_say(tl: Timeline) -> None:
    has_the_list(
        "sanitycheck signaling add_callback late_add_callback rm_callback late_rm_callback status error wait wait_timeout "
        "race_signal_callback",
        "test_dma_fence.py",
    )
    fence, seen = tl.fence(), list[DmaFence]()
    assert (fence.is_signaled(), fence.status, fence.wait(0)) == (False, 0, 0.0)
    fence.add_callback(seen.append)
    removed = fence.add_callback(lambda _: pytest.fail("was removed"))
    assert fence.remove_callback(removed)
    fence.set_error(-errno.EIO)
    assert (fence.status, seen) == (0, [])
    fence.signal()
    assert (fence.is_signaled(), fence.status, seen) == (True, -errno.EIO, [fence])
    assert fence.wait(0) > 0
    assert not fence.remove_callback(removed)
    with raises_errno(errno.EINVAL):
        fence.signal()
    with raises_errno(errno.ENOENT):
        fence.add_callback(seen.append)


def test_S08_arrays_chains_unwrap_and_merge(tl: Timeline, other_tl: Timeline) -> None:
    has_the_list(
        "sanitycheck find_seqno find_signaled find_out_of_order find_gap find_race signal_forward signal_backward wait_forward "
        "wait_backward wait_random",
        "test_dma_fence_chain.py",
    )
    has_the_list(
        "sanitycheck unwrap_array unwrap_chain unwrap_chain_array unwrap_merge unwrap_merge_complex",
        "test_dma_fence_unwrap.py",
    )
    first, second = tl.fence(), other_tl.fence()
    array = DmaFenceArray([first, second])
    chain = DmaFenceChain(DmaFenceChain(None, first, 1), array, 2)
    assert list(dmabuf.unwrap(chain)) == [first, second, first]
    merged = dmabuf.merge(first, second)
    assert set(dmabuf.unwrap(merged)) == {first, second}
    for container in (array, chain, merged):
        container.enable_signaling()
    with Background(lambda: [container.wait() for container in (array, chain, merged)]) as job:
        job.until_blocked()
        first.signal()
        assert not any(container.is_signaled() for container in (array, chain, merged))
        second.signal()
        job.result()


@USAGES
def test_S09_a_reservation_answers_as_the_kernels_own_tests_say(resv: DmaResv, tl: Timeline, usage: Usage) -> None:
    has_the_list("sanitycheck signaling for_each for_each_unlocked get_fences", "test_dma_resv.py")
    fence = tl.fence()
    with resv.locked():
        resv.reserve(1)
        resv.add(fence, usage)
        assert list(resv.iterate(usage)) == [(fence, usage)]
    assert list(resv.iterate_unlocked(usage)) == [(fence, usage, True)]
    assert resv.fences(usage) == [fence]
    assert not resv.test_signaled(usage)
    fence.signal()
    assert resv.test_signaled(usage)
    assert resv.fences(usage) == []


def test_S10_the_lock_is_a_ww_mutex_in_wait_die_mode() -> None:
    has_the_list("aa_lock aa_trylock mutex abba cycle stress", "test_ww_mutex.py", "test_ww_mutex_stress.py")
    mine, theirs = DmaResv(), DmaResv()
    with Holder(theirs, with_context=True) as older, WwAcquireContext() as younger:
        mine.lock(younger)
        assert not mine.trylock(younger)
        with raises_errno(errno.EALREADY):
            mine.lock(younger)
        with raises_errno(errno.EDEADLK):
            theirs.lock(younger)
        mine.unlock()
        older.let_go()
        theirs.lock_slow(younger)
        mine.lock(younger)
        mine.unlock()
        theirs.unlock()


def test_S11_sync_files_are_polled_merged_and_described(tl: Timeline, other_tl: Timeline) -> None:
    """The selftests fence_one_timeline_wait, fence_one_timeline_merge, fence_merge_same_fence and fence_multi_timeline_wait."""

    def active(sf: SyncFile) -> int:
        return sum(not one.status for one in sf.info().fences)

    first, second, third, other = tl.fence(), tl.fence(), tl.fence(), other_tl.fence()
    with SyncFile(first) as one, SyncFile(second) as two, SyncFile(third) as three, SyncFile(other) as elsewhere:
        assert select.select([one], [], [], 0)[0] == []
        with one.merge(two) as pair, pair.merge(three, "all") as whole, one.merge(one) as same, whole.merge(elsewhere) as both:
            assert (active(whole), whole.info().name, active(same), active(both)) == (1, "all", 1, 2)
            first.signal()
            second.signal()
            assert select.select([one, same, pair, whole], [], [], 0)[0] == [one, same, pair]
            third.signal()
            assert (whole.status, active(both), both.status) == (1, 1, 0)
            other.set_error(-errno.EIO)
            other.signal()
            assert (active(both), both.status) == (0, -errno.EIO)  # that of the first member to fail
            assert select.select([both, elsewhere], [], [], 0)[0] == [both, elsewhere]
            assert elsewhere.info().status == -errno.EIO
            with raises_errno(errno.ENOENT):
                one.merge(-1)


def test_S12_a_software_timeline_counts_and_ends_its_fences() -> None:
    has_the_list(
        "alloc_timeline alloc_fence alloc_fence_negative fence_one_timeline_wait fence_one_timeline_merge fence_merge_same_fence "
        "fence_multi_timeline_wait stress_two_threads_shared_timeline consumer_stress_multi_producer_single_consumer "
        "merge_stress_random_merge sync_expired_merge",
        "test_sync_selftests.py",
    )
    with SwSync() as sw, sw.create_fence(5) as fence, sw.create_fence(5) as same, sw.create_fence(20) as late:
        assert same.fence == fence.fence
        sw.inc()
        assert fence.wait(0) == 0
        sw.inc(4)
        assert fence.wait(0) > 0
        sw.inc(10)
        assert (fence.status, late.status) == (1, 0)
        with sw.create_fence(15) as expired, expired.merge(fence) as merged:
            assert (expired.status, merged.status) == (1, 1)
        sw.close()
        assert (fence.status, late.status) == (1, -errno.ENOENT)


def test_S13_the_earliest_of_two_deadlines_is_told_and_none_is_enoent() -> None:
    with SwSync() as sw, sw.create_fence(1) as fence:
        with raises_errno(errno.ENOENT):
            sw.get_deadline(fence)
        for ns in (9_000_000_000, 7_000_000_000, 8_000_000_000):
            fence.set_deadline(ns)
        assert sw.get_deadline(fence) == fence.fence.deadline == 7_000_000_000
        sw.inc()


def test_S17_a_reservation_lock_in_a_signalling_section_is_told(tl: Timeline) -> None:
    resv, fence = DmaResv(), tl.fence()
    with dmabuf.signalling():
        with pytest.warns(ContractWarning, match="signalling"):
            resv.lock()
        fence.signal()
    resv.unlock()


@pytest.mark.parametrize(("direction", "usage"), list(itertools.product((FROM, TO), (Usage.WRITE, Usage.READ))))
def test_S18_begin_cpu_access_waits_for_writers_and_readers(buf: DmaBuf, tl: Timeline, direction: Direction, usage: Usage) -> None:
    fence = tl.fence()
    add(buf.resv, fence, usage)
    with Background(lambda: buf.begin_cpu_access(direction)) as job:
        if direction is FROM and usage is Usage.READ:
            job.result()
        else:
            job.until_blocked()
            assert not job.done
        fence.signal()
        job.result()
    buf.end_cpu_access(direction)


def test_S19_static_map_blocks_until_the_kernel_fence_is_signaled(static: Static, dev: Device, tl: Timeline) -> None:
    with dmabuf.export(static, SIZE) as buf:
        att, fence = buf.attach(dev), tl.fence()
        add(buf.resv, fence, Usage.KERNEL)
        with Background(lambda: att.map_unlocked(TO)) as job:
            job.until_blocked()
            assert not job.done
            fence.signal()
            att.unmap_unlocked(job.result(), TO)
        att.detach()


def test_S19_an_interrupted_map_leaves_nothing_mapped(static: Static, dev: Device, tl: Timeline) -> None:
    with dmabuf.export(static, SIZE) as buf:
        att, fence = buf.attach(dev), tl.fence()
        add(buf.resv, fence, Usage.KERNEL)
        error = interrupted(lambda: att.map_unlocked(TO, interruptible=True), raising=False)
        assert isinstance(error, OSError)
        assert error.errno == errno.EINTR
        assert (att.statistics().mapped, dev.statistics().windows, static.tables) == (0, 0, [])
        fence.signal()
        att.detach()


# -- the tables themselves


def test_every_row_has_a_test_or_a_reason() -> None:
    found = rows()
    assert [row.name for row in found] == [f"F{i:02d}" for i in range(1, 62)] + [f"S{i:02d}" for i in range(1, 21)]
    assert not [row.name for row in found if not row.tests and not row.reason]
    assert all(row.tests or row.reason.startswith("not yet: ") for row in found)


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(rows()), "run: python -m tools.features"
