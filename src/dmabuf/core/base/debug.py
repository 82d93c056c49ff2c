"""The debug layer: what a production kernel compiles out and a developer wants told (spec 3.11, 6.7, 6.8).

On with ``DMABUF_DEBUG=1`` in the environment when the process starts, or by :func:`debugging`. Then

- a table that an importer gets from ``map`` hides its CPU side: looking at its pages raises ``ContractError``, and the DMA side works.
  The exporter sees it whole again in ``unmap``;
- an exporter that returns one table for two maps at a time is a ``ContractWarning`` (spec 2.20);
- a table with DMA addresses or lengths that are no whole pages is reported to the logger ``dmabuf`` at level DEBUG (no error: spec 2.11);
- a ``vmap`` reports bytes that are read or written through it outside of ``begin_cpu_access`` … ``end_cpu_access`` or an own
  ``read()`` or ``write()`` block: ``ContractWarning`` with the line that made the mapping. The raw memoryview of ``map.vaddr`` and bare
  ``mmap()`` mappings are memory and report nothing; no page protection is played with;
- ``detach`` with a mapping of one's own left is a ``ContractWarning``.

Two aids have a switch of their own. :func:`inject_deadlocks` (or ``DMABUF_DEBUG_WW=n``) makes the n-th lock under each context answer
EDEADLK without need, so that the back-off of a program runs. ``with dmabuf.signalling():`` marks code on the way to a fence's signal,
always: taking a reservation lock in it is a ``ContractWarning``, because who holds that lock may wait for this very fence; ``read()``,
``write()`` and ``access()`` take it too. A trylock may be taken. That slots reserved and not used are forgotten at unlock (spec 4.3), and
that locks are held where they must be, is checked always and needs no switch.
"""

from __future__ import annotations

import contextvars
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from dmabuf.core.memory.iosys_map import IosysMap
from dmabuf.core.memory.scatterlist import PAGE, SgTable
from dmabuf.domain.forks import fork_lock
from dmabuf.errors import contract_warning

if TYPE_CHECKING:
    from dmabuf.core.resv.ww_mutex import WwAcquireContext

LOGGER = logging.getLogger("dmabuf")


def _number(name: str) -> int:
    given = os.environ.get(name, "")
    return int(given) if given.isdigit() else 0


enabled = _number("DMABUF_DEBUG") > 0
deadlock_every = _number("DMABUF_DEBUG_WW")  # 0: never
sections = 0  # open in the process: while there is none, nobody has to ask for one's own
_counting = fork_lock()
_sections: contextvars.ContextVar[int] = contextvars.ContextVar("dmabuf signalling", default=0)


@contextmanager
def debugging(on: bool = True) -> Iterator[None]:
    """Switch the layer for a block, in the whole process."""
    global enabled
    before, enabled = enabled, on
    try:
        yield
    finally:
        enabled = before


@contextmanager
def inject_deadlocks(every: int = 2) -> Iterator[None]:
    """Let the n-th lock under each context answer EDEADLK, and later ones at growing distances (CONFIG_DEBUG_WW_MUTEX_SLOWPATH).

    In the whole process; ``every``: n, 0 for none.
    """
    global deadlock_every
    before, deadlock_every = deadlock_every, every
    try:
        yield
    finally:
        deadlock_every = before


def inject(ctx: WwAcquireContext) -> bool:
    """Is it this lock's turn? Each time in a context the distance to the next grows, so that every back-off gets through."""
    left, distance = ctx.injection or (deadlock_every, deadlock_every)
    if left > 1:
        ctx.injection = left - 1, distance
        return False
    distance = distance * 7 // 2 + 1
    ctx.injection = distance, distance
    return True


@contextmanager
def signalling() -> Iterator[None]:
    """Code that a fence's signal depends on: reservation locks are not to be taken in it.

    A section belongs to the thread or asyncio task, and may be inside of another. Taking a lock in it: ``ContractWarning``, and the lock
    is taken. Kernel: dma_fence_begin_signalling, dma_fence_end_signalling.
    """
    global sections
    token = _sections.set(_sections.get() + 1)
    with _counting:
        sections += 1
    try:
        yield
    finally:
        with _counting:
            sections -= 1
        _sections.reset(token)


def in_signalling() -> bool:
    """Is the running thread or task inside of a signalling section?"""
    return _sections.get() > 0


def check_signalling(operation: str, obj: object) -> None:
    """Before a wait for a reservation lock."""
    if _sections.get():
        contract_warning(
            f"{operation}: {obj!r}: inside of dmabuf.signalling(): its holder may wait for the fence that this code is about to signal", 4
        )


def place(frame: FrameType | None) -> str:
    """file:line of the nearest caller outside of the package."""
    here = os.path.dirname(os.path.dirname(__file__))
    while frame is not None and frame.f_code.co_filename.startswith(here + os.sep):
        frame = frame.f_back
    return "an unknown place" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


class CheckedMap(IosysMap):
    """A ``vmap`` that knows where it was made and asks whether the CPU may access the buffer now."""

    __slots__ = ("_allowed", "_made")

    def __init__(self, allowed: Callable[[], bool] | None = None, made: str = "") -> None:
        super().__init__()
        self._allowed, self._made = allowed, made

    @classmethod
    def of(cls, plain: IosysMap, allowed: Callable[[], bool], made: str) -> CheckedMap:
        """The same mapping, watched."""
        new = cls(allowed, made)
        new.assign(plain)
        return new

    def copy(self) -> IosysMap:
        new = super().copy()
        assert isinstance(new, CheckedMap)
        new._allowed, new._made = self._allowed, self._made
        return new

    __copy__ = copy

    def _range(self, operation: str, offset: int, length: int, *, write: bool = False) -> tuple[memoryview, int]:
        found = super()._range(operation, offset, length, write=write)
        if operation != "incr" and self._allowed is not None and not self._allowed():
            contract_warning(
                f"{operation}: CPU access outside of begin_cpu_access() and end_cpu_access(), through the vmap made at {self._made}",
                4 if operation in ("rd", "wr", "rd_field", "wr_field") else 3,
            )
        return found


def hide(table: SgTable) -> None:
    """Before a table is handed to its importer (mangle_sg_table)."""
    if enabled:
        if table.guarded:
            contract_warning(f"map: {table!r}: its exporter returned a table that an importer has already: make a new one each time", 4)
        table.guard("an importer uses the DMA addresses, vmap() or mmap(), never the pages (spec 1.1)")
        for address, length in table:
            if address % PAGE or length % PAGE:
                LOGGER.debug("map: %r: DMA address %#x, %d bytes: not whole pages (spec 2.11)", table, address, length)


def show(table: SgTable) -> None:
    """Before a table goes back to its exporter."""
    table.guard(None)
