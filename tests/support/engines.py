"""Buffers and queues of the software devices, seen without their fences."""

import os

from dmabuf import DmaBuf
from dmabuf.devices.queue import Queue
from tests.support.drivers import PAGE
from tests.support.waiting import until, until_asleep

SIZE = 4 * PAGE  # bytes of the buffers ``buf`` and ``other_buf``


def put(buf: DmaBuf, data: bytes) -> None:
    """Store bytes without any synchronisation."""
    with buf.mmap() as mapping:
        mapping[: len(data)] = data


def got(buf: DmaBuf) -> bytes:
    """The bytes without any synchronisation."""
    with buf.mmap(writable=False) as mapping:
        return mapping[:]


def until_it_waits(queue: Queue) -> None:
    """Until the queue's thread has looked at its jobs, and sleeps."""
    until(lambda: queue._thread is not None and queue._thread.native_id is not None)
    assert queue._thread is not None
    until_asleep(os.getpid(), queue._thread.native_id)
