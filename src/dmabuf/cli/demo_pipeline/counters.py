"""The stages' numbers for the parent, in a separate buffer. Each stage writes only its own.

They are read and written through bare mappings, without fences, so a number may be a moment old. The parent reads digests and texts, which
must be right, after the stage has ended.
"""

from __future__ import annotations

from typing import Final, Literal, get_args

from dmabuf.core.dma_buf import DmaBuf

BLOCK_BYTES: Final = 1024
State = Literal["starting", "running", "done", "gave up", "failed"]
Field = Literal["state", "frames", "waits", "wait_ns", "started_ns", "ended_ns", "copied_between", "copied_inside", "shared"]
STATES: Final[tuple[State, ...]] = get_args(State)
FIELDS: Final[tuple[Field, ...]] = get_args(Field)
_DIGEST, _DIGEST_BYTES, _TEXT = 128, 32, 160


class Counters:
    """One stage's block of numbers, by name: ``counters["frames"] += 1``.

    ``frames``: done. ``waits``, ``wait_ns``: for fences. ``started_ns``, ``ended_ns``: CLOCK_MONOTONIC. Bytes of frames: ``copied_between``
    processes (not where they were written), ``copied_inside`` this one (between a codec's memory and a buffer), ``shared`` (used where they
    were written).
    """

    def __init__(self, buf: DmaBuf, index: int) -> None:
        self._mapping = buf.mmap()
        self._bytes = memoryview(self._mapping)[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES]
        self._words = self._bytes[:_DIGEST].cast("Q")

    def __getitem__(self, field: Field) -> int:
        return self._words[FIELDS.index(field)]

    def __setitem__(self, field: Field, value: int) -> None:
        self._words[FIELDS.index(field)] = value

    @property
    def state(self) -> State:
        """The stage's state."""
        return STATES[self["state"]]

    def say(self, state: State, *, digest: bytes = b"", text: str = "") -> None:
        """Write the stage's new state, with its digest and a text."""
        raw = text.encode(errors="replace")[: BLOCK_BYTES - _TEXT]
        self._bytes[_TEXT : _TEXT + len(raw)] = raw
        self._bytes[_DIGEST : _DIGEST + len(digest)] = digest
        self["state"] = STATES.index(state)

    @property
    def digest(self) -> bytes:
        """The SHA-256 of the stage's result, zeros before."""
        return bytes(self._bytes[_DIGEST : _DIGEST + _DIGEST_BYTES])

    @property
    def text(self) -> str:
        """Why it ended."""
        return bytes(self._bytes[_TEXT:]).rstrip(b"\0").decode(errors="replace")

    def close(self) -> None:
        """Unmap."""
        self._words.release()
        self._bytes.release()
        self._mapping.close()
