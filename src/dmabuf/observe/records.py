"""``buffers()``: a snapshot of every buffer of a domain, the newest first.

A snapshot changes nothing that a buffer's users can see, and takes no reservation lock. If a buffer's list of fences changes meanwhile, the
snapshot has the state before or after one of the changes. Each buffer is read by itself, so two buffers may be from slightly different
times. The dead are reaped first, so the snapshot has nothing of them.

A buffer exists while /proc shows a descriptor or mapping of it, or while ``/proc/locks`` shows its reference lock (for a descriptor in
flight in a socket, or in a process whose descriptors this one may not see).

A snapshot costs one walk over /proc and about ten microseconds for each buffer. Buffers of which no process is visible cost passes over
``/proc/locks``, whose time grows with the square of the locks on the machine: seconds for each pass at tens of thousands.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dmabuf._native import FF_ACCESS, FF_GRANTED, FF_WRITE, LIFE_PID, LIFE_START, Shm
from dmabuf.core.fence.fence import names_of
from dmabuf.domain import lives, naming, proved, records
from dmabuf.domain.domain import Domain
from dmabuf.domain.holders import Holder, holders
from dmabuf.errors import InvalidError
from dmabuf.layout.stored import Layout, unpack

if TYPE_CHECKING:
    from dmabuf.answers import RecordInfo

__all__ = ["BufferRecord", "FenceRecord", "Holder", "StreamPart", "Torn", "buffers", "snapshots"]

_WRITE, _READ = 1, 2
_USAGES = ("kernel", "write", "read", "bookkeep")


@dataclass(frozen=True)
class FenceRecord:
    """A fence on a buffer's reservation object.

    ``driver``, ``timeline``: the names of the timeline ("" if its slot was used again). ``context``, ``seqno``: which fence. ``pid``,
    ``comm``: the process that owns it and will signal it. ``since``: when it was made, in CLOCK_MONOTONIC nanoseconds; for an access, when
    ``read()`` or ``write()`` was called. Its age is ``time.monotonic_ns() - since``. ``usage``: ``"kernel"``, ``"write"``, ``"read"`` or
    ``"bookkeep"``. ``access``: ``"read"`` or ``"write"`` for the fence of such a block, else None. ``granted``: whether the block was
    entered, and no longer waits (False if it is not an access). ``signaled``: whether it is signaled.
    """

    driver: str
    timeline: str
    seqno: int
    pid: int
    since: int
    context: int
    comm: str
    usage: str
    access: str | None
    granted: bool
    signaled: bool


@dataclass(frozen=True)
class Torn:
    """A torn write: the writer died (``errno`` EOWNERDEAD) or raised (ECANCELED). ``pid``: its process."""

    errno: int
    pid: int


@dataclass(frozen=True)
class StreamPart:
    """What a buffer is in a stream. ``ino``: the inode of the stream's own memory. ``slot``: which slot, None for that memory itself."""

    ino: int
    slot: int | None


@dataclass(frozen=True)
class BufferRecord:
    """One buffer at one moment.

    ``ino``, ``dev``: the inode, the same for all its descriptors. ``name``: None if never set. ``size``: bytes. ``created``: nanoseconds
    since the epoch. ``pid``: the process that made it, which may be gone. ``holders``: the processes that have it open or mapped, as far as
    /proc shows them, by pid; empty for a buffer in flight. One with no descriptors and no mappings is in another PID namespace.
    ``accesses``: ``read()`` and ``write()`` blocks entered or waiting. ``blocking_readers``, ``blocking_writers``: the pending fences for
    which a new reader (usage up to WRITE) or writer (up to READ) would wait, the oldest first. ``layout``: what the bytes mean, None if
    nobody said. ``stream``: what it is in a stream, None of none. ``locked_by``: the pid of the process that holds the reservation lock, 0
    if it is free. ``torn``: None if the content is whole.
    """

    ino: int
    name: str | None
    size: int
    exp_name: str
    home: str
    created: int
    holders: list[Holder]
    accesses: int
    blocking_readers: list[FenceRecord]
    blocking_writers: list[FenceRecord]
    torn: Torn | None
    dev: int
    pid: int
    locked_by: int
    layout: Layout | None = None
    stream: StreamPart | None = None


@dataclass(frozen=True)
class BufferSnapshot:
    """A buffer's record, and every fence on its list up to BOOKKEEP, in the list's order, including signaled ones.

    ``part``: (stream, generation, slot) of the stream that it is part of, slot -1 for the stream's own memory; None of none.
    """

    record: BufferRecord
    fences: list[FenceRecord]
    part: tuple[int, int, int] | None = None


def buffers(*, domain: Domain | None = None) -> list[BufferRecord]:
    """Return every buffer that exists, the newest first, without waiting for a reservation lock.

    Args:
        domain: The domain; None means the user's default domain.

    Raises:
        DmaBufError: The domain can't be opened (EACCES, EUCLEAN, ENOSPC, or ENOSYS without /proc).
    """
    return [seen.record for seen in snapshots(domain or Domain.default())]


def snapshots(domain: Domain) -> list[BufferSnapshot]:
    """Return the buffers as :func:`buffers`, with all their fences."""
    domain.sweep()
    if "records" not in domain.sweep_hooks:  # a process that only looks has no buffers, and installs no hook for them
        records.sweep(domain)
    shm = domain.shm
    infos = {i: info for i in shm.rec_list() if (info := _consistent(shm, i)) is not None}
    held = holders({(info["dev"], info["ino"]) for info in infos.values()})
    for i in _unheld(infos, held):
        del infos[i]
    names = _Names(domain)
    newest = sorted(infos.items(), key=lambda item: (item[1]["created"], item[0]), reverse=True)
    parts = {i: part for i, info in newest if (part := shm.stream_part(i, info["gen"])) is not None}
    own = {part[:2]: infos[i]["ino"] for i, part in parts.items() if part[2] < 0}
    parts = {i: part for i, part in parts.items() if part[:2] in own}
    return [
        _snapshot(shm, names, i, info, names.labeled(i, held.get((info["dev"], info["ino"]), [])), parts.get(i), own) for i, info in newest
    ]


def _consistent(shm: Shm, index: int) -> RecordInfo | None:
    """Return the fields of a record, None if it isn't a buffer's, or was given to another buffer meanwhile."""
    info = shm.rec_info(index)
    if info is None or info["kind"] != records.KIND_BUFFER or not info["ino"]:
        return None
    return info if shm.rec_find(info["dev"], info["ino"]) == (index, info["gen"], info["nonce"]) else None


def _unheld(infos: dict[int, RecordInfo], held: dict[tuple[int, int], list[Holder]]) -> set[int]:
    """Return the records whose buffers are gone: their processes are dead, or closed them and have not collected the handle.

    /proc has shown most holders already, and only the rest need the reference locks: a pass over n of those costs the kernel n² steps.
    """
    gone = {i for i, info in infos.items() if (info["dev"], info["ino"]) not in held}
    for _ in range(records.ABSENT_PASSES):  # a single pass may miss a lock
        if not gone:
            break
        seen = records.reference_locks()
        gone = {i for i in gone if seen is not None and (infos[i]["dev"], infos[i]["ino"]) not in seen}
    return gone


def _snapshot(
    shm: Shm,
    names: _Names,
    index: int,
    info: RecordInfo,
    held: list[Holder],
    part: tuple[int, int, int] | None,
    streams: dict[tuple[int, int], int],
) -> BufferSnapshot:
    given = shm.rec_info(info["resv"] - 1) if info["resv"] else None  # None: it is gone, and the number may be another record's
    resv = info["resv"] - 1 if given is not None and given["gen"] == info["resv_gen"] else index
    fences: list[FenceRecord] = []
    pending: list[FenceRecord] = []
    if entries := shm.resv_entries(resv, len(_USAGES) - 1, False):
        fences = [fence for handle, usage in entries if (fence := names.fence(handle, usage)) is not None]
        pending = sorted((f for f in fences if not f.signaled), key=lambda f: f.since)
    name, torn, word = info["name"], info["torn"], shm.resv_owner(resv)
    record = BufferRecord(
        ino=info["ino"],
        name=None if name is None else os.fsdecode(name),
        size=info["size"],
        exp_name=names.text(info["exp_name"]),
        home=names.text(info["home"]),
        created=info["created"],
        holders=sorted(held),
        accesses=len([f for f in pending if f.access is not None]),
        blocking_readers=[f for f in pending if f.usage in _USAGES[: _WRITE + 1]],
        blocking_writers=[f for f in pending if f.usage in _USAGES[: _READ + 1]],
        torn=Torn(torn, info["torn_pid"]) if torn else None,
        dev=info["dev"],
        pid=info["pid"],
        locked_by=names.owner(word) if word else 0,
        layout=_layout(shm.rec_layout(index, info["gen"])),
        stream=None if part is None else StreamPart(streams[part[:2]], part[2] if part[2] >= 0 else None),
    )
    return BufferSnapshot(record, fences, part)


def _layout(found: tuple[int, bytes] | None) -> Layout | None:
    try:
        return None if found is None else unpack(found[1])
    except InvalidError:
        return None  # the file makes no sense, which whoever uses the buffer is told


class _Names:
    """Names of owners and others, each looked up once for a snapshot."""

    def __init__(self, domain: Domain) -> None:
        self.domain, self.shm = domain, domain.shm
        self._processes: dict[int, tuple[int, str]] = {}
        self._texts: dict[bytes, str] = {}
        self._slots: dict[int, tuple[int, str, int]] = {}

    def labeled(self, record: int, held: list[Holder]) -> list[Holder]:
        """Return the holders of a record by their labels, and with those that the domain knows but /proc doesn't show."""
        found, elsewhere = {holder.pid: holder for holder in held}, []
        for index in self.shm.rec_holders(record):
            pid, label, start = self._slot(index)
            here = (
                next((h for h in found if lives.start_time(h) == start), 0) if start else pid
            )  # below this namespace it has another number
            if here in found:
                found[here] = found[here]._replace(comm=label)
            elif start:
                elsewhere.append(Holder(pid, label, 0, 0))
        return [*found.values(), *elsewhere]

    def _slot(self, index: int) -> tuple[int, str, int]:
        """Return (pid, label, 0) of a slot, or its process's start time in place of the 0 if /proc doesn't show that pid."""
        found = self._slots.get(index)
        if found is None:
            shm, at = self.shm, lives.slot_offset(index)
            shown = naming.seen(shm, index) is not None or not lives.is_alive(shm, index)  # one that has ended just now isn't elsewhere
            start = 0 if shown else shm.load64(at + LIFE_START) & (proved.BY_THREAD - 1)
            found = self._slots[index] = (shm.load32(at + LIFE_PID), naming.label_of(shm, index), start)
        return found

    def text(self, raw: bytes) -> str:
        """Return a name, which many records share."""
        found = self._texts.get(raw)
        if found is None:
            found = self._texts[raw] = os.fsdecode(raw)
        return found

    def process(self, life: int) -> tuple[int, str]:
        """Return (pid, comm) of a life."""
        found = self._processes.get(life)
        if found is None:
            pid = self.domain.pid_of(life)
            comm = naming.label_of(self.shm, lives.index_of(life)) if pid else ""
            if not self.shm.life_current(life):  # it ended meanwhile, and the slot may be another process's
                pid, comm = 0, ""
            found = self._processes[life] = (pid, comm)
        return found

    def owner(self, word: int) -> int:
        """Return the pid of a context word's owner, 0 if it is closed."""
        context = self.shm.ctx_info(word)
        return self.process(context[0])[0] if context else 0

    def fence(self, handle: int, usage: int) -> FenceRecord | None:
        """Return a fence from its slot, None if it was signaled so long ago that the slot was used again."""
        info = self.shm.fence_info(handle)
        if info is None:
            return None
        access = bool(info["flags"] & FF_ACCESS)
        driver, timeline = names_of(self.shm, info)
        pid, comm = self.process(info["life"])
        return FenceRecord(
            driver=driver,
            timeline=timeline,
            seqno=info["seqno"],
            pid=pid,
            since=info["created"],
            context=info["context"],
            comm=comm,
            usage=_USAGES[usage],
            access=("read", "write")[bool(info["flags"] & FF_WRITE)] if access else None,
            granted=bool(info["flags"] & FF_GRANTED),
            signaled=not info["pending"],
        )
