"""kill -9 of the exporter or of the caller in every carried call, at every step of it, with the other side going on.

Steps: `service_asked` the caller has asked; `resv_return_to` the exporter has named to whom the lock returns; `resv_passed` the lock has
gone from one owner to the next; `resv_borrowed`, `service_locked` the exporter is about to act under it; `resv_returned` it has given the
lock back; `service_answered` the op is done, the answer not yet sent. And "the op": in the middle of the exporter's op.
"""

import contextlib
import errno
import os
import signal
import socket
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, Self

import pytest

import dmabuf
from dmabuf import Direction, DmaBuf, Usage, _native
from dmabuf.core.buffer.handle import handle_of
from tests.support import elsewhere as do
from tests.support.children import Parent, Spawn
from tests.support.drivers import PAGE, Dynamic
from tests.support.elsewhere import Away, Here, obeys
from tests.support.errnos import raises_errno
from tests.support.steps import fork, reap
from tests.support.waiting import until

pytestmark = pytest.mark.crash

SIZE = 4 * PAGE
TO = int(Direction.TO_DEVICE)

# Every carried call: what is done before it, the call, what the exporter does in it, and whether the lock is held.
CALLS: dict[str, tuple[list[Any], Any, str, bool]] = {
    "begin": ([], (do.begin, TO), "begin", False),
    "end": ([(do.begin, TO)], (do.end, TO), "end", False),
    "mmap": ([], (do.map_bytes,), "mmap", False),
    "attach": ([], (do.attach, True), "attach", False),
    "detach": ([(do.attach, True)], (do.detach,), "detach", False),
    "pin": ([(do.attach, True)], (do.pin,), "pin", True),
    "unpin": ([(do.attach, True), (do.pin,)], (do.unpin,), "unpin", True),
    "map": ([(do.attach, True)], (do.mapped, TO), "map", True),
    "unmap": ([(do.attach, True), (do.mapped, TO)], (do.unmapped,), "unmap", True),
    "vmap": ([], (do.vmap,), "vmap", True),
    "vunmap": ([(do.vmap,)], (do.vunmap,), "vunmap", True),
}
LENDING = {"pin", "unmap"}  # in which each step of the lending is a case
GIVES_BACK = {"detach", "unpin", "unmap", "vunmap"}

POINTS = [
    (name, point)
    for name, (_, _, _, locked) in CALLS.items()
    for point in [
        "asked",
        "the op",
        "answered",
        *(["lent", "passed", "locked", "taken back"] if locked else []),
        *(["return_to", "borrowed", "returned"] if name in LENDING else []),
    ]
]
BY_CALL = pytest.mark.parametrize(("name", "point"), POINTS, ids=[f"{name}-{point}" for name, point in POINTS])


def exporting(parent: Parent) -> None:
    """Exports a buffer and does what it is told, as `obeys` does."""
    state = SimpleNamespace(exporter=Dynamic())
    buf = dmabuf.export(state.exporter, SIZE)
    dmabuf.send(parent.sock, buf)
    while (order := parent.recv()) is not None:
        function, arguments = order
        function(state, *arguments)
        parent.send("done")


def exporter_dies(state: SimpleNamespace, op: str, step: str) -> None:
    if step == "the op":
        state.exporter.during[op] = lambda _: os.kill(os.getpid(), signal.SIGKILL)
    else:
        _native.step_arm("kill", step, 1)


@pytest.mark.parametrize(
    ("name", "step"),
    [
        (name, step)
        for name, (_, _, _, locked) in CALLS.items()
        for step in [
            "the op",
            "service_answered",
            *(["resv_passed", "service_locked"] if locked else []),
            *(["resv_return_to", "resv_borrowed", "resv_returned"] if name in LENDING else []),
        ]
    ],
)
def test_the_exporter_dies_in_the_call_and_the_caller_goes_on(child: Spawn, name: str, step: str) -> None:
    before, (call, *arguments), op, _ = CALLS[name]
    other = child(exporting)
    (buf,) = dmabuf.recv(other.sock)
    here = Here(buf)
    for function, *more in before:
        here.do(function, *more)
    other.send((exporter_dies, (op, step)))
    assert other.recv() == "done"
    if name in GIVES_BACK:
        here.do(call, *arguments)  # as far as this process is concerned it succeeds
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", dmabuf.ContractWarning)  # a vmap that fails, as of every exporter
            with raises_errno(errno.ENODEV):
                here.do(call, *arguments)
    assert other.wait() == -signal.SIGKILL
    assert not buf.resv.is_locked()
    with buf.resv.locked():
        assert buf.resv.held_here()
    state = here.state
    if (att := getattr(state, "att", None)) is not None and att.attached:
        for table in state.tables:
            att.unmap_unlocked(*table)
        att.detach()
    for map_ in state.__dict__.pop("maps", []):
        buf.vunmap_unlocked(map_)
        map_.clear()
    if (dev := getattr(state, "dev", None)) is not None:
        assert dev.statistics().windows == 0
    assert buf.statistics().attachments == buf.statistics().vmaps == 0
    assert buf.resv.fences(Usage.BOOKKEEP) == []
    with raises_errno(errno.ENODEV):
        buf.begin_cpu_access(Direction.FROM_DEVICE)
    state.__dict__.clear()
    buf.close()


# -- the caller has its lock back before a third process, whoever looks first


def stands_at(state: SimpleNamespace, step: str) -> None:
    """The exporter stands still at the step, or in its op, and says so."""
    sock = state.sock
    if step == "the op":
        state.exporter.during["pin"] = lambda _: (sock.send(b"the op\n"), sock.recv(1))
    else:
        _native.step_arm("hold", step, sock.fileno())


def exporting_step_by_step(parent: Parent) -> None:
    state = SimpleNamespace(exporter=Dynamic(), sock=parent.sock)
    buf = dmabuf.export(state.exporter, SIZE)
    dmabuf.send(parent.sock, buf)
    while (order := parent.recv()) is not None:
        function, *arguments = order
        function(state, *arguments)
        parent.send("done")


def pins(state: SimpleNamespace) -> tuple[int, bool, int, bool]:
    """(errno of a pin, whether the lock is held afterwards, by whom, and whether it is still held after the block)."""
    number = 0
    with state.buf.resv.locked():
        try:
            state.att.pin()
        except OSError as e:
            number = e.errno or 0
        held, by = state.buf.resv.held_here(), state.buf.resv.statistics().locked_by
    return number, held, by, state.buf.resv.held_here()


STANDS = ["resv_return_to", "resv_passed", "resv_borrowed", "service_locked", "the op", "resv_returned", "service_answered"]


@pytest.mark.parametrize(
    ("step", "reaper"),
    [*((step, "") for step in STANDS), ("the op", "reap_outside"), ("the op", "reap_lock_returned"), ("the op", "reap_ctx")],
)
def test_caller_has_its_lock_back_before_a_third_process(child: Spawn, step: str, reaper: str) -> None:
    other = child(exporting_step_by_step)
    (buf,) = dmabuf.recv(other.sock)
    caller = Away(child(obeys), buf)
    caller.do(do.attach, True)
    other.send((stands_at, step))
    assert other.recv() == "done"
    caller.start(pins)
    assert other.sock.recv(100) == step.encode() + b"\n"
    caller.other.stop()  # slower than everybody else
    peer = handle_of(buf).shared.backing.peer
    other.kill()
    domain = dmabuf.Domain.default()
    if reaper:  # who reaps is killed in the middle, unless a tick of this process is quicker

        def reaps() -> None:
            domain.join()
            _native.step_arm("kill", reaper, 1)
            domain.reap_dead()

        assert reap(fork(reaps)) in (-signal.SIGKILL, 0)
    while domain.shm.life_current(peer):
        domain.reap_dead()
    assert not buf.resv.trylock()
    assert buf.resv.statistics().locked_by == caller.other.pid
    caller.other.resume()
    assert caller.finish() == (errno.ENODEV, True, caller.other.pid, False)
    with buf.resv.locked():
        pass
    caller.do(do.detach)
    buf.close()
    caller.other.send(None)
    caller.other.result()


def test_with_both_dead_the_lock_is_free(child: Spawn) -> None:
    other = child(exporting_step_by_step)
    (buf,) = dmabuf.recv(other.sock)
    caller = Away(child(obeys), buf)
    caller.do(do.attach, True)
    other.send((stands_at, "the op"))
    assert other.recv() == "done"
    caller.start(pins)
    assert other.sock.recv(100) == b"the op\n"
    other.kill()
    caller.other.kill()
    with buf.resv.locked():
        assert buf.resv.held_here()
    assert not buf.resv.is_locked()
    buf.close()


@pytest.fixture
def dynamic() -> Iterator[Dynamic]:
    made = Dynamic()
    yield made
    made.close()


def caller_dies(state: SimpleNamespace, step: str, count: int) -> None:
    _native.step_arm("kill", step, count)


def balanced(exporter: Dynamic, buf: DmaBuf) -> bool:
    """The exporter has been given back all that anybody had."""
    live: Any = handle_of(buf).shared.backing
    pairs = (("attach", "detach"), ("pin", "unpin"), ("map", "unmap"), ("vmap", "vunmap"), ("begin", "end"))
    return (
        all(exporter.count(one) == exporter.count(other) for one, other in pairs)
        and not exporter.tables
        and not live.attachments
        and not live.vmaps
        and all(mapping.closed for mapping in live._mappings.values())
    )


@BY_CALL
def test_the_caller_dies_in_the_call_and_the_exporter_goes_on(child: Spawn, dynamic: Dynamic, name: str, point: str) -> None:
    before, (call, *arguments), op, _ = CALLS[name]
    with dmabuf.export(dynamic, SIZE) as buf:
        other = child(obeys)
        away = Away(other, buf)
        for function, *more in before:
            away.do(function, *more)
        steps = {
            "return_to": "resv_return_to",
            "passed": "resv_passed",
            "borrowed": "resv_borrowed",
            "locked": "service_locked",
            "returned": "resv_returned",
            "answered": "service_answered",
        }
        with KilledAt(steps[point], other.pid) if point in steps else contextlib.nullcontext():
            match point:
                case "the op":
                    dynamic.during[op] = lambda _: other.kill()
                case "asked":
                    away.do(caller_dies, "service_asked", 1)
                case "lent":
                    away.do(caller_dies, "resv_passed", 1)  # in the caller's process
                case "taken back":
                    away.do(caller_dies, "resv_passed", 2)
            away.start(call, *arguments)
            with pytest.raises(EOFError):
                away.finish()
        dynamic.during.clear()
        other.kill()
        until(lambda: balanced(dynamic, buf))
        until(lambda: not buf.resv.is_locked())
        assert all(dynamic.locked.get(locked, True) for locked in ("pin", "unpin", "map", "unmap", "vmap", "vunmap"))
        # Others go on.
        there = Here(buf)
        there.do(do.attach, True)
        there.do(do.mapped, TO)
        there.do(do.unmapped)
        there.do(do.detach)
        there.do(do.write, b"next")
        there.state.__dict__.clear()
    assert dynamic.whole[0:4] == b"next"


class KilledAt:
    """While this process passes a step, and stands still there with all its threads, another process kills the victim."""

    def __init__(self, step: str, victim: int) -> None:
        ours, self.theirs = socket.socketpair()
        self.step = step

        def kills() -> None:
            self.theirs.close()
            while ours.recv(100):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(victim, signal.SIGKILL)
                ours.send(b"g")

        self.pid = fork(kills)
        ours.close()

    def __enter__(self) -> Self:
        _native.step_arm("hold", self.step, self.theirs.fileno())
        return self

    def __exit__(self, *_: object) -> None:
        _native.step_disarm()
        self.theirs.close()
        assert reap(self.pid) == 0
