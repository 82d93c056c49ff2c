"""What the debug layer does with memory: maps that know whether they may be used, and tables whose pages are hidden (semantics 6.7)."""

from __future__ import annotations

import logging
from collections.abc import Callable

from dmabuf.core.base import debug
from dmabuf.core.memory.iosys_map import IosysMap
from dmabuf.core.memory.scatterlist import PAGE, SgTable, guard, guarded
from dmabuf.errors import contract_warning

LOGGER = logging.getLogger("dmabuf")


class CheckedMap(IosysMap):
    """A ``vmap`` that knows where it was made, and asks whether the CPU may access the buffer now."""

    __slots__ = ("_allowed", "_made")

    def __init__(self, allowed: Callable[[], bool] | None = None, made: str = "") -> None:
        super().__init__()
        self._allowed, self._made = allowed, made

    @classmethod
    def of(cls, plain: IosysMap, allowed: Callable[[], bool], made: str) -> CheckedMap:
        """Return the same mapping, watched."""
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
    """Hide the CPU side of a table from its importer (mangle_sg_table)."""
    if debug.enabled:
        if guarded(table):
            contract_warning(f"map: {table!r}: its exporter returned a table that an importer already has; make a new one each time", 4)
        guard(table, "its pages are hidden from the importer (semantics 1.1); use the DMA addresses, vmap() or mmap()")
        for address, length in table:
            if address % PAGE or length % PAGE:
                LOGGER.debug("map: %r: DMA address %#x, %d bytes: not whole pages (semantics 2.11)", table, address, length)


def show(table: SgTable) -> None:
    """Show the CPU side again, to its exporter."""
    guard(table, None)
