"""What every object with a ``close()`` has in common: a ``with`` block closes it, and is not entered when it is closed."""

from __future__ import annotations

from typing import Self


class Closing:
    """The block's part; the object says how it is closed, and what tells that it is."""

    __slots__ = ()

    def _check(self, operation: str) -> object:
        """Errors: EBADF closed."""
        raise NotImplementedError

    def close(self) -> None:
        """Close it; again: nothing."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        self._check("enter")
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
