"""Sync files that go into a buffer and come out of it; expected values are the kernel's (semantics 5.10)."""

import errno
import os
import select

import pytest

import dmabuf
from dmabuf import DmaBuf, DmaFence, SyncFile, Timeline, Usage
from tests.support.errnos import raises_errno
from tests.support.facts import FACTS, Fact, fact_id, facts
from tests.support.fences import attach, key, keys
from tests.support.sync_files import polled


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
