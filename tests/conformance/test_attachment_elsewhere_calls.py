"""Devices in another process: calls to the exporter that a signal ends, and calls in calls."""

import contextlib
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
def poked(when: Callable[[], bool]) -> Iterator[None]:
    """In the block this thread is sent a signal, whose handler raises, once that is true."""

    def handler(*_: object) -> None:
        raise Interrupt

    def poke() -> None:
        until(when)
        until_asleep(os.getpid(), me)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    before, me = signal.signal(signal.SIGUSR1, handler), threading.get_native_id()
    try:
        with Background(poke):
            yield
    finally:
        signal.signal(signal.SIGUSR1, before)


UNDONE = {
    "begin": ([], (do.begin, TO), ["begin", "end"]),
    "mmap": ([], (do.map_bytes,), ["mmap"]),
    "attach": ([], (do.attach, True), ["attach", "detach"]),
    "pin": ([(do.attach, True)], (do.pin,), ["attach", "pin", "unpin"]),
    "map": ([(do.attach, True)], (do.mapped, TO), ["attach", "pin", "map", "unmap", "unpin"]),
    "vmap": ([], (do.vmap,), ["vmap", "vunmap"]),
}


@pytest.mark.parametrize("op", list(UNDONE))
def test_a_call_that_a_signal_ends_is_undone_in_the_exporters_process(child: Spawn, op: str) -> None:
    before, (call, *arguments), want = UNDONE[op]
    other = child(do.exports, Dynamic, SIZE)
    (buf,) = dmabuf.recv(other.sock)
    here = do.Here(buf)
    for function, *more in before:
        here.do(function, *more)

    def ask(function: Any, *more: Any) -> Any:
        other.send((function, *more))
        return other.recv()

    ask(blocks, op)
    with pytest.raises(Interrupt), poked(lambda: ask(calls)[-1:] == [op]):
        here.do(call, *arguments)
    assert not buf.resv.held_here()
    ask(goes_on)
    until(lambda: sorted(ask(calls)) == sorted(want))
    until(lambda: not buf.resv.is_locked())
    if hasattr(here.state, "att") and here.state.att.attached:
        here.do(do.detach)
    here.do(do.begin, FROM)
    here.do(do.end, FROM)
    here.state.__dict__.clear()
    buf.close()
    other.send(None)
    other.result()


def test_unlocking_after_a_call_that_a_signal_ended_does_nothing(child: Spawn) -> None:
    other = child(do.exports, Dynamic, SIZE)
    (buf,) = dmabuf.recv(other.sock)
    att = buf.attach(Device("npu0"), Mover())
    other.send((blocks, "pin"))
    other.recv()
    buf.resv.lock()
    with pytest.raises(Interrupt), poked(lambda: (other.send((calls,)), other.recv())[1][-1:] == ["pin"]):
        att.pin()
    assert buf.resv.is_locked()  # by the exporter's process, until its op has ended
    with pytest.raises(dmabuf.ContractError):
        att.pin()
    buf.resv.unlock()
    other.send((goes_on,))
    other.recv()
    with buf.resv.locked():
        pass
    att.detach()
    buf.close()
    other.send(None)
    other.result()


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
