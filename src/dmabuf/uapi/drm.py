"""DRM: dumb buffers, PRIME, and vgem's fences (semantics 5.12, 5.13). ``node``: a descriptor of /dev/dri/card* or renderD*."""

from __future__ import annotations

import errno
import os
from array import array
from typing import Final

from dmabuf.uapi import call
from dmabuf.uapi import table as t
from dmabuf.uapi.call import OwnedFd, told
from dmabuf.uapi.structures import CreateDumb, DrmCap, DrmVersion, GemClose, MapDumb, Pointer, PrimeHandle, VgemAttach, VgemSignal

CAP_DUMB_BUFFER: Final = 1
CAP_PRIME: Final = 5
CAP_SYNCOBJ: Final = 0x13
CAP_SYNCOBJ_TIMELINE: Final = 0x14
VGEM_WRITE: Final = 1


def driver(node: int) -> str:
    """Return the driver's name. A descriptor that is not a DRM node is ENOTTY."""
    room = array("B", bytes(64))
    try:
        found = call.perform(node, t.DRM_VERSION, DrmVersion(name_len=len(room), name=room.buffer_info()[0]))
    except OSError as e:
        raise told(e, "version", f"fd {node}", {errno.ENOTTY: ("not a DRM node", "open a node in /dev/dri")}) from None
    return os.fsdecode(room.tobytes()[: min(found.name_len, len(room))])


def capability(node: int, which: int) -> int:
    """Return the driver's value of a capability. One that the kernel doesn't know is EINVAL."""
    try:
        return call.perform(node, t.DRM_GET_CAP, DrmCap(which)).value
    except OSError as e:
        raise told(e, "capability", f"fd {node}") from None


def create_dumb(node: int, width: int, height: int, bpp: int, *, of: object = None) -> CreateDumb:
    """Make a buffer for the CPU. Return its ``handle``, ``pitch`` and ``size``.

    Raises:
        InvalidError: A number is 0 or too large (EINVAL).
        NotPermittedError: The user may not make one on this node (EACCES).
        NoMemoryError: The kernel has no memory (ENOMEM).
        DmaBufError: The driver makes none (EOPNOTSUPP).
    """
    try:
        return call.perform(node, t.CREATE_DUMB, CreateDumb(height, width, bpp))
    except OSError as e:
        remedies = {
            errno.EINVAL: ("bad size", "pass a width, a height and bits per pixel above 0, and not too large"),
            errno.EACCES: ("this node makes no dumb buffers", "open /dev/dri/card*"),
        }
        raise told(e, "create_dumb", of or f"fd {node}", remedies) from None


def map_dumb(node: int, handle: int, *, of: object = None) -> int:
    """Return the offset for mmap(2) on the node. A handle that doesn't exist is ENOENT."""
    try:
        return call.perform(node, t.MAP_DUMB, MapDumb(handle)).offset
    except OSError as e:
        raise told(e, "map_dumb", of or f"handle {handle}") from None


def destroy_dumb(node: int, handle: int) -> None:
    """Close the handle of a dumb buffer. A handle that doesn't exist is EINVAL."""
    try:
        call.perform(node, t.DESTROY_DUMB, Pointer(handle))
    except OSError as e:
        raise told(e, "destroy_dumb", f"handle {handle}") from None


def gem_close(node: int, handle: int) -> None:
    """Close a handle. A handle that doesn't exist is EINVAL."""
    try:
        call.perform(node, t.DRM_GEM_CLOSE, GemClose(handle))
    except OSError as e:
        raise told(e, "close", f"handle {handle}") from None


def handle_to_fd(node: int, handle: int, *, flags: int = os.O_RDWR, of: object = None) -> OwnedFd:
    """Return the dma-buf of a handle, the same one each time, close-on-exec.

    Raises:
        NotFoundError: There is no such handle (ENOENT).
        InvalidError: The flags are not among those of open(2) that it takes (EINVAL).
        DmaBufError: No descriptor is free (EMFILE).
    """
    try:
        return call.obtain(node, t.PRIME_HANDLE_TO_FD, PrimeHandle(handle, flags | os.O_CLOEXEC), "fd")
    except OSError as e:
        raise told(e, "export", of or f"handle {handle}") from None


def fd_to_handle(node: int, fd: int, *, of: object = None) -> int:
    """Import a dma-buf. Return its handle, the same one each time, to be closed once.

    Raises:
        ClosedError: ``fd`` is not open (EBADF).
        InvalidError: It is not a dma-buf, or the device can't reach it (EINVAL).
    """
    try:
        return call.perform(node, t.PRIME_FD_TO_HANDLE, PrimeHandle(0, 0, fd)).handle
    except OSError as e:
        raise told(e, "import", of or f"fd {fd}") from None


def vgem_attach(node: int, handle: int, *, write: bool = False, of: object = None) -> int:
    """Add a fence of vgem, which is signaled after 10 s at the latest. Return its id.

    Raises:
        NotFoundError: There is no such handle (ENOENT).
        BusyError: A fence conflicts (EBUSY).
        DmaBufError: The device is not vgem (ENOTTY).
    """
    try:
        return call.perform(node, t.VGEM_FENCE_ATTACH, VgemAttach(handle, VGEM_WRITE if write else 0)).out_fence
    except OSError as e:
        remedies = {
            errno.EBUSY: ("a fence conflicts", "wait for it first"),
            errno.ENOTTY: ("not a node of vgem", "run: modprobe vgem"),
        }
        raise told(e, "fence", of or f"handle {handle}", remedies) from None


def vgem_signal(node: int, fence: int) -> None:
    """Signal a fence of vgem.

    Raises:
        NotFoundError: There is no such fence, or it is signaled already (ENOENT).
        DmaBufTimeout: vgem has signaled it, because its 10 s are over (ETIMEDOUT).
    """
    try:
        call.perform(node, t.VGEM_FENCE_SIGNAL, VgemSignal(fence))
    except OSError as e:
        remedies = {
            errno.ENOENT: ("no such fence, or it is signaled already", "signal a fence once"),
            errno.ETIMEDOUT: ("vgem has signaled it after 10 s", "signal it sooner"),
        }
        raise told(e, "signal", f"fence {fence}", remedies) from None
