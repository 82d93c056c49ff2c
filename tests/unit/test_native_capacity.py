"""The capacity of a domain: how much it holds, and what happens when it is full or can't grow.

These tests run with sanitizers too, so they fork nothing. The test's watchdog ends what hangs.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import dmabuf
from dmabuf import DmaBufError, Usage, _native
from dmabuf.domain import lives, records
from tests.support.fences import attach
from tests.support.leaks import descriptors

MAPPED = _native.HEADER_BYTES + _native.MAX_CHUNKS * _native.CHUNK_BYTES


def test_an_empty_domain_is_smaller_than_a_mebibyte() -> None:
    domain = dmabuf.Domain.private()
    domain.join()
    st = os.fstat(domain.fileno())
    assert st.st_blocks * 512 < 1 << 20
    assert st.st_size < 1 << 20
    domain.leave()


def test_a_million_fences_can_be_pending_at_once(domain: dmabuf.Domain) -> None:
    shm = domain.shm
    handles = [shm.fence_alloc(0, 1, n, 0, 0, 0) for n in range(1_000_000)]
    assert len(set(handles)) == 1_000_000
    assert all(shm.fence_pending(h) for h in handles[::10_007])
    for handle in handles:
        shm.fence_signal(handle, 0, True)
    size = os.fstat(domain.fileno()).st_size
    again = [shm.fence_alloc(0, 1, n, 0, 0, 0) for n in range(1000)]
    assert not set(again) & set(handles)  # the same slots, later generations
    assert os.fstat(domain.fileno()).st_size == size
    for handle in again:
        shm.fence_signal(handle, 0, True)


def record_of(n: int) -> tuple[int, int, int, bytes, bytes, bytes, None, int, int, int]:
    return (1, n, 4096, n.to_bytes(16, "little"), b"memfd", b"memfd", None, records.KIND_BUFFER, os.getpid(), 1)


def test_65536_buffers_have_records_and_are_found(domain: dmabuf.Domain) -> None:
    shm = domain.shm
    made = [shm.rec_create(*record_of(n)) for n in range(1, 65_537)]
    assert len({index for index, _, _ in made}) == 65_536
    for n in range(1, 65_537, 997):
        assert shm.rec_find(1, n) == (*made[n - 1][:2], n.to_bytes(16, "little"))
    for index, gen, _ in made:
        shm.rec_put(index)
        assert shm.rec_free(index, gen)
    assert shm.rec_list() == []
    size = os.fstat(domain.fileno()).st_size
    index, gen, fresh = shm.rec_create(*record_of(1))
    assert fresh
    assert os.fstat(domain.fileno()).st_size == size
    shm.rec_put(index)
    shm.rec_free(index, gen)


@contextmanager
def no_bigger_files(size: int) -> Iterator[None]:
    """No file may grow beyond this (the signal that tells so is ignored, as Python does)."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)


@contextmanager
def refused(text: str, *errnos: int) -> Iterator[None]:
    """The block ends by an error with this text and one of these errnos; nothing keeps its traceback."""
    try:
        yield
    except DmaBufError as e:
        if e.errno not in errnos or text not in str(e):
            raise
        return
    pytest.fail("nothing was refused")


@contextmanager
def every_chunk_taken(domain: dmabuf.Domain) -> Iterator[None]:
    """Every chunk there can be, without the memory: the table says so. Afterwards it doesn't: who leaves would copy them all."""
    shm, count = domain.shm, domain.shm.load32(_native.OFF_NCHUNKS)
    table = range(_native.OFF_CHUNKTAB, _native.OFF_CHUNKTAB + 8 * _native.MAX_CHUNKS, 8)
    taken = [at for at in table if not shm.load64(at)]
    for at in taken:
        shm.store64(at, _native.CH_TIMELINE | 0x7FFFFFFF << 32)
    os.ftruncate(domain.fileno(), MAPPED)
    shm.store32(_native.OFF_NCHUNKS, _native.MAX_CHUNKS)
    yield
    shm.store32(_native.OFF_NCHUNKS, count)
    for at in taken:
        shm.store64(at, 0)


def test_a_full_domain_is_enospc_with_a_remedy_and_nothing_is_lost(domain: dmabuf.Domain) -> None:
    shm = domain.shm
    buf = dmabuf.allocate(4096, domain=domain, name="before")
    timeline = dmabuf.Timeline("full", domain=domain)
    fences = [timeline.fence()]
    attach(buf.resv, fences[0], Usage.READ)
    made = []
    with every_chunk_taken(domain):
        with refused("close buffers", errno.ENOSPC):
            made.extend(timeline.fence() for _ in range(10_000))
        assert len(made) == _native.FENCES_PER - 1
        assert made[-1].seqno == timeline.statistics().seqno
        assert shm.load32(_native.OFF_TABLE_LOCK) == 0
        assert [f.handle for f in buf.resv.fences(Usage.BOOKKEEP)] == [fences[0].handle]
        for fence in made:
            fence.signal()
        made.clear()
        del fence
        timeline.fence().signal()  # room again
        fences[0].signal()
        with buf.write() as view:
            view[0] = 1
        assert buf.name == "before"
        buf.close()


def test_records_run_out_with_enospc_and_come_back(domain: dmabuf.Domain) -> None:
    first = dmabuf.allocate(4096, domain=domain)
    held: list[dmabuf.DmaBuf] = []
    fds = descriptors()
    with every_chunk_taken(domain):
        with refused("close buffers", errno.ENOSPC):
            held.extend(dmabuf.allocate(4096, domain=domain) for _ in range(1000))
        assert len(held) == _native.RECS_PER - 1
        assert descriptors() == fds + len(held)  # what was refused is closed
        for buf in held:
            buf.close()
        held.clear()
        del buf
        records_gone(domain)
        dmabuf.allocate(4096, domain=domain).close()
        first.close()


def records_gone(domain: dmabuf.Domain) -> None:
    while domain.shm.rec_orphans():
        records.sweep(domain)


def test_entries_run_out_with_enospc_and_the_list_stays(domain: dmabuf.Domain) -> None:
    buf = dmabuf.allocate(4096, domain=domain)
    fence = dmabuf.Timeline("full", domain=domain).fence()
    attach(buf.resv, fence, Usage.READ)
    with every_chunk_taken(domain):
        with buf.resv.locked():
            with pytest.raises(DmaBufError) as caught:
                buf.resv.reserve(100)
            assert caught.value.errno == errno.ENOSPC
            buf.resv.reserve(10)  # there is room for those
        assert [f.handle for f in buf.resv.fences(Usage.BOOKKEEP)] == [fence.handle]
        assert not buf.resv.is_locked()
        fence.signal()
        buf.close()


@pytest.mark.parametrize("what", ["fence", "record", "record with a layout", "layout", "entries", "timeline"])
def test_a_file_that_cannot_grow_is_a_clear_error_and_nothing_is_lost(domain: dmabuf.Domain, what: str) -> None:
    shm = domain.shm
    buf = dmabuf.allocate(4096, domain=domain)
    fence = dmabuf.Timeline("before", domain=domain).fence()
    attach(buf.resv, fence, Usage.READ)
    size = os.fstat(domain.fileno()).st_size
    taken: list[Any] = []
    with no_bigger_files(size):
        with refused("", errno.ENOMEM, errno.ENOSPC):
            for n in range(1, 3000):
                if what == "fence":
                    taken.append(shm.fence_alloc(0, 1, n, 0, 0, 0))
                elif what == "record":
                    taken.append(shm.rec_create(*record_of(n)))
                elif what == "record with a layout":
                    taken.append(shm.rec_create(*record_of(n), 0, b"layout"))
                elif what == "layout":
                    made = dmabuf.allocate(4096, domain=domain)
                    taken.append(made)
                    made.describe(dmabuf.TensorLayout("uint8", (1,)))
                elif what == "timeline":
                    taken.append(dmabuf.Timeline("more", domain=domain))
                else:
                    with buf.resv.locked():
                        buf.resv.reserve(n)
        assert shm.load32(_native.OFF_TABLE_LOCK) == 0
        assert not buf.resv.is_locked()
    assert os.fstat(domain.fileno()).st_size == size
    shm.chunk_claim(_native.CH_TIMELINE)  # and now it can
    assert [f.handle for f in buf.resv.fences(Usage.BOOKKEEP)] == [fence.handle]
    assert shm.table_audit() == (0, 0, 0, 0)
    for one in taken:
        if isinstance(one, dmabuf.DmaBuf):
            one.close()
    fence.signal()
    buf.close()


def test_a_life_without_room_for_its_chunk_leaves_its_slot_free() -> None:
    domain = dmabuf.Domain.private()
    size = os.fstat(domain.fileno()).st_size
    with no_bigger_files(size), pytest.raises(DmaBufError) as caught:
        domain.join()
    assert caught.value.errno in (errno.ENOMEM, errno.ENOSPC)
    assert lives.alive_slots(domain.shm) == []
    assert not lives.is_alive(domain.shm, 0)
    domain.join()
    assert lives.alive_slots(domain.shm) == [0]
    domain.leave()


def test_more_processes_than_there_are_lives_is_enospc() -> None:
    domain = dmabuf.Domain.private()
    for index in range(_native.LIVES):
        domain.shm.store32(lives.slot_offset(index) + _native.LIFE_STATE, _native.LIFE_ALIVE)
    with pytest.raises(DmaBufError, match="processes") as caught:
        domain.join()
    assert caught.value.errno == errno.ENOSPC


def listing(domain: dmabuf.Domain, fences: int) -> dmabuf.DmaResv:
    """A reservation object whose list continues in blocks."""
    resv = dmabuf.DmaResv(domain=domain)
    with resv.locked():
        resv.reserve(fences)
    return resv


def chunks_of_blocks(shm: _native.Shm) -> int:
    table = (shm.load64(_native.OFF_CHUNKTAB + 8 * i) for i in range(shm.load32(_native.OFF_NCHUNKS)))
    return sum(entry & 0xFF == _native.CH_BLOCK for entry in table)


def test_blocks_of_a_freed_list_are_used_again(domain: dmabuf.Domain) -> None:
    shm = domain.shm
    kept = listing(domain, 40)
    before = 0
    for round_ in range(20):
        lists = [listing(domain, 300) for _ in range(20)]  # 20 blocks each
        if not round_:
            before = chunks_of_blocks(shm)
        del lists
        assert shm.table_audit() == (0, 0, 0, 0)
    assert chunks_of_blocks(shm) == before
    assert kept.statistics().fences == 0


@pytest.mark.parametrize("value", [0, 1, 5, 77_777, 0xFFFFFFFF], ids=str)
def test_free_list_of_blocks_that_lies_is_made_again(domain: dmabuf.Domain, value: int) -> None:
    shm = domain.shm
    timeline = dmabuf.Timeline("t", domain=domain)
    first = listing(domain, 200)
    attach(first, fence := timeline.fence(), Usage.READ)
    shm.store32(_native.OFF_LIFE_HIGH + 4, value)  # the word after it
    second = listing(domain, 5000)
    others = [dmabuf.Timeline("t", domain=domain).fence() for _ in range(60)]
    with second.locked():
        second.reserve(len(others))
        for other in others:
            second.add(other, Usage.READ)
    fence.signal()
    assert (first.test_signaled(Usage.READ), second.statistics().pending) == (True, len(others))
    for other in others:
        other.signal()
    assert second.test_signaled(Usage.READ)
