"""The switch of the debug layer: what a production kernel compiles out and a developer wants to be told (semantics 3.11, 6.7, 6.8).

It is on with ``DMABUF_DEBUG=1`` in the environment when the process starts, or by :func:`debugging`. Then

- a table that an importer gets from ``map`` hides its CPU side: reading its pages raises ``ContractError``, and the DMA side works. The
  exporter sees it whole again in ``unmap``;
- an exporter that returns one table for two maps at a time gets a ``ContractWarning`` (semantics 2.20);
- a table with DMA addresses or lengths that are not whole pages is logged by the logger ``dmabuf`` at level DEBUG (semantics 2.11);
- a ``vmap`` reports bytes that are read or written through it outside of ``begin_cpu_access`` … ``end_cpu_access``, or of a ``read()`` or
  ``write()`` block of the same owner: a ``ContractWarning`` with the line that made the mapping. The memoryview of ``map.vaddr`` and bare
  ``mmap()`` mappings are memory and report nothing. Page protection is not used;
- ``detach`` with a mapping of its own left is a ``ContractWarning``.

Two aids have a switch of their own. ``inject_deadlocks`` (``dmabuf.core.resv.ww_mutex``, or ``DMABUF_DEBUG_WW=n``) makes the n-th lock
under each context answer EDEADLK without need, so that a program's back-off runs. ``with dmabuf.signalling():`` marks code on the way to a
fence's signal, and works always: taking a reservation lock in it is a ``ContractWarning``, because the lock's holder may wait for this very
fence. ``read()``, ``write()`` and ``access()`` take the lock too. A trylock is allowed. Two checks need no switch: that reserved slots
which aren't used are forgotten at unlock (semantics 4.3), and that locks are held where they must be.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any

from dmabuf._native import Bracket

_PACKAGE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))) + os.sep


def setting(name: str) -> int:
    """Return the number that an environment variable holds, or 0."""
    given = os.environ.get(name, "")
    return int(given) if given.isdigit() else 0


enabled = setting("DMABUF_DEBUG") > 0


class Switched(Bracket):
    """A block in which a global variable of a module has another value, in the whole process."""

    __slots__ = ("_before", "_name", "_value", "_variables")

    def __init__(self, variables: dict[str, Any], name: str, value: object) -> None:
        """``variables``: the module's ``globals()``."""
        self._variables, self._name, self._value = variables, name, value
        self._before: tuple[Any, ...] = ()  # the value outside of the block, while it is another one

    def enter(self) -> None:
        """Switch."""
        self._before = (self._variables[self._name],)
        self._variables[self._name] = self._value

    def leave(self) -> None:
        """Switch back."""
        for value in self._before:
            self._variables[self._name] = value
        self._before = ()


def debugging(on: bool = True) -> AbstractContextManager[None]:
    """Switch the layer on or off for a block, in the whole process."""
    return Switched(globals(), "enabled", on)


def place(frame: FrameType | None) -> str:
    """Return ``file:line`` of the nearest caller outside of the package."""
    while frame is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    return "an unknown place" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"
