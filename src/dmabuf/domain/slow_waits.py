"""Waits that last long are logged once each, with the process that is in the way (logger ``dmabuf``, level WARNING).

The sleeps in C call :func:`tell` (``Shm.slow``). Waits that are made of other calls use a :class:`Wait`. A thread of its own writes to the
log: the program's handlers then run under no lock of the waiting thread, and keep nobody waiting.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from dmabuf._native import FF_ACCESS, FF_ANYBODY, FF_ASKED, FF_WRITE, TICK_FENCE, TICK_RESV, TICK_STREAM, TICK_TABLE, Shm
from dmabuf.domain import stream_users
from dmabuf.domain.naming import Named, process

if TYPE_CHECKING:
    from dmabuf.answers import FenceInfo


class Waited(Named, Protocol):
    """A domain, whose ``shm.slow_ns`` says how long a wait lasts that is logged."""

    id: str


# What the fence of a wait for several fences stands for: their handles, by the domain's id and the fence's handle.
STANDS_FOR: dict[tuple[str, int], Sequence[int]] = {}


class Wait:
    """One wait, for a loop that calls :meth:`look` again and again while it waits."""

    __slots__ = ("_since", "_told")

    def __init__(self) -> None:
        self._since, self._told = time.monotonic_ns(), False

    def look(self, domain: Waited, what: Callable[[], str]) -> None:
        """Log the wait if it has just become long. ``what``: returns what it is for, with the process that is in the way."""
        if not self._told and time.monotonic_ns() - self._since >= domain.shm.slow_ns:
            self._told = True
            warn(domain.shm, what)


def tell(domain: Waited, kind: int, value: int) -> None:
    """Log a wait of the running thread: ``Shm.slow``."""
    warn(domain.shm, lambda: named(domain, kind, value))


def warn(shm: Shm, what: Callable[[], str]) -> None:
    """Log that a wait for ``what`` has lasted as long as ``shm`` says. The wait goes on whatever goes wrong here."""
    with contextlib.suppress(Exception):
        waiter = f"thread {threading.current_thread().name!r} of this process"
        text = f"a wait has lasted {shm.slow_ns / 1e9:g} s: {waiter} waits for {what()}; run `dmabuf ls` to see who uses the buffers"
        threading.Thread(target=_log, args=(text,), name="dmabuf-log", daemon=True).start()


def _log(text: str) -> None:
    import logging

    logging.getLogger("dmabuf").warning("%s", text)


def named(domain: Waited, kind: int, value: int) -> str:
    """Return what a wait is for. ``value``: as ``Domain.tick`` gets it."""
    if kind == TICK_FENCE:
        return fence(domain, value)
    if kind == TICK_RESV:
        found = domain.shm.ctx_info(value)
        return "a reservation lock" + (f" that thread {found[1]} of {process(domain, found[0])} holds" if found else "")
    if kind == TICK_TABLE:
        return f"the lock of the domain's table, which {process(domain, value)} holds"
    if kind == TICK_STREAM:
        return stream_users.waited_for(domain, value)
    return "something"


def fence(domain: Waited, handle: int) -> str:
    """Return a fence in words: of an access, the access and its buffer."""
    shm = domain.shm
    members = STANDS_FOR.get((domain.id, handle))
    if members is not None:
        pending = [member for member in members if shm.fence_pending(member)]
        several = f"one of {len(members)} fences, the first of which is " if len(members) > 1 else ""
        return several + (fence(domain, pending[0]) if pending else "signaled")
    info = shm.fence_info(handle)
    if info is None:
        return "a fence that has just been signaled"
    if info["flags"] & FF_ASKED:
        return stream_users.stands_in_the_way(domain, info["seqno"])
    who = process(domain, info["life"])
    if info["flags"] & FF_ACCESS:
        owner = shm.ctx_info(info["owner"])
        thread = f"thread {owner[1]} of " if owner else ""
        return f"the {'write()' if info['flags'] & FF_WRITE else 'read()'} block of {thread}{who}{_of_buffer(shm, info)}"
    name = _timeline(shm, info)
    if info["flags"] & FF_ANYBODY:
        return f"somebody's change of a shared object ({name or 'unnamed'}), on behalf of {who}"
    return f"fence {info['context']}:{info['seqno']} of {f'timeline {name!r} of ' if name else ''}{who}"


def _of_buffer(shm: Shm, info: FenceInfo) -> str:
    found = shm.rec_info(info["rec"] - 1) if info["rec"] else None
    if found is None or found["gen"] != info["rec_gen"]:
        return ""
    name = f" {os.fsdecode(found['name'])!r}" if found["name"] else ""
    return f", of buffer{name} ino {found['ino']}"


def _timeline(shm: Shm, info: FenceInfo) -> str:
    found = shm.timeline_info(info["timeline"] - 1) if info["timeline"] else None
    return os.fsdecode(found[5] or found[4]) if found is not None and found[2] == info["context"] else ""
