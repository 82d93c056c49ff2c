"""SgTable: how pages become entries, and that the two sides are kept apart (semantics 1.7)."""

import errno
import re
import sys

import pytest

from dmabuf import ContractError, ContractWarning, Device, Direction, SgTable
from dmabuf.core.memory.scatterlist import MAX_SEGMENT, PAGE, DmaEntry, SgEntry, guard
from tests.support.errnos import raises_errno

TO = Direction.TO_DEVICE


def test_neighboring_pages_become_one_entry() -> None:
    sgt = SgTable.from_pages([3, 4, 5, 9, 10, 2])
    assert sgt.entries == (SgEntry(3, 0, 3 * PAGE), SgEntry(9, 0, 2 * PAGE), SgEntry(2, 0, PAGE))
    assert (sgt.orig_nents, sgt.nents, sgt.size) == (3, 0, 6 * PAGE)
    assert list(sgt.pages()) == [3, 4, 5, 9, 10, 2]


def test_offset_and_size_cut_the_first_and_the_last_page() -> None:
    sgt = SgTable.from_pages([1, 2, 8], offset=100, size=2 * PAGE)
    assert sgt.entries == (SgEntry(1, 100, 2 * PAGE - 100), SgEntry(8, 0, 100))


def test_what_size_leaves_out_is_no_entry() -> None:
    assert SgTable.from_pages([1, 5], size=10).entries == (SgEntry(1, 0, 10),)


def test_entries_are_no_longer_than_the_limit_in_whole_pages() -> None:
    sgt = SgTable.from_pages(range(5), max_segment=2 * PAGE + 17)
    assert [entry.length for entry in sgt.entries] == [2 * PAGE, 2 * PAGE, PAGE]


def test_a_range_that_begins_in_a_page_is_cut_at_page_ends() -> None:
    sgt = SgTable.from_ranges([(100, 3 * PAGE)], max_segment=PAGE)
    assert sgt.entries == (SgEntry(0, 100, PAGE - 100), SgEntry(1, 0, PAGE), SgEntry(2, 0, PAGE), SgEntry(3, 0, 100))


def test_a_gibibyte_in_one_piece_is_one_entry() -> None:
    assert SgTable.from_ranges([(0, 1 << 30)]).orig_nents == 1


def test_a_terabyte_is_cut_at_the_largest_segment() -> None:
    assert SgTable.from_ranges([(0, 1 << 34)]).entries[0].length == MAX_SEGMENT


@pytest.mark.parametrize("make", [lambda: SgTable.from_pages([]), lambda: SgTable.from_ranges([]), lambda: SgTable.from_dma([])])
def test_zero_entries_is_einval(make: object) -> None:
    with raises_errno(errno.EINVAL):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("limit", [0, 1, PAGE - 1])
def test_a_limit_below_a_page_warns_and_is_einval(limit: int) -> None:
    with pytest.warns(ContractWarning), raises_errno(errno.EINVAL):
        SgTable.from_pages([0], max_segment=limit)


@pytest.mark.parametrize("ranges", [[(-1, 5)], [(0, 0)], [(0, -5)]])
def test_what_is_no_range_is_einval(ranges: list[tuple[int, int]]) -> None:
    with raises_errno(errno.EINVAL):
        SgTable.from_ranges(ranges)


@pytest.mark.parametrize("arguments", [{"offset": PAGE}, {"offset": -1}, {"size": 0}, {"size": PAGE + 1}, {"offset": 1, "size": PAGE}])
def test_a_cut_outside_of_the_pages_is_einval(arguments: dict[str, int]) -> None:
    with raises_errno(errno.EINVAL):
        SgTable.from_pages([0], **arguments)  # type: ignore[arg-type]


def test_a_negative_page_is_einval() -> None:
    with raises_errno(errno.EINVAL):
        SgTable.from_pages([-1])


def test_the_bytes_of_an_entry_are_seen_through_it() -> None:
    memory = bytearray(4 * PAGE)
    sgt = SgTable.from_pages([2, 0], memory=memory)
    sgt.view(0)[:2] = b"ab"
    assert memory[2 * PAGE : 2 * PAGE + 2] == b"ab"


def test_a_page_outside_of_the_memory_is_einval() -> None:
    with raises_errno(errno.EINVAL):
        SgTable.from_pages([4], memory=bytearray(4 * PAGE)).view(0)


def test_a_table_without_memory_shows_no_bytes() -> None:
    with raises_errno(errno.EINVAL):
        SgTable.from_pages([4]).view(0)


def test_a_table_of_dma_addresses_alone_has_no_cpu_side() -> None:
    sgt = SgTable.from_dma([(0x1000, PAGE)])
    assert (sgt.orig_nents, sgt.nents, list(sgt)) == (0, 1, [DmaEntry(0x1000, PAGE)])


@pytest.mark.parametrize("entries", [[], [(0, PAGE), (PAGE, PAGE)], [(0, 0)], [(-1, PAGE)]])
def test_a_dma_side_that_does_not_fit_is_einval(entries: list[tuple[int, int]]) -> None:
    with raises_errno(errno.EINVAL):
        SgTable.from_pages([0]).set_dma(entries)


def test_a_hidden_cpu_side_raises_and_the_dma_side_works() -> None:
    sgt = SgTable.from_pages([1], memory=bytearray(2 * PAGE))
    sgt.set_dma([(0x5000, PAGE)])
    guard(sgt, "it is hidden")
    for look in (lambda: sgt.entries, lambda: sgt.memory, lambda: list(sgt.pages()), lambda: sgt.view(0), lambda: sgt.cpu_array()):
        with pytest.raises(ContractError, match="hidden"):
            look()
    assert (list(sgt), sgt.orig_nents, sgt.nents) == ([(0x5000, PAGE)], 1, 1)
    guard(sgt, None)
    assert sgt.entries == (SgEntry(1, 0, PAGE),)


@pytest.mark.parametrize("side", ["cpu_array", "dma_array"])
def test_arrays_without_numpy_name_the_extra(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numpy", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'dmabuf[numpy]'")):
        getattr(SgTable.from_pages([1]), side)()


def test_both_sides_as_arrays() -> None:
    pytest.importorskip("numpy")
    sgt = SgTable.from_pages([7, 9], memory=bytearray(16 * PAGE))
    Device("d").map_sgtable(sgt, TO)
    assert sgt.cpu_array()["page"].tolist() == [7, 9]
    assert sgt.dma_array()["length"].sum() == 2 * PAGE
    assert sgt.dma_array().dtype.names == ("address", "length")
