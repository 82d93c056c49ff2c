"""View: accesses that end exactly once, however their views and arrays go."""

from __future__ import annotations

import errno
import gc
import os
import pickle
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from dmabuf._native import Mapping, View, open_view
from tests.support.mappings import PAGE, SIZE, mapped

Catch = list[Any]


@pytest.fixture
def calls() -> list[str]:
    return []


@pytest.fixture
def ended(calls: list[str]) -> Callable[[], None]:
    return lambda: calls.append("ended")


@pytest.fixture
def unraisable(monkeypatch: pytest.MonkeyPatch) -> Catch:
    caught: Catch = []
    monkeypatch.setattr(sys, "unraisablehook", lambda info: caught.append(info.exc_value))
    return caught


def test_a_view_shows_its_range(mapping: Mapping) -> None:
    mapping[10:14] = b"abcd"
    view = View(mapping, None, readonly=True, offset=11, length=2)
    with memoryview(view) as memory:
        assert bytes(memory) == b"bc"
        assert memory.readonly
    assert (view.size, view.readonly) == (2, True)
    view.retire()


def test_a_view_without_a_length_reaches_the_end(mapping: Mapping) -> None:
    view = View(mapping, None, readonly=True, offset=PAGE)
    assert view.size == SIZE - PAGE
    view.retire()


def test_a_writable_view_writes_the_mapping(mapping: Mapping) -> None:
    view = View(mapping, None, readonly=False, offset=PAGE)
    with memoryview(view) as memory:
        memory[0] = 3
    view.retire()
    assert mapping[PAGE] == 3


def test_a_read_only_view_refuses_a_writable_buffer(fd: int, mapping: Mapping) -> None:
    view = View(mapping, None, readonly=True)
    with pytest.raises(BufferError):
        os.readv(fd, [view])
    assert view.retire()


def test_view_exports_are_counted_apart_from_the_mappings(mapping: Mapping) -> None:
    view = View(mapping, None, readonly=True)
    with memoryview(view), memoryview(view), memoryview(mapping):
        assert (view.exports, mapping.exports, mapping.views) == (2, 1, 1)
    assert (view.exports, mapping.exports, mapping.views) == (0, 0, 1)
    view.retire()


def test_retire_without_exports_ends_the_access_at_once(mapping: Mapping, calls: list[str], ended: Callable[[], None]) -> None:
    view = View(mapping, ended, readonly=True)
    memoryview(view).release()
    assert calls == []
    assert view.retire() is True
    assert calls == ["ended"]


def test_retire_with_an_export_leaves_the_end_to_the_last_one(mapping: Mapping, calls: list[str], ended: Callable[[], None]) -> None:
    view = View(mapping, ended, readonly=True)
    first, second = memoryview(view), memoryview(view)
    assert view.retire() is False
    first.release()
    assert calls == []
    second.release()
    assert calls == ["ended"]
    assert mapping.views == 0


def test_the_end_is_told_once(mapping: Mapping, calls: list[str], ended: Callable[[], None]) -> None:
    view = View(mapping, ended, readonly=True)
    memory = memoryview(view)
    assert [view.retire(), view.retire()] == [False, False]
    memory.release()
    assert [view.retire(), view.retire()] == [True, True]
    del view, memory
    gc.collect()
    assert calls == ["ended"]


def test_a_slice_that_outlives_the_memoryview_holds_the_access(mapping: Mapping, calls: list[str], ended: Callable[[], None]) -> None:
    view, memory = open_view(mapping, ended, True)
    part = memory[1:3]
    memory.release()
    assert view.retire() is False
    del part
    assert calls == ["ended"]


def test_an_array_made_of_the_memoryview_holds_the_access(mapping: Mapping, calls: list[str], ended: Callable[[], None]) -> None:
    numpy = pytest.importorskip("numpy")
    view, memory = open_view(mapping, ended, True)
    array = numpy.asarray(memory)
    memory.release()  # numpy took a memoryview of its own, of which only the View knows
    assert view.exports == 1
    assert view.retire() is False
    part = array[5:6]
    del array
    assert calls == []
    del part
    assert calls == ["ended"]


def test_a_buffer_taken_of_the_memoryview_keeps_it_from_being_released(mapping: Mapping) -> None:
    view, memory = open_view(mapping, None, False)
    taken = pickle.PickleBuffer(memory)
    with pytest.raises(BufferError):
        memory.release()
    assert view.retire() is False
    taken.release()
    memory.release()
    assert mapping.views == 0


def test_memoryview_of_a_view_is_unusable_after_release(mapping: Mapping) -> None:
    view, memory = open_view(mapping, None, True)
    memory.release()
    view.retire()
    with pytest.raises(ValueError, match="released"):
        memory[0]


def test_a_retired_view_refuses_new_exports(mapping: Mapping) -> None:
    view = View(mapping, None, readonly=True)
    memory = memoryview(view)
    view.retire()
    with pytest.raises(ValueError, match="over"):
        memoryview(view)
    assert view.exports == 1
    memory.release()
    with pytest.raises(ValueError, match="over"):
        memoryview(view)


def test_the_mapping_can_be_closed_by_on_release(fd: int) -> None:
    mapping = Mapping(fd, SIZE)
    view = View(mapping, mapping.close, readonly=True)
    memory = memoryview(view)
    view.retire()
    memory.release()
    assert mapping.closed


def test_the_view_keeps_the_mapping(fd: int) -> None:
    mapping = Mapping(fd, SIZE)
    mapping[0] = 5
    address = mapping.address
    view, memory = open_view(mapping, None, True)
    del mapping
    assert memory[0] == 5
    memory.release()
    view.retire()
    assert not mapped(address)


def test_the_memoryview_keeps_the_view(mapping: Mapping, calls: list[str], ended: Callable[[], None]) -> None:
    view, memory = open_view(mapping, ended, True)
    view.retire()
    del view
    assert calls == []
    del memory
    assert calls == ["ended"]


def test_an_open_view_that_is_dropped_frees_the_mapping_and_tells_nobody(
    mapping: Mapping, calls: list[str], ended: Callable[[], None]
) -> None:
    view = View(mapping, ended, readonly=True)
    del view
    assert mapping.views == 0
    assert calls == []


def test_what_on_release_raises_reaches_the_hook_from_retire(mapping: Mapping, unraisable: Catch) -> None:
    def broken() -> None:
        raise KeyError("broken")

    assert View(mapping, broken, readonly=True).retire() is True
    assert [type(error) for error in unraisable] == [KeyError]
    unraisable.clear()


def test_what_on_release_raises_reaches_the_hook_from_the_last_export(mapping: Mapping, unraisable: Catch) -> None:
    def broken() -> None:
        raise KeyError("broken")

    view, memory = open_view(mapping, broken, True)
    view.retire()
    memory.release()
    assert [type(error) for error in unraisable] == [KeyError]
    unraisable.clear()


def test_an_exception_on_its_way_survives_the_end_of_an_access(mapping: Mapping, calls: list[str], ended: Callable[[], None]) -> None:
    def retired() -> memoryview:
        view, memory = open_view(mapping, ended, True)
        view.retire()
        return memory

    with pytest.raises(IndexError):
        [retired(), calls[5]]  # the memoryview is dropped while the error looks for its handler
    assert calls == ["ended"]


def test_on_release_may_start_the_next_access(mapping: Mapping, calls: list[str]) -> None:
    def again() -> None:
        view, memory = open_view(mapping, lambda: calls.append("second"), True)
        memory.release()
        view.retire()
        calls.append("first")

    View(mapping, again, readonly=True).retire()
    assert calls == ["second", "first"]
    assert mapping.views == 0


class Access:
    """As an access does: it refers to its view, and its view to it."""

    def __init__(self, mapping: Mapping, calls: list[str]) -> None:
        self.calls = calls
        self.view, self.memory = open_view(mapping, self.end, True)
        self.word = "ended"

    def end(self) -> None:
        self.calls.append(self.word)


def test_a_cycle_through_an_open_view_is_collected(mapping: Mapping, calls: list[str]) -> None:
    access = weakref.ref(Access(mapping, calls))
    gc.collect()
    assert access() is None
    assert (mapping.views, calls) == (0, [])


@pytest.mark.parametrize("views_first", [True, False])
def test_a_retired_access_ends_whole_when_its_memoryview_becomes_garbage(mapping: Mapping, calls: list[str], views_first: bool) -> None:
    # The collector takes a cycle apart in the order of its making: on_release must not meet half of its object.
    holder: Catch = []
    if views_first:
        holder.append(holder)
    access = Access(mapping, calls)
    access.view.retire()
    if not views_first:
        holder.append(holder)
    holder += [access.memory, access]
    del access, holder
    gc.collect()
    assert calls == ["ended"]
    assert mapping.views == 0


def test_a_view_can_be_referred_to_weakly(mapping: Mapping) -> None:
    view = View(mapping, None, readonly=True)
    reference = weakref.ref(view)
    del view
    assert reference() is None


def test_a_view_needs_a_mapping() -> None:
    with pytest.raises(TypeError):
        View(bytearray(8), None, readonly=True)  # type: ignore[arg-type, unused-ignore]


def test_a_view_needs_to_know_whether_it_is_read_only(mapping: Mapping) -> None:
    with pytest.raises(TypeError):
        View(mapping, None)  # type: ignore[call-arg, unused-ignore]


def test_on_release_is_callable_or_none(mapping: Mapping) -> None:
    with pytest.raises(TypeError):
        View(mapping, 5, readonly=True)  # type: ignore[arg-type, unused-ignore]
    assert mapping.views == 0


def test_a_writable_view_of_a_read_only_mapping_is_refused(fd: int) -> None:
    with Mapping(fd, SIZE, writable=False) as mapping, pytest.raises(BufferError):
        View(mapping, None, readonly=False)


@pytest.mark.parametrize(
    ("offset", "length"),
    [(-1, 1), (SIZE, None), (SIZE, 1), (0, 0), (0, -1), (0, SIZE + 1), (1, SIZE), (SIZE - 1, sys.maxsize), (-1, None)],
)
def test_a_view_outside_of_the_mapping_is_einval(mapping: Mapping, offset: int, length: int | None) -> None:
    with pytest.raises(OSError) as caught:
        View(mapping, None, readonly=True, offset=offset, length=length)
    assert caught.value.errno == errno.EINVAL
    assert mapping.views == 0


def test_open_view_checks_its_arguments(mapping: Mapping) -> None:
    with pytest.raises(TypeError):
        open_view(mapping, None)  # type: ignore[call-arg, unused-ignore]


def test_threads_with_their_own_views_end_each_access_once(mapping: Mapping) -> None:
    rounds, workers = 500, 4
    ends: list[None] = []

    def work() -> None:
        for _ in range(rounds):
            view, memory = open_view(mapping, lambda: ends.append(None), True)
            view.retire()
            memory.release()

    threads = [threading.Thread(target=work) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ends) == rounds * workers
    assert (mapping.views, mapping.exports) == (0, 0)
