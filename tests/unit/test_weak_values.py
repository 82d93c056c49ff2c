"""The dictionary that doesn't keep its values."""

from __future__ import annotations

import gc
import sys
import weakref
from types import FrameType
from typing import Any

import pytest

from dmabuf._native import WeakValues


class Value:
    """Something that can be referenced weakly."""


def test_weak_values_returns_a_value_while_it_lives() -> None:
    table: WeakValues[int, Value] = WeakValues()
    value = Value()
    table[1] = value
    assert (table.get(1), table.values(), table.items(), len(table)) == (value, [value], [(1, value)], 1)
    del value
    assert (table.get(1), table.values(), table.items(), len(table)) == (None, [], [], 0)


def test_weak_values_forgets_the_old_value_of_a_key_and_keeps_the_new_one() -> None:
    table: WeakValues[tuple[int, int], Value] = WeakValues()
    old, new = Value(), Value()
    table[1, 2] = old
    table[1, 2] = new
    del old
    assert table.get((1, 2)) is new


def test_weak_values_has_one_value_under_several_keys_and_tables() -> None:
    table: WeakValues[str, Value] = WeakValues()
    other: WeakValues[str, Value] = WeakValues()
    value = Value()
    table["a"] = table["b"] = other["a"] = value
    del value
    assert len(table) == len(other) == 0


def test_weak_values_forgets_what_is_deleted_or_cleared() -> None:
    table: WeakValues[str, Value] = WeakValues()
    values = [Value(), Value(), Value()]
    table["a"], table["b"], table["c"] = values
    del table["a"]
    assert table.values() == values[1:]
    table.clear()
    assert len(table) == 0


def test_weak_values_end_before_their_values() -> None:
    value = Value()
    table: WeakValues[int, Value] = WeakValues()
    table[1] = value
    before = weakref.getweakrefcount(value)
    del table
    gc.collect()
    assert weakref.getweakrefcount(value) == before - 1


def test_weak_values_of_garbage_are_forgotten() -> None:
    table: WeakValues[int, Any] = WeakValues()
    value: Any = Value()
    value.itself, value.table = value, table
    table[1] = value
    del value
    gc.collect()
    assert table.get(1) is None


def test_end_of_a_weak_value_runs_no_python() -> None:
    table: WeakValues[int, Value] = WeakValues()
    value = Value()
    table[1] = value
    seen: list[str] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        seen.append(f"{event} {frame.f_code.co_name}")

    sys.setprofile(note)
    try:
        del value
    finally:
        sys.setprofile(None)
    assert [what for what in seen if "note" not in what and not what.startswith("c_call")] == []


@pytest.mark.parametrize(
    "misuse",
    [
        lambda table: table.__setitem__([], Value()),
        lambda table: table.__setitem__(1, 1),
        lambda table: table.get([]),
        lambda table: table(1),
        lambda table: table(),
        lambda table: type(table)({}),
        lambda table: type(table)(a=1),
    ],
    ids=["unhashable key", "no weak reference", "get unhashable", "called", "called without", "argument", "keyword"],
)
def test_weak_values_refuses_misuse(misuse: Any) -> None:
    with pytest.raises(TypeError):
        misuse(WeakValues())


def test_deleting_an_unknown_key_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        del WeakValues[int, Value]()[1]
