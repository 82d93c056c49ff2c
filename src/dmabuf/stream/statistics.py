"""What a stream says of itself: who produces, who reads, and how far each is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from dmabuf._native import SD_ALIVE, SD_CLOSED, SD_DIED, SD_NEVER, SR_LATEST, SR_LEFT, SR_MEMBER, SR_QUEUE, SR_REDELIVER
from dmabuf.domain import naming

if TYPE_CHECKING:
    from dmabuf.answers import StreamInfo, StreamReaderInfo
    from dmabuf.stream.parts import Part

ROLES: Final = {SR_QUEUE: "queue", SR_LATEST: "latest", SR_MEMBER: "group", SR_REDELIVER: "group", SR_LEFT: "group"}
STATES: Final = {SD_NEVER: "none yet", SD_ALIVE: "alive", SD_CLOSED: "closed", SD_DIED: "died"}


@dataclass(frozen=True)
class ReaderStatistics:
    """A reader of a stream.

    ``process``: whose it is. ``policy``: "queue", "latest" or "group". ``seen``: the newest frame that it has given back. ``lag``: frames
    that are published and that it has not given back, or its group has not handed out. ``lost``: frames that it has passed over.
    ``holds``: slots that it holds, without those that it is promised. Of a member that died, and whose frames wait for another one, ``pid``
    is 0.
    """

    pid: int
    process: str
    policy: str
    seen: int
    lag: int
    lost: int
    holds: int


@dataclass(frozen=True)
class StreamStatistics:
    """A stream at one moment.

    ``published``: frames since it was made. ``producer``: the pid of the producer, 0 if there is none. ``state``: "alive", "closed",
    "died" or "none yet", of the last producer. ``slots``, ``size``: how many buffers, and of how many bytes. ``foreign``: buffers that
    programs use which don't know the stream. ``writing``: slots that are being written.
    """

    name: str | None
    published: int
    producer: int
    state: str
    slots: int
    size: int
    writing: int
    foreign: int
    readers: list[ReaderStatistics]


def lag_of(info: StreamInfo, reader: StreamReaderInfo) -> int:
    """Return how many frames are published that a reader, or its group, has not had."""
    had = reader["next"] - 1 if reader["next"] else max(reader["seen"], reader["joined"])
    return max(0, info["published"] - had)


def statistics(part: Part) -> StreamStatistics:
    """Return what a stream's words say."""
    info, domain = part.info(), part.domain
    readers = [
        ReaderStatistics(
            domain.pid_of(reader["life"]),
            naming.process(domain, reader["life"]),
            ROLES.get(reader["role"], "?"),
            reader["seen"],
            lag_of(info, reader),
            reader["lost"],
            reader["claims"].bit_count(),
        )
        for reader in info["readers"]
    ]
    return StreamStatistics(
        part.ring.name,
        info["published"],
        domain.pid_of(info["producer"]) if info["why"] == SD_ALIVE else 0,
        STATES.get(info["why"], "?"),
        len(info["slots"]),
        info["size"],
        sum(slot["writing"] for slot in info["slots"]),
        sum(slot["foreign"] for slot in info["slots"]),
        readers,
    )
