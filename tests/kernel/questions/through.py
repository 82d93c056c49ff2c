"""The same calls through this library's uapi layer: the kernel must give the same answers.

What the layer does not offer, as a structure's padding that is not 0, stays the raw call.
"""

import os

from dmabuf.uapi import dma_buf, drm, heap
from dmabuf.uapi import sw_sync as timelines
from dmabuf.uapi import sync_file as files
from tests.kernel.questions.raw import DMA_BUF_SET_NAME_B, PAGE


def sync(raw, fd, flags):
    dma_buf.sync(fd, flags, interruptible=True)
    return 0


def set_name(raw, fd, name, req=DMA_BUF_SET_NAME_B):
    if req != DMA_BUF_SET_NAME_B:
        return raw(fd, name, req)
    dma_buf.set_name(fd, name)
    return 0


def export_sync_file(raw, fd, flags):
    return dma_buf.export_sync_file(fd, flags).take()


def import_sync_file(raw, fd, flags, sync_file):
    dma_buf.import_sync_file(fd, flags, sync_file)
    return 0


def file_info(raw, fd, n=None, flags=0, pad=0, ptr=None):
    if n is not None:
        return raw(fd, n, flags, pad, ptr)
    info = files.file_info(fd)
    fences = [
        {
            "obj_name": fence.obj_name.decode(errors="backslashreplace"),
            "driver_name": fence.driver_name.decode(errors="backslashreplace"),
            "status": fence.status,
            "flags": fence.flags,
            "timestamp_ns": fence.timestamp_ns,
        }
        for fence in info.fences
    ]
    name = info.name.decode(errors="backslashreplace")
    return {"ret": 0, "name": name, "status": info.status, "flags": 0, "num_fences": len(fences), "pad": 0, "fences": fences}


def merge(raw, fd, other, name=b"merged", flags=0, pad=0):
    return raw(fd, other, name, flags, pad) if flags or pad else files.merge(fd, other, name).take()


def sw_sync(raw):
    return timelines.open_timeline().take()


def sw_fence(raw, timeline, value, name=b"fence"):
    return timelines.create_fence(timeline, value).take()


def sw_inc(raw, timeline, by=1):
    timelines.increment(timeline, by)
    return 0


def udmabuf(raw, memfd, off=0, size=PAGE, flags=1, dev=None):
    return raw(memfd, off, size, flags) if dev is None else heap.create(dev, memfd, off, size, flags=flags).take()


def udmabuf_list(raw, items, flags=1, count=None, dev=None, pad=0):
    if dev is None or count is not None or pad:
        return raw(items, flags, count, dev, pad)
    return heap.create_list(dev, items, flags=flags).take()


def heap_alloc(raw, length, fd_flags=os.O_RDWR | os.O_CLOEXEC, heap_flags=0, fd=0, dev=None, **rest):
    # The layer's descriptors are always close-on-exec.
    if dev is None or heap_flags or fd or rest or not fd_flags & os.O_CLOEXEC:
        return raw(length, fd_flags, heap_flags, fd, dev=dev, **rest)
    return heap.allocate(dev, length, fd_flags=fd_flags).take()


def drm_driver(raw, fd):
    return drm.driver(fd)


def create_dumb(raw, fd, w=64, h=64, bpp=32):
    made = drm.create_dumb(fd, w, h, bpp)
    return made.handle, made.size


def prime_export(raw, fd, handle, flags=os.O_CLOEXEC | os.O_RDWR):
    return drm.handle_to_fd(fd, handle, flags=flags).take() if flags & os.O_CLOEXEC else raw(fd, handle, flags)


def prime_import(raw, fd, buffer, flags=0):
    return drm.fd_to_handle(fd, buffer)


def vgem_attach(raw, fd, handle, write=False, flags=None, pad=0):
    return raw(fd, handle, write, flags, pad) if flags is not None or pad else drm.vgem_attach(fd, handle, write=write)


def vgem_signal(raw, fd, fence, flags=0):
    if flags:
        return raw(fd, fence, flags)
    drm.vgem_signal(fd, fence)
    return 0


CALLS = {
    function.__name__: function
    for function in (
        *(sync, set_name, export_sync_file, import_sync_file, file_info, merge, sw_sync, sw_fence, sw_inc, udmabuf, udmabuf_list),
        *(heap_alloc, drm_driver, create_dumb, prime_export, prime_import, vgem_attach, vgem_signal),
    )
}
