"""The stages' numbers for the parent, in a buffer of the pipeline. Each stage's process writes only its own block.

They are read and written through bare mappings, so a number may be a moment old. What a killed process has written stays, and the process
that takes its place goes on with it.
"""

from __future__ import annotations

import struct
from typing import Final, Literal, get_args

from dmabuf.core.dma_buf import DmaBuf

BLOCK_BYTES: Final = 256
Field = Literal[
    "taken",
    "frames",
    "taken_seq",
    "seq",
    "waits",
    "wait_ns",
    "blocks",
    "block_ns",
    "started_ns",
    "last_ns",
    "cpu_ns",
    "copied",
    "copied_between",
    "shared",
]
FIELDS: Final[tuple[Field, ...]] = get_args(Field)
_SEQ: Final = struct.Struct("<Q")


class Counters:
    """The numbers of one process of a stage, by name: ``counters["frames"] += 1``.

    ``taken``: frames whose work was begun. ``frames``: those whose work was done. ``taken_seq``, ``seq``: number, in its stream, of the
    last frame that the process took, and of the last one that it is done with. ``waits``, ``wait_ns``: for frames to come. ``blocks``,
    ``block_ns``: for a free buffer. ``started_ns``, ``last_ns``: CLOCK_MONOTONIC of the first frame's begin and the last one's end.
    ``cpu_ns``: CPU time of all its processes. Bytes of frames: ``copied`` inside the process, ``copied_between`` processes (not where they
    were written), ``shared`` (used where they were written).
    """

    def __init__(self, buf: DmaBuf, index: int) -> None:
        self._mapping = buf.mmap()
        self._bytes = memoryview(self._mapping)[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES]
        self._words = self._bytes.cast("Q")

    def __getitem__(self, field: Field) -> int:
        return self._words[_INDEX[field]]

    def __setitem__(self, field: Field, value: int) -> None:
        self._words[_INDEX[field]] = value

    def all(self) -> dict[str, int]:
        """Return every number."""
        return {name: self[name] for name in FIELDS}

    def close(self) -> None:
        """Unmap."""
        self._words.release()
        self._bytes.release()
        self._mapping.close()


_INDEX: Final = {name: i for i, name in enumerate(FIELDS)}


class Claims:
    """Which frame of a stream the workers of a stage with ``policy=latest`` have come to: each frame is for one of them.

    The number is 8 aligned bytes in a buffer, written inside ``write()``. A worker that dies there leaves the old number or the new one.
    """

    def __init__(self, buf: DmaBuf) -> None:
        self._buf = buf

    def claim(self, seq: int) -> bool:
        """Take a frame. Return False if a worker has taken it, or a newer one."""
        with self._buf.write() as view:
            if seq <= _SEQ.unpack_from(memoryview(view))[0]:
                return False
            _SEQ.pack_into(memoryview(view), 0, seq)
            return True
