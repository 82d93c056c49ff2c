"""The Linux DMA-BUF framework as a Python library: buffers, fences and reservation objects that processes share.

Buffers: ``allocate``, ``get`` and ``open`` give a ``DmaBuf``; ``with buf.read() as view``, ``with buf.write() as view``, ``access`` for
several. To other processes: ``send`` and ``recv``, or as arguments of multiprocessing. Fences: ``Timeline``, ``wait_any``, ``merge``,
``SyncFile``. Drivers in Python: ``export`` with an ``Exporter``, ``DmaBuf.attach`` with a ``Device``; ready to use are ``sim.Engine`` and
``DiskDevice``. Heaps: ``heaps``, ``SpillHeap``. What there is: ``buffers``, ``bufinfo``. Errors are OSErrors with their errno
(``dmabuf.errors``); mistakes in the use of locks and fences are ``ContractError`` and ``ContractWarning``.

``dmabuf.drivers`` (DRM, V4L2) is not imported by this package: ``from dmabuf.drivers import drm, camera``.
"""

import sys as _sys

if not _sys.platform.startswith("linux"):
    raise ImportError("dmabuf works on Linux only: it is built on memfd, futexes and open-file-description locks")

from dmabuf import sim
from dmabuf.core.access.access import access
from dmabuf.core.access.range import BufferRange
from dmabuf.core.attach.attachment import DmaBufAttachment
from dmabuf.core.base.debug import signalling
from dmabuf.core.base.usage import Direction, Usage
from dmabuf.core.contract import Exporter, Importer, export
from dmabuf.core.dma_buf import DmaBuf
from dmabuf.core.fence.array import DmaFenceArray
from dmabuf.core.fence.chain import DmaFenceChain
from dmabuf.core.fence.fence import DmaFence, Timeline, private_stub, stub_fence
from dmabuf.core.fence.lazy import FenceOps
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
from dmabuf.errors import ContractError, ContractWarning, DmaBufError
from dmabuf.heap.recommended import allocate, heaps
from dmabuf.heap.spill import SpillHeap
from dmabuf.observe.bufinfo import bufinfo
from dmabuf.observe.records import buffers
from dmabuf.sharing import live as _live  # noqa: F401  (buffers of other processes' exporters)
from dmabuf.sharing import pickling as _pickling  # noqa: F401  (multiprocessing learns of our types)
from dmabuf.sharing import serving as _serving  # noqa: F401  (and ours for them)
from dmabuf.sharing.opening import open
from dmabuf.sharing.passing import recv, send
from dmabuf.sharing.remote import RemoteTimeline

__all__ = [
    "BufferRange",
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
    "Importer",
    "IosysMap",
    "RemoteTimeline",
    "SgTable",
    "SpillHeap",
    "SwSync",
    "SyncFile",
    "Timeline",
    "TimelineSemaphore",
    "Usage",
    "WwAcquireContext",
    "access",
    "allocate",
    "buffers",
    "bufinfo",
    "export",
    "get",
    "get_sync_file",
    "heaps",
    "lock_all",
    "merge",
    "open",
    "private_stub",
    "recv",
    "send",
    "signalling",
    "sim",
    "stub_fence",
    "sync_info",
    "unwrap",
    "wait_any",
    "wait_semaphores",
]
__version__ = "0.1.0"
