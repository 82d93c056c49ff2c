"""What every object with a ``close()`` has in common: a ``with`` block closes it, and a closed object refuses the block."""

from __future__ import annotations

from typing import Self

from dmabuf.domain.guards import finished


class Closing:
    """The ``with`` block of an object, which says how it is closed and whether it is."""

    __slots__ = ()

    def _check(self, operation: str) -> object:
        """Raise ClosedError if the object is closed (EBADF)."""
        raise NotImplementedError

    def close(self) -> None:
        """Close it. Closing twice has no effect."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        self._check("enter")
        return self

    @finished
    def __exit__(self, *_: object) -> None:
        self.close()
