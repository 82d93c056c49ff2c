"""Window: accesses that end exactly once, however their views and arrays go."""

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

from dmabuf._native import Mapping, Window, window_view
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


def test_a_window_shows_its_range(mapping: Mapping) -> None:
    mapping[10:14] = b"abcd"
    window = Window(mapping, None, readonly=True, offset=11, length=2)
    with memoryview(window) as view:
        assert bytes(view) == b"bc"
        assert view.readonly
    assert (window.size, window.readonly) == (2, True)
    window.retire()


def test_a_window_without_a_length_reaches_the_end(mapping: Mapping) -> None:
    window = Window(mapping, None, readonly=True, offset=PAGE)
    assert window.size == SIZE - PAGE
    window.retire()


def test_a_writable_window_writes_the_mapping(mapping: Mapping) -> None:
    window = Window(mapping, None, readonly=False, offset=PAGE)
    with memoryview(window) as view:
        view[0] = 3
    window.retire()
    assert mapping[PAGE] == 3


def test_a_read_only_window_refuses_a_writable_buffer(fd: int, mapping: Mapping) -> None:
    window = Window(mapping, None, readonly=True)
    with pytest.raises(BufferError):
        os.readv(fd, [window])
    assert window.retire()


def test_window_exports_are_counted_apart_from_the_mappings(mapping: Mapping) -> None:
    window = Window(mapping, None, readonly=True)
    with memoryview(window), memoryview(window), memoryview(mapping):
        assert (window.exports, mapping.exports, mapping.windows) == (2, 1, 1)
    assert (window.exports, mapping.exports, mapping.windows) == (0, 0, 1)
    window.retire()


def test_retire_without_exports_ends_the_access_at_once(mapping: Mapping, calls: list[str], ended: Callable[[], None]) -> None:
    window = Window(mapping, ended, readonly=True)
    memoryview(window).release()
    assert calls == []
    assert window.retire() is True
    assert calls == ["ended"]


def test_retire_with_an_export_leaves_the_end_to_the_last_one(mapping: Mapping, calls: list[str], ended: Callable[[], None]) -> None:
    window = Window(mapping, ended, readonly=True)
    first, second = memoryview(window), memoryview(window)
    assert window.retire() is False
    first.release()
    assert calls == []
    second.release()
    assert calls == ["ended"]
    assert mapping.windows == 0


def test_the_end_is_told_once(mapping: Mapping, calls: list[str], ended: Callable[[], None]) -> None:
    window = Window(mapping, ended, readonly=True)
    view = memoryview(window)
    assert [window.retire(), window.retire()] == [False, False]
    view.release()
    assert [window.retire(), window.retire()] == [True, True]
    del window, view
    gc.collect()
    assert calls == ["ended"]


def test_a_slice_that_outlives_the_view_holds_the_access(mapping: Mapping, calls: list[str], ended: Callable[[], None]) -> None:
    window, view = window_view(mapping, ended, True)
    part = view[1:3]
    view.release()
    assert window.retire() is False
    del part
    assert calls == ["ended"]


def test_an_array_made_of_the_view_holds_the_access(mapping: Mapping, calls: list[str], ended: Callable[[], None]) -> None:
    numpy = pytest.importorskip("numpy")
    window, view = window_view(mapping, ended, True)
    array = numpy.asarray(view)
    view.release()  # numpy took a view of its own: only the window knows of it
    assert window.exports == 1
    assert window.retire() is False
    part = array[5:6]
    del array
    assert calls == []
    del part
    assert calls == ["ended"]


def test_a_buffer_taken_of_the_view_keeps_the_view_from_being_released(mapping: Mapping) -> None:
    window, view = window_view(mapping, None, False)
    taken = pickle.PickleBuffer(view)
    with pytest.raises(BufferError):
        view.release()
    assert window.retire() is False
    taken.release()
    view.release()
    assert mapping.windows == 0


def test_a_view_is_unusable_after_release(mapping: Mapping) -> None:
    window, view = window_view(mapping, None, True)
    view.release()
    window.retire()
    with pytest.raises(ValueError, match="released"):
        view[0]


def test_a_retired_window_refuses_new_exports(mapping: Mapping) -> None:
    window = Window(mapping, None, readonly=True)
    view = memoryview(window)
    window.retire()
    with pytest.raises(ValueError, match="over"):
        memoryview(window)
    assert window.exports == 1
    view.release()
    with pytest.raises(ValueError, match="over"):
        memoryview(window)


def test_the_mapping_can_be_closed_by_on_release(fd: int) -> None:
    mapping = Mapping(fd, SIZE)
    window = Window(mapping, mapping.close, readonly=True)
    view = memoryview(window)
    window.retire()
    view.release()
    assert mapping.closed


def test_the_window_keeps_the_mapping(fd: int) -> None:
    mapping = Mapping(fd, SIZE)
    mapping[0] = 5
    address = mapping.address
    window, view = window_view(mapping, None, True)
    del mapping
    assert view[0] == 5
    view.release()
    window.retire()
    assert not mapped(address)


def test_the_view_keeps_the_window(mapping: Mapping, calls: list[str], ended: Callable[[], None]) -> None:
    window, view = window_view(mapping, ended, True)
    window.retire()
    del window
    assert calls == []
    del view
    assert calls == ["ended"]


def test_an_open_window_that_is_dropped_frees_the_mapping_and_tells_nobody(
    mapping: Mapping, calls: list[str], ended: Callable[[], None]
) -> None:
    window = Window(mapping, ended, readonly=True)
    del window
    assert mapping.windows == 0
    assert calls == []


def test_what_on_release_raises_reaches_the_hook_from_retire(mapping: Mapping, unraisable: Catch) -> None:
    def broken() -> None:
        raise KeyError("broken")

    assert Window(mapping, broken, readonly=True).retire() is True
    assert [type(error) for error in unraisable] == [KeyError]
    unraisable.clear()


def test_what_on_release_raises_reaches_the_hook_from_the_last_export(mapping: Mapping, unraisable: Catch) -> None:
    def broken() -> None:
        raise KeyError("broken")

    window, view = window_view(mapping, broken, True)
    window.retire()
    view.release()
    assert [type(error) for error in unraisable] == [KeyError]
    unraisable.clear()


def test_an_exception_on_its_way_survives_the_end_of_an_access(mapping: Mapping, calls: list[str], ended: Callable[[], None]) -> None:
    def retired() -> memoryview:
        window, view = window_view(mapping, ended, True)
        window.retire()
        return view

    with pytest.raises(IndexError):
        [retired(), calls[5]]  # the view is dropped while the error looks for its handler
    assert calls == ["ended"]


def test_on_release_may_start_the_next_access(mapping: Mapping, calls: list[str]) -> None:
    def again() -> None:
        window, view = window_view(mapping, lambda: calls.append("second"), True)
        view.release()
        window.retire()
        calls.append("first")

    Window(mapping, again, readonly=True).retire()
    assert calls == ["second", "first"]
    assert mapping.windows == 0


class Access:
    """As an access does: it refers to its window, and its window to it."""

    def __init__(self, mapping: Mapping, calls: list[str]) -> None:
        self.calls = calls
        self.window, self.view = window_view(mapping, self.end, True)
        self.word = "ended"

    def end(self) -> None:
        self.calls.append(self.word)


def test_a_cycle_through_an_open_window_is_collected(mapping: Mapping, calls: list[str]) -> None:
    access = weakref.ref(Access(mapping, calls))
    gc.collect()
    assert access() is None
    assert (mapping.windows, calls) == (0, [])


@pytest.mark.parametrize("views_first", [True, False])
def test_a_retired_access_ends_whole_when_its_view_becomes_garbage(mapping: Mapping, calls: list[str], views_first: bool) -> None:
    # The collector takes a cycle apart in the order of its making: on_release must not meet half of its object.
    holder: Catch = []
    if views_first:
        holder.append(holder)
    access = Access(mapping, calls)
    access.window.retire()
    if not views_first:
        holder.append(holder)
    holder += [access.view, access]
    del access, holder
    gc.collect()
    assert calls == ["ended"]
    assert mapping.windows == 0


def test_a_window_can_be_referred_to_weakly(mapping: Mapping) -> None:
    window = Window(mapping, None, readonly=True)
    reference = weakref.ref(window)
    del window
    assert reference() is None


def test_a_window_needs_a_mapping() -> None:
    with pytest.raises(TypeError):
        Window(bytearray(8), None, readonly=True)  # type: ignore[arg-type, unused-ignore]


def test_a_window_needs_to_know_whether_it_is_read_only(mapping: Mapping) -> None:
    with pytest.raises(TypeError):
        Window(mapping, None)  # type: ignore[call-arg, unused-ignore]


def test_on_release_is_callable_or_none(mapping: Mapping) -> None:
    with pytest.raises(TypeError):
        Window(mapping, 5, readonly=True)  # type: ignore[arg-type, unused-ignore]
    assert mapping.windows == 0


def test_a_writable_window_of_a_read_only_mapping_is_refused(fd: int) -> None:
    with Mapping(fd, SIZE, writable=False) as mapping, pytest.raises(BufferError):
        Window(mapping, None, readonly=False)


@pytest.mark.parametrize(
    ("offset", "length"),
    [(-1, 1), (SIZE, None), (SIZE, 1), (0, 0), (0, -1), (0, SIZE + 1), (1, SIZE), (SIZE - 1, sys.maxsize), (-1, None)],
)
def test_a_window_outside_of_the_mapping_is_einval(mapping: Mapping, offset: int, length: int | None) -> None:
    with pytest.raises(OSError) as caught:
        Window(mapping, None, readonly=True, offset=offset, length=length)
    assert caught.value.errno == errno.EINVAL
    assert mapping.windows == 0


def test_window_view_checks_its_arguments(mapping: Mapping) -> None:
    with pytest.raises(TypeError):
        window_view(mapping, None)  # type: ignore[call-arg, unused-ignore]


def test_threads_with_their_own_windows_end_each_access_once(mapping: Mapping) -> None:
    rounds, workers = 500, 4
    ends: list[None] = []

    def work() -> None:
        for _ in range(rounds):
            window, view = window_view(mapping, lambda: ends.append(None), True)
            window.retire()
            view.release()

    threads = [threading.Thread(target=work) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ends) == rounds * workers
    assert (mapping.windows, mapping.exports) == (0, 0)
