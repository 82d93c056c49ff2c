"""Devices in another process: the mapping matrix, what the device sees, and failures that leave nothing (semantics 2.8–2.14)."""

import errno
from typing import Any

import pytest

import dmabuf
from dmabuf import ContractWarning, Direction, DmaBufAttachment, SgTable, Timeline, Usage
from tests.support import elsewhere as do
from tests.support.children import Spawn
from tests.support.drivers import BIDIR, FROM, PAGE, TO, Bare, Dynamic, Static
from tests.support.elsewhere import Away, Place, There
from tests.support.errnos import raises_errno
from tests.support.fences import attach as add
from tests.support.waiting import until, until_asleep

SIZE = 4 * PAGE


# -- the matrix


def test_static_with_static_maps_at_map_and_unmaps_at_unmap(place: Place, static: Static) -> None:
    with dmabuf.export(static, SIZE) as buf, place.of(buf) as there:
        there.do(do.attach)
        assert static.calls == ["attach"]
        there.do(do.mapped, TO)
        there.do(do.unmapped)
        assert static.calls == ["attach", ("map", TO), ("unmap", TO)]
        there.do(do.detach)
        assert static.calls[3:] == ["detach"]
        assert static.locked == {"attach": False, "map": True, "unmap": True, "detach": False}


def test_static_with_dynamic_maps_at_attach(place: Place, static: Static) -> None:
    with dmabuf.export(static, SIZE) as buf, place.of(buf) as there:
        there.do(do.attach, dynamic=True)
        assert static.calls == ["attach", ("map", BIDIR)]
        assert there.do(do.mapped, TO) == there.do(do.mapped, FROM)
        assert static.count("map") == 1
        there.do(do.unmapped)
        there.do(do.unmapped)
        there.do(do.detach)
        assert static.calls[2:] == [("unmap", BIDIR), "detach"]


def test_dynamic_with_static_pins_and_maps_at_attach(place: Place, dynamic: Dynamic) -> None:
    with dmabuf.export(dynamic, SIZE) as buf, place.of(buf) as there:
        there.do(do.attach)
        assert dynamic.calls == ["attach", "pin", ("map", BIDIR)]
        there.do(do.mapped, TO)
        there.do(do.unmapped)
        there.do(do.detach)
        assert dynamic.calls[3:] == [("unmap", BIDIR), "unpin", "detach"]
        assert all(dynamic.locked[op] for op in ("pin", "map", "unmap", "unpin"))


def test_dynamic_with_dynamic_maps_at_map_and_pins_only_without_the_option(place: Place, dynamic: Dynamic, move_notify: bool) -> None:
    with dmabuf.export(dynamic, SIZE) as buf, place.of(buf) as there:
        there.do(do.attach, dynamic=True)
        assert dynamic.calls == ["attach"]
        there.do(do.mapped, FROM)
        assert dynamic.calls[1:] == ([("map", FROM)] if move_notify else ["pin", ("map", FROM)])
        dynamic.calls.clear()
        there.do(do.unmapped)
        assert dynamic.calls == ([("unmap", FROM)] if move_notify else [("unmap", FROM), "unpin"])
        dynamic.calls.clear()
        there.do(do.pin)
        there.do(do.unpin)
        assert dynamic.calls == ["pin", "unpin"]
        there.do(do.detach)


def test_a_caching_exporter_maps_once_until_detach(place: Place, static: Static) -> None:
    with dmabuf.export(static, SIZE, cache_sgt_mapping=True) as buf, place.of(buf) as there:
        there.do(do.attach)
        there.do(do.mapped, TO)
        there.do(do.unmapped)
        there.do(do.mapped, TO)
        assert static.count("map") == 1
        with raises_errno(errno.EBUSY):
            there.do(do.mapped, FROM)
        there.do(do.unmapped)
        there.do(do.detach)
        assert static.calls == ["attach", ("map", TO), ("unmap", TO), "detach"]


def test_a_static_importer_waits_for_kernel_fences(child: Spawn, static: Static, tl: Timeline) -> None:
    with dmabuf.export(static, SIZE) as buf, Place(child, False).of(buf) as there:
        assert isinstance(there, Away)
        there.do(do.attach)
        fence = tl.fence()
        add(buf.resv, fence, Usage.KERNEL)
        there.start(do.mapped, TO)
        until(lambda: static.count("map"))
        until_asleep(there.other.pid)
        assert not there.other._messages.poll()
        fence.signal()
        there.finish()
        there.do(do.unmapped)
        there.do(do.detach)


# -- what the device sees


def test_the_device_elsewhere_uses_the_exporters_memory(place: Place, static: Static) -> None:
    with dmabuf.export(static, SIZE) as buf, place.of(buf) as there:
        there.do(do.attach, max_segment=PAGE)
        entries = there.do(do.mapped, BIDIR)
        assert [length for _, length in entries] == [PAGE] * 4
        static.whole[0:5] = b"hello"
        assert there.do(do.device_read, entries[0][0], 5) == b"hello"
        there.do(do.device_write, entries[3][0] + 7, b"written")
        assert static.whole[3 * PAGE + 7 : 3 * PAGE + 14] == b"written"
        there.do(do.unmapped)
        with raises_errno(errno.EFAULT):
            there.do(do.device_read, entries[0][0], 1)
        there.do(do.detach)


def test_the_pages_are_hidden_from_importers_elsewhere_too(place: Place, static: Static) -> None:
    with dmabuf.export(static, SIZE) as buf, place.of(buf) as there:
        there.do(do.attach)
        there.do(do.mapped, TO)
        with pytest.raises(dmabuf.ContractError, match="pages are hidden"):
            there.do(look_at_pages)
        there.do(do.unmapped)
        there.do(do.detach)


def look_at_pages(state: Any) -> None:
    _ = state.tables[-1][0].entries


class OfItsOwn(Bare):
    """Its memory is a device's own: it fills in addresses."""

    def map(self, attachment: DmaBufAttachment, direction: Direction) -> SgTable:
        self.said("map", attachment, direction)
        return SgTable.from_dma([(0x10000, PAGE), (0x40000, 2 * PAGE)])

    def unmap(self, attachment: DmaBufAttachment, sgt: SgTable, direction: Direction) -> None:
        self.said("unmap", attachment, direction)

    def attach(self, attachment: DmaBufAttachment) -> None:
        attachment.peer2peer = False


def test_addresses_that_the_exporter_filled_in_come_as_they_are(place: Place) -> None:
    exporter = OfItsOwn()
    with dmabuf.export(exporter, SIZE) as buf, place.of(buf) as there:
        there.do(do.attach, dynamic=True, peer2peer=True)
        assert there.do(do.mapped, TO) == [(0x10000, PAGE), (0x40000, 2 * PAGE)]
        there.do(do.unmapped)
        assert there.do(peer2peer) is False
        there.do(do.detach)
    exporter.close()


def peer2peer(state: Any) -> bool:
    return bool(state.att.peer2peer)


class Curious(Static):
    def attach(self, attachment: DmaBufAttachment) -> None:
        dev = attachment.dev
        self.calls.append((dev.name, dev.dma_mask, dev.max_segment, attachment.is_dynamic, attachment.peer2peer))


def test_the_exporter_sees_the_devices_name_and_limits(place: Place) -> None:
    exporter = Curious()
    with dmabuf.export(exporter, SIZE) as buf, place.of(buf) as there:
        there.do(do.attach, dynamic=True, peer2peer=True, dma_mask=(1 << 32) - 1, max_segment=2 * PAGE)
        assert exporter.calls[0] == ("npu0", (1 << 32) - 1, 2 * PAGE, True, True)
        assert "\tAttached Devices:\n\tnpu0\nTotal 1 devices attached\n" in dmabuf.bufinfo()
        there.do(do.detach)
        assert "Total 0 devices attached" in dmabuf.bufinfo()
    exporter.close()


# -- failures leave the state as it was


def prepared(there: There, *, dynamic: bool) -> None:
    there.do(do.attach, dynamic=dynamic)


@pytest.mark.parametrize("op", ["attach", "pin", "map"])
@pytest.mark.parametrize("number", [errno.EBUSY, errno.EINTR])
def test_a_failing_attach_undoes_what_came_before(place: Place, dynamic: Dynamic, op: str, number: int) -> None:
    with dmabuf.export(dynamic, SIZE) as buf, place.of(buf) as there:
        there.do(do.begin, FROM)
        there.do(do.end, FROM)
        dynamic.calls.clear()
        before = there.do(do.standing), do.counts(dynamic, buf)
        dynamic.fails[op] = number
        with raises_errno(number):
            there.do(do.attach)
        done = [call for call in dynamic.calls if call not in ("detach", "unpin")]
        assert dynamic.calls[len(done) :] == {"attach": [], "pin": ["detach"], "map": ["unpin", "detach"]}[op]
        dynamic.fails.clear()
        dynamic.calls.clear()
        assert (there.do(do.standing)[0], there.do(do.standing)[2:], do.counts(dynamic, buf)) == (before[0][0], before[0][2:], before[1])


@pytest.mark.parametrize(("op", "move_notify"), [("pin", False), ("map", False), ("map", True)], indirect=["move_notify"])
def test_a_failing_map_undoes_what_came_before(place: Place, dynamic: Dynamic, op: str, move_notify: bool) -> None:
    with dmabuf.export(dynamic, SIZE) as buf, place.of(buf) as there:
        there.do(do.attach, dynamic=True)
        before = there.do(do.standing), do.counts(dynamic, buf)
        dynamic.calls.clear()
        dynamic.fails[op] = errno.ENOSPC
        with raises_errno(errno.ENOSPC):
            there.do(do.mapped, TO)
        assert dynamic.calls == ([("map", TO)] if move_notify else {"pin": ["pin"], "map": ["pin", ("map", TO), "unpin"]}[op])
        dynamic.fails.clear()
        dynamic.calls.clear()
        assert (there.do(do.standing), do.counts(dynamic, buf)) == before
        there.do(do.detach)


def test_a_failing_pin_is_told_and_the_lock_is_free(place: Place, dynamic: Dynamic) -> None:
    with dmabuf.export(dynamic, SIZE) as buf, place.of(buf) as there:
        there.do(do.attach, dynamic=True)
        dynamic.fails["pin"] = errno.ENOMEM
        with raises_errno(errno.ENOMEM):
            there.do(do.pin)
        assert not buf.resv.is_locked()
        dynamic.fails.clear()
        there.do(do.detach)


def test_a_map_that_the_device_refuses_is_given_back(place: Place, static: Static) -> None:
    with dmabuf.export(static, SIZE) as buf, place.of(buf) as there:
        there.do(do.attach, dma_mask=4 * PAGE - 1)  # the table fits below no such mask
        before = do.counts(static, buf)[:-1]
        with raises_errno(errno.ENOMEM):
            there.do(do.mapped, TO)
        assert do.counts(static, buf)[:-1] == before
        there.do(do.detach)


class NoTable(Dynamic):
    def map(self, attachment: DmaBufAttachment, direction: Direction) -> SgTable | None:
        return None


def test_a_map_that_returns_no_table_is_enomem(place: Place) -> None:
    exporter = NoTable()
    with dmabuf.export(exporter, SIZE) as buf, place.of(buf) as there:
        with raises_errno(errno.ENOMEM):
            there.do(do.attach)
        assert exporter.pins == 0
        assert do.counts(exporter, buf)[3] == 0
    exporter.close()


class OfBytes(Static):
    def map(self, attachment: DmaBufAttachment, direction: Direction) -> SgTable:
        return attachment.dev.map_sgtable(SgTable.from_ranges([(0, SIZE)], memory=bytearray(SIZE)), direction)

    def unmap(self, attachment: DmaBufAttachment, sgt: SgTable, direction: Direction) -> None:
        self.said("unmap", attachment, direction)
        attachment.dev.unmap_sgtable(sgt, direction)


def test_memory_that_is_no_mapping_cannot_be_mapped_elsewhere(child: Spawn) -> None:
    exporter = OfBytes()
    with dmabuf.export(exporter, SIZE) as buf, Place(child, False).of(buf) as there:
        there.do(do.attach)
        with raises_errno(errno.EOPNOTSUPP):
            there.do(do.mapped, TO)
        assert exporter.calls == ["attach", ("unmap", TO)]
        there.do(do.detach)
    exporter.close()


# -- vmap


def test_vmap_is_counted_and_the_exporter_sees_one_of_each(place: Place, static: Static) -> None:
    with dmabuf.export(static, SIZE) as buf, place.of(buf) as there:
        assert [there.do(do.vmap), there.do(do.vmap)] == [1, 2]
        static.whole[0] = 42
        assert there.do(seen_by_vmap) == 42
        there.do(do.vunmap)
        assert static.calls == ["vmap"]
        there.do(do.vunmap)
        assert static.calls == ["vmap", "vunmap"]
        assert static.locked == {"vmap": True, "vunmap": True}


def seen_by_vmap(state: Any) -> int:
    return int(state.maps[0].vaddr[0])


def test_a_failing_vmap_warns_the_caller_and_counts_nothing(place: Place, static: Static) -> None:
    with dmabuf.export(static, SIZE) as buf, place.of(buf) as there:
        static.fails["vmap"] = errno.ENOMEM
        with pytest.warns(ContractWarning), raises_errno(errno.ENOMEM):
            there.do(do.vmap)
        assert do.counts(static, buf)[4:6] == (0, False)
        static.fails.clear()
        there.do(do.vmap)
        there.do(do.vunmap)


def test_without_the_op_there_is_no_vmap(place: Place, bare: Bare) -> None:
    with dmabuf.export(bare, SIZE) as buf, place.of(buf) as there, raises_errno(errno.EINVAL):
        there.do(do.vmap)
