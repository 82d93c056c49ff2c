"""Each consumer of a view in a block, in a ``read()`` view, after the block and after ``close()``: the table of docs/views.md."""

from __future__ import annotations

import gc
import warnings
from typing import Any

import pytest

import dmabuf
from dmabuf import DmaBuf, Usage
from tests.interop.consumers import (
    ALL,
    CALL,
    COPIES,
    DETACHED,
    FREE,
    READ_ONLY,
    REFUSES,
    SHARES,
    SIZE,
    WRITABLE,
    Consumer,
    use,
)

EACH = pytest.mark.parametrize("consumer", ALL, ids=lambda one: one.name)
pytestmark = pytest.mark.filterwarnings(
    "ignore:the view is read-only, and torch:RuntimeWarning",
    "ignore:The given NumPy array is not writable:UserWarning",
    "ignore:The given buffer is not writable:UserWarning",
)


def filled() -> DmaBuf:
    buf = dmabuf.allocate(SIZE)
    with buf.write() as view:
        view[:] = bytes([5]) * SIZE
    return buf


def fences(buf: DmaBuf) -> int:
    return len(buf.resv.fences(Usage.BOOKKEEP))


def writes(consumer: Consumer, made: Any) -> bool:
    """Write a 9 to what the consumer made. Returns whether it could."""
    assert consumer.put is not None
    try:
        consumer.put(made, 9)
    except (TypeError, ValueError):
        return False
    return True


@EACH
def test_consumer_in_a_write_block_is_as_in_the_table(consumer: Consumer) -> None:
    with filled() as buf, buf.write() as view:
        seen = use(consumer, view)
        if seen.what == REFUSES:
            assert consumer.inside == REFUSES
        elif consumer.put is None:
            assert consumer.inside in (SHARES, COPIES, CALL)
        else:
            assert writes(consumer, seen.kept)
            assert consumer.inside == (SHARES if view[0] == 9 else COPIES)
        del seen


@EACH
def test_consumer_of_a_read_view_is_as_in_the_table(consumer: Consumer) -> None:
    with filled() as buf, buf.read() as view:
        seen = use(consumer, view)
        if seen.what == REFUSES:
            assert consumer.reading == REFUSES
        elif consumer.put is None:
            assert consumer.reading in (READ_ONLY, COPIES, CALL)
        else:
            written = writes(consumer, seen.kept)
            what = READ_ONLY if not written else WRITABLE if view[0] == 9 else COPIES
            assert consumer.reading == what
        del seen


@EACH
def test_what_a_consumer_keeps_of_a_write_is_as_in_the_table(consumer: Consumer) -> None:
    with filled() as buf:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", dmabuf.KeptWarning)
            with buf.write() as view:
                kept = use(consumer, view).kept
        names = [str(one.message) for one in told if one.category is dmabuf.KeptWarning]
        assert len(names) == (consumer.after == DETACHED)
        assert fences(buf) == 0
        with buf.write(timeout=0) as other:
            other[:] = bytes([7]) * SIZE
        if kept is None:
            assert consumer.inside == REFUSES
        elif consumer.name in ("view", "slice"):
            with pytest.raises(ValueError, match="released"):
                consumer.first(kept)
        else:
            assert consumer.first(kept) == 5


@EACH
def test_what_a_consumer_keeps_of_a_read_shows_no_later_write(consumer: Consumer) -> None:
    with filled() as buf:
        with buf.read() as view:
            kept = use(consumer, view).kept
        holds = consumer.after == DETACHED and consumer.reading != REFUSES
        assert fences(buf) == holds
        with buf.write(timeout=0) as other:  # of the same thread: it gives way at once
            other[:] = bytes([7]) * SIZE
        assert fences(buf) == 0
        if kept is not None and consumer.name not in ("view", "slice"):
            assert consumer.first(kept) == 5


@EACH
@pytest.mark.parametrize("mode", ["read", "write"])
def test_what_a_consumer_keeps_outlives_the_buffer(consumer: Consumer, mode: str) -> None:
    with filled() as buf:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", dmabuf.KeptWarning)
            with getattr(buf, mode)() as view:
                kept = use(consumer, view).kept
    del view
    gc.collect()
    if kept is not None and consumer.name not in ("view", "slice"):
        assert consumer.first(kept) == 5
    del kept
    gc.collect()


@EACH
def test_what_a_consumer_keeps_after_an_exception_is_a_copy(consumer: Consumer) -> None:
    kept: list[Any] = []
    with filled() as buf:
        with pytest.raises(ZeroDivisionError), buf.read() as view:  # noqa: PT012
            kept.append(use(consumer, view).kept)
            raise ZeroDivisionError
        assert fences(buf) == 0
        with buf.write(timeout=0) as other:
            other[:] = bytes([7]) * SIZE
        if kept[0] is not None and consumer.name not in ("view", "slice"):
            assert consumer.first(kept[0]) == 5


def test_torch_names_the_remedy_where_it_is_refused() -> None:
    torch = pytest.importorskip("torch")
    with filled() as buf, buf.read() as view:
        for take in (torch.frombuffer, torch.asarray):
            with pytest.warns(RuntimeWarning, match=r"view\.tensor\(copy=True\)") as told, pytest.raises(RuntimeError):
                take(view, dtype=torch.uint8)
            assert told[0].filename == __file__
        with pytest.raises(BufferError, match=r"view\.tensor\(copy=True\)"):
            torch.from_dlpack(view)


def test_others_that_ask_as_torch_does_are_not_refused() -> None:
    import fcntl
    import os

    a, b = os.openpty()
    with filled() as buf, buf.read() as view:
        fcntl.ioctl(a, 0x5413, view[:8])  # noqa: TID251 (TIOCGWINSZ; a read-only buffer is copied)
        assert view[0] == 5
    os.close(a)
    os.close(b)


def test_every_row_says_what_is_kept() -> None:
    for consumer in ALL:
        assert consumer.after in (FREE, DETACHED)
        assert (consumer.after == FREE) == (consumer.inside in (COPIES, CALL, REFUSES) or consumer.name in ("view", "slice"))
