"""Native mappings: their sizes, and whether they are there."""

import mmap

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
