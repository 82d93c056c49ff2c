"""``streams()``: a snapshot of every stream of a domain, the newest first: who produces, who reads, and what is in each slot.

Looking changes nothing, takes no place in the stream, and neither waits nor makes anybody wait. Each reader and each slot is read as it was
at one moment, so that none is a mixture of two; two of them may be from slightly different moments. Nothing that is read is trusted: a
stream whose words make no sense is shown as far as they do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from dmabuf._native import SD_ALIVE, SP_DROP, SP_WAIT, SR_LEFT, SR_REDELIVER
from dmabuf.domain import lives, naming
from dmabuf.domain.domain import Domain
from dmabuf.layout.stored import Layout
from dmabuf.observe.records import BufferSnapshot, snapshots
from dmabuf.stream.statistics import ROLES, STATES, lag_of

if TYPE_CHECKING:
    from dmabuf.answers import StreamInfo, StreamReaderInfo, StreamSlotInfo

__all__ = ["ProcessRecord", "StreamReaderRecord", "StreamRecord", "StreamSlotRecord", "streams", "streams_of"]

_POLICIES: Final = {SP_WAIT: "wait", SP_DROP: "drop"}


@dataclass(frozen=True)
class ProcessRecord:
    """A process of a stream.

    ``pid``: its number in its own PID namespace, 0 if it has ended. ``comm``: its label. ``state``: "running", "stopped", "elsewhere" (in
    another PID namespace, so that its number says nothing here) or "ended".
    """

    pid: int
    comm: str
    state: str


@dataclass(frozen=True)
class StreamReaderRecord:
    """A reader of a stream.

    ``process``: whose it is. ``role``: "queue", "latest" or "group". ``group``: which group, in hexadecimal digits, since a stream doesn't
    know their names; None of none. ``redelivers``: whether what it has when it dies goes to another member. ``seen``: the newest frame that
    it has given back. ``lag``: frames that are published and that it, or its group, has not had. ``lost``: frames that it has passed over.
    ``holds``: the slots that it holds, without those that it is promised.
    """

    process: ProcessRecord
    role: str
    group: str | None
    redelivers: bool
    seen: int
    lag: int
    lost: int
    holds: list[int]


@dataclass(frozen=True)
class StreamSlotRecord:
    """A slot of a stream.

    ``ino``: the inode of its buffer, None if that is gone. ``seq``: the number of the frame in it, 0 for none. ``state``: "empty",
    "written", "writing" (or chosen to be written), or "torn". ``foreign``: whether a program that doesn't know the stream may be using it.
    ``held_by``, ``promised_to``: pids of readers that hold the frame, and of those that have yet to take it and for whom it is kept.
    """

    slot: int
    ino: int | None
    seq: int
    state: str
    foreign: bool
    held_by: list[int]
    promised_to: list[int]


@dataclass(frozen=True)
class StreamRecord:
    """A stream at one moment.

    ``ino``: the inode of its own memory, which ``dmabuf ls`` shows too. ``name``: None if it has none. ``policy``: "wait" or "drop", what
    its producer does when it is full. ``size``: bytes of a slot. ``layout``: what a frame is, None if nobody said. ``producer``: who
    produces, None if nobody does. ``state``: "alive", "closed", "died" or "none yet", of the last producer. ``published``: frames since
    it was made.
    ``lag``: of the reader that is farthest behind. ``kept``: slots that readers hold.
    """

    ino: int
    name: str | None
    created: int
    policy: str
    size: int
    layout: Layout | None
    meta_bytes: int
    producer: ProcessRecord | None
    state: str
    published: int
    lag: int
    kept: int
    readers: list[StreamReaderRecord]
    slots: list[StreamSlotRecord]


def streams(*, domain: Domain | None = None) -> list[StreamRecord]:
    """Return every stream that exists, the newest first.

    Args:
        domain: The domain; None means the user's default domain.

    Raises:
        DmaBufError: As :func:`dmabuf.buffers`.
    """
    domain = domain or Domain.default()
    return streams_of(domain, snapshots(domain))


def streams_of(domain: Domain, seen: Sequence[BufferSnapshot]) -> list[StreamRecord]:
    """Return the streams of which buffers were seen."""
    slots = {one.part: one for one in seen if one.part is not None}
    found = []
    for one in seen:
        if one.part is None or one.part[2] >= 0:
            continue
        number, gen, _ = one.part
        try:
            info = domain.shm.stream_info(number, gen)
        except OSError:
            continue  # it has gone meanwhile
        parts = [slots.get((number, gen, k)) for k in range(len(info["slots"]))]
        found.append(_stream(domain, one, info, parts))
    return found


def _stream(domain: Domain, own: BufferSnapshot, info: StreamInfo, parts: Sequence[BufferSnapshot | None]) -> StreamRecord:
    processes: dict[int, ProcessRecord] = {}

    def process(life: int) -> ProcessRecord:
        if life not in processes:
            processes[life] = _process(domain, life)
        return processes[life]

    pids = [process(reader["life"]).pid for reader in info["readers"]]
    readers = [_reader(info, reader, process(reader["life"])) for reader in info["readers"]]
    slots = []
    for k, (slot, part) in enumerate(zip(info["slots"], parts, strict=True)):
        waits = info["policy"] == SP_WAIT and slot["seq"] and not slot["writing"]
        slots.append(
            StreamSlotRecord(
                k,
                None if part is None else part.record.ino,
                slot["seq"],
                _state(slot),
                slot["foreign"],
                [pid for pid, reader in zip(pids, info["readers"], strict=True) if reader["claims"] >> k & 1],
                [pid for pid, reader in zip(pids, info["readers"], strict=True) if waits and 0 < _first(reader) <= slot["seq"]],
            )
        )
    layout = next((part.record.layout for part in parts if part is not None), None)
    return StreamRecord(
        own.record.ino,
        own.record.name,
        own.record.created,
        _POLICIES.get(info["policy"], "?"),
        info["size"],
        layout,
        info["meta_bytes"],
        process(info["producer"]) if info["why"] == SD_ALIVE else None,
        STATES.get(info["why"], "?"),
        info["published"],
        max((reader.lag for reader in readers), default=0),
        sum(any(reader["claims"] >> k & 1 for reader in info["readers"]) for k in range(len(slots))),
        readers,
        slots,
    )


def _reader(info: StreamInfo, reader: StreamReaderInfo, process: ProcessRecord) -> StreamReaderRecord:
    role = ROLES.get(reader["role"], "?")
    return StreamReaderRecord(
        process,
        role,
        f"{reader['group']:016x}" if role == "group" else None,
        reader["role"] in (SR_REDELIVER, SR_LEFT),
        reader["seen"],
        lag_of(info, reader),
        reader["lost"],
        [k for k in range(len(info["slots"])) if reader["claims"] >> k & 1],
    )


def _first(reader: StreamReaderInfo) -> int:
    """Return the oldest frame that is promised to a reader, or to its group; 0: none is."""
    return reader["cursor"] or reader["next"]


def _state(slot: StreamSlotInfo) -> str:
    if slot["writing"]:
        return "writing"
    if slot["torn"]:
        return "torn"
    return "written" if slot["seq"] else "empty"


def _process(domain: Domain, life: int) -> ProcessRecord:
    pid = domain.pid_of(life) if life else 0
    if not pid:
        return ProcessRecord(0, "", "ended")
    index = lives.index_of(life)
    comm, found = naming.label_of(domain.shm, index), naming.seen(domain.shm, index)
    if not domain.shm.life_current(life):  # it ended meanwhile, and the slot may be another process's
        return ProcessRecord(0, "", "ended")
    return ProcessRecord(pid, comm, "elsewhere" if found is None else "stopped" if found.stopped else "running")
