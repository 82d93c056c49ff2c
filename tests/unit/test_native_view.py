"""What hostile code does to a block and its views: in ops of an exporter, in hooks, with blocks that are used again."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import dmabuf
from dmabuf import Direction, DmaBuf, DmaBufAttachment, Exporter, SgTable, Usage, View
from dmabuf._native import Mapping
from dmabuf.core.buffer.handle import handle_of
from tests.support.budget import times
from tests.support.errnos import raises_errno

SIZE = 4096


class Mishap(Exception):
    """What goes wrong inside a block."""


class Plain(Exporter):
    """An exporter that keeps the mappings that it gives out. ``during``: what runs in an op."""

    def __init__(self) -> None:
        self.memory = dmabuf.allocate(SIZE)
        self.given: list[Mapping] = []
        self.during: dict[str, Callable[[], object]] = {}
        self.open = 0

    def mmap(self, buf: DmaBuf, offset: int, length: int) -> Any:
        self.given.append(self.memory.mmap())
        return self.given[-1]

    def begin_cpu_access(self, buf: DmaBuf, direction: Direction) -> None:
        if "begin" in self.during:
            self.during.pop("begin")()
        self.open += 1

    def end_cpu_access(self, buf: DmaBuf, direction: Direction) -> None:
        self.open -= 1
        if "end" in self.during:
            self.during.pop("end")()

    def map(self, attachment: DmaBufAttachment, direction: Direction) -> SgTable | None:
        raise NotImplementedError

    def unmap(self, attachment: DmaBufAttachment, sgt: SgTable, direction: Direction) -> None:
        raise NotImplementedError

    def release(self, buf: DmaBuf) -> None:
        self.during.clear()


@pytest.fixture
def buf() -> Iterator[DmaBuf]:
    with dmabuf.allocate(SIZE) as made:
        yield made


@pytest.fixture
def plain() -> Iterator[Plain]:
    made = Plain()
    yield made
    made.given.clear()
    made.memory.close()


@pytest.fixture
def exported(plain: Plain) -> Iterator[DmaBuf]:
    with dmabuf.export(plain, SIZE) as made:
        yield made


def held(buf: DmaBuf) -> int:
    return len(buf.resv.fences(Usage.BOOKKEEP)) + handle_of(buf).accesses


def raising(block: Any, keep: Callable[[View], Any]) -> Any:
    """Leave a block by an exception, and return what ``keep`` made of its view."""
    kept: list[Any] = []
    with pytest.raises(Mishap), block as view:  # noqa: PT012
        kept.append(keep(view))
        raise Mishap
    return kept.pop()


# ---- a block that is used again ----


@pytest.mark.parametrize("mode", ["read", "write"])
def test_block_used_again_is_not_confused_by_what_it_left_before(buf: DmaBuf, mode: str) -> None:
    block = getattr(buf, mode)()
    first = raising(block, memoryview)
    second = raising(block, lambda view: memoryview(view)[:4])
    assert held(buf) == 0
    with block as view:
        assert view[0] == 0
    assert held(buf) == 0
    assert (first[SIZE - 1], second[3]) == (0, 0)


def test_dropping_what_an_earlier_use_left_ends_nothing_later(buf: DmaBuf) -> None:
    block = buf.read()
    old = raising(block, memoryview)
    with block as view:
        new = memoryview(view)
    assert block.kept == 1
    old.release()
    assert held(buf) == 1
    new.release()
    del new
    assert held(buf) == 0


# ---- bytes at the very end ----


@pytest.mark.parametrize("part", [slice(SIZE, None), slice(SIZE, None, -1), slice(7, 7), slice(0, 0)], ids=str)
def test_empty_slice_that_an_exception_leaves_is_detached(buf: DmaBuf, part: slice) -> None:
    kept = raising(buf.write(), lambda view: (memoryview(view[part]), memoryview(view[SIZE - 1 :])))
    assert held(buf) == 0
    assert bytes(kept[1]) == b"\0"


def test_steps_and_both_ends_are_copied(buf: DmaBuf) -> None:
    with buf.write() as view:
        view[:] = bytes(i % 251 for i in range(SIZE))
    kept = raising(buf.read(), lambda view: [memoryview(view[3::7]), memoryview(view[::-1]), memoryview(view[-1:])])
    with buf.write(timeout=0) as view:
        view[:] = bytes(SIZE)
    model = bytes(i % 251 for i in range(SIZE))
    assert [bytes(one) for one in kept] == [model[3::7], model[::-1], model[-1:]]


# ---- an exporter that keeps the mappings it gives out ----


@pytest.mark.parametrize("mode", ["read", "write"])
def test_mapping_that_an_exporter_keeps_is_never_taken_away(plain: Plain, exported: DmaBuf, mode: str) -> None:
    kept = raising(getattr(exported, mode)(), memoryview)
    assert len(exported.resv.fences(Usage.BOOKKEEP)) == 1  # it can't be detached, so it keeps the access
    kept.release()
    del kept
    assert held(exported) == 0
    assert plain.open == 0
    with exported.write() as view:
        view[0] = 9
    with plain.memory.read() as view:
        assert view[0] == 9
    assert [memoryview(one)[0] for one in plain.given] == [9, 9]


def test_write_left_normally_with_an_exporters_mapping_kept_is_torn(plain: Plain, exported: DmaBuf) -> None:
    kept: list[memoryview] = []
    with pytest.raises(BufferError, match="torn"), exported.write() as view:
        kept.append(memoryview(view))
    kept.pop().release()
    assert held(exported) == 0
    with raises_errno(errno.ECANCELED), exported.read():
        pass


# ---- code that runs in the middle ----


@pytest.mark.parametrize("call", ["send", "throw", "close"])
def test_awaitable_is_not_run_from_inside_itself(plain: Plain, exported: DmaBuf, call: str) -> None:
    block = exported.read()
    awaitables: list[Any] = [block.__aenter__()]
    raised: list[str] = []

    def again() -> None:
        try:
            getattr(awaitables[0], call)(*{"send": (None,), "throw": (Mishap(),), "close": ()}[call])
        except ValueError as e:
            raised.append(str(e))

    plain.during["begin"] = again

    async def enter() -> View:
        view: View = await awaitables[0]
        return view

    view = asyncio.run(enter())
    assert len(raised) == 1
    assert view[0] == 0
    block.__exit__(None, None, None)
    assert held(exported) == 0
    awaitables.clear()


@pytest.mark.parametrize("op", ["begin", "end"])
@pytest.mark.parametrize("act", ["enter", "leave", "leave and enter"])
def test_op_that_uses_its_own_block_leaves_nothing_held(plain: Plain, exported: DmaBuf, op: str, act: str) -> None:
    block = exported.write()

    def again() -> None:
        if "leave" in act:
            block.__exit__(None, None, None)
        if "enter" in act:
            block.__enter__()

    plain.during[op] = again
    try:
        with block:
            pass
    except OSError:
        pass
    block.__exit__(None, None, None)
    assert held(exported) == 0
    assert plain.open == 0


@pytest.mark.parametrize("op", ["begin", "end"])
def test_op_that_closes_the_buffer_is_refused(plain: Plain, exported: DmaBuf, op: str) -> None:
    plain.during[op] = exported.close
    with raises_errno(errno.EBUSY if op == "end" else errno.EBADF), exported.read():
        pass
    with plain.memory.read():
        assert plain.open in (0, 1)


def test_warning_of_what_a_write_left_comes_when_the_buffer_is_free(buf: DmaBuf, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def show(*_: Any, **__: Any) -> None:
        with buf.write(timeout=0) as view:
            seen.append(view[0])

    monkeypatch.setattr(warnings, "showwarning", show)
    with warnings.catch_warnings():
        warnings.simplefilter("always", dmabuf.KeptWarning)
        warnings.showwarning = show
        with buf.write() as view:
            view[0] = 5
            kept = memoryview(view)
    assert seen == [5]
    assert kept[0] == 5


USES: list[Callable[[Any, Any], object]] = [
    lambda view, zero: view[zero],
    lambda view, zero: view[zero:],
    lambda view, zero: view.__setitem__(zero, 1),
    lambda view, zero: view.__setitem__(0, zero),
    lambda view, zero: view.__setitem__(slice(zero, 4), b"abcd"),
    lambda view, zero: view.array("u1", (zero,)),
    lambda view, zero: view.array("u1", (4,), 0, (zero,)),
]


@pytest.mark.parametrize("use", USES, ids=range(len(USES)))
def test_number_that_leaves_the_block_finds_the_view_over(buf: DmaBuf, use: Callable[[Any, Any], object]) -> None:
    class Zero:
        def __index__(self) -> int:
            block.__exit__(None, None, None)
            return 0

    block = buf.write()
    view = block.__enter__()
    with pytest.raises(ValueError, match="released"):
        use(view, Zero())
    assert held(buf) == 0


# ---- large buffers, and what goes wrong often ----


def test_open_block_never_finds_zeros_however_large_the_buffer_is() -> None:
    with dmabuf.allocate((256 << 20) + SIZE) as buf:
        with buf.write() as view:
            view[0], view[-1] = 1, 2
        with buf.read() as view:
            reader = buf.read()
            other = reader.__enter__()
            kept = [memoryview(view)]
        assert raising(buf.read(), memoryview)[0] == 1
        assert (other[0], other[-1], kept[0][0]) == (1, 2, 1)
        reader.__exit__(None, None, None)
        kept.clear()
        assert held(buf) == 0


def rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def ignored(error: type[BaseException], call: Callable[[], object]) -> None:
    try:
        call()
    except error:
        return
    raise AssertionError("it didn't fail")


def failing(buf: DmaBuf, view: View, exported: DmaBuf, plain: Plain) -> dict[str, Callable[[], object]]:
    """Calls that fail, each after it has taken something."""
    import numpy as np

    readonly = view.toreadonly()

    def begin_fails() -> None:
        plain.during["begin"] = lambda: int("x")
        exported.read().__enter__()

    def enter_twice() -> None:
        block = buf.read(timeout=0)
        block.__enter__()

    def kept_and_raised() -> None:
        plain.given.clear()  # the exporter's own list would grow
        with exported.read() as other:
            memoryview(other)
            raise ValueError

    return {
        "index": lambda: view[SIZE],
        "value": lambda: view.__setitem__(0, 256),
        "size": lambda: view.__setitem__(slice(0, 3), b"ab"),
        "type": lambda: view.__setitem__(slice(0, 3), "abc"),
        "readonly": lambda: readonly.__setitem__(0, 1),
        "ndarray": lambda: np.ndarray(4, np.uint8, buffer=view),  # type: ignore[call-overload]
        "contiguous": lambda: bytes(view[::2]) and hash(memoryview(view[::2]).cast("B")),
        "dtype": lambda: view.array("no such"),
        "objects": lambda: view.array("O"),
        "shape": lambda: view.array("u1", (SIZE + 1,)),
        "too large": lambda: view.array("u1", (0, 1 << 62, 1 << 62)),
        "strides": lambda: view.array("u1", (2,), 0, (1, 2)),
        "unversioned": lambda: readonly.__dlpack__(),
        "device": lambda: view.__dlpack__(dl_device=(2, 0)),
        "stream": lambda: view.__dlpack__(stream=1),
        "begin": begin_fails,
        "enter": enter_twice,
        "kept": kept_and_raised,
        "tensor": lambda: view.tensor("f4"),
    }


@pytest.mark.skipif("ASAN_OPTIONS" in os.environ, reason="what is freed stays for a while under the address sanitizer")
def test_what_fails_often_leaves_no_memory(buf: DmaBuf, exported: DmaBuf, plain: Plain) -> None:
    pytest.importorskip("numpy")
    rounds = times(quick=2_000, full=10_000)
    with buf.write() as view:
        for name, call in failing(buf, view, exported, plain).items():
            for _ in range(500):
                ignored(Exception, call)
            gc.collect()
            before = rss()
            for _ in range(rounds):
                ignored(Exception, call)
            gc.collect()
            assert rss() - before < 16 * rounds + (1 << 20), name
    assert held(buf) == held(exported) == plain.open == 0
