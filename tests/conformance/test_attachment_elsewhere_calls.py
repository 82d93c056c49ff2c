"""Devices in another process: calls to the exporter that a signal ends, and calls in calls."""

import contextlib
import errno
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import dmabuf
from dmabuf import Device, Direction, DmaBufAttachment
from tests.support import elsewhere as do
from tests.support.children import Spawn
from tests.support.drivers import PAGE, Dynamic, Mover, Static
from tests.support.elsewhere import Place
from tests.support.interrupts import Interrupt
from tests.support.waiting import Background, until, until_asleep

TO, FROM = Direction.TO_DEVICE, Direction.FROM_DEVICE
SIZE = 4 * PAGE


# -- signals


def blocks(state: Any, op: str) -> None:
    state.go = threading.Event()
    state.exporter.during[op] = lambda _: state.go.wait()


def goes_on(state: Any) -> None:
    state.exporter.during.clear()
    state.go.set()


def calls(state: Any) -> list[Any]:
    return [call if isinstance(call, str) else call[0] for call in state.exporter.calls]


@contextlib.contextmanager
def poked(
    when: Callable[[], bool], then: Callable[[], object] = lambda: None, times: int = 1, kind: type[BaseException] = Interrupt
) -> Iterator[list[int]]:
    """In the block this thread is sent a signal, whose handler raises, once that is true; `then` when all handlers ran."""
    ran: list[int] = []

    def handler(*_: object) -> None:
        ran.append(len(ran))
        raise kind(len(ran))

    def poke() -> None:
        until(when)
        for count in range(1, times + 1):
            until_asleep(os.getpid(), me)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
            until(lambda count=count: len(ran) == count)
        then()

    before, me = signal.signal(signal.SIGUSR1, handler), threading.get_native_id()
    try:
        with Background(poke):
            yield ran
    finally:
        signal.signal(signal.SIGUSR1, before)


UNDONE = {
    "begin": ([], (do.begin, TO), ["begin", "end"]),
    "mmap": ([], (do.map_bytes,), ["mmap"]),
    "attach": ([], (do.attach, True), ["attach", "detach"]),
    "pin": ([(do.attach, True)], (do.pin,), ["attach", "pin", "unpin"]),
    "map": ([(do.attach, True)], (do.mapped, TO), ["attach", "map", "unmap"]),
    "pin and map": ([(do.attach, True)], (do.mapped, TO), ["attach", "pin", "map", "unmap", "unpin"]),
    "vmap": ([], (do.vmap,), ["vmap", "vunmap"]),
}


@pytest.mark.parametrize("op", ["begin", "mmap", "attach"])
def test_a_call_that_a_signal_ends_is_undone_in_the_exporters_process(child: Spawn, op: str) -> None:
    before, (call, *arguments), want = UNDONE[op]
    with do.exported(child) as (ask, here):
        buf = here.state.buf
        for function, *more in before:
            here.do(function, *more)
        ask(blocks, op)
        with pytest.raises(Interrupt), poked(lambda: ask(calls)[-1:] == [op]):
            here.do(call, *arguments)
        assert not buf.resv.held_here()
        ask(goes_on)
        until(lambda: sorted(ask(calls)) == sorted(want))
        until(lambda: not buf.resv.is_locked())
        here.do(do.begin, FROM)
        here.do(do.end, FROM)


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize(("op", "move_notify"), [("pin", True), ("map", True), ("map", False), ("vmap", True)], indirect=["move_notify"])
def test_locked_call_is_undone_before_handlers_exception_is_raised(child: Spawn, op: str, move_notify: bool, times: int) -> None:
    before, (call, *arguments), want = UNDONE[op if move_notify else f"pin and {op}"]
    with do.exported(child) as (ask, here):
        buf = here.state.buf
        for function, *more in before:
            here.do(function, *more)
        ask(blocks, op)
        with poked(lambda: ask(calls)[-1:] == [op], lambda: ask(goes_on), times) as ran, pytest.raises(Interrupt) as caught:
            here.do(call, *arguments)
        assert (len(ran), caught.value.args) == (times, (times,))  # the last one's; each handler ran while the op did
        assert sorted(ask(calls)) == sorted(want)
        assert not buf.resv.is_locked()
        if before:
            here.do(do.detach)


@pytest.mark.parametrize(
    ("op", "move_notify"), [("unpin", True), ("unmap", True), ("unmap", False), ("vunmap", True)], indirect=["move_notify"]
)
def test_what_gives_back_is_seen_through_too(child: Spawn, op: str, move_notify: bool) -> None:
    made: dict[str, list[Any]] = {
        "unpin": [(do.attach, True), (do.pin,)],
        "unmap": [(do.attach, True), (do.mapped, TO)],
        "vunmap": [(do.vmap,)],
    }
    back = {"unpin": do.unpin, "unmap": do.unmapped, "vunmap": do.vunmap}[op]
    with do.exported(child) as (ask, here):
        for function, *more in made[op]:
            here.do(function, *more)
        ask(blocks, op)
        with poked(lambda: ask(calls)[-1:] == [op], lambda: ask(goes_on)), pytest.raises(Interrupt):
            here.do(back)
        assert ask(calls).count(op) == 1
        assert ask(calls).count("unpin") == (op == "unpin" or not move_notify)
        assert not here.state.buf.resv.is_locked()
        if op != "vunmap":
            here.state.att.detach()


@pytest.mark.parametrize("kind", [Interrupt, TimeoutError, KeyboardInterrupt])
def test_the_lock_is_held_again_when_what_the_handler_raised_comes(child: Spawn, kind: type[BaseException]) -> None:
    with do.exported(child) as (ask, here):
        buf = here.state.buf
        att = buf.attach(Device("npu0"), Mover())
        ask(blocks, "pin")
        with buf.resv.locked():
            with poked(lambda: ask(calls)[-1:] == ["pin"], lambda: ask(goes_on), kind=kind), pytest.raises(kind):
                att.pin()
            assert buf.resv.held_here()
            assert buf.resv.statistics().locked_by == os.getpid()
            att.pin()
            att.unpin()
        assert not buf.resv.is_locked()
        assert ask(calls) == ["attach", "pin", "unpin", "pin", "unpin"]
        att.detach()


def test_a_full_domain_keeps_nobody_from_a_locked_call(child: Spawn, monkeypatch: pytest.MonkeyPatch) -> None:
    with do.exported(child) as (ask, here):
        buf = here.state.buf
        att = buf.attach(Device("npu0"), Mover())

        def full(*_: object) -> int:
            raise OSError(errno.ENOSPC, "full")

        with buf.resv.locked():
            monkeypatch.setattr(buf.domain, "ctx_open", full)
            att.pin()
            att.unpin()
            assert buf.resv.held_here()
            assert buf.resv.statistics().locked_by == os.getpid()
            monkeypatch.undo()
        assert not buf.resv.is_locked()
        assert ask(calls) == ["attach", "pin", "unpin"]
        att.detach()


def test_a_locked_call_that_is_poked_ends_with_the_exporters_death(child: Spawn) -> None:
    other = child(do.exports, Dynamic, SIZE)
    (buf,) = dmabuf.recv(other.sock)
    att = buf.attach(Device("npu0"), Mover())
    other.send((blocks, "pin"))
    other.recv()

    def asked() -> bool:
        other.send((calls,))
        return bool(other.recv()[-1:] == ["pin"])

    with buf.resv.locked():
        with poked(asked, other.kill), pytest.raises(Interrupt):
            att.pin()
        assert buf.resv.held_here()
        assert buf.resv.statistics().locked_by == os.getpid()
    assert not buf.resv.is_locked()
    att.detach()
    buf.close()


def holds_up(state: Any) -> None:
    """The importer takes its time."""
    state.go, state.told, inner = threading.Event(), [], Mover.move_notify

    def wait(self: Mover, attachment: DmaBufAttachment) -> None:
        state.told.append(1)
        state.go.wait()
        inner(self, attachment)

    Mover.move_notify = wait  # type: ignore[method-assign]


def told(state: Any) -> bool:
    return bool(state.told)


def holds_up_no_more(state: Any) -> None:
    state.go.set()


def test_move_waits_for_remote_importers_before_handlers_exception(child: Spawn, dynamic: Dynamic) -> None:
    with dmabuf.export(dynamic, SIZE) as buf, Place(child, False).of(buf) as there:
        there.do(do.attach, dynamic=True)
        there.do(holds_up)
        with buf.resv.locked():
            stop = KeyboardInterrupt  # an Exception would be taken for the importer's, and reported
            with poked(lambda: there.do(told), lambda: there.do(holds_up_no_more), kind=stop), pytest.raises(stop):
                buf.move_notify()
            assert there.do(do.heard) == (1, True)
            assert buf.resv.held_here()
        there.do(do.detach)


# -- calls in calls


class Relay(Static):
    """Its ops use another process's buffer, whose exporter is a relay too."""

    def begin_cpu_access(self, buf: dmabuf.DmaBuf, direction: Direction) -> None:
        super().begin_cpu_access(buf, direction)
        if direction is FROM and self.inner is not None:
            self.inner.begin_cpu_access(TO)

    inner: Any = None


def takes(state: Any) -> None:
    (state.exporter.inner,) = dmabuf.recv(state.parent.sock)


def lets_go(state: Any) -> None:
    state.exporter.inner.close()
    state.exporter.inner = None


def test_two_processes_that_call_each_other_in_their_ops_go_on(child: Spawn) -> None:
    mine = Relay()
    with dmabuf.export(mine, SIZE) as own:
        other = child(do.exports, Relay, SIZE)
        (theirs,) = dmabuf.recv(other.sock)
        dmabuf.send(other.sock, own)
        other.send((takes,))
        other.recv()
        mine.inner = theirs
        theirs.begin_cpu_access(FROM)  # there, and in it TO here
        assert mine.calls == [("begin", TO)]
        with Background(lambda: [own.begin_cpu_access(FROM) for _ in range(20)]) as job:
            for _ in range(20):
                theirs.begin_cpu_access(FROM)
            job.result()
        assert mine.calls.count(("begin", TO)) == 21
        other.send((lets_go,))
        other.recv()
        mine.inner = None
        theirs.close()
        other.send(None)
        until(lambda: mine.count("end") == 21)
    other.result()
    mine.close()


class Reentrant(Static):
    """In its attach it asks its own buffer, and takes its lock."""

    def attach(self, attachment: DmaBufAttachment) -> None:
        super().attach(attachment)
        with attachment.dmabuf.resv.locked(), attachment.dmabuf.get_dma_buf():
            pass
        attachment.dmabuf.begin_cpu_access(TO)


def test_an_op_may_use_its_own_buffer(place: Place) -> None:
    exporter = Reentrant()
    with dmabuf.export(exporter, SIZE) as buf, place.of(buf) as there:
        there.do(do.attach)
        assert exporter.calls == ["attach", ("begin", TO)]
        there.do(do.detach)
    exporter.close()
