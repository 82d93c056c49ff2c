"""``Module``: a ready-made owner of exporters, which can be unloaded only when no buffer of them is left."""

from __future__ import annotations

import errno
import threading

from dmabuf.errors import fail


class Module:
    """An owner to pass to ``export(owner=…)``.

    ``references``: how many there are. ``alive``: not unloaded.
    """

    def __init__(self, name: str) -> None:
        self.name, self.references, self.alive = name, 0, True
        self._lock = threading.RLock()  # re-entrant, because a finalizer or a signal handler may come in the middle

    def __repr__(self) -> str:
        return f"<dmabuf Module {self.name}>"

    def try_get(self) -> bool:
        with self._lock:
            self.references += self.alive
            return self.alive

    def put(self) -> None:
        with self._lock:
            self.references -= 1

    def unload(self) -> None:
        """Refuse every export from now on.

        Raises:
            BusyError: A buffer of its exporters lives (EBUSY).
        """
        with self._lock:
            left = self.references
            self.alive = self.alive and left > 0
        if left:
            raise fail(errno.EBUSY, "unload", self, "close its buffers and mappings", what=f"{left} buffers live")
