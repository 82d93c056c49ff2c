"""Device: DMA addresses, and the fault of every access that is not mapped right now."""

import errno
import itertools
import random
import threading

import pytest

from dmabuf import ContractError, ContractWarning, Device, Direction, SgTable
from dmabuf.core.memory.scatterlist import PAGE
from tests.support.drivers import BIDIR, FROM, TO
from tests.support.errnos import raises_errno
from tests.support.waiting import Background, until

IOMMU = pytest.mark.parametrize("iommu", [True, False], ids=["iommu", "direct"])


def table(pages: int = 4, first: int = 0) -> SgTable:
    return SgTable.from_pages(range(first, first + pages), memory=bytearray((first + pages) * PAGE))


@IOMMU
def test_what_is_mapped_is_read_and_written_by_address(iommu: bool) -> None:
    dev, sgt = Device("d", iommu=iommu), table()
    dev.map_sgtable(sgt, BIDIR)
    ((address, length),) = sgt
    assert length == 4 * PAGE
    dev.write(address + 5, b"abc")
    assert dev.read(address + 5, 3) == bytes(sgt.view(0)[5:8]) == b"abc"
    dev.unmap_sgtable(sgt, BIDIR)
    assert sgt.nents == 0


@IOMMU
def test_after_unmap_the_address_faults(iommu: bool) -> None:
    dev, sgt = Device("d", iommu=iommu), table()
    address = next(iter(dev.map_sgtable(sgt, BIDIR))).address
    dev.unmap_sgtable(sgt, BIDIR)
    with raises_errno(errno.EFAULT):
        dev.read(address, 1)
    with raises_errno(errno.EFAULT):
        dev.write(address, b"x")
    assert dev.statistics().faults == 2


@pytest.mark.parametrize("address", [0, 1, PAGE - 1, 1 << 63])
def test_an_address_never_given_faults(address: int) -> None:
    with raises_errno(errno.EFAULT):
        Device("d").read(address, 1)


@IOMMU
def test_an_access_that_runs_over_the_end_faults_and_stores_nothing(iommu: bool) -> None:
    dev, sgt, other = Device("d", iommu=iommu), table(1), table(1)
    (entry,) = dev.map_sgtable(sgt, BIDIR)
    dev.map_sgtable(other, BIDIR)
    with raises_errno(errno.EFAULT):
        dev.write(entry.address + PAGE - 1, b"xyz" * PAGE)
    assert sgt.view(0)[-1] == 0


def test_reading_a_negative_number_of_bytes_is_einval() -> None:
    with raises_errno(errno.EINVAL):
        Device("d").read(PAGE, -1)


@pytest.mark.parametrize(("way", "reads", "writes"), [(TO, True, False), (FROM, False, True), (BIDIR, True, True)])
def test_a_direction_allows_what_it_says(way: Direction, reads: bool, writes: bool) -> None:
    dev, sgt = Device("d"), table()
    (entry,) = dev.map_sgtable(sgt, way)
    for allowed, access in ((reads, lambda: dev.read(entry.address, 1)), (writes, lambda: dev.write(entry.address, b"x"))):
        if allowed:
            access()
        else:
            with raises_errno(errno.EFAULT):
                access()


def test_the_iommu_merges_what_is_apart_up_to_the_segment_limit() -> None:
    sgt = SgTable.from_pages([0, 2, 4, 6], memory=bytearray(8 * PAGE))
    dev = Device("d", max_segment=3 * PAGE)
    dev.map_sgtable(sgt, BIDIR)
    assert [entry.length for entry in sgt] == [3 * PAGE, PAGE]
    assert (sgt.orig_nents, sgt.nents) == (4, 2)
    first = sgt.dma_entries[0].address
    dev.write(first, bytes([1]) * PAGE + bytes([2]) * PAGE)
    assert (sgt.view(0)[0], sgt.view(1)[0], sgt.view(2)[0]) == (1, 2, 0)


def test_without_an_iommu_nothing_that_is_apart_is_merged() -> None:
    sgt = SgTable.from_pages([0, 2], memory=bytearray(4 * PAGE))
    Device("d", iommu=False).map_sgtable(sgt, BIDIR)
    assert sgt.nents == 2


def test_a_part_of_a_page_keeps_its_offset() -> None:
    sgt = SgTable.from_ranges([(100, 50)], memory=bytearray(PAGE))
    (entry,) = Device("d").map_sgtable(sgt, BIDIR)
    assert (entry.address % PAGE, entry.length) == (100, 50)


def test_addresses_stay_below_the_mask_and_are_reused_when_exhausted() -> None:
    dev = Device("d", dma_mask=(1 << 16) - 1)
    for _ in range(50):
        sgt = table(4)
        dev.map_sgtable(sgt, BIDIR)
        assert all(entry.address + entry.length - 1 <= dev.dma_mask for entry in sgt)
        dev.unmap_sgtable(sgt, BIDIR)


def test_no_addresses_left_is_enomem_and_maps_nothing() -> None:
    dev = Device("d", dma_mask=(1 << 16) - 1)
    with raises_errno(errno.ENOMEM):
        dev.map_sgtable(table(20), BIDIR)
    assert dev.statistics().windows == 0
    kept = []
    with raises_errno(errno.ENOMEM):
        for _ in range(20):
            kept.append(table(4))
            dev.map_sgtable(kept[-1], BIDIR)
    assert dev.statistics().windows == len(kept) - 1


def test_random_mappings_never_overlap() -> None:
    dev, rng = Device("d", dma_mask=(1 << 20) - 1), random.Random(7)
    mapped: list[SgTable] = []
    for _ in range(400):
        if mapped and rng.random() < 0.5:
            dev.unmap_sgtable(mapped.pop(rng.randrange(len(mapped))), BIDIR)
        sgt = table(rng.randint(1, 8))
        try:
            dev.map_sgtable(sgt, BIDIR)
        except OSError as e:
            if e.errno != errno.ENOMEM:
                raise
            continue
        mapped.append(sgt)
        spans = sorted((entry.address, entry.address + entry.length) for one in mapped for entry in one)
        assert all(a[1] < b[0] for a, b in itertools.pairwise(spans))


def test_without_an_iommu_memory_above_the_mask_is_eio() -> None:
    # Not 32 bits: an interpreter that is no PIE has its heap below 4 GiB.
    dev = Device("d", dma_mask=4 * PAGE - 1, iommu=False)
    with raises_errno(errno.EIO):
        dev.map_sgtable(table(), BIDIR)
    assert dev.statistics().windows == 0


@pytest.mark.parametrize("direction", [Direction.NONE, 9, -1])
def test_mapping_in_no_direction_is_einval(direction: int) -> None:
    with raises_errno(errno.EINVAL):
        Device("d").map_sgtable(table(), direction)


def test_mapping_twice_is_einval() -> None:
    dev, sgt = Device("d"), table()
    dev.map_sgtable(sgt, TO)
    with raises_errno(errno.EINVAL):
        dev.map_sgtable(sgt, TO)


def test_a_segment_longer_than_the_device_takes_is_einval() -> None:
    with raises_errno(errno.EINVAL):
        Device("d", max_segment=PAGE).map_sgtable(table(2), TO)


def test_a_table_without_memory_is_einval() -> None:
    for sgt in (SgTable.from_pages([0]), SgTable.from_dma([(0, PAGE)])):
        with raises_errno(errno.EINVAL):
            Device("d").map_sgtable(sgt, TO)


def test_read_only_memory_is_mapped_to_the_device_only() -> None:
    sgt = SgTable.from_pages([0], memory=bytes(PAGE))
    with raises_errno(errno.EACCES):
        Device("d").map_sgtable(sgt, BIDIR)
    Device("d").map_sgtable(sgt, TO)


@pytest.mark.parametrize("why", ["not mapped", "another device", "another direction"])
def test_a_wrong_unmap_is_a_contract_error(why: str) -> None:
    dev, sgt = Device("d"), table()
    if why != "not mapped":
        dev.map_sgtable(sgt, TO)
    with pytest.raises(ContractError):
        (Device("e") if why == "another device" else dev).unmap_sgtable(sgt, FROM if why == "another direction" else TO)
    assert dev.statistics().windows == (why != "not mapped")


@pytest.mark.parametrize("name", ["", "a\0b"])
def test_a_device_without_a_name_is_einval(name: str) -> None:
    with raises_errno(errno.EINVAL):
        Device(name)


@pytest.mark.parametrize("mask", [0, 5, PAGE - 1, (1 << 65) - 1, -1])
def test_what_is_no_mask_is_einval(mask: int) -> None:
    with raises_errno(errno.EINVAL):
        Device("d", dma_mask=mask)


def test_a_segment_limit_below_a_page_warns_and_is_einval() -> None:
    with pytest.warns(ContractWarning), raises_errno(errno.EINVAL):
        Device("d", max_segment=PAGE - 1)


@IOMMU
def test_views_show_the_bytes_behind_an_address(iommu: bool) -> None:
    dev, sgt = Device("d", iommu=iommu), table()
    (entry,) = dev.map_sgtable(sgt, BIDIR)
    with dev.views(entry.address + 5, PAGE, FROM) as pieces:
        assert sum(map(len, pieces)) == PAGE
        pieces[0][:3] = b"abc"
    with dev.views(entry.address + 5, 3, TO) as pieces:
        assert b"".join(pieces) == b"abc"
        assert pieces[0].readonly
    with dev.views(entry.address + 5, 3, BIDIR) as pieces:
        pieces[0][:1] = b"x"
    assert dev.read(entry.address + 5, 3) == b"xbc"


@pytest.mark.parametrize(("mapped", "wanted"), [(TO, FROM), (TO, BIDIR), (FROM, TO), (FROM, BIDIR)], ids=lambda way: way.name)
def test_views_against_the_direction_of_the_mapping_fault(mapped: Direction, wanted: Direction) -> None:
    dev, sgt = Device("d"), table()
    (entry,) = dev.map_sgtable(sgt, mapped)
    with raises_errno(errno.EFAULT), dev.views(entry.address, 1, wanted):
        pass


def test_views_past_the_end_of_a_mapping_fault() -> None:
    dev, sgt = Device("d"), table()
    (entry,) = dev.map_sgtable(sgt, BIDIR)
    with raises_errno(errno.EFAULT), dev.views(entry.address + 1, entry.length, TO):
        pass


@pytest.mark.parametrize("direction", [Direction.NONE, 4, -1])
def test_views_have_a_direction(direction: int) -> None:
    with raises_errno(errno.EINVAL), Device("d").views(PAGE, 1, direction):
        pass


def test_unmap_waits_for_views_and_new_ones_fault() -> None:
    dev, sgt, other = Device("d"), table(), table()
    (entry,) = dev.map_sgtable(sgt, BIDIR)
    dev.map_sgtable(other, BIDIR)
    inside = threading.Event()

    def unmap() -> None:
        inside.wait()
        dev.unmap_sgtable(sgt, BIDIR)

    with Background(unmap) as unmapping, dev.views(entry.address, PAGE, FROM) as pieces:
        inside.set()
        until(lambda: dev.statistics().windows == 1)
        unmapping.until_blocked()
        assert not unmapping.done
        with raises_errno(errno.EFAULT):
            dev.read(entry.address, 1)
        dev.unmap_sgtable(other, BIDIR)  # another mapping's end waits for nobody
        pieces[0][:1] = b"x"
    assert unmapping.done
    assert sgt.view(0)[:1] == b"x"


def test_unmap_inside_of_own_views_is_refused() -> None:
    dev, sgt = Device("d"), table()
    (entry,) = dev.map_sgtable(sgt, BIDIR)
    with dev.views(entry.address, PAGE, TO), pytest.raises(ContractError):
        dev.unmap_sgtable(sgt, BIDIR)
    dev.unmap_sgtable(sgt, BIDIR)
