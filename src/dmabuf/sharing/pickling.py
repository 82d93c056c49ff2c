"""Buffers, fences, sync files, timelines and domains through multiprocessing: as arguments of a Process, in a Queue, a Pipe or a Pool.

Only multiprocessing's own pickler (``ForkingPickler``) can pass a descriptor, so every other pickler gets a TypeError. This module doesn't
import multiprocessing. The reducers are registered when both are imported, in whichever order.

A descriptor travels as multiprocessing's ``DupFd``. A child that is being started gets it at once. Otherwise a thread of the sender keeps
it until the receiver has fetched it, so the sender must live until then.
"""

from __future__ import annotations

import copyreg
import errno
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, TypeAlias

from dmabuf._native import owned
from dmabuf.core.buffer.handle import handle_of
from dmabuf.core.dma_buf import DmaBuf
from dmabuf.core.fence.array import DmaFenceArray
from dmabuf.core.fence.chain import DmaFenceChain
from dmabuf.core.fence.fence import DmaFence, wrap
from dmabuf.core.fence.lazy import CustomFence
from dmabuf.core.fence.timeline import Timeline
from dmabuf.core.fence.travel import pack, unpack
from dmabuf.core.get import from_fd
from dmabuf.core.sync.semaphore import TimelineSemaphore
from dmabuf.core.sync.sw_sync import SwFence, SwSync
from dmabuf.core.sync.sync_file import SyncFile
from dmabuf.domain.domain import Domain, known
from dmabuf.domain.sync_files import SyncFileRecord
from dmabuf.errors import fail
from dmabuf.sharing.items import check_fence, directory_lost, timeline_place
from dmabuf.sharing.remote_timeline import RemoteTimeline

_MODULE = "multiprocessing.reduction"
Reduced: TypeAlias = tuple[Callable[..., object], tuple[object, ...]]  # what a pickler calls in the receiver, with which arguments


class _Sent(Protocol):
    """A descriptor on its way, multiprocessing's ``DupFd``."""

    def detach(self) -> int: ...


# ---- in the sender ----


def _reduce_buffer(buf: DmaBuf) -> Reduced:
    handle = handle_of(buf)
    fd = handle.descriptor("pickle")
    return _make_buffer, (sys.modules[_MODULE].DupFd(fd), buf.domain, handle.shared.info()["name"])


def _reduce_domain(domain: Domain) -> Reduced:
    if domain.path is not None:
        with domain.directory() as directory:
            if directory is None:
                raise directory_lost("pickle", domain)
        return _make_domain, (domain.id, str(domain.path), None)
    return _make_domain, (domain.id, None, sys.modules[_MODULE].DupFd(domain.fileno()))


def _reduce_fence(fence: DmaFence) -> Reduced:
    check_fence(fence, "pickle")
    structure = pack(fence)
    if structure is not None:
        return unpack, (fence.domain, structure)
    fence.publish()
    fence.shm.fence_share(fence.handle)  # from now on a warning comes if it is dropped unsignaled
    return _make_fence, (fence.domain, fence.handle, (fence.context, fence.seqno, fence.timeline_index))


def _reduce_sync_file(sync_file: SyncFile) -> Reduced:
    sync_file.share("pickle")
    facts = sync_file.record().pack() if sync_file.domain.path is None and not sync_file.kernel else None
    return _make_sync_file, (sys.modules[_MODULE].DupFd(sync_file.fileno()), sync_file.domain, facts)


def _reduce_shared(thing: SwSync | TimelineSemaphore) -> Reduced:
    return _make_shared, (type(thing), sys.modules[_MODULE].DupFd(thing.fileno()), thing.domain)


def _reduce_timeline(timeline: Timeline | RemoteTimeline) -> Reduced:
    return RemoteTimeline, (timeline.domain, *timeline_place(timeline, "pickle"))


# ---- in the receiver ----


def _make_buffer(there: _Sent, domain: Domain, name: bytes | None) -> DmaBuf:
    return from_fd(owned(there.detach), domain, name=name)


def _make_domain(identity: str, path: str | None, there: _Sent) -> Domain:
    if path is None:
        return Domain.adopt(owned(there.detach))
    domain = known(identity) or Domain.open(Path(path))
    if domain.id != identity:
        what = f"its directory has another domain now, {domain.id}"
        remedy = "keep the sender running until it is received, or start it again if its directory was removed"
        raise fail(errno.EXDEV, "unpickle", f"domain {identity}", remedy, what=what)
    return domain


def _make_fence(domain: Domain, handle: int, past: tuple[int, int, int]) -> DmaFence:
    return wrap(domain, handle, past)


def _make_sync_file(there: _Sent, domain: Domain, facts: bytes | None) -> SyncFile:
    return SyncFile.from_owned_fd(owned(there.detach), domain, None if facts is None else SyncFileRecord.unpack(facts))


def _make_shared(kind: type[SwSync] | type[TimelineSemaphore], there: _Sent, domain: Domain) -> SwSync | TimelineSemaphore:
    return kind.from_owned_fd(owned(there.detach), domain)


# ---- registration ----

_REDUCERS: dict[type, Callable[[Any], Reduced]] = {
    DmaBuf: _reduce_buffer,
    CustomFence: _reduce_fence,
    DmaFence: _reduce_fence,
    DmaFenceArray: _reduce_fence,
    DmaFenceChain: _reduce_fence,
    Domain: _reduce_domain,
    RemoteTimeline: _reduce_timeline,
    SwFence: _reduce_fence,
    SwSync: _reduce_shared,
    SyncFile: _reduce_sync_file,
    Timeline: _reduce_timeline,
    TimelineSemaphore: _reduce_shared,
}


def _register() -> None:
    for kind, reducer in _REDUCERS.items():
        sys.modules[_MODULE].ForkingPickler.register(kind, reducer)


def _by_forking_pickler(caller: FrameType | None) -> bool:
    """Return True if multiprocessing runs the pickler, which it does in two functions of one module."""
    reduction: Any = sys.modules.get(_MODULE)
    if caller is None or not hasattr(reduction, "ForkingPickler"):
        return False
    return caller.f_code in (reduction.ForkingPickler.dumps.__func__.__code__, reduction.dump.__code__)


def _reduce(thing: Any) -> Reduced:
    """Reduce an object for any pickler. Once the reducers are registered, multiprocessing's own pickler doesn't call this."""
    if _by_forking_pickler(sys._getframe(1)):
        _register()
        return _REDUCERS[type(thing)](thing)
    name = type(thing).__name__
    raise TypeError(
        f"a {name} belongs to living processes and can't be pickled to bytes: pass it through multiprocessing "
        "(an argument of a Process, a Queue, a Pipe, a Pool), or send it with dmabuf.send()"
    )


for _kind in _REDUCERS:
    copyreg.pickle(_kind, _reduce)
if hasattr(sys.modules.get(_MODULE), "ForkingPickler"):
    _register()
