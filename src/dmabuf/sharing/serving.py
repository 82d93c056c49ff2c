"""The exporting process's side of calls from others: what each asking process has of each buffer, and its end.

Every request names the buffer by its inode and brings a descriptor of it (a lease: who has none can't ask); while an asking process has
something of a buffer, this process keeps a handle of its own for it, the *stake*: so ``release`` comes after the last of them, wherever
it is. A stake holds

- the exporter's mappings, each as long as the other process keeps the one that it made of it;
- the brackets of CPU access that were begun and not ended. Where the other process goes in the middle, its brackets are ended, the last
  one first; an exporter sees as many ends as begins;
- attachments, each with a stand-in of its device, which has the name and the limits and takes the exporter's tables as any device does;
  the real device maps the same memory over there. Their tables, pins and vmaps.

A process that dies, or closes its last handle, mapping and attachment of what this process exports, ends its session: all of that is
given back then, in the thread that notices.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from dmabuf import _native
from dmabuf.core.attach.attachment import DmaBufAttachment, make
from dmabuf.core.base.usage import Direction
from dmabuf.core.buffer.backing import SERVERS
from dmabuf.core.contract import Attachment, RevocableImporter
from dmabuf.core.dma_buf import DmaBuf
from dmabuf.core.export.exported import Exported
from dmabuf.core.get import from_fd
from dmabuf.core.memory.device import Device
from dmabuf.core.memory.iosys_map import IosysMap
from dmabuf.core.memory.scatterlist import SgTable, cpu_side, mapping_of, memory_of
from dmabuf.core.resv.lock import holding
from dmabuf.domain import dispatcher
from dmabuf.domain.records import Record
from dmabuf.errors import DmaBufError, fail
from dmabuf.sharing import memory
from dmabuf.sharing.lending import borrowed, regain
from dmabuf.sharing.line import Line, line_to
from dmabuf.sharing.messages import LOST, THERE, Body, flag, no_room, number, text
from dmabuf.sharing.service import Answer, Handler, Session, register, serve

Key = tuple[int, int]  # (st_dev, st_ino)


class Stake:
    """What one asking process has of one buffer of this process's."""

    def __init__(self, buf: DmaBuf, live: Exported) -> None:
        self.buf, self.live = buf, live
        self.users = 0  # calls that run
        self.mappings: dict[int, _native.Mapping] = {}
        self.brackets: list[Direction] = []
        self.attachments: dict[int, DmaBufAttachment] = {}
        self.pins: Counter[int] = Counter()  # by attachment
        self.tables: dict[int, tuple[DmaBufAttachment, SgTable, Direction]] = {}
        self.vmaps: list[IosysMap] = []

    @property
    def empty(self) -> bool:
        return not (self.users or self.mappings or self.brackets or self.attachments or self.tables or self.vmaps)

    def attachment(self, body: Body) -> DmaBufAttachment:
        """Errors: EINVAL no such attachment."""
        found = self.attachments.get(number(body, "attachment"))
        if found is None:
            raise fail(errno.EINVAL, "request", self.buf, "attach again", what="no such attachment")
        return found

    def end(self) -> None:
        """The other process is gone: give everything back, in the order that it would have."""
        exporter = self.live.exporter
        if self.tables or self.pins or self.vmaps or self.attachments:
            with self.buf.resv.locked():
                for attachment, sgt, way in self.tables.values():
                    _quietly(partial(exporter.unmap, attachment, sgt, way))
                for n, count in self.pins.items():
                    for _ in range(count):
                        _quietly(partial(exporter.unpin, self.attachments[n]))
                for map_ in self.vmaps:
                    _quietly(partial(self.live.vunmap, self.buf, map_))
                for attachment in self.attachments.values():
                    _forget(self.live, attachment)
        for attachment in self.attachments.values():
            _quietly(partial(_detached, self.live, attachment))
        while self.brackets:
            _quietly(partial(self.live.end, self.buf, self.brackets.pop()))
        for mapping in self.mappings.values():
            mapping.close()
        for kept in (self.tables, self.pins, self.vmaps, self.attachments, self.mappings):
            kept.clear()


def _forget(live: Exported, attachment: DmaBufAttachment) -> None:
    """Take it off the list; the lock is held."""
    attachment.attached = False
    with contextlib.suppress(ValueError):
        live.attachments.remove(attachment)


def _detached(live: Exported, attachment: DmaBufAttachment) -> None:
    """The last step of its end; the lock is not held."""
    if isinstance(attachment.importer, ImporterElsewhere):
        attachment.importer.close()
    if "detach" in live.ops:
        live.exporter.detach(attachment)
    attachment.priv = None


class ImporterElsewhere(RevocableImporter):
    """An importer in the process that asked for the attachment; it is told there, and waited for."""

    def __init__(self, session: Session, body: Body) -> None:
        self.session, self.body = session, body
        self.allow_peer2peer = flag(body, "peer2peer")
        self.line: Line | None = None

    def move_notify(self, attachment: DmaBufAttachment) -> None:
        if self.line is None:
            self.line = line_to(self.session.domain, self.session.life, self)
        resv = attachment._resv
        held, life = holding(resv), self.session.domain.shm.life
        try:
            self.line.call("moved", {**self.body, "holder": held.word}, operation="move_notify", kept=True)
        except DmaBufError as e:
            if e.errno != errno.ENODEV:  # dead, or about to be: its attachment goes with its session
                raise
        finally:  # what it asked of this process in it ends first
            regain(resv, held, held.word, life)

    def revoke(self, attachment: Attachment) -> None:
        if self.line is not None:  # it was told of the move
            with contextlib.suppress(DmaBufError):  # dead: so is its device
                self.line.call("revoked", self.body, operation="move")

    def close(self) -> None:
        line, self.line = self.line, None
        if line is not None:
            line.leave(self)


def _quietly(call: Callable[[], object]) -> None:
    """An exporter's error that has nobody to go to."""
    try:
        call()
    except Exception as e:
        dispatcher.report(e, call)


class Stakes:
    """All that one asking process has here."""

    def __init__(self, session: Session) -> None:
        self.domain = session.domain
        self.numbers = itertools.count(1)
        self._stakes: dict[Key, Stake] = {}
        self._lock = threading.Lock()
        session.at_end.append(self.end)

    @contextlib.contextmanager
    def using(self, body: Body, fds: list[int]) -> Iterator[Stake]:
        """The stake that a request is about; it is there for the block, and afterwards if there is something in it.

        Errors: ENODEV no such buffer of this process; EMFILE its descriptor found no room; EBADMSG; those of ``get()``.
        """
        key = (number(body, "dev"), number(body, "ino"))
        with self._lock:
            stake = self._stakes.get(key)
            if stake is not None:
                stake.users += 1
        if stake is None:
            stake = self._staked(key, body, fds)
        try:
            yield stake
        finally:
            with self._lock:
                stake.users -= 1
                last = stake.empty
                if last:
                    self._stakes.pop(key, None)
            if last:
                stake.buf.close()

    def _staked(self, key: Key, body: Body, fds: list[int]) -> Stake:
        if body.get(LOST):
            raise no_room(text(body, "kind"), f"buffer ino {key[1]}", THERE)
        if not fds:
            raise _unknown(key)
        buf = from_fd(fds.pop(0), self.domain)
        live = buf._record.live
        if (buf._record.dev, buf._record.ino) != key or not isinstance(live, Exported):
            buf.close()
            raise _unknown(key)
        with self._lock:
            stake = self._stakes.setdefault(key, Stake(buf, live))
            stake.users += 1
        if stake.buf is not buf:
            buf.close()
        return stake

    def end(self) -> None:
        while self._stakes:
            _, stake = self._stakes.popitem()
            stake.end()
            _quietly(stake.buf.close)


def _unknown(key: Key) -> OSError:
    return fail(
        errno.ENODEV, "request", f"buffer ino {key[1]}", "ask its exporter for a new buffer", what="this process exports no such buffer"
    )


def stakes_of(session: Session) -> Stakes:
    """The stakes of an asking process."""
    found: Stakes | None = session.state.get("stakes")
    return found or session.state.setdefault("stakes", Stakes(session))


def direction_of(body: Body) -> Direction:
    """Errors: EBADMSG no direction."""
    return Direction(number(body, "direction", max(Direction)))


# ---- the requests ----


def _exporter(session: Session, body: Body, fds: list[int]) -> Answer:
    """What the exporter can do: its ops, and whether it keeps tables."""
    key = (number(body, "dev"), number(body, "ino"))
    record: Record | None = (session.domain.local.get("records") or {}).get(key)
    live: Any = record.live if record is not None else None
    if not isinstance(live, Exported):
        raise _unknown(key)
    return Answer({"ops": sorted(live.ops), "cache": live.cache})


def _begin(session: Session, body: Body, fds: list[int]) -> Answer:
    way, stakes = direction_of(body), stakes_of(session)
    with stakes.using(body, fds) as stake:
        stake.live.begin(stake.buf, way)
        stake.brackets.append(way)
    return Answer(undo=lambda _: _end(session, body, []))


def _end(session: Session, body: Body, fds: list[int]) -> Answer:
    way = direction_of(body)
    with stakes_of(session).using(body, fds) as stake:
        if stake.brackets:  # nothing pairs them but that there are as many
            at = next((i for i in reversed(range(len(stake.brackets))) if stake.brackets[i] is way), -1)
            del stake.brackets[at]
        stake.live.end(stake.buf, way)
    return Answer()


def _mmap(session: Session, body: Body, fds: list[int]) -> Answer:
    stakes = stakes_of(session)
    with stakes.using(body, fds) as stake:
        mapping = stake.buf._mmap("mmap", number(body, "offset"), number(body, "length"), False)
        try:
            shown = memory.range_of(mapping, "mmap", stake.buf)
        except BaseException:
            mapping.close()
            raise
        n = next(stakes.numbers)
        stake.mappings[n] = mapping
    answer = Answer({"mapping": n, "offset": shown.offset, "length": shown.length, "writable": shown.writable}, [shown.fd])
    answer.undo = lambda _: _unmapped(session, {**body, "mapping": n}, [])
    return answer


def under_lock(
    session: Session,
    body: Body,
    fds: list[int],
    act: Callable[[Stake], Answer],
    undo: Callable[[Stake, Answer], object] | None = None,
) -> Answer:
    """Run ``act`` with the reservation lock, which the caller lends for it (sharing/lending.py), and ``undo`` likewise.

    ``holder``: its loan; 0: nobody holds the lock for this, and it is taken here. Errors: EPERM the caller doesn't hold it.
    """
    kind, loan = text(body, "kind"), number(body, "holder")
    with stakes_of(session).using(body, fds) as stake:
        with borrowed(stake.buf.resv, loan, kind, stake.buf) if loan else stake.buf.resv.locked():
            answer = act(stake)
    if undo is not None:

        def undone(told: Body) -> None:
            with stakes_of(session).using(body, []) as stake, borrowed(stake.buf.resv, number(told, "holder"), kind, stake.buf):
                undo(stake, answer)

        answer.undo = undone
    return answer


def _attach(session: Session, body: Body, fds: list[int]) -> Answer:
    dev = Device(
        text(body, "device", 1 << 12),
        dma_mask=number(body, "dma_mask"),
        max_segment=max(number(body, "max_segment"), memory.PAGE),
    )
    stakes = stakes_of(session)
    with stakes.using(body, fds) as stake:
        n, live = next(stakes.numbers), stake.live
        about = {"dev": number(body, "dev"), "ino": number(body, "ino"), "attachment": n, "peer2peer": flag(body, "peer2peer")}
        attachment = make(stake.buf, dev, ImporterElsewhere(session, about) if flag(body, "dynamic") else None, live)
        if "attach" in live.ops:
            live.exporter.attach(attachment)
        with stake.buf.resv.locked():
            live.attachments.insert(0, attachment)
            attachment.attached = True
            stake.attachments[n] = attachment
    return Answer({"attachment": n, "peer2peer": attachment.peer2peer}, undo=lambda _: _detach(session, {**body, "attachment": n}, []))


def _detach(session: Session, body: Body, fds: list[int]) -> Answer:
    with stakes_of(session).using(body, fds) as stake:
        attachment = stake.attachment(body)
        with stake.buf.resv.locked():
            _forget(stake.live, attachment)
        n = number(body, "attachment")
        del stake.attachments[n]
        stake.pins.pop(n, None)
        _detached(stake.live, attachment)
    return Answer()


def _pin(session: Session, body: Body, fds: list[int]) -> Answer:
    def act(stake: Stake) -> Answer:
        stake.live.exporter.pin(stake.attachment(body))
        stake.pins[number(body, "attachment")] += 1
        return Answer()

    return under_lock(session, body, fds, act, lambda stake, _: _unpinned(stake, body))


def _unpin(session: Session, body: Body, fds: list[int]) -> Answer:
    return under_lock(session, body, fds, lambda stake: _unpinned(stake, body))


def _unpinned(stake: Stake, body: Body) -> Answer:
    n = number(body, "attachment")
    stake.pins[n] -= 1
    if stake.pins[n] <= 0:
        del stake.pins[n]
    stake.live.exporter.unpin(stake.attachment(body))
    return Answer()


def _map(session: Session, body: Body, fds: list[int]) -> Answer:
    way = direction_of(body)

    def act(stake: Stake) -> Answer:
        attachment, exporter = stake.attachment(body), stake.live.exporter
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
        answer.body["table"] = n = next(stakes_of(session).numbers)
        stake.tables[n] = attachment, sgt, way
        return answer

    def undo(stake: Stake, answer: Answer) -> None:
        if "table" in answer.body:
            _untabled(stake, answer.body)

    return under_lock(session, body, fds, act, undo)


def _shown(attachment: DmaBufAttachment, sgt: SgTable) -> Answer:
    """A table as it travels: the memory and the ranges that its device is to map, or the addresses that the exporter filled in."""
    cpu = [n for entry in cpu_side(sgt) for n in entry]
    mapping = mapping_of(sgt)
    if mapping is None or mapping.device is not attachment.dev:
        return Answer({"cpu": cpu, "dma": [n for address, length in sgt for n in (address, length, 0)]})
    mapped = memory_of(sgt)
    assert mapped is not None  # by the device
    shown = memory.range_of(mapped, "map", attachment)
    return Answer({"cpu": cpu, "offset": shown.offset, "length": shown.length, "writable": shown.writable}, [shown.fd])


def _unmap(session: Session, body: Body, fds: list[int]) -> Answer:
    return under_lock(session, body, fds, lambda stake: _untabled(stake, body))


def _untabled(stake: Stake, body: Body) -> Answer:
    found = stake.tables.pop(number(body, "table"), None)
    if found is None:
        raise fail(errno.EINVAL, "unmap", stake.buf, "unmap each table once", what="no such table")
    stake.live.exporter.unmap(*found)
    return Answer()


def _vmap(session: Session, body: Body, fds: list[int]) -> Answer:
    def act(stake: Stake) -> Answer:
        map_ = stake.live.vmap(stake.buf, tell=False)
        try:
            view = map_.vaddr if map_.vaddr is not None else map_.vaddr_iomem
            assert view is not None  # a vmap that is NULL has failed
            shown = memory.range_of(view, "vmap", stake.buf)
        except BaseException:
            stake.live.vunmap(stake.buf, map_)
            raise
        stake.vmaps.append(map_)
        about = {"offset": shown.offset, "length": shown.length, "writable": shown.writable, "iomem": map_.is_iomem}
        return Answer(about, [shown.fd])

    return under_lock(session, body, fds, act, lambda stake, _: _vunmapped(stake))


def _vunmap(session: Session, body: Body, fds: list[int]) -> Answer:
    return under_lock(session, body, fds, _vunmapped)


def _vunmapped(stake: Stake) -> Answer:
    if not stake.vmaps:
        raise fail(errno.EINVAL, "vunmap", stake.buf, "vunmap as often as vmap", what="it is not mapped")
    stake.live.vunmap(stake.buf, stake.vmaps.pop())
    return Answer()


def _unmapped(session: Session, body: Body, fds: list[int]) -> Answer:
    with contextlib.suppress(OSError), stakes_of(session).using(body, fds) as stake:
        mapping = stake.mappings.pop(number(body, "mapping"), None)
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
