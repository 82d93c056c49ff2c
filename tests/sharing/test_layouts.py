"""A buffer's layout lives in the domain: every process that gets the buffer, in whatever way, finds it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from multiprocessing import resource_sharer
from typing import Any

import pytest

import dmabuf
from dmabuf import ImageLayout, TensorLayout, _native
from dmabuf.core.buffer.handle import handle_of
from dmabuf.errors import ExistsError, InvalidError
from dmabuf.layout.stored import Layout
from tests.support.apart import Apart
from tests.support.children import Parent, Spawn
from tests.support.drivers import Dynamic
from tests.support.errnos import raises_errno
from tests.support.steps import fork, reap

PICTURE = ImageLayout.linear("NV12", 64, 16)
APART = ImageLayout.linear("NV12", 64, 16, apart=True)
TENSOR = TensorLayout("float32", (3, 5))


@pytest.fixture
def described() -> Iterator[dmabuf.DmaBuf]:
    with dmabuf.allocate(layout=PICTURE, name="picture") as buf:
        yield buf


# ---- allocating ----


def test_allocate_by_layout_has_its_size_and_layout(described: dmabuf.DmaBuf) -> None:
    assert described.layout == PICTURE
    assert described.layout_part == 0
    assert described.size >= PICTURE.sizes[0]
    assert described.name == "picture"


def test_allocate_by_shape_has_a_tensor_without_gaps() -> None:
    with dmabuf.allocate(shape=(3, 5), dtype="float32") as buf:
        assert buf.layout == TENSOR
    with dmabuf.allocate(shape=7, dtype="int64") as buf:
        assert buf.layout == TensorLayout("int64", (7,))


def test_allocate_by_size_has_no_layout() -> None:
    with dmabuf.allocate(4096) as buf:
        assert buf.layout is None
        assert buf.layout_part == 0


def test_allocate_may_ask_for_more_than_the_layout_needs() -> None:
    with dmabuf.allocate(1 << 16, layout=TENSOR) as buf:
        assert (buf.size, buf.layout) == (1 << 16, TENSOR)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"size": 59, "layout": TENSOR}, "needs 60 bytes"),
        ({"layout": TENSOR, "shape": (3,)}, "a shape or a dtype is given too"),
        ({"layout": TENSOR, "dtype": "uint8"}, "a shape or a dtype is given too"),
        ({"shape": (3,)}, "it has no dtype"),
        ({"dtype": "uint8"}, "it has no shape"),
        ({"shape": (3,), "dtype": "float"}, "'float' doesn't say how many bits"),
        ({"shape": (0, 4), "dtype": "uint8"}, "no elements"),
        ({"layout": APART}, "spread over 2 buffers"),
    ],
)
def test_allocate_with_a_bad_layout_is_einval(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidError, match=says):
        dmabuf.allocate(**options)


@pytest.mark.parametrize("options", [{"layout": "NV12"}, {"layout": TENSOR, "size": "1"}, {"shape": (1.5,), "dtype": "uint8"}, {}])
def test_allocate_with_another_type_is_typeerror(options: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        dmabuf.allocate(**options)


def on_another_heap() -> tuple[Layout | None, str]:
    with dmabuf.allocate(layout=TENSOR, heap="spill") as buf:
        return buf.layout, buf.home


def test_allocate_on_another_heap_has_its_layout(apart: Apart) -> None:
    assert apart(on_another_heap) == (TENSOR, "exported")


# ---- several buffers ----


def test_allocate_planes_makes_a_buffer_for_each_part() -> None:
    bufs = dmabuf.allocate_planes(APART, name="camera")
    try:
        assert [(buf.layout, buf.layout_part, buf.name) for buf in bufs] == [(APART, 0, "camera"), (APART, 1, "camera:1")]
        assert [buf.size >= size for buf, size in zip(bufs, APART.sizes, strict=True)] == [True, True]
        with dmabuf.access(write=list(bufs)) as views:
            APART.planes(views)[1][:] = 7
        with bufs[1].read() as view:
            assert view[0] == 7
    finally:
        for buf in bufs:
            buf.close()


def test_allocate_planes_that_fails_leaves_nothing() -> None:
    before = len(dmabuf.buffers())
    with pytest.raises(InvalidError, match="31 bytes"):
        dmabuf.allocate_planes(APART, name="x" * 31)  # too long for the second
    assert len(dmabuf.buffers()) == before


def test_allocate_planes_of_a_tensor_is_typeerror() -> None:
    with pytest.raises(TypeError, match="ImageLayout"):
        dmabuf.allocate_planes(TENSOR)  # type: ignore[arg-type]


# ---- describing ----


def test_describe_gives_a_layout_once() -> None:
    with dmabuf.allocate(4096) as buf, dmabuf.get(buf.fileno()) as again:
        assert again.layout is None
        buf.describe(TENSOR)
        buf.describe(TENSOR)
        assert again.layout == buf.layout == TENSOR
        with pytest.raises(ExistsError, match="another layout: float32"):
            again.describe(TensorLayout("float32", (5, 3)))
        assert buf.layout == TENSOR


def test_describe_says_which_part_it_is() -> None:
    with dmabuf.allocate(4096) as buf:
        buf.describe(APART, 1)
        assert (buf.layout, buf.layout_part) == (APART, 1)
        with pytest.raises(ExistsError):
            buf.describe(APART, 0)


@pytest.mark.parametrize(
    ("layout", "part", "says"),
    [
        (PICTURE, 1, "1 buffers, and there is no part 1"),
        (PICTURE, -1, "no part -1"),
        (TensorLayout("uint8", (4097,)), 0, "needs 4097 bytes"),
    ],
)
def test_describe_with_a_bad_argument_is_einval(layout: Layout, part: int, says: str) -> None:
    with dmabuf.allocate(4096) as buf:
        with pytest.raises(InvalidError, match=says):
            buf.describe(layout, part)
        assert buf.layout is None


def test_describe_with_something_else_is_typeerror() -> None:
    with dmabuf.allocate(4096) as buf, pytest.raises(TypeError, match="ImageLayout or a TensorLayout"):
        buf.describe("NV12")  # type: ignore[arg-type]


def test_layout_of_a_closed_buffer_is_ebadf(described: dmabuf.DmaBuf) -> None:
    described.close()
    for use in (lambda: described.layout, lambda: described.layout_part, lambda: described.describe(PICTURE)):
        with raises_errno(errno.EBADF):
            use()


def test_buffer_of_an_exporter_has_a_layout() -> None:
    exporter = Dynamic()
    with dmabuf.export(exporter, 4096) as buf:
        buf.describe(TENSOR)
        assert buf.layout == TENSOR
    exporter.close()


def test_every_handle_has_the_layout(described: dmabuf.DmaBuf) -> None:
    fd = described.dup()
    with dmabuf.get(fd) as one, described.get_dma_buf() as two, dmabuf.open("picture") as three, dmabuf.open(described.ino) as four:
        assert {one.layout, two.layout, three.layout, four.layout} == {PICTURE}
    os.close(fd)


# ---- other processes ----


def _received(parent: Parent) -> list[Layout | None]:
    bufs = dmabuf.recv(parent.sock)
    found = [buf.layout for buf in bufs]
    for buf in bufs:
        buf.close()
    return found


def test_layout_comes_along_with_send(child: Spawn, described: dmabuf.DmaBuf) -> None:
    other = child(_received)
    dmabuf.send(other.sock, described)
    assert other.result() == [PICTURE]
    other = child(_received)
    with dmabuf.allocate(layout=TENSOR) as tensor, dmabuf.allocate(4096) as bare:
        dmabuf.send(other.sock, tensor, described, bare)
        assert other.result() == [TENSOR, PICTURE, None]


def _opened(parent: Parent, what: str | int) -> Layout | None:
    with dmabuf.open(what) as buf:
        return buf.layout


def test_layout_comes_along_with_open(child: Spawn, described: dmabuf.DmaBuf) -> None:
    assert child(_opened, "picture").result() == PICTURE
    assert child(_opened, described.ino).result() == PICTURE


def _unpickled(parent: Parent) -> Layout | None:
    with parent.recv() as buf:
        return buf.layout  # type: ignore[no-any-return]


def test_layout_comes_along_with_multiprocessing(child: Spawn, described: dmabuf.DmaBuf) -> None:
    other = child(_unpickled)
    other.send(described)
    assert other.result() == PICTURE
    resource_sharer.stop()


def test_layout_is_there_in_a_forked_child(described: dmabuf.DmaBuf) -> None:
    def look() -> None:
        assert described.layout == PICTURE
        with dmabuf.allocate(layout=TENSOR) as buf:
            assert buf.layout == TENSOR

    assert reap(fork(look)) == 0


def _sender(parent: Parent) -> None:
    with dmabuf.allocate(layout=PICTURE, name="in flight") as buf:
        dmabuf.send(parent.sock, buf)


def test_layout_outlives_its_maker_in_a_message(child: Spawn) -> None:
    other = child(_sender)
    other.result()
    (buf,) = dmabuf.recv(other.sock)
    with buf:
        assert (buf.name, buf.layout) == ("in flight", PICTURE)


def _describer(parent: Parent) -> None:
    (buf,) = dmabuf.recv(parent.sock)
    with buf:
        buf.describe(TENSOR)


def test_layout_that_another_process_gives_is_found(child: Spawn) -> None:
    with dmabuf.allocate(4096) as buf:
        assert buf.layout is None
        other = child(_describer)
        dmabuf.send(other.sock, buf)
        other.result()
        assert buf.layout == TENSOR


def test_record_that_is_made_again_has_the_layout_that_this_process_knew(described: dmabuf.DmaBuf) -> None:
    shared = handle_of(described).shared
    assert described.layout == PICTURE
    shm, old = shared.shm, (shared.index, shared.gen)
    shm.rec_put(shared.index)
    assert shm.rec_free(*old)
    shared.life = 0
    assert described.layout == PICTURE
    shared.ensure()
    assert (shared.index, shared.gen) != old
    assert shm.rec_layout(shared.index, shared.gen) == (0, PICTURE.pack())


# ---- what the file says ----


@pytest.mark.parametrize(
    "lie", [b"", b"DL\x01\x01", b"\xff" * 256, TensorLayout("uint8", (1 << 40,)).pack(), ImageLayout.linear("NV12", 64, 64).pack()]
)
def test_layout_that_makes_no_sense_is_euclean(lie: bytes) -> None:
    with dmabuf.allocate(4096) as buf:
        shared = handle_of(buf).shared
        assert shared.shm.rec_set_layout(shared.index, shared.gen, 0, lie)
        with raises_errno(errno.EUCLEAN):
            _ = buf.layout


def test_layout_slots_are_used_again() -> None:
    domain = dmabuf.Domain.private()
    shm = domain.join()

    def chunks() -> int:
        table = (shm.load64(_native.OFF_CHUNKTAB + 8 * i) for i in range(shm.load32(_native.OFF_NCHUNKS)))
        return sum(entry & 0xFF == _native.CH_LAYOUT for entry in table)

    for _ in range(3):
        bufs = [dmabuf.allocate(shape=(n + 1,), dtype="uint8", domain=domain) for n in range(130)]
        assert [buf.layout for buf in bufs] == [TensorLayout("uint8", (n + 1,)) for n in range(130)]
        for buf in bufs:
            buf.close()
        assert shm.table_audit() == (0, 0, 0, 0)
        assert chunks() == 2
    domain.leave()


@pytest.mark.parametrize("length", [257, 4096])
def test_native_layout_of_too_many_bytes_is_valueerror(length: int) -> None:
    with dmabuf.allocate(4096) as buf:
        shared = handle_of(buf).shared
        with pytest.raises(ValueError, match="at most 256 bytes"):
            shared.shm.rec_set_layout(shared.index, shared.gen, 0, bytes(length))
        with pytest.raises(ValueError, match="at most 256 bytes"):
            shared.shm.rec_create(1, 2, 3, bytes(16), b"", b"", None, 0, 1, 1, 0, bytes(length))


def test_native_layout_of_another_generation_is_refused(described: dmabuf.DmaBuf) -> None:
    shared = handle_of(described).shared
    assert shared.shm.rec_layout(shared.index, shared.gen + 1) is None
    assert not shared.shm.rec_set_layout(shared.index, shared.gen + 1, 0, b"")
