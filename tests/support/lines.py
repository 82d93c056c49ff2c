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
        for i in order:
            self.fences[i].signal()

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
        self.other.send(order)
        if self.other.recv() != "signalled":
            raise AssertionError

    def end(self) -> None:
        self.other.send(None)
        self.other.result()


def makes_and_signals(parent: Parent, count: int) -> None:
    """Sends its fences, and ends those that the test names; at the end all that are left."""
    line = dmabuf.Timeline("there")
    fences = [line.fence() for _ in range(count)]
    for i in range(0, count, _A_MESSAGE):
        dmabuf.send(parent.sock, *fences[i : i + _A_MESSAGE])
    order: Sequence[int] | None
    while (order := parent.recv()) is not None:
        for i in order:
            fences[i].signal()
        parent.send("signalled")
    line.close()
