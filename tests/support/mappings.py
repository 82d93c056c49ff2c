"""Native mappings: their sizes, and whether they are there; and which of a process are shared."""

import ctypes
import errno
import fcntl
import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import IO

PAGE = mmap.PAGESIZE
SIZE = 4 * PAGE  # bytes of the file behind the fixture ``fd``


def mapped(address: int) -> bool:
    """Whether an address lies in a mapping of this process."""
    with open("/proc/self/maps", encoding="ascii", errors="replace") as maps:
        for line in maps:
            low, high = (int(word, 16) for word in line.split()[0].split("-"))
            if low <= address < high:
                return True
    return False


# `struct procmap_query` of <linux/fs.h>, and what asks for the first shared mapping at an address or above.
_QUERY = struct.Struct("9Q4I2Q")
_PROCMAP_QUERY = 0xC0686611
_SHARED, _OR_NEXT = 0x08, 0x10
_NAME_BYTES = 4096


def shared_mappings() -> Iterator[str]:
    """The name and inode of each shared mapping of this process; addresses say nothing, a mapping may move."""
    with open("/proc/self/maps", "rb", buffering=0) as maps:
        try:
            yield from _asked(maps)
        except OSError as error:
            if error.errno != errno.ENOTTY:  # of a kernel before 6.11
                raise
            yield from _read()


def _asked(maps: IO[bytes]) -> Iterator[str]:
    # A worker has a thousand mappings, for the libraries of what the tests import: the kernel takes a millisecond to print them.
    query, name, address = bytearray(_QUERY.size), ctypes.create_string_buffer(_NAME_BYTES), 0
    while True:
        flags, room = _SHARED | _OR_NEXT, ctypes.addressof(name)
        _QUERY.pack_into(query, 0, _QUERY.size, flags, address, *[0] * 8, _NAME_BYTES, 0, room, 0)
        try:
            fcntl.ioctl(maps, _PROCMAP_QUERY, query)  # noqa: TID251 - no ioctl of a buffer
        except FileNotFoundError:  # none is left
            return
        _, _, _, _, address, _, _, _, inode, *_ = _QUERY.unpack(query)
        yield f"{name.value.decode(errors='surrogateescape')} inode {inode}"


def _read() -> Iterator[str]:
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        _, permissions, _, _, inode, *name = line.split(maxsplit=5)
        if "s" in permissions:
            yield f"{name[0] if name else ''} inode {inode}"
