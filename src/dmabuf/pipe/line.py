"""The line between the parent and a process of a stage: a socket pair over which JSON, buffers and streams go.

A stage looks at it between two frames and while it waits, and never sends without need. The end of the parent is the end of the line.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Callable
from typing import Any, Final

from dmabuf.sharing.passing import Sent, recv, send

Message = dict[str, Any]
Handler = Callable[[Message, list[Any]], None]


class ParentGone(Exception):
    """The parent has ended."""


class Line:
    """A stage's end of the line.

    ``stopping``: the parent asked for an end. ``on``: what to do with messages, by their ``op``.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.stopping = self.going = False
        self.on: dict[str, Handler] = {"stop": self._stop, "go": self._go}
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)

    def _stop(self, message: Message, objects: list[Any]) -> None:
        self.stopping = True

    def _go(self, message: Message, objects: list[Any]) -> None:
        self.going = True

    def tell(self, op: str, *objects: Sent, **fields: Any) -> None:
        """Send a message to the parent.

        Raises:
            ParentGone: It has ended.
        """
        try:
            send(self.sock, *objects, meta={"op": op, **fields})
        except ConnectionError:
            raise ParentGone from None

    def look(self, seconds: float | None = 0) -> bool:
        """Take what has come; wait for so many seconds if there is nothing, None without limit. Return True if something has come.

        Raises:
            ParentGone: It has ended.
        """
        came = False
        while self._poll.poll(None if seconds is None else seconds * 1000):
            self.hear()
            came, seconds = True, 0
        return came

    def hear(self) -> None:
        """Take one message."""
        try:
            objects = recv(self.sock)
        except (EOFError, ConnectionError):
            raise ParentGone from None
        message = objects.meta
        self.on[message["op"]](message, list(objects))


WAIT_S: Final = 0.25  # how often a stage that waits for a free buffer looks at its line
