"""Every ioctl that the library makes or serves: name, direction, letter, number, structure (semantics 5.1); its value is computed."""

from __future__ import annotations

from typing import Any, Final

from dmabuf.uapi import structures as s
from dmabuf.uapi.layout import WR, Ioctl, Layout, R, W

_POINTER = Layout(s.Pointer, "Q")
_INT = Layout(s.Pointer, "i")
_U32 = Layout(s.Pointer, "I")

# ---- dma-buf ----

DMA_BUF_SYNC: Final = Ioctl("DMA_BUF_IOCTL_SYNC", W, "b", 0, Layout(s.Sync, "Q"))
# The argument is a pointer to the name; A and B differ by the pointer's size in the number and do the same (semantics 5.4).
DMA_BUF_SET_NAME: Final = Ioctl("DMA_BUF_SET_NAME", W, "b", 1, _POINTER)
DMA_BUF_SET_NAME_A: Final = Ioctl("DMA_BUF_SET_NAME_A", W, "b", 1, _POINTER, 4)
DMA_BUF_SET_NAME_B: Final = Ioctl("DMA_BUF_SET_NAME_B", W, "b", 1, _POINTER, 8)
DMA_BUF_EXPORT_SYNC_FILE: Final = Ioctl("DMA_BUF_IOCTL_EXPORT_SYNC_FILE", WR, "b", 2, Layout(s.SyncFileOf, "Ii"))
DMA_BUF_IMPORT_SYNC_FILE: Final = Ioctl("DMA_BUF_IOCTL_IMPORT_SYNC_FILE", W, "b", 3, Layout(s.SyncFileOf, "Ii"))

# ---- sync_file ----

SYNC_MERGE: Final = Ioctl("SYNC_IOC_MERGE", WR, ">", 3, Layout(s.Merge, "32siiII"))
SYNC_FILE_INFO: Final = Ioctl("SYNC_IOC_FILE_INFO", WR, ">", 4, Layout(s.FileInfo, "32siIIIQ"))
SYNC_SET_DEADLINE: Final = Ioctl("SYNC_IOC_SET_DEADLINE", W, ">", 5, Layout(s.SetDeadline, "QQ"))
FENCE_INFO: Final = Layout(s.FenceInfo, "32s32siIQ")

# ---- heaps ----

DMA_HEAP_ALLOC: Final = Ioctl("DMA_HEAP_IOCTL_ALLOC", WR, "H", 0, Layout(s.HeapAllocation, "QIIQ"))
UDMABUF_CREATE: Final = Ioctl("UDMABUF_CREATE", W, "u", 0x42, Layout(s.UdmabufCreate, "IIQQ"))
UDMABUF_CREATE_LIST: Final = Ioctl("UDMABUF_CREATE_LIST", W, "u", 0x43, Layout(s.UdmabufCreateList, "II"))
UDMABUF_ITEM: Final = Layout(s.UdmabufItem, "IIQQ")

# ---- sw_sync ----

SW_SYNC_CREATE_FENCE: Final = Ioctl("SW_SYNC_IOC_CREATE_FENCE", WR, "W", 0, Layout(s.SwSyncFence, "I32si"))
SW_SYNC_INC: Final = Ioctl("SW_SYNC_IOC_INC", W, "W", 1, _U32)
SW_SYNC_GET_DEADLINE: Final = Ioctl("SW_SYNC_GET_DEADLINE", WR, "W", 2, Layout(s.SwSyncDeadline, "QIi"))

# ---- DRM ----

DRM_VERSION: Final = Ioctl("DRM_IOCTL_VERSION", WR, "d", 0x00, Layout(s.DrmVersion, "iii4xQQQQQQ"))
DRM_GEM_CLOSE: Final = Ioctl("DRM_IOCTL_GEM_CLOSE", W, "d", 0x09, Layout(s.GemClose, "II"))
DRM_GET_CAP: Final = Ioctl("DRM_IOCTL_GET_CAP", WR, "d", 0x0C, Layout(s.DrmCap, "QQ"))
PRIME_HANDLE_TO_FD: Final = Ioctl("DRM_IOCTL_PRIME_HANDLE_TO_FD", WR, "d", 0x2D, Layout(s.PrimeHandle, "IIi"))
PRIME_FD_TO_HANDLE: Final = Ioctl("DRM_IOCTL_PRIME_FD_TO_HANDLE", WR, "d", 0x2E, Layout(s.PrimeHandle, "IIi"))
CREATE_DUMB: Final = Ioctl("DRM_IOCTL_MODE_CREATE_DUMB", WR, "d", 0xB2, Layout(s.CreateDumb, "IIIIIIQ"))
MAP_DUMB: Final = Ioctl("DRM_IOCTL_MODE_MAP_DUMB", WR, "d", 0xB3, Layout(s.MapDumb, "IIQ"))
DESTROY_DUMB: Final = Ioctl("DRM_IOCTL_MODE_DESTROY_DUMB", WR, "d", 0xB4, _U32)
VGEM_FENCE_ATTACH: Final = Ioctl("DRM_IOCTL_VGEM_FENCE_ATTACH", WR, "d", 0x41, Layout(s.VgemAttach, "IIII"))
VGEM_FENCE_SIGNAL: Final = Ioctl("DRM_IOCTL_VGEM_FENCE_SIGNAL", W, "d", 0x42, Layout(s.VgemSignal, "II"))

# ---- syncobj; the kernel takes the sizes from before v6.8 too ----

_SYNCOBJ_CREATE = Layout(s.SyncobjCreate, "II")
_SYNCOBJ_HANDLE = Layout(s.SyncobjHandle, "IIiI")
_SYNCOBJ_ARRAY = Layout(s.SyncobjArray, "QII")
_SYNCOBJ_TIMELINE_ARRAY = Layout(s.SyncobjTimelineArray, "QQII")
SYNCOBJ_CREATE: Final = Ioctl("DRM_IOCTL_SYNCOBJ_CREATE", WR, "d", 0xBF, _SYNCOBJ_CREATE)
SYNCOBJ_DESTROY: Final = Ioctl("DRM_IOCTL_SYNCOBJ_DESTROY", WR, "d", 0xC0, _SYNCOBJ_CREATE)
SYNCOBJ_HANDLE_TO_FD: Final = Ioctl("DRM_IOCTL_SYNCOBJ_HANDLE_TO_FD", WR, "d", 0xC1, _SYNCOBJ_HANDLE)
SYNCOBJ_FD_TO_HANDLE: Final = Ioctl("DRM_IOCTL_SYNCOBJ_FD_TO_HANDLE", WR, "d", 0xC2, _SYNCOBJ_HANDLE)
SYNCOBJ_WAIT: Final = Ioctl("DRM_IOCTL_SYNCOBJ_WAIT", WR, "d", 0xC3, Layout(s.SyncobjWait, "QqIIIIQ"))
SYNCOBJ_WAIT_OLD: Final = Ioctl("DRM_IOCTL_SYNCOBJ_WAIT (before v6.8)", WR, "d", 0xC3, Layout(s.SyncobjWaitOld, "QqIIII"))
SYNCOBJ_RESET: Final = Ioctl("DRM_IOCTL_SYNCOBJ_RESET", WR, "d", 0xC4, _SYNCOBJ_ARRAY)
SYNCOBJ_SIGNAL: Final = Ioctl("DRM_IOCTL_SYNCOBJ_SIGNAL", WR, "d", 0xC5, _SYNCOBJ_ARRAY)
SYNCOBJ_TIMELINE_WAIT: Final = Ioctl("DRM_IOCTL_SYNCOBJ_TIMELINE_WAIT", WR, "d", 0xCA, Layout(s.SyncobjTimelineWait, "QQqIIIIQ"))
SYNCOBJ_TIMELINE_WAIT_OLD: Final = Ioctl(
    "DRM_IOCTL_SYNCOBJ_TIMELINE_WAIT (before v6.8)", WR, "d", 0xCA, Layout(s.SyncobjTimelineWaitOld, "QQqIIII")
)
SYNCOBJ_QUERY: Final = Ioctl("DRM_IOCTL_SYNCOBJ_QUERY", WR, "d", 0xCB, _SYNCOBJ_TIMELINE_ARRAY)
SYNCOBJ_TRANSFER: Final = Ioctl("DRM_IOCTL_SYNCOBJ_TRANSFER", WR, "d", 0xCC, Layout(s.SyncobjTransfer, "IIQQII"))
SYNCOBJ_TIMELINE_SIGNAL: Final = Ioctl("DRM_IOCTL_SYNCOBJ_TIMELINE_SIGNAL", WR, "d", 0xCD, _SYNCOBJ_TIMELINE_ARRAY)
SYNCOBJ_EVENTFD: Final = Ioctl("DRM_IOCTL_SYNCOBJ_EVENTFD", WR, "d", 0xCF, Layout(s.SyncobjEventfd, "IIQiI"))

# ---- V4L2, single-planar ----

_V4L2_FORMAT = Layout(s.V4l2Format, "I4x12I152x")
_V4L2_BUFFER = Layout(s.V4l2Buffer, "5I4xqq16sIIQIIi4x")
VIDIOC_QUERYCAP: Final = Ioctl("VIDIOC_QUERYCAP", R, "V", 0, Layout(s.V4l2Capability, "16s32s32sIII12x"))
VIDIOC_G_FMT: Final = Ioctl("VIDIOC_G_FMT", WR, "V", 4, _V4L2_FORMAT)
VIDIOC_S_FMT: Final = Ioctl("VIDIOC_S_FMT", WR, "V", 5, _V4L2_FORMAT)
VIDIOC_REQBUFS: Final = Ioctl("VIDIOC_REQBUFS", WR, "V", 8, Layout(s.V4l2RequestBuffers, "IIIIB3x"))
VIDIOC_QUERYBUF: Final = Ioctl("VIDIOC_QUERYBUF", WR, "V", 9, _V4L2_BUFFER)
VIDIOC_QBUF: Final = Ioctl("VIDIOC_QBUF", WR, "V", 15, _V4L2_BUFFER)
VIDIOC_EXPBUF: Final = Ioctl("VIDIOC_EXPBUF", WR, "V", 16, Layout(s.V4l2ExportBuffer, "IIIIi44x"))
VIDIOC_DQBUF: Final = Ioctl("VIDIOC_DQBUF", WR, "V", 17, _V4L2_BUFFER)
VIDIOC_STREAMON: Final = Ioctl("VIDIOC_STREAMON", W, "V", 18, _INT)
VIDIOC_STREAMOFF: Final = Ioctl("VIDIOC_STREAMOFF", W, "V", 19, _INT)

ALL: Final[tuple[Ioctl[Any], ...]] = tuple(value for value in list(globals().values()) if isinstance(value, Ioctl))
"""Every ioctl, in this order."""

BY_NUMBER: Final[dict[int, Ioctl[Any]]] = {ioctl.number: ioctl for ioctl in reversed(ALL)}
"""Every ioctl by its number, for servers. Of two with one number, the first."""
