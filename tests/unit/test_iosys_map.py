"""IosysMap does what the kernel's does (semantics 1.11), and answers where the kernel would fault."""

from __future__ import annotations

import copy
import ctypes
import errno
import sys
from collections.abc import Callable
from typing import Any

import pytest

from dmabuf._native import buffer_address
from dmabuf.core.memory.iosys_map import IosysMap
from dmabuf.errors import DmaBufError

SIZE = 64
WIDTHS = {"u8": 1, "u16": 2, "u32": 4, "u64": 8}


class Inner(ctypes.Structure):
    _fields_ = [("low", ctypes.c_uint16), ("high", ctypes.c_uint16)]


class Header(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_uint8),  # 0
        ("count", ctypes.c_uint32),  # 4
        ("total", ctypes.c_uint64),  # 8
        ("delta", ctypes.c_int32),  # 16
        ("inner", Inner),  # 20
        ("flag", ctypes.c_uint32, 3),  # 24, a bit field
        ("ratio", ctypes.c_double),  # 32
        ("words", ctypes.c_uint32 * 2),  # 40
        ("link", ctypes.POINTER(ctypes.c_uint32)),  # 48
    ]


class Longer(Header):
    _fields_ = [("tail", ctypes.c_uint16)]


class Big(ctypes.BigEndianStructure):
    _fields_ = [("count", ctypes.c_uint32)]


class Little(ctypes.LittleEndianStructure):
    _fields_ = [("count", ctypes.c_uint32)]


@pytest.fixture
def memory() -> bytearray:
    return bytearray(range(SIZE))


@pytest.fixture(params=["system", "iomem"])
def map_(request: pytest.FixtureRequest, memory: bytearray) -> IosysMap:
    return IosysMap.init_vaddr(memory) if request.param == "system" else IosysMap.init_vaddr_iomem(memory)


def fails_with(number: int, call: Callable[..., object], *args: Any, **kwargs: Any) -> None:
    with pytest.raises(DmaBufError) as caught:
        call(*args, **kwargs)
    assert caught.value.errno == number


# ------------------------------------------------------ address and kind


def test_a_new_map_is_null_and_of_system_memory() -> None:
    new = IosysMap()
    assert (new.is_null(), new.is_set(), new.is_iomem, new.address) == (True, False, False, 0)
    assert new.vaddr is None
    assert new.vaddr_iomem is None


def test_set_vaddr_points_to_the_buffer(memory: bytearray) -> None:
    new = IosysMap()
    new.set_vaddr(memory)
    assert (new.is_null(), new.is_set(), new.is_iomem) == (False, True, False)
    assert new.address == buffer_address(memory)
    assert bytes(new.vaddr or b"") == memory
    assert new.vaddr_iomem is None


def test_set_vaddr_iomem_sets_the_flag(memory: bytearray) -> None:
    new = IosysMap()
    new.set_vaddr_iomem(memory)
    assert (new.is_set(), new.is_iomem) == (True, True)
    assert new.vaddr is None
    assert bytes(new.vaddr_iomem or b"") == memory


def test_set_vaddr_clears_the_flag(memory: bytearray) -> None:
    new = IosysMap.init_vaddr_iomem(memory)
    new.set_vaddr(memory)
    assert not new.is_iomem


def test_set_vaddr_to_null_is_null_of_its_kind() -> None:
    new = IosysMap()
    new.set_vaddr_iomem(None)
    assert (new.is_null(), new.is_iomem) == (True, True)


def test_clear_makes_it_null_and_of_system_memory(map_: IosysMap) -> None:
    map_.incr(3)
    map_.clear()
    assert (map_.is_null(), map_.is_iomem, map_.address) == (True, False, 0)


def test_clear_lets_the_buffer_go(memory: bytearray, map_: IosysMap) -> None:
    with pytest.raises(BufferError):
        memory.append(0)
    map_.clear()
    memory.append(0)


def test_a_map_survives_the_release_of_the_view_it_was_made_of(memory: bytearray) -> None:
    view = memoryview(memory)
    new = IosysMap.init_vaddr(view)
    view.release()
    assert new.rd(1, "u8") == 1


def test_an_identity_may_differ_from_the_address_here(memory: bytearray) -> None:
    new = IosysMap.init_vaddr_iomem(memory, address=0xFEE00000)
    new.incr(0x10)
    assert new.address == 0xFEE00010


def test_maps_of_one_address_and_kind_are_equal(memory: bytearray) -> None:
    one, other = IosysMap.init_vaddr(memory), IosysMap.init_vaddr(memoryview(memory)[: SIZE // 2])
    assert one.is_equal(other)
    assert one == other


def test_maps_of_two_addresses_are_not_equal(memory: bytearray) -> None:
    one, other = IosysMap.init_vaddr(memory), IosysMap.init_vaddr(memoryview(memory)[1:])
    assert not one.is_equal(other)
    assert one != other


def test_the_same_address_reached_by_incr_is_equal(memory: bytearray) -> None:
    one, other = IosysMap.init_vaddr(memory), IosysMap.init_vaddr(memoryview(memory)[8:])
    one.incr(8)
    assert one.is_equal(other)


def test_system_and_io_maps_of_one_address_are_not_equal(memory: bytearray) -> None:
    assert not IosysMap.init_vaddr(memory).is_equal(IosysMap.init_vaddr_iomem(memory))


def test_system_and_io_maps_are_not_equal_even_if_null() -> None:
    assert not IosysMap.init_vaddr(None).is_equal(IosysMap.init_vaddr_iomem(None))


def test_null_maps_of_one_kind_are_equal() -> None:
    assert IosysMap().is_equal(IosysMap.init_vaddr(None))


def test_a_map_equals_nothing_else() -> None:
    assert IosysMap() != 0
    with pytest.raises(TypeError):
        IosysMap().is_equal(0)  # type: ignore[arg-type]


def test_a_map_is_not_hashable() -> None:
    with pytest.raises(TypeError):
        hash(IosysMap())


@pytest.mark.parametrize("duplicate", [IosysMap.copy, copy.copy, lambda m: IosysMap.init_offset(m, 0)])
def test_a_copy_is_equal_and_moves_by_itself(map_: IosysMap, duplicate: Callable[[IosysMap], IosysMap]) -> None:
    other = duplicate(map_)
    assert other.is_equal(map_)
    other.incr(1)
    assert not other.is_equal(map_)
    map_.clear()
    assert other.rd(0, "u8") == 1


def test_init_offset_leaves_the_original(map_: IosysMap) -> None:
    before = map_.address
    other = IosysMap.init_offset(map_, 16)
    assert (other.address, map_.address) == (before + 16, before)
    assert other.is_iomem == map_.is_iomem
    assert other.rd(0, "u8") == 16


def test_incr_adds_up(map_: IosysMap) -> None:
    before = map_.address
    map_.incr(5)
    map_.incr(7)
    assert map_.address == before + 12
    assert map_.rd(0, "u8") == 12
    assert bytes(map_.vaddr or map_.vaddr_iomem or b"") == bytes(range(12, SIZE))


def test_incr_may_reach_the_end(map_: IosysMap) -> None:
    map_.incr(SIZE)
    assert map_.is_set()
    fails_with(errno.EFAULT, map_.rd, 0, "u8")


def test_incr_beyond_the_end_is_efault_and_moves_nothing(map_: IosysMap) -> None:
    before = map_.address
    fails_with(errno.EFAULT, map_.incr, SIZE + 1)
    assert map_.address == before


def test_incr_by_a_negative_number_is_einval(map_: IosysMap) -> None:
    fails_with(errno.EINVAL, map_.incr, -1)


def test_init_offset_beyond_the_end_is_efault(map_: IosysMap) -> None:
    fails_with(errno.EFAULT, IosysMap.init_offset, map_, SIZE + 1)


@pytest.mark.parametrize("setter", [IosysMap.init_vaddr, IosysMap.init_vaddr_iomem])
class TestSetters:
    def test_an_empty_buffer_is_einval(self, setter: Callable[..., IosysMap]) -> None:
        fails_with(errno.EINVAL, setter, b"")

    def test_a_buffer_with_gaps_is_einval(self, setter: Callable[..., IosysMap], memory: bytearray) -> None:
        fails_with(errno.EINVAL, setter, memoryview(memory)[::2])

    @pytest.mark.parametrize("address", [0, -1])
    def test_an_address_that_is_not_positive_is_einval(self, setter: Callable[..., IosysMap], memory: bytearray, address: int) -> None:
        fails_with(errno.EINVAL, setter, memory, address=address)

    def test_an_address_of_nothing_is_einval(self, setter: Callable[..., IosysMap]) -> None:
        fails_with(errno.EINVAL, setter, None, address=4096)

    def test_a_thing_without_bytes_is_a_type_error(self, setter: Callable[..., IosysMap]) -> None:
        with pytest.raises(TypeError):
            setter(4096)


def test_a_failed_set_leaves_the_map(map_: IosysMap, memory: bytearray) -> None:
    before = map_.address
    fails_with(errno.EINVAL, map_.set_vaddr, b"")
    assert map_.address == before


def test_items_of_a_wider_buffer_are_seen_as_bytes() -> None:
    words = memoryview(bytearray(SIZE)).cast("I")
    new = IosysMap.init_vaddr(words)
    new.wr(4, "u32", 0x01020304)
    assert words[1] == 0x01020304


# -------------------------------------------------------------------- bytes


def test_memcpy_to_copies_to_the_offset(map_: IosysMap, memory: bytearray) -> None:
    map_.incr(2)
    map_.memcpy_to(3, b"abcdef", 4)
    assert memory == bytes(range(5)) + b"abcd" + bytes(range(9, SIZE))


def test_memcpy_to_without_a_length_copies_all(map_: IosysMap, memory: bytearray) -> None:
    map_.memcpy_to(SIZE - 2, b"ab")
    assert memory[-3:] == bytes((SIZE - 3,)) + b"ab"


def test_memcpy_from_copies_from_the_offset(map_: IosysMap) -> None:
    target = bytearray(6)
    map_.incr(2)
    map_.memcpy_from(target, 3, 4)
    assert target == bytes((5, 6, 7, 8, 0, 0))


def test_memcpy_from_without_a_length_fills_the_target(map_: IosysMap) -> None:
    target = bytearray(6)
    map_.memcpy_from(target, SIZE - 6)
    assert target == bytes(range(SIZE - 6, SIZE))


def test_memset_sets_the_range(map_: IosysMap, memory: bytearray) -> None:
    map_.memset(4, 0xAA, 3)
    assert memory == bytes(range(4)) + b"\xaa\xaa\xaa" + bytes(range(7, SIZE))


@pytest.mark.parametrize(
    "call",
    [
        lambda m: m.memcpy_to(SIZE, b""),
        lambda m: m.memcpy_from(bytearray(), SIZE),
        lambda m: m.memset(SIZE, 0, 0),
        lambda m: m.incr(0),
    ],
    ids=["memcpy_to", "memcpy_from", "memset", "incr"],
)
def test_nothing_may_be_moved_at_the_end(map_: IosysMap, memory: bytearray, call: Callable[[IosysMap], None]) -> None:
    call(map_)
    assert memory == bytes(range(SIZE))


@pytest.mark.parametrize("width", WIDTHS)
def test_rd_reads_the_machines_byte_order_at_any_offset(map_: IosysMap, memory: bytearray, width: Any) -> None:
    for offset in (0, 1, 3, SIZE - WIDTHS[width]):
        assert map_.rd(offset, width) == int.from_bytes(memory[offset : offset + WIDTHS[width]], sys.byteorder)


@pytest.mark.parametrize("width", WIDTHS)
def test_wr_writes_what_rd_reads_and_nothing_beside(map_: IosysMap, memory: bytearray, width: Any) -> None:
    size = WIDTHS[width]
    for value in (0, 1, (1 << 8 * size) - 1):
        map_.wr(5, width, value)
        assert map_.rd(5, width) == value
        assert memory == bytes(range(5)) + value.to_bytes(size, sys.byteorder) + bytes(range(5 + size, SIZE))


@pytest.mark.parametrize(
    ("field", "offset", "size"), [("kind", 0, 1), ("count", 4, 4), ("total", 8, 8), ("inner.low", 20, 2), ("inner.high", 22, 2)]
)
def test_a_field_is_where_the_structure_has_it(map_: IosysMap, memory: bytearray, field: str, offset: int, size: int) -> None:
    value = (1 << 8 * size) - 2
    map_.wr_field(3, Header, field, value)
    assert memory[3 + offset : 3 + offset + size] == value.to_bytes(size, sys.byteorder)
    assert map_.rd_field(3, Header, field) == value


def test_a_signed_field_keeps_its_sign(map_: IosysMap) -> None:
    map_.wr_field(0, Header, "delta", -5)
    assert map_.rd_field(0, Header, "delta") == -5
    assert Header.from_buffer_copy(map_.vaddr or map_.vaddr_iomem or b"").delta == -5


def test_a_field_of_a_base_structure_is_found(map_: IosysMap) -> None:
    assert map_.rd_field(0, Longer, "count") == map_.rd(4, "u32")


# ------------------------------------------------- what each call refuses

CALLS: dict[str, Callable[[IosysMap, int], object]] = {
    "memcpy_to": lambda m, offset: m.memcpy_to(offset, b"ab"),
    "memcpy_from": lambda m, offset: m.memcpy_from(bytearray(2), offset),
    "memset": lambda m, offset: m.memset(offset, 0, 2),
    "rd": lambda m, offset: m.rd(offset, "u16"),
    "wr": lambda m, offset: m.wr(offset, "u16", 0),
    "rd_field": lambda m, offset: m.rd_field(offset, Inner, "low"),
    "wr_field": lambda m, offset: m.wr_field(offset, Inner, "low", 0),
}
WRITES = ("memcpy_to", "memset", "wr", "wr_field")


@pytest.mark.parametrize("name", CALLS)
def test_the_last_bytes_may_be_touched(map_: IosysMap, name: str) -> None:
    CALLS[name](map_, SIZE - 2)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("offset", [SIZE - 1, SIZE, 1 << 80])
def test_bytes_beyond_the_end_are_efault(map_: IosysMap, memory: bytearray, name: str, offset: int) -> None:
    fails_with(errno.EFAULT, CALLS[name], map_, offset)
    assert memory == bytes(range(SIZE))


@pytest.mark.parametrize("name", CALLS)
def test_a_negative_offset_is_einval(map_: IosysMap, name: str) -> None:
    map_.incr(8)
    fails_with(errno.EINVAL, CALLS[name], map_, -1)


@pytest.mark.parametrize("name", CALLS)
def test_a_null_map_is_efault(name: str) -> None:
    fails_with(errno.EFAULT, CALLS[name], IosysMap(), 0)


def test_incr_of_a_null_map_is_efault() -> None:
    fails_with(errno.EFAULT, IosysMap().incr, 0)


@pytest.mark.parametrize("name", CALLS)
def test_an_offset_that_is_no_int_is_a_type_error(map_: IosysMap, name: str) -> None:
    with pytest.raises(TypeError):
        CALLS[name](map_, "0")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", WRITES)
def test_writing_to_read_only_memory_is_eacces(name: str) -> None:
    fails_with(errno.EACCES, CALLS[name], IosysMap.init_vaddr(bytes(SIZE)), 0)


@pytest.mark.parametrize("name", [name for name in CALLS if name not in WRITES])
def test_reading_read_only_memory_is_fine(name: str) -> None:
    CALLS[name](IosysMap.init_vaddr(bytes(SIZE)), 0)


def test_memcpy_to_of_more_than_the_source_has_is_einval(map_: IosysMap) -> None:
    fails_with(errno.EINVAL, map_.memcpy_to, 0, b"ab", 3)


def test_memcpy_to_of_a_negative_length_is_einval(map_: IosysMap) -> None:
    fails_with(errno.EINVAL, map_.memcpy_to, 0, b"ab", -1)


def test_memcpy_to_of_a_source_with_gaps_is_einval(map_: IosysMap) -> None:
    fails_with(errno.EINVAL, map_.memcpy_to, 0, memoryview(b"abcd")[::2])


def test_memcpy_from_into_a_shorter_target_is_einval(map_: IosysMap) -> None:
    fails_with(errno.EINVAL, map_.memcpy_from, bytearray(2), 0, 3)


def test_memcpy_from_of_a_negative_length_is_einval(map_: IosysMap) -> None:
    fails_with(errno.EINVAL, map_.memcpy_from, bytearray(2), 0, -1)


def test_memcpy_from_into_a_read_only_target_is_einval(map_: IosysMap) -> None:
    fails_with(errno.EINVAL, map_.memcpy_from, bytes(2), 0)


@pytest.mark.parametrize("value", [-1, 256])
def test_memset_to_what_is_no_byte_is_einval(map_: IosysMap, value: int) -> None:
    fails_with(errno.EINVAL, map_.memset, 0, value, 1)


def test_memset_of_a_negative_length_is_einval(map_: IosysMap) -> None:
    fails_with(errno.EINVAL, map_.memset, 0, 0, -1)


@pytest.mark.parametrize("length", [SIZE + 1, 1 << 80])
def test_memset_of_more_than_there_is_is_efault_before_anything_is_made(map_: IosysMap, length: int) -> None:
    fails_with(errno.EFAULT, map_.memset, 0, 0, length)


def test_rd_of_an_unknown_width_is_einval(map_: IosysMap) -> None:
    fails_with(errno.EINVAL, map_.rd, 0, "u128")


def test_wr_of_an_unknown_width_is_einval(map_: IosysMap) -> None:
    fails_with(errno.EINVAL, map_.wr, 0, "s8", 0)


@pytest.mark.parametrize("width", WIDTHS)
def test_wr_of_a_value_that_does_not_fit_is_einval(map_: IosysMap, memory: bytearray, width: Any) -> None:
    for value in (-1, 1 << 8 * WIDTHS[width]):
        fails_with(errno.EINVAL, map_.wr, 0, width, value)
    assert memory == bytes(range(SIZE))


def test_wr_of_what_is_no_int_is_a_type_error(map_: IosysMap) -> None:
    with pytest.raises(TypeError):
        map_.wr(0, "u8", 1.5)  # type: ignore[arg-type]


def test_wr_field_of_a_value_that_does_not_fit_is_einval(map_: IosysMap) -> None:
    fails_with(errno.EINVAL, map_.wr_field, 0, Header, "kind", 256)


@pytest.mark.parametrize(
    "field",
    ["nothing", "", ".", "kind.low", "inner", "inner.nothing", "flag", "ratio", "words", "link"],
)
def test_a_field_that_is_no_integer_of_its_own_is_einval(map_: IosysMap, field: str) -> None:
    fails_with(errno.EINVAL, map_.rd_field, 0, Header, field)


def test_a_field_in_the_other_byte_order_is_einval(map_: IosysMap) -> None:
    native, swapped = (Little, Big) if sys.byteorder == "little" else (Big, Little)
    assert map_.rd_field(0, native, "count") == map_.rd(0, "u32")
    fails_with(errno.EINVAL, map_.rd_field, 0, swapped, "count")


@pytest.mark.parametrize("kind", [ctypes.c_uint32, int, "Header", None])
def test_a_field_of_what_is_no_structure_is_a_type_error(map_: IosysMap, kind: Any) -> None:
    with pytest.raises(TypeError):
        map_.rd_field(0, kind, "count")


def test_the_repr_says_what_it_is(memory: bytearray) -> None:
    assert repr(IosysMap()) == "<IosysMap NULL, system>"
    assert repr(IosysMap.init_vaddr_iomem(memory, address=0x1000)) == f"<IosysMap 0x1000, iomem, {SIZE} bytes>"
