"""The requests that the exporting process answers: each runs an op of a buffer's exporter for a process that called it.

Every request names the buffer by its inode and brings a descriptor of it, so a process that has none can't call. What an op gives to the
calling process is kept in its `ClientState` until that process gives it back or ends.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable

from dmabuf._native import OwnedFd
from dmabuf.core.attach.attachment import DmaBufAttachment, enter, make
from dmabuf.core.base.usage import Direction
from dmabuf.core.buffer.backing import SERVERS
from dmabuf.core.buffer.handle import handle_of
from dmabuf.core.buffer.mapping import map_range
from dmabuf.core.buffer.shared import known
from dmabuf.core.export.exported import Exported
from dmabuf.core.memory.device import Device
from dmabuf.core.memory.scatterlist import SgTable, cpu_side, mapping_of, memory_of
from dmabuf.errors import fail
from dmabuf.sharing import memory
from dmabuf.sharing.client_state import ClientBuffer, ClientState, detach, unknown
from dmabuf.sharing.lending import borrowed
from dmabuf.sharing.messages import Body, flag, number, text
from dmabuf.sharing.remote_importer import RemoteImporter
from dmabuf.sharing.server import Answer, Handler, Session, register, serve


def direction_of(body: Body) -> Direction:
    """Return the direction of a message. If there is none, it fails with EBADMSG."""
    return Direction(number(body, "direction", max(Direction)))


# ---- the requests ----


def _exporter(session: Session, body: Body, fds: list[OwnedFd]) -> Answer:
    """Return the exporter's ops, and whether it keeps tables."""
    key = (number(body, "dev"), number(body, "ino"))
    shared = known(session.domain, *key)
    live = None if shared is None else shared.backing
    if not isinstance(live, Exported):
        raise unknown(key)
    return Answer({"ops": sorted(live.ops), "cache": live.cache})


def _begin(session: Session, body: Body, fds: list[OwnedFd]) -> Answer:
    way, block, state = direction_of(body), number(body, "block"), session.state(ClientState)
    with state.using(body, fds) as entry:
        entry.live.begin(entry.buf, way)
        entry.brackets.append((block, way))
    return Answer(undo=lambda _: _end_unless_gone(session, body))


def _end(session: Session, body: Body, fds: list[OwnedFd]) -> Answer:
    way, block = direction_of(body), number(body, "block")
    with session.state(ClientState).using(body, fds) as entry:
        of_block = [i for i, (found, _) in enumerate(entry.brackets) if found == block]
        if block and not of_block:
            return Answer()  # it was ended, or has never begun: a client that a signal handler interrupts asks in any case
        if of_block:  # without a block nothing pairs ends with begins, except their number
            at = next((i for i in reversed(of_block) if entry.brackets[i][1] is way), of_block[-1])
            del entry.brackets[at]
        entry.live.end(entry.buf, way)
    return Answer()


def _end_unless_gone(session: Session, body: Body) -> None:
    """Undo a begin. The client may have asked for its end already, and closed the buffer."""
    with contextlib.suppress(OSError):
        _end(session, body, [])


def _mmap(session: Session, body: Body, fds: list[OwnedFd]) -> Answer:
    state = session.state(ClientState)
    with state.using(body, fds) as entry:
        mapping = map_range(handle_of(entry.buf), "mmap", number(body, "offset"), number(body, "length"), False)
        try:
            shown = memory.range_of(mapping, "mmap", entry.buf)
        except BaseException:
            mapping.close()
            raise
        n = next(state.numbers)
        entry.mappings[n] = mapping
    answer = Answer({"mapping": n, "offset": shown.offset, "length": shown.length, "writable": shown.writable}, [shown.fd])
    answer.undo = lambda _: _unmapped(session, {**body, "mapping": n}, [])
    return answer


def under_lock(
    session: Session,
    body: Body,
    fds: list[OwnedFd],
    act: Callable[[ClientBuffer], Answer],
    undo: Callable[[ClientBuffer, Answer], object] | None = None,
) -> Answer:
    """Run ``act`` with the reservation lock, which the caller lends (sharing/lending.py), and ``undo`` likewise.

    ``holder`` of the message is the caller's return context. If it is 0, the caller doesn't hold the lock, and this process takes it. A
    caller that says it holds the lock but doesn't gets EPERM.
    """
    kind, loan = text(body, "kind"), number(body, "holder")
    with session.state(ClientState).using(body, fds) as entry:
        with borrowed(entry.buf.resv, loan, kind, entry.buf) if loan else entry.buf.resv.locked():
            answer = act(entry)
    if undo is not None:

        def undone(told: Body) -> None:
            with session.state(ClientState).using(body, []) as entry, borrowed(entry.buf.resv, number(told, "holder"), kind, entry.buf):
                undo(entry, answer)

        answer.undo = undone
    return answer


def _attach(session: Session, body: Body, fds: list[OwnedFd]) -> Answer:
    dev = Device(
        text(body, "device", 1 << 12),
        dma_mask=number(body, "dma_mask"),
        max_segment=max(number(body, "max_segment"), memory.PAGE),
    )
    state = session.state(ClientState)
    with state.using(body, fds) as entry:
        n, live = next(state.numbers), entry.live
        about = {"dev": number(body, "dev"), "ino": number(body, "ino"), "attachment": n, "peer2peer": flag(body, "peer2peer")}
        attachment = make(entry.buf, dev, RemoteImporter(session, about) if flag(body, "dynamic") else None, live)
        enter(attachment, match=False)  # the client matches its importer with this exporter
        entry.attachments[n] = attachment
    return Answer({"attachment": n, "peer2peer": attachment.peer2peer}, undo=lambda _: _detach(session, {**body, "attachment": n}, []))


def _detach(session: Session, body: Body, fds: list[OwnedFd]) -> Answer:
    with session.state(ClientState).using(body, fds) as entry:
        attachment = entry.attachment(body)
        n = number(body, "attachment")
        del entry.attachments[n]
        entry.pins.pop(n, None)
        detach(attachment)
    return Answer()


def _pin(session: Session, body: Body, fds: list[OwnedFd]) -> Answer:
    def act(entry: ClientBuffer) -> Answer:
        entry.live.exporter.pin(entry.attachment(body))
        entry.pins[number(body, "attachment")] += 1
        return Answer()

    return under_lock(session, body, fds, act, lambda entry, _: _unpinned(entry, body))


def _unpin(session: Session, body: Body, fds: list[OwnedFd]) -> Answer:
    return under_lock(session, body, fds, lambda entry: _unpinned(entry, body))


def _unpinned(entry: ClientBuffer, body: Body) -> Answer:
    n = number(body, "attachment")
    entry.pins[n] -= 1
    if entry.pins[n] <= 0:
        del entry.pins[n]
    entry.live.exporter.unpin(entry.attachment(body))
    return Answer()


def _map(session: Session, body: Body, fds: list[OwnedFd]) -> Answer:
    way = direction_of(body)

    def act(entry: ClientBuffer) -> Answer:
        attachment, exporter = entry.attachment(body), entry.live.exporter
        sgt = exporter.map(attachment, way)
        if sgt is None:
            return Answer()
        if not isinstance(sgt, SgTable):
            raise TypeError(f"map: the exporter returned {type(sgt).__name__}, not an SgTable")
        try:
            answer = _shown(attachment, sgt)
        except BaseException:
            exporter.unmap(attachment, sgt, way)
            raise
        answer.body["table"] = n = next(session.state(ClientState).numbers)
        entry.tables[n] = attachment, sgt, way
        return answer

    def undo(entry: ClientBuffer, answer: Answer) -> None:
        if "table" in answer.body:
            _untabled(entry, answer.body)

    return under_lock(session, body, fds, act, undo)


def _shown(attachment: DmaBufAttachment, sgt: SgTable) -> Answer:
    """Return a table as an answer: the memory and the ranges for the client's device, or the addresses that the exporter filled in."""
    cpu = [n for entry in cpu_side(sgt) for n in entry]
    mapping = mapping_of(sgt)
    if mapping is None or mapping.device is not attachment.dev:
        return Answer({"cpu": cpu, "dma": [n for address, length in sgt for n in (address, length, 0)]})
    mapped = memory_of(sgt)
    assert mapped is not None  # by the device
    shown = memory.range_of(mapped, "map", attachment)
    return Answer({"cpu": cpu, "offset": shown.offset, "length": shown.length, "writable": shown.writable}, [shown.fd])


def _unmap(session: Session, body: Body, fds: list[OwnedFd]) -> Answer:
    return under_lock(session, body, fds, lambda entry: _untabled(entry, body))


def _untabled(entry: ClientBuffer, body: Body) -> Answer:
    found = entry.tables.pop(number(body, "table"), None)
    if found is None:
        raise fail(errno.EINVAL, "unmap", entry.buf, "unmap each table once", what="no such table")
    entry.live.exporter.unmap(*found)
    return Answer()


def _vmap(session: Session, body: Body, fds: list[OwnedFd]) -> Answer:
    def act(entry: ClientBuffer) -> Answer:
        map_ = entry.live.vmap(entry.buf, tell=False)
        try:
            view = map_.vaddr if map_.vaddr is not None else map_.vaddr_iomem
            assert view is not None  # a vmap that is NULL has failed
            shown = memory.range_of(view, "vmap", entry.buf)
        except BaseException:
            entry.live.vunmap(entry.buf, map_)
            raise
        entry.vmaps.append(map_)
        about = {"offset": shown.offset, "length": shown.length, "writable": shown.writable, "iomem": map_.is_iomem}
        return Answer(about, [shown.fd])

    return under_lock(session, body, fds, act, lambda entry, _: _vunmapped(entry))


def _vunmap(session: Session, body: Body, fds: list[OwnedFd]) -> Answer:
    return under_lock(session, body, fds, _vunmapped)


def _vunmapped(entry: ClientBuffer) -> Answer:
    if not entry.vmaps:
        raise fail(errno.EINVAL, "vunmap", entry.buf, "vunmap as often as vmap", what="it is not mapped")
    entry.live.vunmap(entry.buf, entry.vmaps.pop())
    return Answer()


def _unmapped(session: Session, body: Body, fds: list[OwnedFd]) -> Answer:
    with contextlib.suppress(OSError), session.state(ClientState).using(body, fds) as entry:
        mapping = entry.mappings.pop(number(body, "mapping"), None)
        if mapping is not None:
            mapping.close()
    return Answer()


_REQUESTS: dict[str, Handler] = {
    "exporter": _exporter,
    "begin": _begin,
    "end": _end,
    "mmap": _mmap,
    "unmapped": _unmapped,
    "attach": _attach,
    "detach": _detach,
    "pin": _pin,
    "unpin": _unpin,
    "map": _map,
    "unmap": _unmap,
    "vmap": _vmap,
    "vunmap": _vunmap,
}
for _kind, _handler in _REQUESTS.items():
    register(_kind, _handler)
SERVERS.register("exported", serve)
