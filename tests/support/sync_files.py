"""Sync files seen from outside: as descriptors, and as slots of the domain."""

import select
from typing import Any

import dmabuf
from dmabuf._native import CHUNK_BYTES, HEADER_BYTES, SYNC_PER
from dmabuf.domain.sync_files import place_of


def polled(fd: Any, events: int = select.POLLIN | select.POLLOUT) -> int:
    """What poll(2) says of a descriptor at once."""
    asked = select.poll()
    asked.register(fd, events)
    found = asked.poll(0)
    return found[0][1] if found else 0


def open_in_domain(domain: dmabuf.Domain | None = None) -> int:
    """How many sync files of the domain some process has the descriptor of."""
    return (domain or dmabuf.Domain.default()).join().sync_count()


def scribble(fd: int, of_fence: bool, at: int, value: int) -> None:
    """Write a word of 32 bits into the slot of a sync file, or of its first fence, as another program might."""
    domain = dmabuf.Domain.default()
    found = place_of(fd)
    assert found is not None
    slot, shm = found[1].slot, domain.join()
    if of_fence:
        slot = shm.load32(_offset(slot) + FIRST) - 1
    shm.store32(_offset(slot) + at, value)


FIRST = 8  # db_sync.first


def _offset(slot: int) -> int:
    return HEADER_BYTES + slot // SYNC_PER * CHUNK_BYTES + slot % SYNC_PER * (CHUNK_BYTES // SYNC_PER)
