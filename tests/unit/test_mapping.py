"""Mapping: memory that can't go while somebody looks."""

from __future__ import annotations

import ctypes
import errno
import os
import pickle
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest

import dmabuf
from dmabuf._native import Mapping, buffer_address
from dmabuf.core.buffer.handle import handle_of
from tests.support.leaks import descriptors
from tests.support.mappings import PAGE, SIZE, mapped

LONG = 2 << 20  # above the size from which unmapping lets go of the GIL


def test_two_mappings_of_one_fd_show_the_same_bytes(fd: int, mapping: Mapping) -> None:
    with Mapping(fd, SIZE) as other:
        mapping[5] = 200
        assert other[5] == 200


def test_a_mapping_begins_at_its_offset(fd: int) -> None:
    os.pwrite(fd, b"here", PAGE)
    with Mapping(fd, PAGE, offset=PAGE) as mapping:
        assert mapping[:4] == b"here"
        assert len(mapping) == mapping.size == PAGE


def test_a_length_may_end_inside_the_last_page_of_the_file(fd: int) -> None:
    os.truncate(fd, PAGE + 1)
    with Mapping(fd, 2 * PAGE) as mapping:
        assert mapping[2 * PAGE - 1] == 0


def test_a_mapping_outlives_the_fd_and_holds_none() -> None:
    fd = os.memfd_create("test-mapping")
    os.truncate(fd, PAGE)
    before = descriptors()
    mapping = Mapping(fd, PAGE)
    assert descriptors() == before
    os.close(fd)
    mapping[0] = 1
    assert mapping[0] == 1
    mapping.close()


def test_the_address_is_where_the_bytes_are(mapping: Mapping) -> None:
    mapping[:3] = b"abc"
    assert ctypes.string_at(mapping.address, 3) == b"abc"
    assert buffer_address(mapping) == mapping.address


def test_the_buffer_is_flat_bytes(mapping: Mapping) -> None:
    with memoryview(mapping) as view:
        assert (view.ndim, view.format, view.itemsize, view.nbytes, view.readonly) == (1, "B", 1, SIZE, False)
        assert view.obj is mapping


def test_a_read_only_mapping_exports_read_only_bytes(fd: int) -> None:
    with Mapping(fd, SIZE, writable=False) as mapping, memoryview(mapping) as view:
        assert not mapping.writable
        assert view.readonly


def test_a_writable_request_on_a_read_only_mapping_is_refused(fd: int) -> None:
    with Mapping(fd, SIZE, writable=False) as mapping:
        with pytest.raises(BufferError):
            os.readv(fd, [mapping])
        assert mapping.exports == 0


def test_exports_are_counted(mapping: Mapping) -> None:
    views = [memoryview(mapping) for _ in range(3)]
    assert mapping.exports == 3
    for left, view in zip((2, 1, 0), views, strict=True):
        view.release()
        assert mapping.exports == left


def test_a_slice_that_outlives_its_view_still_counts(mapping: Mapping) -> None:
    view = memoryview(mapping)
    part = view[10:20]
    view.release()
    assert mapping.exports == 1
    part.release()
    assert mapping.exports == 0


def test_close_with_an_export_is_refused_and_changes_nothing(mapping: Mapping) -> None:
    with memoryview(mapping) as view:
        with pytest.raises(BufferError):
            mapping.close()
        view[0] = 7
        assert mapping[0] == 7


def test_close_with_an_open_block_is_refused() -> None:
    with dmabuf.allocate(PAGE) as buf:
        with buf.read():
            mapping = handle_of(buf).view
            assert mapping is not None
            assert mapping.views == 1
            with pytest.raises(BufferError):
                mapping.close()
        assert mapping.views == 0
        mapping.close()
        with buf.read() as view:  # through another mapping
            assert view[0] == 0


@pytest.mark.parametrize("length", [PAGE, LONG])
def test_close_unmaps(fd: int, length: int) -> None:
    os.truncate(fd, length)
    mapping = Mapping(fd, length)
    address = mapping.address
    assert mapped(address)
    mapping.close()
    assert mapping.closed
    assert not mapped(address)


@pytest.mark.parametrize("length", [PAGE, LONG])
def test_a_dropped_mapping_unmaps(fd: int, length: int) -> None:
    os.truncate(fd, length)
    mapping = Mapping(fd, length)
    address = mapping.address
    del mapping
    assert not mapped(address)


def test_close_is_idempotent(mapping: Mapping) -> None:
    mapping.close()
    mapping.close()


def test_the_with_block_closes(fd: int) -> None:
    with Mapping(fd, SIZE) as mapping:
        assert not mapping.closed
    assert mapping.closed


def test_an_exception_in_the_with_block_is_not_lost_behind_a_live_view(fd: int) -> None:
    mapping = Mapping(fd, SIZE)
    view = memoryview(mapping)
    with pytest.raises(BufferError) as caught, mapping:
        raise KeyError("the body's")
    assert isinstance(caught.value.__context__, KeyError)
    view.release()
    mapping.close()


@pytest.mark.parametrize(
    "use",
    [
        pytest.param(lambda m: memoryview(m), id="memoryview"),
        pytest.param(lambda m: len(m), id="len"),
        pytest.param(lambda m: m.size, id="size"),
        pytest.param(lambda m: m.writable, id="writable"),
        pytest.param(lambda m: m.address, id="address"),
        pytest.param(lambda m: m[0], id="index"),
        pytest.param(lambda m: m[:1], id="slice"),
        pytest.param(lambda m: m.__setitem__(0, 1), id="store"),
        pytest.param(lambda m: m.__enter__(), id="with"),
        pytest.param(lambda m: buffer_address(m), id="buffer_address"),
    ],
)
def test_a_closed_mapping_refuses(mapping: Mapping, use: Callable[[Mapping], object]) -> None:
    mapping.close()
    with pytest.raises(ValueError, match="closed"):
        use(mapping)


def test_a_closed_mapping_still_answers_what_it_is(mapping: Mapping) -> None:
    mapping.close()
    assert mapping.closed
    assert (mapping.exports, mapping.views) == (0, 0)
    assert "closed" in repr(mapping)


def fails_with(number: int, *args: Any, **kwargs: Any) -> OSError:
    with pytest.raises(OSError) as caught:
        Mapping(*args, **kwargs).close()
    assert caught.value.errno == number
    return caught.value


def test_a_length_of_zero_is_einval(fd: int) -> None:
    fails_with(errno.EINVAL, fd, 0)


def test_a_negative_length_is_einval(fd: int) -> None:
    fails_with(errno.EINVAL, fd, -PAGE)


def test_an_offset_inside_a_page_is_einval_and_named(fd: int) -> None:
    assert str(PAGE) in str(fails_with(errno.EINVAL, fd, PAGE, offset=100))


def test_a_negative_offset_is_einval(fd: int) -> None:
    fails_with(errno.EINVAL, fd, PAGE, offset=-PAGE)


def test_a_range_beyond_the_file_is_einval_instead_of_sigbus(fd: int) -> None:
    fails_with(errno.EINVAL, fd, SIZE + 1)


def test_an_offset_at_the_end_of_the_file_is_einval(fd: int) -> None:
    fails_with(errno.EINVAL, fd, PAGE, offset=SIZE)


def test_a_range_that_wraps_is_einval(fd: int) -> None:
    fails_with(errno.EINVAL, fd, sys.maxsize, offset=sys.maxsize // PAGE * PAGE)


def test_a_closed_fd_is_ebadf(fd: int) -> None:
    spare = os.dup(fd)
    os.close(spare)
    fails_with(errno.EBADF, spare, PAGE)


def test_a_negative_fd_is_ebadf() -> None:
    fails_with(errno.EBADF, -1, PAGE)


def test_a_file_that_cannot_be_mapped_is_enodev() -> None:
    reader, writer = os.pipe()
    try:
        fails_with(errno.ENODEV, reader, PAGE, writable=False)
    finally:
        os.close(reader)
        os.close(writer)


def test_a_writable_mapping_of_a_read_only_fd_is_eacces(fd: int) -> None:
    reader = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    try:
        assert isinstance(fails_with(errno.EACCES, reader, PAGE), PermissionError)
        Mapping(reader, PAGE, writable=False).close()
    finally:
        os.close(reader)


def test_an_fd_that_is_no_int_is_a_type_error() -> None:
    with pytest.raises(TypeError):
        Mapping("3", PAGE)  # type: ignore[arg-type, unused-ignore]


def test_offset_is_keyword_only(fd: int) -> None:
    with pytest.raises(TypeError):
        Mapping(fd, PAGE, 0)  # type: ignore[misc, call-arg, unused-ignore]


def test_indices_are_those_of_bytes(mapping: Mapping) -> None:
    mapping[:8] = b"01234567"
    mapping[-1] = 9
    whole = bytes(mapping)
    assert [mapping[i] for i in (0, 7, -1, -SIZE)] == [whole[i] for i in (0, 7, -1, -SIZE)]
    for part in (slice(2, 5), slice(None, None, 1000), slice(7, None, -2), slice(5, 2), slice(-3, None), slice(SIZE, 9 * SIZE)):
        assert mapping[part] == whole[part]


def test_a_strided_slice_is_stored_where_it_is_read(mapping: Mapping) -> None:
    mapping[6:0:-2] = b"abc"
    assert mapping[:8] == b"\0\0c\0b\0a\0"


def test_an_overlapping_store_moves(mapping: Mapping) -> None:
    mapping[:6] = b"abcdef"
    with memoryview(mapping) as view:
        mapping[2:6] = view[:4]
    assert mapping[:6] == b"ababcd"


@pytest.mark.parametrize("index", [SIZE, -SIZE - 1, 1 << 80])
def test_an_index_outside_is_an_index_error(mapping: Mapping, index: int) -> None:
    with pytest.raises(IndexError):
        mapping[index]


def test_an_index_that_is_no_int_is_a_type_error(mapping: Mapping) -> None:
    with pytest.raises(TypeError):
        mapping["0"]  # type: ignore[call-overload, unused-ignore]


@pytest.mark.parametrize("byte", [-1, 256, 1 << 80])
def test_a_stored_value_that_is_no_byte_is_a_value_error(mapping: Mapping, byte: int) -> None:
    with pytest.raises(ValueError, match="byte"):
        mapping[0] = byte


def test_a_store_of_another_size_is_a_value_error(mapping: Mapping) -> None:
    with pytest.raises(ValueError, match="size"):
        mapping[:3] = b"four"


def test_bytes_cannot_be_deleted(mapping: Mapping) -> None:
    with pytest.raises(TypeError):
        del mapping[0]  # type: ignore[attr-defined, unused-ignore]


def test_a_store_into_a_read_only_mapping_is_a_type_error(fd: int) -> None:
    with Mapping(fd, SIZE, writable=False) as mapping, pytest.raises(TypeError):
        mapping[0] = 1


class Closer:
    """An index that closes the mapping while it is being evaluated."""

    def __init__(self, mapping: Mapping) -> None:
        self.mapping = mapping

    def __index__(self) -> int:
        self.mapping.close()
        return 0


def test_an_index_that_closes_the_mapping_does_not_read_it(mapping: Mapping) -> None:
    with pytest.raises(ValueError, match="closed"):
        mapping[Closer(mapping)]


def test_a_slice_that_closes_the_mapping_does_not_read_it(mapping: Mapping) -> None:
    with pytest.raises(ValueError, match="closed"):
        mapping[Closer(mapping) :]  # type: ignore[misc, unused-ignore]


def test_a_slice_that_closes_the_mapping_does_not_write_it(mapping: Mapping) -> None:
    with pytest.raises(ValueError, match="closed"):
        mapping[Closer(mapping) : 1] = b"x"  # type: ignore[misc, unused-ignore]


def test_a_mapping_can_be_referred_to_weakly(fd: int) -> None:
    mapping = Mapping(fd, PAGE)
    reference = weakref.ref(mapping)
    assert reference() is mapping
    del mapping
    assert reference() is None


def test_a_mapping_is_not_pickled(mapping: Mapping) -> None:
    with pytest.raises(TypeError):
        pickle.dumps(mapping)


def test_a_child_keeps_the_memory_it_inherited(mapping: Mapping) -> None:
    pid = os.fork()
    if pid == 0:
        mapping[0] = 42
        mapping.close()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert mapping[0] == 42


def test_threads_that_close_one_mapping_close_it_once(fd: int) -> None:
    os.truncate(fd, LONG)
    for _ in range(50):
        mapping = Mapping(fd, LONG)
        threads = [threading.Thread(target=mapping.close) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert mapping.closed


def test_buffer_address_needs_a_buffer() -> None:
    with pytest.raises(TypeError):
        buffer_address(5)  # type: ignore[arg-type, unused-ignore]


def test_buffer_address_needs_contiguous_memory() -> None:
    with pytest.raises(BufferError):
        buffer_address(memoryview(b"abcdef")[::2])


@pytest.mark.parametrize(("offset", "length"), [(0, SIZE), (PAGE, PAGE), (2 * PAGE, 2 * PAGE)])
def test_part_mapped_from_start_shows_part_and_is_unmapped_whole(fd: int, offset: int, length: int) -> None:
    os.pwrite(fd, b"here", offset)
    with Mapping(fd, length, offset=offset, from_start=True) as part:
        assert (part.size, part[:4]) == (length, b"here")
        part[length - 1] = 7
    assert os.pread(fd, 1, offset + length - 1) == b"\7"


def test_a_part_from_the_start_beyond_the_address_range_is_einval(fd: int) -> None:
    with pytest.raises(OSError) as caught:
        Mapping(fd, sys.maxsize // PAGE * PAGE, offset=PAGE, from_start=True)
    assert caught.value.errno == errno.EINVAL
