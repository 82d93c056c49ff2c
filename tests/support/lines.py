"""Fences of one timeline that a test signals, made by this process or by another."""

from collections.abc import Sequence

import dmabuf
from dmabuf import DmaFence
from tests.support.children import Parent, Spawn

_A_MESSAGE = 200


class Here:
    """Fences of this process."""

    def __init__(self) -> None:
        self.timeline = dmabuf.Timeline("here")
        self.fences: list[DmaFence] = []

    def make(self, count: int) -> list[DmaFence]:
        self.fences = [self.timeline.fence() for _ in range(count)]
        return self.fences

    def signal(self, *order: int) -> None:
        """Signal these fences, in this order. One that has been signaled is EINVAL."""
        for i in order:
            self.fences[i].signal()

    def set_error(self, i: int, error: int) -> None:
        self.fences[i].set_error(error)

    def end(self) -> None:
        self.timeline.close()


class There(Here):
    """Fences of another process, which signals them as it is told."""

    def __init__(self, child: Spawn) -> None:
        self.child = child

    def make(self, count: int) -> list[DmaFence]:
        self.other = self.child(makes_and_signals, count)
        self.fences = []
        while len(self.fences) < count:
            self.fences += dmabuf.recv(self.other.sock)
        return self.fences

    def signal(self, *order: int) -> None:
        self._tell("signal", order)

    def set_error(self, i: int, error: int) -> None:
        self._tell("set_error", (i,), error)

    def _tell(self, what: str, order: Sequence[int], *arguments: int) -> None:
        self.other.send((what, order, *arguments))
        number = self.other.recv()
        if number:
            raise OSError(number, f"{what} there")

    def end(self) -> None:
        self.other.send(None)
        self.other.result()


def makes_and_signals(parent: Parent, count: int) -> None:
    """Sends its fences, and ends those that the test names; at the end all that are left."""
    line = dmabuf.Timeline("there")
    fences = [line.fence() for _ in range(count)]
    for i in range(0, count, _A_MESSAGE):
        dmabuf.send(parent.sock, *fences[i : i + _A_MESSAGE])
    while (told := parent.recv()) is not None:
        what, order, *arguments = told
        try:
            for i in order:
                getattr(fences[i], what)(*arguments)
            parent.send(0)
        except OSError as e:
            parent.send(e.errno)
    line.close()
