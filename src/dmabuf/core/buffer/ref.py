"""``BufferRef``: a token that says which buffer is meant, and is bytes.

A buffer is a descriptor, and only its kind of channel carries it. A token goes through any pickle or file, into any number of processes,
and none of that keeps the buffer alive. ``dmabuf.open(token)`` finds the buffer as long as some process has it open.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Self

from dmabuf.core.buffer.handle import Handle
from dmabuf.core.buffer.identity import NAME_BYTES
from dmabuf.errors import fail

_MAGIC: Final = b"dmabufR\1"  # the last byte is the version
_FORM: Final = struct.Struct("=8s8sQQQ16s32s")  # magic, domain, st_dev, st_ino, size, nonce, name


@dataclass(frozen=True, slots=True)
class BufferRef:
    """Which buffer is meant: a small value that any pickle carries. ``dmabuf.open(ref)`` opens the buffer.

    A token doesn't keep its buffer alive. It is never taken for another buffer: not for a later one with the same inode number, and not for
    one of another domain or boot.

    Attributes:
        domain: The id of the domain.
        dev: The device of the inode.
        ino: The number of the inode.
        size: The size in bytes.
        nonce: The buffer's random number.
        name: The name that the buffer had, None if it had none; for messages only.
    """

    domain: str
    dev: int
    ino: int
    size: int
    nonce: bytes
    name: str | None = None

    def __bytes__(self) -> bytes:
        """Return the token as 88 bytes, for channels that don't pickle."""
        raw = b"" if self.name is None else os.fsencode(self.name)
        return _FORM.pack(_MAGIC, bytes.fromhex(self.domain), self.dev, self.ino, self.size, self.nonce, raw)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Return the token that ``bytes(ref)`` made these bytes of. Nothing is opened or looked for.

        Args:
            data: The bytes.

        Raises:
            InvalidError: They are not a token of this version (EINVAL).
            TypeError: ``data`` is not bytes.
        """
        if not isinstance(data, bytes):
            raise TypeError(f"BufferRef: the bytes of a token are bytes, not {type(data).__name__}")
        magic, domain, dev, ino, size, nonce, raw = _FORM.unpack(data) if len(data) == _FORM.size else (b"",) * 7
        name = raw.rstrip(b"\0")
        if magic != _MAGIC or not ino or not 0 < size < 1 << 63 or len(name) > NAME_BYTES or b"\0" in name:
            what = f"{len(data)} bytes that are not a token of this version of dmabuf"
            raise fail(errno.EINVAL, "open", "a token", "pass bytes(buf.ref()), from the same version", what=what)
        return cls(domain.hex(), dev, ino, size, nonce, os.fsdecode(name) or None)

    def __str__(self) -> str:
        name = "" if self.name is None else f" {self.name!r}"
        return f"buffer{name} (inode {self.ino} of domain {self.domain})"

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return unpickled, (bytes(self),)


def unpickled(data: bytes) -> BufferRef:
    """Return a token from its pickle. It is a function of the module, because cloudpickle would take a method's code along."""
    return BufferRef.from_bytes(data)


def ref_of(handle: Handle, name: bytes | None) -> BufferRef:
    """Return the token of a handle's buffer, even if the handle is closed."""
    shared = handle.shared
    return BufferRef(handle.domain.id, shared.dev, shared.ino, handle.size, shared.nonce, os.fsdecode(name) if name else None)
