"""Share memory between Linux processes: buffers that are file descriptors, with fences that say who is done with them.

What a newcomer needs:

    buf = dmabuf.allocate(1 << 20, name="frame")    memory that other processes can have
    buf = dmabuf.allocate(shape=(3, 224, 224), dtype="float32")    the same, and every process finds ``buf.layout``
    with buf.read() as view: ...                    waits for the writer; nobody writes during the block
    with buf.write() as view: ...                   waits for readers and writers; nobody else is in a block
    with dmabuf.access(read=[a], write=[b]) as (x, y): ...    several buffers, without a deadlock
    dmabuf.send(sock, buf); (buf,) = dmabuf.recv(sock)        to another process; multiprocessing takes buffers too
    buf = dmabuf.open("frame")                      a buffer of another process, by its name; open_or_allocate() makes it if need be
    buf.close()                                     the memory goes with its last holder
    $ dmabuf ls                                     who has which buffer, and what blocks it

Fences: ``Timeline``, ``wait_any``, ``merge``, ``SyncFile``. Drivers in Python: ``export`` with an ``Exporter``, ``DmaBuf.attach`` with a
``Device``; ready to use are ``sim.Engine`` and ``DiskDevice``. Pictures and tensors: ``ImageLayout``, ``TensorLayout``. Heaps: ``heaps``,
``SpillHeap``. State: ``buffers``, ``streams``, ``bufinfo``. Errors are OSErrors with their errno (``dmabuf.errors``); mistakes in the use
of locks and fences are ``ContractError`` and ``ContractWarning``.

``dmabuf.drivers`` (DRM, V4L2) is a package of its own: ``from dmabuf.drivers import drm, camera``.
"""

import sys as _sys

if not _sys.platform.startswith("linux"):
    raise ImportError("dmabuf works on Linux only: it is built on memfd, futexes and open-file-description locks")

# Type checkers take a variable of this name for true, and importing typing would cost a third of the time.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from dmabuf import errors as errors
    from dmabuf import sim
    from dmabuf._native import Frame, View
    from dmabuf.core.access.many import access
    from dmabuf.core.access.range import BufferRange
    from dmabuf.core.attach.attachment import DmaBufAttachment
    from dmabuf.core.attach.importer import Importer
    from dmabuf.core.base.usage import Direction, Usage
    from dmabuf.core.buffer.ref import BufferRef
    from dmabuf.core.dma_buf import DmaBuf
    from dmabuf.core.export.export import export
    from dmabuf.core.export.exporter import Exporter
    from dmabuf.core.fence.array import DmaFenceArray
    from dmabuf.core.fence.chain import DmaFenceChain
    from dmabuf.core.fence.fence import DmaFence
    from dmabuf.core.fence.ops import FenceOps
    from dmabuf.core.fence.signalling import signalling
    from dmabuf.core.fence.stub import private_stub, stub_fence
    from dmabuf.core.fence.timeline import Timeline
    from dmabuf.core.fence.unwrap import merge, unwrap
    from dmabuf.core.fence.wait_any import wait_any
    from dmabuf.core.get import get
    from dmabuf.core.memory.device import Device
    from dmabuf.core.memory.iosys_map import IosysMap
    from dmabuf.core.memory.scatterlist import SgTable
    from dmabuf.core.resv.resv import DmaResv
    from dmabuf.core.resv.ww_mutex import WwAcquireContext, lock_all
    from dmabuf.core.sync.semaphore import TimelineSemaphore, wait_semaphores
    from dmabuf.core.sync.sw_sync import SwSync, sync_info
    from dmabuf.core.sync.sync_file import SyncFile, get_sync_file
    from dmabuf.devices.disk import DiskDevice
    from dmabuf.domain.domain import Domain
    from dmabuf.domain.peers import label
    from dmabuf.errors import ContractError, ContractWarning, DmaBufError, KeptWarning
    from dmabuf.heap.named import open_or_allocate
    from dmabuf.heap.recommended import allocate, allocate_planes, heaps
    from dmabuf.heap.spill import SpillHeap
    from dmabuf.layout.color import Color
    from dmabuf.layout.formats import PixelFormat
    from dmabuf.layout.image import ImageLayout, Plane
    from dmabuf.layout.tensor import TensorLayout
    from dmabuf.observe.bufinfo import bufinfo
    from dmabuf.observe.records import buffers
    from dmabuf.observe.streams import streams
    from dmabuf.sharing.duplicate import serve
    from dmabuf.sharing.opening import open
    from dmabuf.sharing.passing import recv, send
    from dmabuf.sharing.passing_async import arecv, asend
    from dmabuf.sharing.remote_timeline import RemoteTimeline
    from dmabuf.stream.pool import Pool
    from dmabuf.stream.reader import StreamReader
    from dmabuf.stream.stream import Stream

__all__ = [
    "BufferRange",
    "BufferRef",
    "Color",
    "ContractError",
    "ContractWarning",
    "Device",
    "Direction",
    "DiskDevice",
    "DmaBuf",
    "DmaBufAttachment",
    "DmaBufError",
    "DmaFence",
    "DmaFenceArray",
    "DmaFenceChain",
    "DmaResv",
    "Domain",
    "Exporter",
    "FenceOps",
    "Frame",
    "ImageLayout",
    "Importer",
    "IosysMap",
    "KeptWarning",
    "PixelFormat",
    "Plane",
    "Pool",
    "RemoteTimeline",
    "SgTable",
    "SpillHeap",
    "Stream",
    "StreamReader",
    "SwSync",
    "SyncFile",
    "TensorLayout",
    "Timeline",
    "TimelineSemaphore",
    "Usage",
    "View",
    "WwAcquireContext",
    "access",
    "allocate",
    "allocate_planes",
    "arecv",
    "asend",
    "buffers",
    "bufinfo",
    "export",
    "get",
    "get_sync_file",
    "heaps",
    "label",
    "lock_all",
    "merge",
    "open",
    "open_or_allocate",
    "private_stub",
    "recv",
    "send",
    "serve",
    "signalling",
    "sim",
    "streams",
    "stub_fence",
    "sync_info",
    "unwrap",
    "wait_any",
    "wait_semaphores",
]
__version__ = "0.1.0"

# Where each name is defined: a name is imported when it is first used (PEP 562), so that a process that only imports this package, as
# every spawned worker does, pays for nothing.
_PLACES = {
    "dmabuf._native": ("Frame", "View"),
    "dmabuf.core.access.many": ("access",),
    "dmabuf.core.access.range": ("BufferRange",),
    "dmabuf.core.attach.attachment": ("DmaBufAttachment",),
    "dmabuf.core.attach.importer": ("Importer",),
    "dmabuf.core.base.usage": ("Direction", "Usage"),
    "dmabuf.core.buffer.ref": ("BufferRef",),
    "dmabuf.core.dma_buf": ("DmaBuf",),
    "dmabuf.core.export.export": ("export",),
    "dmabuf.core.export.exporter": ("Exporter",),
    "dmabuf.core.fence.array": ("DmaFenceArray",),
    "dmabuf.core.fence.chain": ("DmaFenceChain",),
    "dmabuf.core.fence.fence": ("DmaFence",),
    "dmabuf.core.fence.ops": ("FenceOps",),
    "dmabuf.core.fence.signalling": ("signalling",),
    "dmabuf.core.fence.stub": ("private_stub", "stub_fence"),
    "dmabuf.core.fence.timeline": ("Timeline",),
    "dmabuf.core.fence.unwrap": ("merge", "unwrap"),
    "dmabuf.core.fence.wait_any": ("wait_any",),
    "dmabuf.core.get": ("get",),
    "dmabuf.core.memory.device": ("Device",),
    "dmabuf.core.memory.iosys_map": ("IosysMap",),
    "dmabuf.core.memory.scatterlist": ("SgTable",),
    "dmabuf.core.resv.resv": ("DmaResv",),
    "dmabuf.core.resv.ww_mutex": ("WwAcquireContext", "lock_all"),
    "dmabuf.core.sync.semaphore": ("TimelineSemaphore", "wait_semaphores"),
    "dmabuf.core.sync.sw_sync": ("SwSync", "sync_info"),
    "dmabuf.core.sync.sync_file": ("SyncFile", "get_sync_file"),
    "dmabuf.devices.disk": ("DiskDevice",),
    "dmabuf.domain.domain": ("Domain",),
    "dmabuf.domain.peers": ("label",),
    "dmabuf.errors": ("ContractError", "ContractWarning", "DmaBufError", "KeptWarning"),
    "dmabuf.heap.named": ("open_or_allocate",),
    "dmabuf.heap.recommended": ("allocate", "allocate_planes", "heaps"),
    "dmabuf.heap.spill": ("SpillHeap",),
    "dmabuf.layout.color": ("Color",),
    "dmabuf.layout.formats": ("PixelFormat",),
    "dmabuf.layout.image": ("ImageLayout", "Plane"),
    "dmabuf.layout.tensor": ("TensorLayout",),
    "dmabuf.observe.bufinfo": ("bufinfo",),
    "dmabuf.observe.records": ("buffers",),
    "dmabuf.observe.streams": ("streams",),
    "dmabuf.sharing.duplicate": ("serve",),
    "dmabuf.sharing.opening": ("open",),
    "dmabuf.sharing.passing": ("recv", "send"),
    "dmabuf.sharing.passing_async": ("arecv", "asend"),
    "dmabuf.sharing.remote_timeline": ("RemoteTimeline",),
    "dmabuf.stream.pool": ("Pool",),
    "dmabuf.stream.reader": ("StreamReader",),
    "dmabuf.stream.stream": ("Stream",),
}
_MODULE_OF = {name: module for module, names in _PLACES.items() for name in names}
_MODULES = ("errors", "sim")
_WITH_OBJECTS = ("dmabuf.sharing.pickling",)  # a program that has an object of this package may pickle it
_WITHOUT_OBJECTS = ("dmabuf.errors", "dmabuf.core.base.usage", "dmabuf.layout.")


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name in _MODULES:
        found: object = import_module(f"dmabuf.{name}")
    elif name in _MODULE_OF:
        module = _MODULE_OF[name]
        if not module.startswith(_WITHOUT_OBJECTS):
            for needed in _WITH_OBJECTS:
                import_module(needed)
        found = getattr(import_module(module), name)
    else:
        raise AttributeError(f"module 'dmabuf' has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
