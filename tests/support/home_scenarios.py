"""What programs do with the kernel's own dma-bufs, each as one function of a home's name: run whole, and with every call failing once."""

import asyncio
import contextlib
import gc
import os
import select
import socket
from collections.abc import Callable

import dmabuf
from dmabuf import Direction
from dmabuf.uapi import dma_buf

SIZE = 8192
Made = Callable[[], dmabuf.DmaBuf]


def allocate(made: Made) -> None:
    with made() as buf:
        assert buf.size == SIZE


def named(made: Made) -> None:
    with made() as buf:
        buf.name = "scenario"
        assert buf.name == "scenario"


def read_and_write(made: Made) -> None:
    with made() as buf:
        with buf.write() as view:
            view[:4] = b"data"
        with buf.read() as view:
            assert bytes(view[:4]) == b"data"


def read_with_a_timeout(made: Made) -> None:
    with made() as buf, buf.read(timeout=5) as view:
        assert view[0] == 0


def an_array_that_outlives(made: Made) -> None:
    with made() as buf:
        with buf.read() as view:
            kept = memoryview(view)
        del view
    assert kept[0] == 0
    kept.release()


def several(made: Made) -> None:
    with made() as one, made() as other, dmabuf.access(read=[one], write=[other]) as (source, target):
        target[:] = source


def in_a_task(made: Made) -> None:
    async def main() -> None:
        with made() as buf:
            async with buf.write() as view:
                view[:1] = b"x"
            await buf.readable()
            await buf.writable()

    asyncio.run(main())


def brackets(made: Made) -> None:
    with made() as buf:
        buf.begin_cpu_access(Direction.BIDIRECTIONAL)
        buf.end_cpu_access(Direction.BIDIRECTIONAL)
        buf.sync(dma_buf.START | dma_buf.READ)
        buf.sync(dma_buf.END | dma_buf.READ)


def mappings(made: Made) -> None:
    with made() as buf:
        with buf.mmap(offset=4096, length=4096) as part:
            part[:1] = b"x"
        mapped = buf.vmap_unlocked()
        buf.vunmap_unlocked(mapped)


def handles(made: Made) -> None:
    with made() as buf:
        fd = buf.dup()
        try:
            with dmabuf.get(fd) as again, again.get_dma_buf() as third:
                assert third == buf
        finally:
            os.close(fd)


def polls(made: Made) -> None:
    with made() as buf:
        assert buf.poll(select.POLLIN) == select.POLLIN
        os.close(buf.poll_fd(select.POLLOUT))


def sync_files(made: Made) -> None:
    with made() as buf, dma_buf.export_sync_file(buf.fileno(), dma_buf.RW) as fence:
        dma_buf.import_sync_file(buf.fileno(), dma_buf.READ, fence.number)


def sent(made: Made) -> None:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with left, right, made() as buf:
        dmabuf.send(left, buf)
        (again,) = dmabuf.recv(right)
        with again:
            assert again == buf


def attached(made: Made) -> None:
    with made() as buf:
        attachment = buf.attach(dmabuf.Device("npu0"))
        try:
            with attachment.mapped(Direction.TO_DEVICE):
                pass
        finally:
            attachment.detach()


SCENARIOS: dict[str, Callable[[Made], None]] = {
    "allocate": allocate,
    "named": named,
    "read and write": read_and_write,
    "read with a timeout": read_with_a_timeout,
    "an array that outlives": an_array_that_outlives,
    "several": several,
    "in a task": in_a_task,
    "brackets": brackets,
    "mappings": mappings,
    "handles": handles,
    "polls": polls,
    "sync files": sync_files,
    "sent": sent,
    "attached": attached,
}


def whole_after() -> None:
    """Nothing of a scenario is left in the domain."""
    if not _swept(0):  # the whole heap only if that seems to be needed
        assert _swept(2) or dmabuf.buffers() == []


def _swept(generation: int) -> bool:
    gc.collect(generation)
    with contextlib.suppress(OSError):
        dmabuf.Domain.default().sweep()
    return not dmabuf.buffers()
