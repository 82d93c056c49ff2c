"""``WeakObjects``: objects that nothing here keeps alive, which threads add, lose and walk at the same time.

A ``weakref.WeakSet`` would do, but a thread that walks one gets RuntimeError when another thread adds to it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from dmabuf.domain.guards import finalizer

T = TypeVar("T")


class WeakObjects(Generic[T]):
    """A set of objects by identity. Every change is one operation of a dict, so threads, finalizers and signal handlers need no lock."""

    __slots__ = ("_refs",)

    def __init__(self) -> None:
        self._refs: dict[int, weakref.ref[T]] = {}  # by the id of the object, which nobody else has before forget() has run

    def add(self, found: T) -> None:
        """Add an object. Adding it again has no effect."""
        refs, key = self._refs, id(found)
        if key in refs:
            return

        def forget(_: weakref.ref[T]) -> None:
            refs.pop(key, None)

        refs[key] = weakref.ref(found, finalizer(forget))

    def discard(self, found: T) -> None:
        """Remove an object, if it is there."""
        self._refs.pop(id(found), None)

    def discard_where(self, unwanted: Callable[[T], bool]) -> None:
        """Remove the objects for which a function returns True, in one walk."""
        for key, ref in list(self._refs.items()):
            found = ref()
            if found is not None and unwanted(found):
                self._refs.pop(key, None)

    def __iter__(self) -> Iterator[T]:
        """The objects that are there now, oldest first. They live at least as long as the iteration."""
        return iter([found for ref in list(self._refs.values()) if (found := ref()) is not None])

    def __len__(self) -> int:
        return len(self._refs)
