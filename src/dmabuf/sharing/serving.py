"""The exporting process's side of calls from others: what each asking process has of each buffer, and its end.

Every request names the buffer by its inode and brings a descriptor of it (a lease: who has none can't ask); while an asking process has
something of a buffer, this process keeps a handle of its own for it, the *stake*: so ``release`` comes after the last of them, wherever
it is. A stake holds

- the exporter's mappings, each as long as the other process keeps the one that it made of it;
- the brackets of CPU access that were begun and not ended. Where the other process goes in the middle, its brackets are ended, the last
  one first; an exporter sees as many ends as begins.

A process that dies, or closes its last handle, mapping and attachment of what this process exports, ends its session: all of that is
given back then, in the thread that notices.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

from dmabuf import _native
from dmabuf.core.backing import Exported
from dmabuf.core.buffer import DmaBuf
from dmabuf.core.handles import from_fd
from dmabuf.core.usage import Direction
from dmabuf.domain import dispatcher
from dmabuf.domain.records import Record
from dmabuf.errors import fail
from dmabuf.sharing import memory
from dmabuf.sharing.service import Answer, Body, Session, number, register

Key = tuple[int, int]  # (st_dev, st_ino)


class Stake:
    """What one asking process has of one buffer of this process's."""

    def __init__(self, buf: DmaBuf, live: Exported) -> None:
        self.buf, self.live = buf, live
        self.users = 0  # calls that run
        self.mappings: dict[int, _native.Mapping] = {}
        self.brackets: list[Direction] = []

    @property
    def empty(self) -> bool:
        return not (self.users or self.mappings or self.brackets)

    def end(self) -> None:
        """The other process is gone: give everything back."""
        while self.brackets:
            way = self.brackets.pop()
            _quietly(lambda way=way: self.live.end(self.buf, way))  # type: ignore[misc]
        for mapping in self.mappings.values():
            mapping.close()
        self.mappings.clear()


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

        Errors: ENODEV no such buffer of this process; EBADMSG; those of ``get()``.
        """
        key = (number(body, "dev"), number(body, "ino"))
        with self._lock:
            stake = self._stakes.get(key)
            if stake is not None:
                stake.users += 1
        if stake is None:
            stake = self._staked(key, fds)
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

    def _staked(self, key: Key, fds: list[int]) -> Stake:
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
    return Answer(undo=lambda: _end(session, body, []))


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
    answer.undo = lambda: _unmapped(session, {**body, "mapping": n}, [])
    return answer


def _unmapped(session: Session, body: Body, fds: list[int]) -> Answer:
    with contextlib.suppress(OSError), stakes_of(session).using(body, fds) as stake:
        mapping = stake.mappings.pop(number(body, "mapping"), None)
        if mapping is not None:
            mapping.close()
    return Answer()


for _kind, _handler in {"exporter": _exporter, "begin": _begin, "end": _end, "mmap": _mmap, "unmapped": _unmapped}.items():
    register(_kind, _handler)
