"""What an exporter's mmap and vmap give, and what they may not (semantics 2.17, 2.18)."""

import errno
from typing import Any

import pytest

import dmabuf
from dmabuf import ContractError, ContractWarning, DmaBuf, IosysMap, Usage
from tests.support.drivers import FROM, PAGE, Bare, Static
from tests.support.errnos import raises_errno

SIZE = 4 * PAGE


# -- mmap


def test_mmap_is_the_exporters(static: Static) -> None:
    with dmabuf.export(static, SIZE) as buf:
        mapping = buf.mmap(PAGE, PAGE)
        redirected = buf.dma_mmap(PAGE, PAGE)
        mapping[0] = 9
        assert redirected[0] == static.whole[PAGE] == 9
        assert static.calls == [("mmap", PAGE, PAGE), ("mmap", PAGE, PAGE)]
        mapping.close()
        redirected.close()


@pytest.mark.parametrize(("offset", "length"), [(0, SIZE + 1), (SIZE, PAGE), (1, PAGE), (0, 0)])
def test_mmap_out_of_bounds_is_einval_before_the_exporter_is_asked(static: Static, offset: int, length: int) -> None:
    with dmabuf.export(static, SIZE) as buf:
        with raises_errno(errno.EINVAL):
            buf.mmap(offset, length)
        with raises_errno(errno.EINVAL):
            buf.dma_mmap(offset, length)
        assert static.calls == []


def test_dma_mmap_that_overflows_is_eoverflow(static: Static) -> None:
    with dmabuf.export(static, SIZE) as buf, raises_errno(errno.EOVERFLOW):
        buf.dma_mmap((1 << 64) - PAGE, 2 * PAGE)


@pytest.mark.parametrize("call", ["mmap", "read", "write"])
def test_without_the_op_there_is_no_mapping(bare: Bare, call: str) -> None:
    with dmabuf.export(bare, SIZE) as buf:
        with raises_errno(errno.EINVAL):
            buf.mmap() if call == "mmap" else getattr(buf, call)().__enter__()
        assert buf.resv.fences(Usage.BOOKKEEP) == []


def test_a_failing_mmap_is_told(static: Static) -> None:
    with dmabuf.export(static, SIZE) as buf:
        static.fails["mmap"] = errno.EAGAIN
        with raises_errno(errno.EAGAIN):
            buf.mmap()


def test_an_exporter_whose_mmap_returns_something_else_is_a_type_error(bare: Bare) -> None:
    class Odd(Static):
        def mmap(self, buf: DmaBuf, offset: int, length: int) -> Any:
            return bytearray(length)

    exporter = Odd()
    with dmabuf.export(exporter, SIZE) as buf, pytest.raises(TypeError):
        buf.mmap()
    exporter.close()


def test_read_only_memory_is_mapped_when_asked_so(static: Static) -> None:
    class ReadOnly(Static):
        def mmap(self, buf: DmaBuf, offset: int, length: int) -> Any:
            return self.memory.mmap(offset, length, writable=False)

    exporter = ReadOnly()
    with dmabuf.export(exporter, SIZE) as buf:
        with raises_errno(errno.EACCES):
            buf.mmap()
        buf.mmap(writable=False).close()
        with raises_errno(errno.EACCES), buf.write():
            pass
        with buf.read():
            pass
    exporter.close()


# -- vmap


def test_vmap_is_counted_and_the_exporter_sees_one_of_each(static: Static) -> None:
    with dmabuf.export(static, SIZE) as buf:
        with buf.resv.locked():
            one, two = buf.vmap(), buf.vmap()
            assert one == two
            buf.vunmap(one)
            assert static.calls == ["vmap"]
            buf.vunmap(two)
        assert static.calls == ["vmap", "vunmap"]
        buf.vunmap_unlocked(buf.vmap_unlocked())
        assert static.calls == ["vmap", "vunmap"] * 2


def test_a_failing_vmap_warns_and_clears_the_map(static: Static) -> None:
    with dmabuf.export(static, SIZE) as buf:
        stale = IosysMap.init_vaddr(bytearray(8))
        static.fails["vmap"] = errno.ENOMEM
        with pytest.warns(ContractWarning), raises_errno(errno.ENOMEM):
            buf.vmap_unlocked(stale)
        assert stale.is_null()
        assert buf.statistics().vmaps == 0
        assert not buf.resv.is_locked()
        static.fails.clear()
        assert buf.vmap_unlocked(stale) is stale
        assert stale.is_set()
        buf.vunmap_unlocked(stale)


@pytest.mark.parametrize("why", ["not locked", "locked", "closed"])
def test_every_failure_clears_the_map(static: Static, why: str) -> None:
    stale = IosysMap.init_vaddr(bytearray(8))
    buf = dmabuf.export(static, SIZE)
    if why == "not locked":
        with pytest.raises(ContractError):
            buf.vmap(stale)
    elif why == "locked":
        with buf.resv.locked(), pytest.warns(ContractWarning), raises_errno(errno.EDEADLK):
            buf.vmap_unlocked(stale)
    buf.close()
    if why == "closed":
        with raises_errno(errno.EBADF):
            buf.vmap(stale)
    assert stale.is_null()


def test_vmap_without_the_op_is_einval_without_a_warning(bare: Bare) -> None:
    with dmabuf.export(bare, SIZE) as buf, raises_errno(errno.EINVAL):
        buf.vmap_unlocked()


def test_a_vmap_of_null_is_enomem(static: Static) -> None:
    class Null(Static):
        def vmap(self, buf: DmaBuf) -> IosysMap:
            return IosysMap()

    exporter = Null()
    with dmabuf.export(exporter, SIZE) as buf, pytest.warns(ContractWarning), raises_errno(errno.ENOMEM):
        buf.vmap_unlocked()
    exporter.close()


@pytest.mark.parametrize("kind", ["foreign", "one too many"])
def test_a_wrong_vunmap_is_a_contract_error(either: Static, kind: str) -> None:
    with dmabuf.export(either, SIZE) as buf:
        map_ = buf.vmap_unlocked()
        if kind == "one too many":
            buf.vunmap_unlocked(map_)
        with pytest.raises(ContractError):
            buf.vunmap_unlocked(IosysMap.init_vaddr(bytearray(8)) if kind == "foreign" else map_)
        if kind == "foreign":
            buf.vunmap_unlocked(map_)
        assert either.calls == ["vmap", "vunmap"]


@pytest.mark.parametrize("returned", [None, b"bytes"])
def test_vmap_that_returns_no_map_is_a_type_error_and_counts_nothing(static: Static, returned: object) -> None:
    exporter = type("Odd", (Static,), {"vmap": lambda self, buf: returned})()
    with dmabuf.export(exporter, SIZE) as buf:
        with pytest.raises(TypeError, match="not an IosysMap"):
            buf.vmap_unlocked()
        assert (buf.statistics().vmaps, buf.resv.is_locked()) == (0, False)
    exporter.close()


def test_a_plain_buffer_is_vmapped_too(buf: DmaBuf) -> None:
    with buf.write() as view:
        view[:2] = b"hi"
    map_, again = buf.vmap_unlocked(), buf.vmap_unlocked()
    assert map_ == again
    buf.begin_cpu_access(FROM)
    got = bytearray(2)
    map_.memcpy_from(got, 0)
    buf.end_cpu_access(FROM)
    assert got == b"hi"
    buf.vunmap_unlocked(map_)
    buf.vunmap_unlocked(again)
