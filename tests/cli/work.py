"""What the stages of test pipelines do."""

import os
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np

NOT_CALLABLE = 5


def same(frame: Any) -> Any:
    return frame


def inverted(frame: Any, out: Any) -> None:
    np.subtract(255, frame, out=out)


def halved(frame: Any) -> Any:
    return frame[::2, ::2]


def added(frame: Any, *, amount: int = 1) -> Any:
    return frame + np.uint8(amount)


def mean(frame: Any) -> float:
    return float(frame.mean())


def mean_rows(frame: Any, out: Any) -> None:
    frame.mean(axis=1, out=out)


def marked(frame: Any, meta: dict[str, Any]) -> Any:
    meta["first"] = int(frame.flat[0])
    return frame, "seen"


def odd_only(frame: Any) -> Any:
    return frame if frame.flat[0] % 2 else None


def odd_written(frame: Any, out: Any) -> bool:
    out[...] = frame
    return bool(frame.flat[0] % 2)


def talkative(frame: Any) -> str:
    return "x" * 5000


def broken(frame: Any, at: int = 3) -> Any:
    if frame.flat[0] == at * 3:
        raise ValueError("this frame is broken")
    return frame


def shrinking(frame: Any) -> Any:
    return frame[: 4 if frame.flat[0] == 0 else 2]


def nothing_of_numbers(frame: Any) -> object:
    return object()


def killed(frame: Any, at: int = 3) -> Any:
    if frame.flat[0] == at * 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return frame


def stuck(frame: Any) -> None:
    signal.pause()


def endless() -> Iterator[Any]:
    while True:
        yield np.zeros((4, 4), np.uint8)


def three() -> Iterator[Any]:
    for n in range(3):
        yield np.full((2, 3), n, np.float32)


def no_array() -> Iterator[Any]:
    yield 5


def takes_two(frame: Any, threshold: int) -> Any:
    return frame


class Firsts:
    """Notes the first number of each frame, and the frames' own values."""

    def __init__(self, scale: int = 1) -> None:
        self._scale, self._seen = scale, []

    def __call__(self, frame: Any, meta: dict[str, Any]) -> None:
        self._seen.append([int(frame.flat[0]) * self._scale, meta] if meta else int(frame.flat[0]) * self._scale)

    def close(self) -> Any:
        return self._seen
