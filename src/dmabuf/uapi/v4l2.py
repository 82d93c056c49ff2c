"""V4L2 capture into buffers that are exported as dma-bufs (VIDIOC_EXPBUF), single-planar; include/uapi/linux/videodev2.h."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from typing import Final

from dmabuf.uapi import call
from dmabuf.uapi import table as t
from dmabuf.uapi.call import OwnedFd, told
from dmabuf.uapi.structures import Pointer, V4l2Buffer, V4l2Capability, V4l2ExportBuffer, V4l2Format, V4l2RequestBuffers

CAPTURE: Final = 1  # V4L2_BUF_TYPE_VIDEO_CAPTURE
MMAP: Final = 1  # V4L2_MEMORY_MMAP
DMABUF: Final = 4  # V4L2_MEMORY_DMABUF
CAP_VIDEO_CAPTURE: Final = 0x1
CAP_STREAMING: Final = 0x04000000
CAP_DEVICE_CAPS: Final = 0x80000000
FLAG_ERROR: Final = 0x40  # V4L2_BUF_FLAG_ERROR: the frame is broken

_REMEDIES: Final[Mapping[int, call.Remedy]] = {
    errno.ENOTTY: ("not a V4L2 device, or its driver can't do this", "open another device"),
    errno.EBUSY: ("another process streams from it, or its buffers are in use", "stop that process, or close the buffers"),
    errno.EINVAL: ("the driver refuses this", "ask for something else"),
}


def query_capability(fd: int) -> V4l2Capability:
    """Return the device's capabilities. A device that is not of V4L2 is ENOTTY."""
    try:
        return call.perform(fd, t.VIDIOC_QUERYCAP, V4l2Capability())
    except OSError as e:
        raise told(e, "capability", f"fd {fd}", _REMEDIES) from None


def get_format(fd: int) -> V4l2Format:
    """Return the format of the next frames. A device that doesn't capture is EINVAL."""
    try:
        return call.perform(fd, t.VIDIOC_G_FMT, V4l2Format(CAPTURE))
    except OSError as e:
        raise told(e, "format", f"fd {fd}", _REMEDIES) from None


def set_format(fd: int, wanted: V4l2Format) -> V4l2Format:
    """Ask for a format. Return the nearest one that the driver has.

    Raises:
        BusyError: The driver has buffers, which would have the old format (EBUSY).
        InvalidError: The device doesn't capture (EINVAL).
    """
    try:
        return call.perform(fd, t.VIDIOC_S_FMT, wanted)
    except OSError as e:
        raise told(e, "format", f"fd {fd}", _REMEDIES) from None


def with_picture(told: V4l2Format, width: int, height: int, pixelformat: int) -> V4l2Format:
    """Return a format with another picture, whose sizes the driver is to compute."""
    return told._replace(width=width, height=height, pixelformat=pixelformat, bytesperline=0, sizeimage=0, priv=0, field=0)


def request_buffers(fd: int, count: int, memory: int = MMAP) -> int:
    """Have the driver make ``count`` buffers (0 frees them). Return how many there are.

    Raises:
        BusyError: Buffers are in use (EBUSY).
        InvalidError: The driver doesn't take this kind of memory (EINVAL).
        NoMemoryError: The kernel has no memory (ENOMEM).
    """
    try:
        return call.perform(fd, t.VIDIOC_REQBUFS, V4l2RequestBuffers(count, CAPTURE, memory)).how_many
    except OSError as e:
        raise told(e, "buffers", f"fd {fd}", _REMEDIES) from None


def query_buffer(fd: int, index: int) -> V4l2Buffer:
    """Return the state of a buffer. A buffer that doesn't exist is EINVAL."""
    try:
        return call.perform(fd, t.VIDIOC_QUERYBUF, V4l2Buffer(index, CAPTURE, memory=MMAP))
    except OSError as e:
        raise told(e, "buffer", f"index {index}", _REMEDIES) from None


def export_buffer(fd: int, index: int, *, flags: int = os.O_RDWR) -> OwnedFd:
    """Return a buffer as a dma-buf, close-on-exec.

    Raises:
        InvalidError: There is no such buffer, or it was not made with MMAP (EINVAL).
        DmaBufError: The driver exports none (ENOTTY), or no descriptor is free (EMFILE).
    """
    try:
        return call.obtain(fd, t.VIDIOC_EXPBUF, V4l2ExportBuffer(CAPTURE, index, flags=flags | os.O_CLOEXEC), "fd")
    except OSError as e:
        raise told(e, "export", f"index {index}", _REMEDIES) from None


def queue(fd: int, buffer: V4l2Buffer) -> None:
    """Give a buffer to the driver. A buffer that the driver has already is EINVAL."""
    try:
        call.perform(fd, t.VIDIOC_QBUF, buffer)
    except OSError as e:
        raise told(e, "queue", f"index {buffer.which}", _REMEDIES) from None


def dequeue(fd: int, memory: int = MMAP) -> V4l2Buffer:
    """Take a filled buffer, and wait for one unless the descriptor is non-blocking.

    Raises:
        WouldBlockError: None is filled yet (EAGAIN).
        InvalidError: The device isn't streaming (EINVAL).
        DmaBufError: The device failed (EIO).
    """
    try:
        return call.perform(fd, t.VIDIOC_DQBUF, V4l2Buffer(0, CAPTURE, memory=memory), restart=False)
    except OSError as e:
        raise told(e, "dequeue", f"fd {fd}", {**_REMEDIES, errno.EAGAIN: ("no frame is ready", "wait for POLLIN")}) from None


def stream(fd: int, on: bool) -> None:
    """Start or stop. A stop takes every buffer back from the driver.

    Raises:
        InvalidError: There are no buffers (EINVAL).
        BusyError: Another program streams (EBUSY).
        BrokenConnectionError: A link to the sensor is missing (EPIPE).
    """
    try:
        call.perform(fd, t.VIDIOC_STREAMON if on else t.VIDIOC_STREAMOFF, Pointer(CAPTURE))
    except OSError as e:
        raise told(e, "stream", f"fd {fd}", _REMEDIES) from None
