"""The dicts with which the C extension answers, for type checkers. Nothing imports this module at run time."""

from typing import TypedDict


class RecordInfo(TypedDict):
    """What a record says: of a buffer, or of a reservation object."""

    gen: int
    dev: int
    ino: int
    size: int
    nonce: bytes
    created: int
    life: int
    pid: int
    kind: int
    torn: int
    torn_pid: int
    absent: int
    absent_ns: int
    resv: int
    resv_gen: int
    name: bytes | None
    exp_name: bytes
    home: bytes


class FenceInfo(TypedDict):
    """What a fence's slot says."""

    pending: bool
    sync: bool
    context: int
    seqno: int
    error: int
    flags: int
    owner: int
    rec: int
    rec_gen: int
    timeline: int
    created: int
    deadline: int
    timestamp: int
    life: int


class StreamReaderInfo(TypedDict):
    """What a reader's place in a stream says. ``cursor``: 0 if nothing is promised to it. ``life``: 0 if it died, and its frames wait.

    ``next``: the next frame that its group hands out, 0 if it has none.
    """

    place: int
    life: int
    role: int
    group: int
    cursor: int
    next: int
    claims: int
    lost: int
    seen: int
    joined: int


class StreamSlotInfo(TypedDict):
    """What a slot of a stream says. ``rec``: its buffer's record + 1."""

    rec: int
    rec_gen: int
    seq: int
    writing: bool
    foreign: bool
    torn: int
    used: int
    stamp: int


class StreamInfo(TypedDict):
    """What a stream says of itself."""

    policy: int
    size: int
    meta_bytes: int
    published: int
    why: int
    producer: int
    readers: list[StreamReaderInfo]
    slots: list[StreamSlotInfo]
