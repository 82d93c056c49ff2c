"""Buffers, fences, sync files, timelines and domains through multiprocessing: as arguments of a Process, in a Queue, a Pipe or a Pool.

Only multiprocessing's own pickler (``ForkingPickler``) can pass a descriptor, so every other pickler gets a TypeError. A child that is
being started gets its descriptors at once, as multiprocessing does it. Every other receiver asks the sender for them (``keeping``,
``fetching``).

A ``multiprocessing.Queue`` pickles in a thread of the sender, which prints what a reducer raises and drops the item: its receiver would
wait for ever. There a reducer raises nothing, but returns what raises in the receiver.
"""

from __future__ import annotations

import copyreg
import errno
import os
import sys
from collections.abc import Callable
from functools import partial
from multiprocessing import context, process
from multiprocessing.reduction import DupFd, ForkingPickler
from pathlib import Path
from types import FrameType
from typing import Any, Final, Protocol, TypeAlias, TypeVar

from dmabuf._native import OwnedFd, owned
from dmabuf.core.access.range import BufferRange
from dmabuf.core.buffer.handle import Handle, handle_of
from dmabuf.core.buffer.ref import BufferRef, ref_of
from dmabuf.core.dma_buf import DmaBuf, GivenHandle
from dmabuf.core.fence.array import DmaFenceArray
from dmabuf.core.fence.chain import DmaFenceChain
from dmabuf.core.fence.fence import DmaFence, wrap
from dmabuf.core.fence.lazy import CustomFence
from dmabuf.core.fence.timeline import Timeline
from dmabuf.core.fence.travel import pack, unpack
from dmabuf.core.get import received
from dmabuf.core.sync.semaphore import TimelineSemaphore
from dmabuf.core.sync.sw_sync import SwFence, SwSync
from dmabuf.core.sync.sync_file import SyncFile
from dmabuf.domain.domain import Domain, known
from dmabuf.domain.sync_files import SyncFileRecord
from dmabuf.errors import ClosedError, DmaBufError, fail, needing_descriptors, rebuilt
from dmabuf.sharing import opening
from dmabuf.sharing.fetching import FOR_NOW, fetch, or_put_back, said, sender_name
from dmabuf.sharing.items import check_fence, directory_lost, timeline_place
from dmabuf.sharing.keeping import TABLE, Place, with_room
from dmabuf.sharing.pending import Pickled, pending, pickled_again, settled, stand_in, stand_in_class
from dmabuf.sharing.put_back import for_call, for_pool
from dmabuf.sharing.remote_timeline import RemoteTimeline

Reduced: TypeAlias = tuple[Callable[..., object], tuple[object, ...]]  # what a pickler calls in the receiver, with which arguments


class _Inherited(Protocol):
    """A descriptor that a child inherits, multiprocessing's ``DupFd``."""

    def detach(self) -> int: ...


Where: TypeAlias = _Inherited | Place
T = TypeVar("T")


# ---- in the sender ----


def _place(fileno: Callable[[], int], make: Callable[[], OwnedFd]) -> Where:
    """Return where the receiver finds a descriptor.

    Args:
        fileno: Returns the descriptor, for a child that is being started and inherits it.
        make: Returns a descriptor to keep for every other receiver.
    """
    if context.get_spawning_popen() is not None:
        return DupFd(fileno())
    with needing_descriptors("pickle", "a descriptor"):
        return TABLE.add(make)


def _copy(fd: int) -> OwnedFd:
    return owned(os.dup, fd)


def _reduce_buffer(buf: DmaBuf) -> Reduced:
    handle = handle_of(buf)
    try:
        handle.check("pickle")
        name = handle.shared.info()["name"]
        make = handle.detach if isinstance(handle, GivenHandle) else handle.dup_owned
        ref = bytes(ref_of(handle, name))
        return _make_buffer, (_place(partial(handle.descriptor, "pickle"), make), buf.domain, ref, name)
    except ClosedError:
        if not handle.closed:
            raise
        remedy = "pass buf.give(), or close it once it was received"
        raise fail(errno.EBADF, "pickle", handle, remedy, what="the buffer was closed before it was pickled") from None


def _reduce_range(part: BufferRange) -> Reduced:
    return _make_range, (part.buf, part.offset, part.length)


def _reduce_stand_in(thing: Any) -> Reduced:
    made = settled(thing)
    return _REDUCERS[type(made)](made)


def _reduce_domain(domain: Domain) -> Reduced:
    if domain.path is not None:
        try:
            with domain.directory() as directory:
                if directory is None:
                    raise directory_lost("pickle", domain)
        except OSError as e:
            if e.errno not in (errno.EMFILE, errno.ENFILE):  # without a free descriptor only the receiver can look
                raise
        return _make_domain, (domain.id, str(domain.path), None)
    return _make_domain, (domain.id, None, _place(domain.fileno, lambda: _copy(domain.fileno())))


def _reduce_fence(fence: DmaFence) -> Reduced:
    check_fence(fence, "pickle")
    structure = pack(fence)
    if structure is not None:
        return _make_container, (type(fence), fence.domain, structure)
    fence.publish()
    fence.shm.fence_share(fence.handle)  # from now on a warning comes if it is dropped unsignaled
    return _make_fence, (fence.domain, fence.handle, (fence.context, fence.seqno, fence.timeline_index))


def _reduce_sync_file(sync_file: SyncFile) -> Reduced:
    sync_file.share("pickle")
    facts = sync_file.record().pack() if sync_file.domain.path is None and not sync_file.kernel else None
    return _make_sync_file, (_place(sync_file.fileno, lambda: _copy(sync_file.fileno())), sync_file.domain, facts)


def _reduce_shared(thing: SwSync | TimelineSemaphore) -> Reduced:
    return _make_shared, (type(thing), _place(thing.fileno, lambda: _copy(thing.fileno())), thing.domain)


def _reduce_timeline(timeline: Timeline | RemoteTimeline) -> Reduced:
    return _make_timeline, (timeline.domain, *timeline_place(timeline, "pickle"))


# ---- what a queue's thread can't raise ----


def _in_feeder() -> bool:
    """Return True in the thread of a ``multiprocessing.Queue`` that only prints an error. Queues of executors tell their callers."""
    queue: Any = getattr(sys.modules.get("multiprocessing.queues"), "Queue", None)
    # Nobody promises these two. Without them, an error is printed as before.
    feed, prints = getattr(queue, "_feed", None), getattr(queue, "_on_queue_feeder_error", None)
    code = getattr(feed, "__code__", None)
    frame = None if code is None else sys._getframe(1)
    while frame is not None:
        if frame.f_code is code:
            return frame.f_locals.get("onerror") is prints
        frame = frame.f_back
    return False


def _told(thing: Any, error: Exception) -> Reduced:
    """Return what raises in the receiver of something that can't be pickled. An open handle of the buffer elsewhere will do."""
    sender = sender_name(os.getpid(), process.current_process().name)
    ref: bytes | None = None
    what = f"a {type(thing).__name__}"
    if type(thing) is DmaBuf:
        handle = handle_of(thing)
        token = ref_of(handle, _name_of(handle))
        ref, what = bytes(token), str(token)
    if type(thing) is DmaBuf and thing.closed:
        told = fail(
            errno.EBADF, "unpickle", what, "put buf.give() into the queue instead of buf, or close it once it was received",
            what=f"{sender} closed it before the thread of its queue had pickled it",
        )  # fmt: skip
    elif isinstance(error, DmaBufError):
        told = fail(error.errno or errno.EIO, "unpickle", what, error.remedy, what=f"{sender} could not pickle it: {said(error)}")
    else:
        number = getattr(error, "errno", None) or errno.EIO
        told = fail(number, "unpickle", what, what=f"{sender} could not pickle it: {type(error).__name__}: {error}")
    return _tell, (ref, told.errno, str(told), told.operation, told.remedy)


def _name_of(handle: Handle) -> bytes | None:
    try:
        found: bytes | None = handle.shared.seen()["name"]
    except OSError:
        return None
    return found


def _tell(ref: bytes | None, number: int, text: str, operation: str | None, remedy: str | None) -> DmaBuf:
    """Raise in the receiver what happened in the sender, unless another process has the buffer open."""
    return _otherwise(ref, rebuilt(number, text, operation, remedy))


def _otherwise(ref: bytes | None, error: DmaBufError) -> DmaBuf:
    """Return the buffer from another process that has it open, and raise the error if none has."""
    if ref is not None:
        try:
            return opening.reopen(BufferRef.from_bytes(ref))
        except DmaBufError:
            pass
    raise error


# ---- in the receiver ----


def _taken(there: Where, what: str, make: Callable[[OwnedFd], T]) -> T:
    """Return what is made of a descriptor, which was inherited, or is fetched from its sender."""
    return fetch(there, what, make) if isinstance(there, tuple) else make(owned(there.detach))


def _or_later(kind: type[T], what: str, receive: Callable[[], T], pickled: Pickled) -> T:
    """Return what ``receive`` returns. Where its error would end a pool or a manager's call, return what asks for it when it is used."""
    try:
        return receive()
    except OSError as e:
        if not _must_not_fail(e):
            raise
        return stand_in(kind, what, receive, pickled)


def _must_not_fail(error: OSError) -> bool:
    return for_pool() or (error.errno in FOR_NOW and for_call())


def _make_buffer(there: Where, domain: Domain, ref: bytes, name: bytes | None) -> DmaBuf:
    token = BufferRef.from_bytes(ref)

    def make(fd: OwnedFd) -> DmaBuf:
        return received(fd, settled(domain), token.dev, token.ino, token.nonce, name)

    def receive() -> DmaBuf:
        settled(domain)
        try:
            return _taken(there, str(token), make)
        except DmaBufError as e:
            if e.errno not in (errno.EOWNERDEAD, errno.ENOENT):
                raise
            return _otherwise(ref, e)

    try:
        return receive()
    except OSError as e:
        if not _must_not_fail(e):
            raise
        return pending(domain, token, receive, (_make_buffer, (there, domain, ref, name)))


def _make_range(buf: DmaBuf, offset: int, length: int) -> BufferRange:
    return _or_later(BufferRange, "a range of a buffer", lambda: BufferRange(buf, offset, length), (_make_range, (buf, offset, length)))


def _make_domain(identity: str, path: str | None, there: Where | None) -> Domain:
    what = f"domain {identity}"

    def receive() -> Domain:
        if path is None:
            assert there is not None
            return _taken(there, what, Domain.adopt)
        with or_put_back(identity.encode(), what), needing_descriptors("unpickle", what):
            domain = known(identity) or Domain.open(Path(path))
        if domain.id != identity:
            remedy = "keep the sender running until it is received, or start it again if its directory was removed"
            raise fail(errno.EXDEV, "unpickle", what, remedy, what=f"its directory has another domain now, {domain.id}")
        return domain

    return _or_later(Domain, what, receive, (_make_domain, (identity, path, there)))


def _make_fence(domain: Domain, handle: int, past: tuple[int, int, int]) -> DmaFence:
    return _or_later(DmaFence, "a fence", lambda: wrap(settled(domain), handle, past), (_make_fence, (domain, handle, past)))


def _make_container(kind: type[DmaFence], domain: Domain, structure: bytes) -> DmaFence:
    what = f"a {kind.__name__}"
    return _or_later(kind, what, lambda: unpack(settled(domain), structure), (_make_container, (kind, domain, structure)))


def _make_timeline(domain: Domain, index: int, number: int, past: int) -> RemoteTimeline:
    arguments = domain, index, number, past
    return _or_later(
        RemoteTimeline, "a timeline", lambda: RemoteTimeline(settled(domain), index, number, past), (_make_timeline, arguments)
    )


def _make_sync_file(there: Where, domain: Domain, facts: bytes | None) -> SyncFile:
    what = "a sync file"

    def receive() -> SyncFile:
        in_domain, record = settled(domain), None if facts is None else SyncFileRecord.unpack(facts)
        return _taken(there, what, lambda fd: SyncFile.from_owned_fd(fd, in_domain, record))

    return _or_later(SyncFile, what, receive, (_make_sync_file, (there, domain, facts)))


def _make_shared(kind: type[SwSync] | type[TimelineSemaphore], there: Where, domain: Domain) -> SwSync | TimelineSemaphore:
    what = f"a {kind.__name__}"

    def receive() -> SwSync | TimelineSemaphore:
        in_domain = settled(domain)
        return _taken(there, what, lambda fd: kind.from_owned_fd(fd, in_domain))

    return _or_later(kind, what, receive, (_make_shared, (kind, there, domain)))


# ---- registration ----

_REDUCERS: dict[type, Callable[[Any], Reduced]] = {
    BufferRange: _reduce_range,
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
_REDUCERS.update((stand_in_class(kind), _reduce_stand_in) for kind in tuple(_REDUCERS))


def _reduce(thing: Any) -> Reduced:
    """Reduce an object for multiprocessing's pickler."""
    again = pickled_again(thing)
    if again is not None:
        return again
    try:
        return _REDUCERS[type(thing)](thing)
    except Exception as e:
        if not _in_feeder():
            raise
        error = e
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        try:
            return with_room(lambda: _REDUCERS[type(thing)](thing))
        except Exception as e:
            error = e
    return _told(thing, error)


_DRIVERS: Final = ("loky.backend.reduction", "joblib.pool")  # the modules, of which joblib has copies


def _for_worker(caller: FrameType | None) -> bool:
    """Return True if the caller of a reducer is loky's pickler, which is a subclass of cloudpickle's, or that of joblib's pools.

    They pickle what goes to a worker or comes from one, as multiprocessing's does, but don't know its reducers.
    """
    frames = (caller, None if caller is None else caller.f_back)
    return any(frame is not None and frame.f_globals.get("__name__", "").endswith(_DRIVERS) for frame in frames)


def _reduce_elsewhere(thing: Any) -> Reduced:
    """Reduce an object for any other pickler."""
    if _for_worker(sys._getframe(1)):
        return _reduce(thing)
    if isinstance(thing, BufferRange):
        return BufferRange, (thing.buf, thing.offset, thing.length)  # what has no buffer can be copied in its process
    name = type(thing).__name__
    token = ", or pickle buf.ref() and open that with dmabuf.open()" if isinstance(thing, DmaBuf) else ""
    raise TypeError(
        f"a {name} belongs to living processes and can't be pickled to bytes: pass it through multiprocessing "
        f"(an argument of a Process, a Queue, a Pipe, a Pool), or send it with dmabuf.send(){token}"
    )


for _kind in _REDUCERS:
    copyreg.pickle(_kind, _reduce_elsewhere)
    ForkingPickler.register(_kind, _reduce)
