"""The structures of the ioctls, as NamedTuples with the kernel's field names (semantics 5.1); their bytes are in ``table``.

``count`` and ``index`` are methods of every tuple: those fields are called ``how_many`` and ``which``.
"""

from __future__ import annotations

from typing import NamedTuple

# ---- linux/dma-buf.h ----


class Sync(NamedTuple):
    """dma_buf_sync: ``flags`` READ 1, WRITE 2, START 0, END 4."""

    flags: int


class SyncFileOf(NamedTuple):
    """dma_buf_export_sync_file (``fd`` out) and dma_buf_import_sync_file (``fd`` in)."""

    flags: int
    fd: int = -1


class Pointer(NamedTuple):
    """The argument of an ioctl that takes a pointer or a number."""

    value: int


# ---- linux/sync_file.h ----


class Merge(NamedTuple):
    """sync_merge_data: ``fence`` is the new descriptor."""

    name: bytes
    fd2: int
    fence: int = -1
    flags: int = 0
    pad: int = 0


class FenceInfo(NamedTuple):
    """sync_fence_info. ``status``: 1 signaled, 0 pending, else the error; ``timestamp_ns``: CLOCK_MONOTONIC, 0 while pending."""

    obj_name: bytes
    driver_name: bytes
    status: int
    flags: int
    timestamp_ns: int


class FileInfo(NamedTuple):
    """sync_file_info. ``sync_fence_info``: a pointer to ``num_fences`` structures."""

    name: bytes = b""
    status: int = 0
    flags: int = 0
    num_fences: int = 0
    pad: int = 0
    sync_fence_info: int = 0


class SetDeadline(NamedTuple):
    """sync_set_deadline (v6.8)."""

    deadline_ns: int
    pad: int = 0


# ---- linux/dma-heap.h, linux/udmabuf.h ----


class HeapAllocation(NamedTuple):
    """dma_heap_allocation_data: ``fd`` must be 0 in the call."""

    len: int
    fd: int = 0
    fd_flags: int = 0
    heap_flags: int = 0


class UdmabufCreate(NamedTuple):
    """udmabuf_create; the new descriptor is the ioctl's result."""

    memfd: int
    flags: int
    offset: int
    size: int


class UdmabufCreateList(NamedTuple):
    """The head of udmabuf_create_list; ``how_many`` items follow."""

    flags: int
    how_many: int


class UdmabufItem(NamedTuple):
    """udmabuf_create_item."""

    memfd: int
    pad: int
    offset: int
    size: int


# ---- drivers/dma-buf/sync_debug.h ----


class SwSyncFence(NamedTuple):
    """sw_sync_create_fence_data: ``fence`` is the new descriptor, ``name`` is ignored."""

    value: int
    name: bytes = b""
    fence: int = -1


class SwSyncDeadline(NamedTuple):
    """sw_sync_get_deadline (v6.8)."""

    deadline_ns: int
    pad: int
    fence_fd: int


# ---- drm/drm.h, drm/drm_mode.h, drm/vgem_drm.h ----


class DrmVersion(NamedTuple):
    """drm_version: names by pointer and length."""

    major: int = 0
    minor: int = 0
    patch: int = 0
    name_len: int = 0
    name: int = 0
    date_len: int = 0
    date: int = 0
    desc_len: int = 0
    desc: int = 0


class DrmCap(NamedTuple):
    """drm_get_cap."""

    capability: int
    value: int = 0


class GemClose(NamedTuple):
    """drm_gem_close."""

    handle: int
    pad: int = 0


class PrimeHandle(NamedTuple):
    """drm_prime_handle."""

    handle: int
    flags: int
    fd: int = -1


class CreateDumb(NamedTuple):
    """drm_mode_create_dumb; the kernel fills in the last three."""

    height: int
    width: int
    bpp: int
    flags: int = 0
    handle: int = 0
    pitch: int = 0
    size: int = 0


class MapDumb(NamedTuple):
    """drm_mode_map_dumb: ``offset`` is for mmap(2) on the node."""

    handle: int
    pad: int = 0
    offset: int = 0


class VgemAttach(NamedTuple):
    """drm_vgem_fence_attach; ``flags`` WRITE 1."""

    handle: int
    flags: int = 0
    out_fence: int = 0
    pad: int = 0


class VgemSignal(NamedTuple):
    """drm_vgem_fence_signal."""

    fence: int
    flags: int = 0


class SyncobjCreate(NamedTuple):
    """drm_syncobj_create and drm_syncobj_destroy."""

    handle: int = 0
    flags: int = 0


class SyncobjHandle(NamedTuple):
    """drm_syncobj_handle, without the point that v6.16 added."""

    handle: int
    flags: int
    fd: int = -1
    pad: int = 0


class SyncobjWaitOld(NamedTuple):
    """drm_syncobj_wait before v6.8."""

    handles: int
    timeout_nsec: int
    count_handles: int
    flags: int
    first_signaled: int = 0
    pad: int = 0


class SyncobjWait(NamedTuple):
    """drm_syncobj_wait; the timeout is a time of CLOCK_MONOTONIC."""

    handles: int
    timeout_nsec: int
    count_handles: int
    flags: int
    first_signaled: int = 0
    pad: int = 0
    deadline_nsec: int = 0


class SyncobjTimelineWaitOld(NamedTuple):
    """drm_syncobj_timeline_wait before v6.8."""

    handles: int
    points: int
    timeout_nsec: int
    count_handles: int
    flags: int
    first_signaled: int = 0
    pad: int = 0


class SyncobjTimelineWait(NamedTuple):
    """drm_syncobj_timeline_wait."""

    handles: int
    points: int
    timeout_nsec: int
    count_handles: int
    flags: int
    first_signaled: int = 0
    pad: int = 0
    deadline_nsec: int = 0


class SyncobjArray(NamedTuple):
    """drm_syncobj_array."""

    handles: int
    count_handles: int
    pad: int = 0


class SyncobjTimelineArray(NamedTuple):
    """drm_syncobj_timeline_array."""

    handles: int
    points: int
    count_handles: int
    flags: int = 0


class SyncobjTransfer(NamedTuple):
    """drm_syncobj_transfer."""

    src_handle: int
    dst_handle: int
    src_point: int
    dst_point: int
    flags: int = 0
    pad: int = 0


class SyncobjEventfd(NamedTuple):
    """drm_syncobj_eventfd."""

    handle: int
    flags: int
    point: int
    fd: int
    pad: int = 0


# ---- linux/videodev2.h (64-bit) ----


class V4l2Capability(NamedTuple):
    """v4l2_capability."""

    driver: bytes = b""
    card: bytes = b""
    bus_info: bytes = b""
    version: int = 0
    capabilities: int = 0
    device_caps: int = 0


class V4l2Format(NamedTuple):
    """v4l2_format with its v4l2_pix_format, for buffers of a single plane."""

    type: int
    width: int = 0
    height: int = 0
    pixelformat: int = 0
    field: int = 0
    bytesperline: int = 0
    sizeimage: int = 0
    colorspace: int = 0
    priv: int = 0
    flags: int = 0
    ycbcr_enc: int = 0
    quantization: int = 0
    xfer_func: int = 0


class V4l2RequestBuffers(NamedTuple):
    """v4l2_requestbuffers; the kernel fills in ``how_many``."""

    how_many: int
    type: int
    memory: int
    capabilities: int = 0
    flags: int = 0


class V4l2Buffer(NamedTuple):
    """v4l2_buffer. ``m``: the offset, pointer or descriptor, by ``memory``."""

    which: int
    type: int
    bytesused: int = 0
    flags: int = 0
    field: int = 0
    tv_sec: int = 0
    tv_usec: int = 0
    timecode: bytes = b""
    sequence: int = 0
    memory: int = 0
    m: int = 0
    length: int = 0
    reserved2: int = 0
    request_fd: int = 0


class V4l2ExportBuffer(NamedTuple):
    """v4l2_exportbuffer; ``fd`` is the new descriptor."""

    type: int
    which: int
    plane: int = 0
    flags: int = 0
    fd: int = -1
