"""Operations on a buffer in this process or in another one, for tests that hold for both.

    def test_…(place: Place, static: Static) -> None:
        with dmabuf.export(static, SIZE) as buf, place.of(buf) as there:
            there.do(begin, Direction.TO_DEVICE)        # begin(state, direction), a function of a module

`state` is a namespace that stays for the calls to come: `state.buf` is the buffer there. What the function raises is raised here.
"""

import contextlib
import gc
import os
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Concatenate, ParamSpec, TypeVar

import dmabuf
from dmabuf import DmaBuf
from dmabuf.core.buffer.handle import handle_of
from dmabuf.domain.dispatcher import DISPATCHER
from tests.support.children import Child, Parent, Spawn
from tests.support.drivers import PAGE, Bare, Dynamic, Mover

P = ParamSpec("P")
T = TypeVar("T")
Ask = Callable[..., Any]


class There:
    """The buffer where the operations are done."""

    def do(self, function: Callable[Concatenate[SimpleNamespace, P], T], *arguments: P.args, **keywords: P.kwargs) -> T:
        """Call function(state, …) there."""
        raise NotImplementedError


class Here(There):
    def __init__(self, buf: DmaBuf) -> None:
        self.state = SimpleNamespace(buf=buf)

    def do(self, function: Callable[Concatenate[SimpleNamespace, P], T], *arguments: P.args, **keywords: P.kwargs) -> T:
        return function(self.state, *arguments, **keywords)


class Away(There):
    def __init__(self, other: Child, buf: DmaBuf) -> None:
        self.other = other
        dmabuf.send(other.sock, buf)

    def start(self, function: Callable[Concatenate[SimpleNamespace, P], Any], *arguments: P.args, **keywords: P.kwargs) -> None:
        """Begin function(state, …) there, and don't wait for its end."""
        self.other.send((function, arguments, keywords))

    def finish(self) -> Any:
        """What the function begun last returned or raised."""
        good, value, warned = self.other.recv()
        for category, text in warned:
            warnings.warn(category(text), stacklevel=2)
        if good:
            return value
        raise value

    def do(self, function: Callable[Concatenate[SimpleNamespace, P], T], *arguments: P.args, **keywords: P.kwargs) -> T:
        self.start(function, *arguments, **keywords)
        result: T = self.finish()
        return result


def obeys(parent: Parent) -> None:
    """The other process: receives the buffer, then does what it is told until it is told None."""
    state = SimpleNamespace(parent=parent)
    (state.buf,) = dmabuf.recv(parent.sock)
    while (order := parent.recv()) is not None:
        function, arguments, keywords = order
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            try:
                good, value = True, function(state, *arguments, **keywords)
            except Exception as e:
                good, value = False, _portable(e)
        del order, function, arguments, keywords
        parent.send((good, value, [(w.category, str(w.message)) for w in seen]))
        del value
    state.__dict__.pop("buf").close()
    state.__dict__.clear()
    gc.collect()


def exports(parent: Parent, kind: type[Bare], size: int) -> None:
    """The other way round: exports a buffer there, and calls functions of (state, …), with `state.exporter`, until it is told None."""
    state = SimpleNamespace(parent=parent, exporter=kind())
    buf = dmabuf.export(state.exporter, size)
    dmabuf.send(parent.sock, buf)
    while (order := parent.recv()) is not None:
        function, *arguments = order
        parent.send(function(state, *arguments))
    buf.close()
    state.exporter.close()


@contextlib.contextmanager
def exported(child: Spawn, kind: type[Dynamic] = Dynamic) -> Iterator[tuple[Ask, Here]]:
    """A buffer of another process: a way to ask that for f(its state, …), and the buffer here."""
    other = child(exports, kind, 4 * PAGE)
    (buf,) = dmabuf.recv(other.sock)
    here = Here(buf)

    def ask(function: Any, *more: Any) -> Any:
        other.send((function, *more))
        return other.recv()

    yield ask, here
    here.state.__dict__.clear()
    buf.close()
    other.send(None)
    other.result()


def _portable(error: Exception) -> Exception:
    error.__traceback__ = error.__context__ = error.__cause__ = None
    with contextlib.suppress(Exception):
        pickle.dumps(error)
        return error
    return RuntimeError(repr(error))


class Place:
    """`here`: this process. Else another one."""

    def __init__(self, child: Spawn, here: bool) -> None:
        self.child, self.here = child, here

    @contextlib.contextmanager
    def of(self, buf: DmaBuf) -> Iterator[There]:
        """The buffer there; at the end of the block nothing of it is left there."""
        if self.here:
            yield Here(buf)
            return
        away = Away(self.child(obeys), buf)
        try:
            yield away
        except BaseException:
            away.other.kill()  # else it keeps the buffer, whose release others wait for
            raise
        away.other.send(None)
        away.other.result()


# -- what is done to a buffer there


def begin(state: SimpleNamespace, direction: int) -> None:
    state.buf.begin_cpu_access(direction)


def end(state: SimpleNamespace, direction: int) -> None:
    state.buf.end_cpu_access(direction)


def map_bytes(state: SimpleNamespace, offset: int = 0, length: int | None = None, writable: bool = True) -> None:
    """A bare mapping, which stays."""
    state.mapping = state.buf.mmap(offset, length, writable=writable)


def unmap_bytes(state: SimpleNamespace) -> None:
    state.mapping.close()


def peek(state: SimpleNamespace, offset: int, length: int) -> bytes:
    """Bytes of the bare mapping."""
    found: bytes = state.mapping[offset : offset + length]
    return found


def poke(state: SimpleNamespace, offset: int, data: bytes) -> None:
    state.mapping[offset : offset + len(data)] = data


def write(state: SimpleNamespace, data: bytes) -> None:
    with state.buf.write() as view:
        view[: len(data)] = data


def read(state: SimpleNamespace, length: int) -> bytes:
    with state.buf.read() as view:
        return bytes(view[:length])


def close(state: SimpleNamespace) -> None:
    state.buf.close()


def memories(state: SimpleNamespace | None = None) -> int:
    """Descriptors and mappings of memory in this process; its sockets come and go with other tests' processes."""
    links = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # of the listing itself
            links.append(os.readlink(f"/proc/self/fd/{name}"))
    maps = Path("/proc/self/maps").read_text().splitlines()
    return sum("memfd:" in line for line in links + maps)


# -- devices there


def attach(state: SimpleNamespace, dynamic: bool = False, peer2peer: bool = False, **limits: Any) -> None:
    """A device "npu0" attached, as `state.att`; with an importer that writes down what it hears of."""
    state.dev = dmabuf.Device("npu0", **limits)
    state.mover = Mover(peer2peer) if dynamic else None
    state.tables = []
    state.att = state.buf.attach(state.dev, state.mover)


def detach(state: SimpleNamespace) -> None:
    state.att.detach()


def mapped(state: SimpleNamespace, direction: int) -> list[tuple[int, int]]:
    """Map; what the device sees: its addresses and lengths."""
    state.tables.append((state.att.map_unlocked(direction), direction))
    return [tuple(entry) for entry in state.tables[-1][0]]


def unmapped(state: SimpleNamespace) -> None:
    """Unmap what was mapped last."""
    state.att.unmap_unlocked(*state.tables.pop())


def pin(state: SimpleNamespace) -> None:
    with state.buf.resv.locked():
        state.att.pin()


def unpin(state: SimpleNamespace) -> None:
    with state.buf.resv.locked():
        state.att.unpin()


def device_read(state: SimpleNamespace, address: int, length: int) -> bytes:
    found: bytes = state.dev.read(address, length)
    return found


def device_write(state: SimpleNamespace, address: int, data: bytes) -> None:
    state.dev.write(address, data)


def vmap(state: SimpleNamespace) -> int:
    """One vmap more; how many there are here."""
    state.__dict__.setdefault("maps", []).append(state.buf.vmap_unlocked())
    return len(state.maps)


def vunmap(state: SimpleNamespace) -> None:
    state.buf.vunmap_unlocked(state.maps.pop())


def heard(state: SimpleNamespace) -> tuple[int, bool]:
    """How often the importer was told of a move, and whether the lock was held each time."""
    return len(state.mover.moved), all(state.mover.locked)


def standing(state: SimpleNamespace) -> Any:
    """All that an operation there may change, and a failing one must not."""
    dev = getattr(state, "dev", None)
    stats = state.buf.statistics()
    return (
        (stats.attachments, stats.vmaps, stats.accesses),
        (dev.statistics().mapped, dev.statistics().windows) if dev else None,
        state.buf.resv.is_locked(),
        nodes(state.buf),
        memories(),
    )


def nodes(buf: DmaBuf) -> tuple[int, int]:
    """Entries of the reservation object, and callbacks registered with fences, in this process."""
    watching = DISPATCHER.peek(buf.domain)
    return buf.resv.statistics().fences, watching.watching if watching is not None else 0


def counts(exporter: Bare, buf: DmaBuf) -> Any:
    """The exporter's side of what a failing operation must not change."""
    live: Any = handle_of(buf).shared.backing
    return (
        len(exporter.tables),
        exporter.count("pin") - exporter.count("unpin"),
        exporter.count("vmap") - exporter.count("vunmap"),
        len(live.attachments),
        live.vmaps,
        buf.resv.is_locked(),
        nodes(buf),
        memories(),
    )
