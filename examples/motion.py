"""Stages for `dmabuf pipe` that find what moves in a video and draw a box around it.

    python examples/motion.py VIDEO OUTPUT

runs, with three processes for the second stage, and each stage in a process of its own:

    dmabuf pipe VIDEO ! examples/motion.py:Motion threshold=24 ! examples/motion.py:boxed workers=3 ! OUTPUT

`Motion` compares each frame with the one before, so one process has to see them all. It returns a box, which goes on with the frame as a
value. `boxed` writes the frame with the box into the next buffer; its workers take turns, and the output has the frames in their order.

Written by hand here:
- what a frame is compared with, in the object of the one process that sees all frames
"""

import subprocess
import sys

import numpy as np
from numpy.typing import NDArray

GREEN = (0, 255, 0)
STEP = 4  # only each fourth pixel is compared


class Motion:
    """Returns (left, top, right, bottom) of what has changed since the frame before; an empty list if nothing has."""

    def __init__(self, threshold: int = 24) -> None:
        self.threshold, self.frames_with_motion = threshold, 0
        self.before: NDArray[np.int16] | None = None

    def __call__(self, frame: NDArray[np.uint8]) -> list[int]:
        """Compare a frame with the one before."""
        now = frame[::STEP, ::STEP].mean(axis=2).astype(np.int16)
        before, self.before = self.before, now
        changed = np.argwhere(np.abs(now - before) > self.threshold) if before is not None else np.empty((0, 2))
        if not len(changed):
            return []
        self.frames_with_motion += 1
        (top, left), (bottom, right) = changed.min(axis=0), changed.max(axis=0)
        return [int(side) * STEP for side in (left, top, right, bottom)]

    def close(self) -> int:
        """Say in how many frames something moved: the pipeline's table shows it."""
        return self.frames_with_motion


def boxed(frame: NDArray[np.uint8], out: NDArray[np.uint8], meta: dict[str, list[int]]) -> None:
    """Write the frame, and the box of the stage before."""
    out[...] = frame
    if box := meta["Motion"]:
        left, top, right, bottom = box
        out[[top, bottom], left:right] = GREEN
        out[top:bottom, [left, right]] = GREEN


if __name__ == "__main__":
    video, output = sys.argv[1:]
    stages = [video, "!", f"{__file__}:Motion", "threshold=24", "!", f"{__file__}:boxed", "workers=3", "!", output]
    sys.exit(subprocess.run([sys.executable, "-m", "dmabuf", "pipe", *stages]).returncode)
