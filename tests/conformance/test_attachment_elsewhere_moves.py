"""Devices in another process: moves, deaths, and forks (semantics 2.14, 2.18)."""

import errno
import os
import signal
import warnings
from typing import Any

import pytest

import dmabuf
from dmabuf import Device, Direction, DmaBufAttachment, Exporter
from dmabuf.core.attach import attachment as attachments
from dmabuf.core.export.exported import EXPORTS
from tests.support import elsewhere as do
from tests.support.children import Spawn
from tests.support.drivers import PAGE, Dynamic, Mover, Static
from tests.support.elsewhere import Away, Place, obeys
from tests.support.errnos import raises_errno
from tests.support.waiting import Background, until

TO, FROM = Direction.TO_DEVICE, Direction.FROM_DEVICE
SIZE = 4 * PAGE


# -- moves


def test_importers_of_all_processes_hear_of_a_move_the_newest_first(child: Spawn, dynamic: Dynamic) -> None:
    with dmabuf.export(dynamic, SIZE) as buf, Place(child, False).of(buf) as one, Place(child, False).of(buf) as two:
        order: list[str] = []
        one.do(do.attach, dynamic=True)
        here = Told(order)
        att = buf.attach(Device("gpu0"), here)
        two.do(do.attach, dynamic=True)
        here.before = lambda: order.append(f"two {two.do(do.heard)} one {one.do(do.heard)}")
        with buf.resv.locked():
            buf.move_notify()
            assert buf.resv.held_here()
        assert order == ["two (1, True) one (0, True)", "here"]
        assert one.do(do.heard) == (1, True)
        for there in (one, two):
            there.do(do.detach)
        att.detach()


class Told(Mover):
    def __init__(self, order: list[str]) -> None:
        super().__init__()
        self.order, self.before = order, lambda: None

    def move_notify(self, attachment: DmaBufAttachment) -> None:
        self.before()
        self.order.append("here")


@pytest.mark.usefixtures("move_notify")
def test_after_a_move_the_importer_maps_anew_and_sees_the_new_place(child: Spawn, dynamic: Dynamic) -> None:
    with dmabuf.export(dynamic, SIZE) as buf, Place(child, False).of(buf) as there:
        there.do(do.attach, dynamic=True)
        there.do(do.mapped, TO)
        other = Dynamic()
        other.whole[0] = 9
        with buf.resv.locked():
            buf.move_notify()
            dynamic.whole, other.whole = other.whole, dynamic.whole
        there.do(do.unmapped)
        ((address, _),) = there.do(do.mapped, TO)
        assert there.do(do.device_read, address, 1) == b"\x09"
        there.do(do.unmapped)
        there.do(do.detach)
        dynamic.whole, other.whole = other.whole, dynamic.whole
        other.close()


def test_a_dead_importer_is_passed_over(child: Spawn, dynamic: Dynamic) -> None:
    with dmabuf.export(dynamic, SIZE) as buf:
        other = child(obeys)
        there = Away(other, buf)
        there.do(do.attach, dynamic=True)
        mover = Mover()
        att = buf.attach(Device("gpu0"), mover)
        other.kill()
        with buf.resv.locked():
            buf.move_notify()
        assert len(mover.moved) == 1
        att.detach()
        until(lambda: buf.statistics().attachments == 0)


def slow(state: Any) -> None:
    state.mover.move_notify = None
    importer = state.mover
    inner = Mover.move_notify

    def wait(self: Mover, attachment: DmaBufAttachment) -> None:
        state.parent.send("told")
        state.parent.recv()
        inner(self, attachment)

    del importer.move_notify
    Mover.move_notify = wait  # type: ignore[method-assign]


def test_a_slow_importer_is_waited_for(child: Spawn, dynamic: Dynamic) -> None:
    with dmabuf.export(dynamic, SIZE) as buf, Place(child, False).of(buf) as there:
        assert isinstance(there, Away)
        there.do(do.attach, dynamic=True)
        there.do(slow)

        def move() -> None:
            with buf.resv.locked():
                buf.move_notify()

        there.start(wait_for_nothing)
        assert there.other.recv() == "waits"
        with Background(move) as job:
            assert there.other.recv() == "told"
            job.until_blocked()
            assert not job.done
            assert buf.resv.is_locked()
            there.other.send("go on")
            job.result()
        there.finish()
        there.do(do.detach)


def wait_for_nothing(state: Any) -> None:
    """Keeps the main thread of the other process from reading what is for the importer, from the answer on."""
    state.parent.send("waits")
    until(lambda: state.mover.moved)


# -- deaths


def test_a_dead_importer_is_detached_and_all_it_had_is_given_back(child: Spawn, dynamic: Dynamic, move_notify: bool) -> None:
    with dmabuf.export(dynamic, SIZE) as buf:
        other = child(obeys)
        there = Away(other, buf)
        there.do(do.attach, dynamic=True)
        there.do(do.mapped, TO)
        there.do(do.pin)
        there.do(do.vmap)
        other.kill()
        until(lambda: dynamic.count("detach"))
        pin, unpin = ([], []) if move_notify else (["pin"], ["unpin"])
        assert dynamic.calls == [
            "attach", *pin, ("map", TO), "pin", "vmap", ("unmap", TO), *unpin, "unpin", "vunmap", "detach",
        ]  # fmt: skip
        assert dynamic.locked["unmap"]
        assert dynamic.locked["unpin"]
        assert not dynamic.locked["detach"]
        assert do.counts(dynamic, buf)[:6] == (0, 0, 0, 0, 0, False)


def exports(state_parent: Any, kind: type[Exporter]) -> None:
    exporter: Any = kind()
    buf = dmabuf.export(exporter, SIZE)
    dmabuf.send(state_parent.sock, buf)
    state_parent.recv()


@pytest.mark.usefixtures("move_notify")
def test_with_a_dead_exporter_giving_back_succeeds_and_the_rest_is_enodev(child: Spawn) -> None:
    other = child(exports, Dynamic)
    (buf,) = dmabuf.recv(other.sock)
    dev, mover = Device("npu0"), Mover()
    att, fixed = buf.attach(dev, mover), buf.attach(dev)
    sgt = att.map_unlocked(TO)
    with buf.resv.locked():
        att.pin()
    map_ = buf.vmap_unlocked()
    other.kill()
    with buf.resv.locked():
        for call in (lambda: att.map(TO), att.pin, buf.vmap if False else lambda: att.map(FROM)):
            with raises_errno(errno.ENODEV):
                call()
            assert buf.resv.held_here()
        att.unmap(sgt, TO)
        att.unpin()
    with raises_errno(errno.ENODEV):
        buf.attach(dev)
    buf.vunmap_unlocked(map_)
    map_.clear()
    att.detach()
    fixed.detach()
    assert dev.statistics().windows == 0
    assert buf.statistics().attachments == 0
    buf.close()


# -- deaths in a move, and forks


def dies_when_told(state: Any) -> None:
    Mover.move_notify = lambda self, attachment: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]


@pytest.mark.crash
def test_an_importer_that_dies_as_it_hears_of_a_move_is_passed_over(child: Spawn, dynamic: Dynamic) -> None:
    with dmabuf.export(dynamic, SIZE) as buf:
        mover = Mover()
        att = buf.attach(Device("gpu0"), mover)
        there = Away(child(obeys), buf)
        there.do(do.attach, dynamic=True)
        there.do(dies_when_told)
        with buf.resv.locked():
            buf.move_notify()
            assert buf.resv.held_here()
        assert len(mover.moved) == 1
        assert there.other.wait() == -signal.SIGKILL
        until(lambda: buf.statistics().attachments == 1)
        att.detach()
    until(lambda: dynamic.count("detach") == 2)  # of the dead: it is called after the attachment is off the list
    assert dynamic.count("attach") == 2


def moves(state: Any) -> None:
    (exported,) = EXPORTS.of(dmabuf.Domain.default()).buffers.values()
    with exported.resv.locked():
        attachments.notify_moves(exported)


@pytest.mark.crash
@pytest.mark.usefixtures("move_notify")
def test_an_exporter_that_dies_in_a_move_leaves_importers_that_go_on(child: Spawn) -> None:
    other = child(do.exports, Dynamic, SIZE)
    (buf,) = dmabuf.recv(other.sock)
    dev = Device("npu0")

    class Kills(Mover):
        def move_notify(self, attachment: DmaBufAttachment) -> None:
            super().move_notify(attachment)
            other.kill()

    mover = Kills()
    att = buf.attach(dev, mover)
    sgt = att.map_unlocked(TO)
    other.send((moves,))
    until(lambda: mover.moved)
    other.wait()
    assert mover.locked == [True]
    with buf.resv.locked():  # free, though its holder died with it
        att.unmap(sgt, TO)
        with raises_errno(errno.ENODEV):
            att.map(TO)
    att.detach()
    assert dev.statistics().windows == 0
    buf.close()


def forks(state: Any) -> int:
    """A child of the importer: its parent's attachment is not its own, and the buffer is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12+: a fork with threads
        pid = os.fork()
    if not pid:
        code = 1
        try:
            with raises_errno(errno.ENODEV):
                state.att.map_unlocked(TO)
            assert state.buf.statistics().attachments == 0
            state.buf.begin_cpu_access(TO)
            state.buf.end_cpu_access(TO)
            dev = Device("fork0")
            att = state.buf.attach(dev)
            with att.mapped(TO) as sgt:
                assert len(sgt) == 1
            att.detach()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_forked_child_of_an_importer_begins_anew(child: Spawn, static: Static) -> None:
    with dmabuf.export(static, SIZE) as buf, Place(child, False).of(buf) as there:
        there.do(do.attach)
        there.do(do.mapped, TO)
        assert there.do(forks) == 0
        until(lambda: static.count("detach") == 1)
        assert static.calls == [
            "attach", ("map", TO), ("begin", TO), ("end", TO), "attach", ("map", TO), ("unmap", TO), "detach",
        ]  # fmt: skip
        there.do(do.unmapped)
        there.do(do.detach)
