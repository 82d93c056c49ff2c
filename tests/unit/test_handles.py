"""A handle that can't be made loses nothing: the descriptor that it was to own is closed once."""

import errno
from typing import Any

import pytest

import dmabuf
from dmabuf.domain.records import Record
from dmabuf.errors import fail
from tests.support.leaks import descriptors


def test_a_reference_that_cannot_be_made_closes_its_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Record, handle: object, name: bytes | None = None) -> None:
        raise fail(errno.ENOSPC, "hold", "a record")

    with dmabuf.allocate(4096) as buf:
        before = descriptors()
        with monkeypatch.context() as patch:
            patch.setattr(Record, "enter", full)
            for make in (buf.get_dma_buf, lambda: dmabuf.get(buf.fileno())):
                with pytest.raises(OSError) as caught:
                    make()
                assert caught.value.errno == errno.ENOSPC
        assert descriptors() == before
        assert not buf.closed
        with buf.get_dma_buf() as again:
            assert again == buf


@pytest.mark.parametrize("size", ["4096", 1e6, None])
def test_a_size_that_is_no_int_is_a_typeerror_that_says_so(size: Any) -> None:
    with pytest.raises(TypeError, match=r"allocate: size is a number of bytes, an int, not (str|float|NoneType)"):
        dmabuf.allocate(size)


def test_a_domain_that_is_a_path_is_a_typeerror_that_says_so() -> None:
    path: Any = "/run/user/1000/dmabuf"
    with pytest.raises(TypeError, match=r"allocate: domain is a dmabuf.Domain, as Domain.open\(path\) gives, not str"):
        dmabuf.allocate(4096, domain=path)
