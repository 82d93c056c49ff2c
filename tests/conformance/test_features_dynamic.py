"""Rows F35 and later of the history of dma-buf.h (semantics 8), which begin with memory that may move; see test_features.py."""

import errno
import logging
import os
import zlib

import pytest

import dmabuf
from dmabuf import (
    ContractError,
    ContractWarning,
    Device,
    Direction,
    DmaBuf,
    DmaBufAttachment,
    IosysMap,
    SgTable,
    Timeline,
    Usage,
    sim,
)
from tests.support.drivers import FROM, PAGE, TO, Bare, Dynamic, Mover, Static
from tests.support.errnos import raises_errno
from tests.support.fences import attach as add
from tests.support.fences import entries, key
from tests.support.logs import logged
from tests.support.waiting import Background

IN, OUT = 1, 4  # select.POLLIN, POLLOUT
SIZE = 4 * PAGE


def test_F35_dynamic_importers_hear_of_moves_and_static_ones_pin(dynamic: Dynamic, dev: Device) -> None:
    with dmabuf.export(dynamic, SIZE) as buf:
        importer = Mover()
        one, two = buf.attach(dev, importer), buf.attach(dev, importer)
        assert dynamic.pins == 0
        with buf.resv.locked():
            buf.move_notify()
        assert (importer.moved, importer.locked) == ([two, one], [True, True])
        importer.moved.clear()
        one.detach()
        two.detach()
        static = buf.attach(dev)
        assert dynamic.pins == 1
        with buf.resv.locked():
            buf.move_notify()
        static.detach()
        assert dynamic.pins == 0
    only_pin = type("OnlyPin", (Bare,), {"pin": Dynamic.pin})()
    with pytest.warns(ContractWarning), raises_errno(errno.EINVAL):
        dmabuf.export(only_pin, SIZE)
    only_pin.close()


def test_F36_pin_makes_an_exporter_dynamic(static: Static, dynamic: Dynamic) -> None:
    with dmabuf.export(static, SIZE) as one, dmabuf.export(dynamic, SIZE) as two:
        assert (one.is_dynamic, two.is_dynamic) == (False, True)


@pytest.mark.parametrize("able", [False, True])
def test_F37_the_exporter_sees_whether_the_importer_does_peer_to_peer(static: Static, dev: Device, able: bool) -> None:
    seen: list[bool] = []
    static.during = dict.fromkeys(("attach", "map"), lambda att: seen.append(att.peer2peer))
    with dmabuf.export(static, SIZE) as buf:
        att = buf.attach(dev, Mover(allow_peer2peer=able))
        assert att.peer2peer is able
        att.detach()
    assert seen == [able, able]


def test_F38_reading_the_name_waits_for_no_reservation_lock(buf: DmaBuf) -> None:
    buf.name = "cam"
    with buf.resv.locked(), Background(lambda: (buf.name, buf.fdinfo(), dmabuf.bufinfo())) as job:
        assert job.result()[0] == "cam"


def test_F39_a_mapping_says_whether_it_is_memory_or_io() -> None:
    memory = bytearray(8)
    system, io, null = IosysMap.init_vaddr(memory), IosysMap.init_vaddr_iomem(memory), IosysMap()
    assert (system.is_iomem, io.is_iomem) == (False, True)
    assert system != io
    assert null.is_null()
    assert system.is_set()


def test_F40_a_failing_vmap_tells_and_clears_the_map(static: Static) -> None:
    with dmabuf.export(static, SIZE) as buf:
        stale = IosysMap.init_vaddr(bytearray(8))
        static.fails["vmap"] = errno.ENOMEM
        with pytest.warns(ContractWarning), raises_errno(errno.ENOMEM):
            buf.vmap_unlocked(stale)
        assert stale.is_null()


def test_F41_vunmap_takes_the_map_that_vmap_gave(static: Static) -> None:
    with dmabuf.export(static, SIZE) as buf:
        map_ = buf.vmap_unlocked()
        with pytest.raises(ContractError):
            buf.vunmap_unlocked(IosysMap.init_vaddr(bytearray(8)))
        buf.vunmap_unlocked(map_)


def test_F42_dma_addresses_and_lengths_are_whole_pages(buf: DmaBuf) -> None:
    att = buf.attach(Device("npu0", max_segment=PAGE))
    with att.mapped(TO) as sgt:
        assert sgt.nents == buf.size // PAGE
        assert all(address % PAGE == length % PAGE == 0 for address, length in sgt)
    att.detach()

    class Odd(Bare):
        def map(self, attachment: DmaBufAttachment, direction: Direction) -> SgTable | None:
            return SgTable.from_dma([(0x1010, 100)])

        def unmap(self, attachment: DmaBufAttachment, sgt: SgTable, direction: Direction) -> None:
            pass

    exporter = Odd()
    with logged(logging.DEBUG) as log, dmabuf.export(exporter, SIZE) as odd:
        att = odd.attach(Device("npu0"))
        with att.mapped(TO):
            assert any("not whole pages" in text for text in log.texts)
        att.detach()
    exporter.close()


def test_F43_the_size_never_changes(dynamic: Dynamic) -> None:
    with dmabuf.export(dynamic, SIZE) as buf:
        with pytest.raises(AttributeError):
            buf.size = 1  # type: ignore[misc]
        with buf.resv.locked():
            buf.move_notify()
        assert buf.lseek(0, os.SEEK_END) == os.lseek(buf.fileno(), 0, os.SEEK_END) == SIZE
        for change in (1, 2 * SIZE):
            with raises_errno(errno.EPERM):
                os.ftruncate(buf.fileno(), change)


def test_F44_a_vmap_wants_its_bracket(buf: DmaBuf) -> None:
    map_ = buf.vmap_unlocked()
    with pytest.warns(ContractWarning, match="outside of begin_cpu_access"):
        map_.rd(0, "u32")
    buf.begin_cpu_access(FROM)
    assert map_.rd(0, "u32") == 0
    buf.end_cpu_access(FROM)
    buf.vunmap_unlocked(map_)


def test_F45_pin_on_a_static_attachment_warns(dynamic: Dynamic, dev: Device) -> None:
    with dmabuf.export(dynamic, SIZE) as buf:
        att = buf.attach(dev)
        with buf.resv.locked(), pytest.warns(ContractWarning):
            att.pin()
        att.detach()


def test_F46_importers_see_no_pages_in_debug_mode(static: Static, dev: Device) -> None:
    seen: list[int] = []
    static.during["unmap"] = lambda _: seen.append(len(static.tables[0].entries))
    with dmabuf.export(static, SIZE) as buf:
        att = buf.attach(dev)
        with att.mapped(TO) as sgt:
            with pytest.raises(ContractError):
                sgt.view(0)
            assert dev.read(sgt.dma_entries[0].address, 4) == bytes(4)
        att.detach()
    assert seen == [1]


@pytest.mark.usefixtures("move_notify")
def test_F48_static_map_is_ready_and_dynamic_importers_wait(static: Static, dynamic: Dynamic, dev: Device, tl: Timeline) -> None:
    clear = tl.fence()
    with dmabuf.export(static, SIZE) as buf:
        add(buf.resv, clear, Usage.KERNEL)
        att = buf.attach(dev)
        with Background(lambda: att.map_unlocked(TO)) as job:
            job.until_blocked()
            assert not job.done
            clear.signal()
            att.unmap_unlocked(job.result(), TO)
        att.detach()
    move = tl.fence()
    with dmabuf.export(dynamic, SIZE) as buf:
        add(buf.resv, move, Usage.KERNEL)
        att = buf.attach(dev, Mover())

        def driver() -> bytes:
            with att.mapped(TO) as sgt:
                buf.resv.wait(Usage.WRITE)
                assert move.is_signaled()
                return dev.read(sgt.dma_entries[0].address, 1)

        with Background(driver) as job:
            job.until_blocked()
            assert not job.done
            dynamic.whole[0] = 7
            move.signal()
            assert job.result() == b"\7"
        att.detach()


@pytest.mark.parametrize("implicit", [True, False], ids=["implicit", "opted out"])
def test_F49_implicit_sync_orders_writer_and_reader(buf: DmaBuf, tl: Timeline, implicit: bool) -> None:
    """Two simulated devices (10,000 rounds in two processes: tests/devices); who opts out skips readers and writers, and never KERNEL."""
    gate, moved = tl.fence(), tl.fence()
    with sim.Engine("writer") as writer, sim.Engine("reader") as reader:
        crc = {value: zlib.crc32(bytes([value]) * SIZE) for value in (0, 7)}
        target = reader.attach(buf, dynamic=True)
        write = writer.queue().fill(buf, 7, wait=[gate])
        if implicit:
            read = reader.queue().checksum(target)
            assert entries(buf.resv) == [(key(write.fence), Usage.WRITE), (key(read.fence), Usage.READ)]
            gate.signal()
            assert read.wait() == crc[7]
        else:
            assert reader.queue().checksum(target, implicit=False).wait() == crc[0]
            add(buf.resv, moved, Usage.KERNEL)
            read = reader.queue().checksum(target, implicit=False)
            assert (key(read.fence), Usage.BOOKKEEP) in entries(buf.resv)
            gate.signal()
            write.wait()
            assert not read.done
        moved.signal()
        assert read.wait() == crc[7]
        reader.close()
        writer.close()


def test_F51_a_write_fence_need_not_depend_on_earlier_readers(buf: DmaBuf, tl: Timeline, other_tl: Timeline) -> None:
    read, write = tl.fence(), other_tl.fence()
    add(buf.resv, read, Usage.READ)
    add(buf.resv, write, Usage.WRITE)
    write.signal()
    assert not buf.resv.test_signaled(Usage.READ)
    read.signal()
    assert buf.resv.test_signaled(Usage.READ)


def test_F52_pollers_wake_when_their_own_set_is_done(static: Static) -> None:
    timelines = [dmabuf.Timeline(str(i)) for i in range(6)]
    with dmabuf.export(static, SIZE) as buf:
        fences = [timeline.fence() for timeline in timelines]
        for i, fence in enumerate(fences):
            add(buf.resv, fence, Usage.WRITE if i < 3 else Usage.READ)
        with Background(lambda: buf.poll(IN, None)) as reader, Background(lambda: buf.poll(OUT, None)) as writer:
            for fence in fences[:3]:
                reader.until_blocked()
                assert not reader.done
                fence.signal()
            assert reader.result() == IN
            for fence in fences[3:]:
                writer.until_blocked()
                assert not writer.done
                fence.signal()
            assert writer.result() == OUT
    for timeline in timelines:
        timeline.close()


def test_F53_an_exporter_may_pin_in_place(dynamic: Dynamic, dev: Device) -> None:
    with dmabuf.export(dynamic, SIZE) as buf:
        dynamic.whole[0] = 9
        att = buf.attach(dev)
        with att.mapped(TO) as sgt:
            assert dev.read(sgt.dma_entries[0].address, 1) == b"\x09"
        att.detach()


def test_F54_an_iosys_map_works_by_itself() -> None:
    memory = bytearray(16)
    for make in (IosysMap.init_vaddr, IosysMap.init_vaddr_iomem):
        map_ = make(memory)
        map_.memcpy_to(4, b"abcd")
        later = IosysMap.init_offset(map_, 4)
        assert later.rd(0, "u8") == ord("a")
        assert later != map_


def test_F55_a_write_fence_drops_no_read_fence(buf: DmaBuf, tl: Timeline, other_tl: Timeline) -> None:
    read, write = tl.fence(), other_tl.fence()
    add(buf.resv, read, Usage.READ)
    add(buf.resv, write, Usage.WRITE)
    assert {key(fence) for fence in buf.resv.fences(Usage.READ)} == {key(read), key(write)}
    read.signal()
    assert [key(fence) for fence in buf.resv.fences(Usage.READ)] == [key(write)]
    write.signal()


def test_F56_queries_go_by_usage(buf: DmaBuf, tl: Timeline) -> None:
    assert (Usage.rw(True), Usage.rw(False)) == (Usage.READ, Usage.WRITE)
    read = tl.fence()
    add(buf.resv, read, Usage.READ)
    assert buf.resv.fences(Usage.WRITE) == []
    read.signal()


def test_F57_fences_are_added_after_reserving(buf: DmaBuf, tl: Timeline) -> None:
    first, second = tl.fence(), tl.fence()
    with buf.resv.locked(), pytest.raises(ContractError):
        buf.resv.add(first, Usage.READ)
    add(buf.resv, first, Usage.READ)
    add(buf.resv, second, Usage.READ)
    assert entries(buf.resv) == [(key(second), Usage.READ)]
    first.signal()
    second.signal()


def test_F58_vmap_has_unlocked_variants(static: Static) -> None:
    with dmabuf.export(static, SIZE) as buf:
        map_ = buf.vmap_unlocked()
        with buf.resv.locked(), pytest.warns(ContractWarning), raises_errno(errno.EDEADLK):
            buf.vmap_unlocked()
        with buf.resv.locked(), pytest.warns(ContractWarning), raises_errno(errno.EDEADLK):
            buf.vunmap_unlocked(map_)
        buf.vunmap_unlocked(map_)


def test_F59_map_has_unlocked_variants(static: Static, dev: Device) -> None:
    with dmabuf.export(static, SIZE) as buf:
        att = buf.attach(dev)
        sgt = att.map_unlocked(TO)
        with buf.resv.locked(), pytest.warns(ContractWarning), raises_errno(errno.EDEADLK):
            att.map_unlocked(TO)
        with buf.resv.locked(), pytest.warns(ContractWarning), raises_errno(errno.EDEADLK):
            att.unmap_unlocked(sgt, TO)
        att.unmap_unlocked(sgt, TO)
        att.detach()


def test_F60_the_reservation_lock_is_asserted(dynamic: Dynamic, dev: Device) -> None:
    """The whole table is in test_attachment.py."""
    with dmabuf.export(dynamic, SIZE) as buf:
        att = buf.attach(dev, Mover())
        for call in (lambda: att.map(TO), buf.vmap, att.pin, att.unpin, buf.move_notify):
            with pytest.raises(ContractError):
                call()
        att.detach()


@pytest.mark.parametrize("given", [None, ""])
def test_F61_the_exporters_name_is_never_empty(static: Static, given: str | None) -> None:
    if given is None:
        with dmabuf.export(static, SIZE, exp_name=given) as buf:
            assert buf.exp_name
            assert buf.name is None
    else:
        with raises_errno(errno.EINVAL):
            dmabuf.export(static, SIZE, exp_name=given)
