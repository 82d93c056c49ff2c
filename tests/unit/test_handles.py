"""A handle that can't be made loses nothing: the descriptor that it was to own is closed once."""

import errno
from typing import Any

import pytest

import dmabuf
from dmabuf._native import one_of, open_handle
from dmabuf.core.buffer.handle import handle_of
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


@pytest.mark.parametrize("size", ["4096", 1e6])
def test_a_size_that_is_no_int_is_a_typeerror_that_says_so(size: Any) -> None:
    with pytest.raises(TypeError, match=r"allocate: size is a number of bytes, an int, not (str|float)"):
        dmabuf.allocate(size)


def test_a_domain_that_is_a_path_is_a_typeerror_that_says_so() -> None:
    path: Any = "/run/user/1000/dmabuf"
    with pytest.raises(TypeError, match=r"allocate: domain is a dmabuf.Domain, as Domain.open\(path\) gives, not str"):
        dmabuf.allocate(4096, domain=path)


@pytest.mark.parametrize("resv", [False, True], ids=["passed on", "with its reservation object"])
@pytest.mark.parametrize("stop", ["before", "after"])
def test_close_ends_when_a_signal_handler_raises_in_it(monkeypatch: pytest.MonkeyPatch, stop: str, resv: bool) -> None:
    leave, calls = Record.leave, []

    def interrupted(self: Record, *arguments: Any, **named: Any) -> Any:
        calls.append(stop)
        if len(calls) == 1 and stop == "before":
            raise KeyboardInterrupt
        result = leave(self, *arguments, **named)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return result

    dmabuf.allocate(4096).close()  # makes the domain's watch of inodes
    before = descriptors()
    buf = dmabuf.allocate(4096)
    kept = buf.resv if resv else None
    del kept
    monkeypatch.setattr(Record, "leave", interrupted)
    with pytest.raises(KeyboardInterrupt):
        buf.close()
    assert buf.closed
    assert len(calls) == 2
    assert descriptors() == before
    buf.close()
    assert len(calls) == 2


def test_close_raises_what_its_record_raises_and_can_be_called_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise fail(errno.EUCLEAN, "look up", "a record")

    buf = dmabuf.allocate(4096)
    with monkeypatch.context() as patch:
        patch.setattr(Record, "leave", refused)
        with pytest.raises(OSError) as caught:
            buf.close()
    assert caught.value.errno == errno.EUCLEAN
    buf.close()
    assert buf.closed


def test_one_of_and_open_handle_refuse_other_types() -> None:
    with pytest.raises(TypeError, match="kind of list"):
        one_of(tuple, 1)  # type: ignore[type-var]
    with dmabuf.allocate(4096) as buf, pytest.raises(TypeError, match="open_handle"):
        open_handle(dmabuf.DmaBuf, object, -1, handle_of(buf).shared)  # type: ignore[arg-type]
    with dmabuf.allocate(4096) as buf, pytest.raises(TypeError, match="an OwnedFd is required, not str"):
        open_handle(dmabuf.DmaBuf, type(handle_of(buf)), "3", handle_of(buf).shared)  # type: ignore[arg-type]
