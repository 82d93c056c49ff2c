"""Devices in another process: the mapping matrix, failures that leave nothing, moves, and deaths (spec 2.8–2.14, 2.18)."""

import contextlib
import errno
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import dmabuf
from dmabuf import ContractWarning, Device, Direction, DmaBufAttachment, Exporter, SgTable, Timeline, Usage
from dmabuf.core import attachment as attachments
from dmabuf.core.backing import exports_of
from tests.support import elsewhere as do
from tests.support.children import Spawn
from tests.support.drivers import PAGE, Bare, Dynamic, Mover, Static
from tests.support.elsewhere import Away, Place, There, obeys
from tests.support.errnos import raises_errno
from tests.support.fences import attach as add
from tests.support.interrupts import Interrupt
from tests.support.waiting import Background, until, until_asleep

BIDIR, TO, FROM = Direction.BIDIRECTIONAL, Direction.TO_DEVICE, Direction.FROM_DEVICE
SIZE = 4 * PAGE


@pytest.fixture(params=["here", "elsewhere"])
def place(request: pytest.FixtureRequest, child: Spawn) -> Place:
    return Place(child, request.param == "here")


def counts(exporter: Bare, buf: dmabuf.DmaBuf) -> Any:
    """The exporter's side of what a failing operation must not change."""
    live: Any = buf._record.live
    return (
        len(exporter.tables),
        exporter.count("pin") - exporter.count("unpin"),
        exporter.count("vmap") - exporter.count("vunmap"),
        len(live.attachments),
        live.vmaps,
        buf.resv.is_locked(),
        do.nodes(buf),
        do.memories(),
    )


# -- the matrix


def test_static_with_static_maps_at_map_and_unmaps_at_unmap(place: Place, static: Static) -> None:
    with dmabuf.export(static, SIZE) as buf, place.of(buf) as there:
        there.do(do.attach)
        assert static.calls == ["attach"]
        there.do(do.mapped, TO)
        there.do(do.unmapped)
        assert static.calls == ["attach", ("map", TO), ("unmap", TO)]
        there.do(do.detach)
        assert static.calls[3:] == ["detach"]
        assert static.locked == {"attach": False, "map": True, "unmap": True, "detach": False}


def test_static_with_dynamic_maps_at_attach(place: Place, static: Static) -> None:
    with dmabuf.export(static, SIZE) as buf, place.of(buf) as there:
        there.do(do.attach, dynamic=True)
        assert static.calls == ["attach", ("map", BIDIR)]
        assert there.do(do.mapped, TO) == there.do(do.mapped, FROM)
        assert static.count("map") == 1
        there.do(do.unmapped)
        there.do(do.unmapped)
        there.do(do.detach)
        assert static.calls[2:] == [("unmap", BIDIR), "detach"]


def test_dynamic_with_static_pins_and_maps_at_attach(place: Place, dynamic: Dynamic) -> None:
    with dmabuf.export(dynamic, SIZE) as buf, place.of(buf) as there:
        there.do(do.attach)
        assert dynamic.calls == ["attach", "pin", ("map", BIDIR)]
        there.do(do.mapped, TO)
        there.do(do.unmapped)
        there.do(do.detach)
        assert dynamic.calls[3:] == [("unmap", BIDIR), "unpin", "detach"]
        assert all(dynamic.locked[op] for op in ("pin", "map", "unmap", "unpin"))


def test_dynamic_with_dynamic_pins_and_maps_at_map(place: Place, dynamic: Dynamic) -> None:
    with dmabuf.export(dynamic, SIZE) as buf, place.of(buf) as there:
        there.do(do.attach, dynamic=True)
        assert dynamic.calls == ["attach"]
        there.do(do.mapped, FROM)
        assert dynamic.calls[1:] == ["pin", ("map", FROM)]
        there.do(do.unmapped)
        assert dynamic.calls[3:] == [("unmap", FROM), "unpin"]
        there.do(do.pin)
        there.do(do.unpin)
        assert dynamic.pins == 0
        there.do(do.detach)


def test_a_caching_exporter_maps_once_until_detach(place: Place, static: Static) -> None:
    with dmabuf.export(static, SIZE, cache_sgt_mapping=True) as buf, place.of(buf) as there:
        there.do(do.attach)
        there.do(do.mapped, TO)
        there.do(do.unmapped)
        there.do(do.mapped, TO)
        assert static.count("map") == 1
        with raises_errno(errno.EBUSY):
            there.do(do.mapped, FROM)
        there.do(do.unmapped)
        there.do(do.detach)
        assert static.calls == ["attach", ("map", TO), ("unmap", TO), "detach"]


def test_a_static_importer_waits_for_kernel_fences(child: Spawn, static: Static, tl: Timeline) -> None:
    with dmabuf.export(static, SIZE) as buf, Place(child, False).of(buf) as there:
        assert isinstance(there, Away)
        there.do(do.attach)
        fence = tl.fence()
        add(buf.resv, fence, Usage.KERNEL)
        there.start(do.mapped, TO)
        until(lambda: static.count("map"))
        until_asleep(there.other.pid)
        assert not there.other._messages.poll()
        fence.signal()
        there.finish()
        there.do(do.unmapped)
        there.do(do.detach)


# -- what the device sees


def test_the_device_elsewhere_uses_the_exporters_memory(place: Place, static: Static) -> None:
    with dmabuf.export(static, SIZE) as buf, place.of(buf) as there:
        there.do(do.attach, max_segment=PAGE)
        entries = there.do(do.mapped, BIDIR)
        assert [length for _, length in entries] == [PAGE] * 4
        static.whole[0:5] = b"hello"
        assert there.do(do.device_read, entries[0][0], 5) == b"hello"
        there.do(do.device_write, entries[3][0] + 7, b"written")
        assert static.whole[3 * PAGE + 7 : 3 * PAGE + 14] == b"written"
        there.do(do.unmapped)
        with raises_errno(errno.EFAULT):
            there.do(do.device_read, entries[0][0], 1)
        there.do(do.detach)


def test_the_pages_are_hidden_from_importers_elsewhere_too(place: Place, static: Static) -> None:
    with dmabuf.export(static, SIZE) as buf, place.of(buf) as there:
        there.do(do.attach)
        there.do(do.mapped, TO)
        with pytest.raises(dmabuf.ContractError, match="never the pages"):
            there.do(look_at_pages)
        there.do(do.unmapped)
        there.do(do.detach)


def look_at_pages(state: Any) -> None:
    _ = state.tables[-1][0].entries


class OfItsOwn(Bare):
    """Its memory is a device's own: it fills in addresses."""

    def map(self, attachment: DmaBufAttachment, direction: Direction) -> SgTable:
        self.said("map", attachment, direction)
        return SgTable.from_dma([(0x10000, PAGE), (0x40000, 2 * PAGE)])

    def unmap(self, attachment: DmaBufAttachment, sgt: SgTable, direction: Direction) -> None:
        self.said("unmap", attachment, direction)

    def attach(self, attachment: DmaBufAttachment) -> None:
        attachment.peer2peer = False


def test_addresses_that_the_exporter_filled_in_come_as_they_are(place: Place) -> None:
    exporter = OfItsOwn()
    with dmabuf.export(exporter, SIZE) as buf, place.of(buf) as there:
        there.do(do.attach, dynamic=True, peer2peer=True)
        assert there.do(do.mapped, TO) == [(0x10000, PAGE), (0x40000, 2 * PAGE)]
        there.do(do.unmapped)
        assert there.do(peer2peer) is False
        there.do(do.detach)
    exporter.close()


def peer2peer(state: Any) -> bool:
    return bool(state.att.peer2peer)


class Curious(Static):
    def attach(self, attachment: DmaBufAttachment) -> None:
        dev = attachment.dev
        self.calls.append((dev.name, dev.dma_mask, dev.max_segment, attachment.is_dynamic, attachment.peer2peer))


def test_the_exporter_sees_the_devices_name_and_limits(place: Place) -> None:
    exporter = Curious()
    with dmabuf.export(exporter, SIZE) as buf, place.of(buf) as there:
        there.do(do.attach, dynamic=True, peer2peer=True, dma_mask=(1 << 32) - 1, max_segment=2 * PAGE)
        assert exporter.calls[0] == ("npu0", (1 << 32) - 1, 2 * PAGE, True, True)
        assert "\tAttached Devices:\n\tnpu0\nTotal 1 devices attached\n" in dmabuf.bufinfo()
        there.do(do.detach)
        assert "Total 0 devices attached" in dmabuf.bufinfo()
    exporter.close()


# -- failures leave the state as it was


def prepared(there: There, *, dynamic: bool) -> None:
    there.do(do.attach, dynamic=dynamic)


@pytest.mark.parametrize("op", ["attach", "pin", "map"])
@pytest.mark.parametrize("number", [errno.EBUSY, errno.EINTR])
def test_a_failing_attach_undoes_what_came_before(place: Place, dynamic: Dynamic, op: str, number: int) -> None:
    with dmabuf.export(dynamic, SIZE) as buf, place.of(buf) as there:
        there.do(do.begin, FROM)
        there.do(do.end, FROM)
        dynamic.calls.clear()
        before = there.do(do.standing), counts(dynamic, buf)
        dynamic.fails[op] = number
        with raises_errno(number):
            there.do(do.attach)
        done = [call for call in dynamic.calls if call not in ("detach", "unpin")]
        assert dynamic.calls[len(done) :] == {"attach": [], "pin": ["detach"], "map": ["unpin", "detach"]}[op]
        dynamic.fails.clear()
        dynamic.calls.clear()
        assert (there.do(do.standing)[0], there.do(do.standing)[2:], counts(dynamic, buf)) == (before[0][0], before[0][2:], before[1])


@pytest.mark.parametrize("op", ["pin", "map"])
def test_a_failing_map_undoes_what_came_before(place: Place, dynamic: Dynamic, op: str) -> None:
    with dmabuf.export(dynamic, SIZE) as buf, place.of(buf) as there:
        there.do(do.attach, dynamic=True)
        before = there.do(do.standing), counts(dynamic, buf)
        dynamic.calls.clear()
        dynamic.fails[op] = errno.ENOSPC
        with raises_errno(errno.ENOSPC):
            there.do(do.mapped, TO)
        assert dynamic.calls == {"pin": ["pin"], "map": ["pin", ("map", TO), "unpin"]}[op]
        dynamic.fails.clear()
        dynamic.calls.clear()
        assert (there.do(do.standing), counts(dynamic, buf)) == before
        there.do(do.detach)


def test_a_failing_pin_is_told_and_the_lock_is_free(place: Place, dynamic: Dynamic) -> None:
    with dmabuf.export(dynamic, SIZE) as buf, place.of(buf) as there:
        there.do(do.attach, dynamic=True)
        dynamic.fails["pin"] = errno.ENOMEM
        with raises_errno(errno.ENOMEM):
            there.do(do.pin)
        assert not buf.resv.is_locked()
        dynamic.fails.clear()
        there.do(do.detach)


def test_a_map_that_the_device_refuses_is_given_back(place: Place, static: Static) -> None:
    with dmabuf.export(static, SIZE) as buf, place.of(buf) as there:
        there.do(do.attach, dma_mask=4 * PAGE - 1)  # the table fits below no such mask
        before = counts(static, buf)[:-1]
        with raises_errno(errno.ENOMEM):
            there.do(do.mapped, TO)
        assert counts(static, buf)[:-1] == before
        there.do(do.detach)


class NoTable(Dynamic):
    def map(self, attachment: DmaBufAttachment, direction: Direction) -> SgTable | None:
        return None


def test_a_map_that_returns_no_table_is_enomem(place: Place) -> None:
    exporter = NoTable()
    with dmabuf.export(exporter, SIZE) as buf, place.of(buf) as there:
        with raises_errno(errno.ENOMEM):
            there.do(do.attach)
        assert exporter.pins == 0
        assert counts(exporter, buf)[3] == 0
    exporter.close()


class OfBytes(Static):
    def map(self, attachment: DmaBufAttachment, direction: Direction) -> SgTable:
        return attachment.dev.map_sgtable(SgTable.from_ranges([(0, SIZE)], memory=bytearray(SIZE)), direction)

    def unmap(self, attachment: DmaBufAttachment, sgt: SgTable, direction: Direction) -> None:
        self.said("unmap", attachment, direction)
        attachment.dev.unmap_sgtable(sgt, direction)


def test_memory_that_is_no_mapping_cannot_be_mapped_elsewhere(child: Spawn) -> None:
    exporter = OfBytes()
    with dmabuf.export(exporter, SIZE) as buf, Place(child, False).of(buf) as there:
        there.do(do.attach)
        with raises_errno(errno.EOPNOTSUPP):
            there.do(do.mapped, TO)
        assert exporter.calls == ["attach", ("unmap", TO)]
        there.do(do.detach)
    exporter.close()


# -- vmap


def test_vmap_is_counted_and_the_exporter_sees_one_of_each(place: Place, static: Static) -> None:
    with dmabuf.export(static, SIZE) as buf, place.of(buf) as there:
        assert [there.do(do.vmap), there.do(do.vmap)] == [1, 2]
        static.whole[0] = 42
        assert there.do(seen_by_vmap) == 42
        there.do(do.vunmap)
        assert static.calls == ["vmap"]
        there.do(do.vunmap)
        assert static.calls == ["vmap", "vunmap"]
        assert static.locked == {"vmap": True, "vunmap": True}


def seen_by_vmap(state: Any) -> int:
    return int(state.maps[0].vaddr[0])


def test_a_failing_vmap_warns_the_caller_and_counts_nothing(place: Place, static: Static) -> None:
    with dmabuf.export(static, SIZE) as buf, place.of(buf) as there:
        static.fails["vmap"] = errno.ENOMEM
        with pytest.warns(ContractWarning), raises_errno(errno.ENOMEM):
            there.do(do.vmap)
        assert counts(static, buf)[4:6] == (0, False)
        static.fails.clear()
        there.do(do.vmap)
        there.do(do.vunmap)


def test_without_the_op_there_is_no_vmap(place: Place, bare: Bare) -> None:
    with dmabuf.export(bare, SIZE) as buf, place.of(buf) as there, raises_errno(errno.EINVAL):
        there.do(do.vmap)


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
    """Keeps the main thread of the other process from reading what is for the importer."""
    until(lambda: state.mover.moved)


# -- deaths


def test_a_dead_importer_is_detached_and_all_it_had_is_given_back(child: Spawn, dynamic: Dynamic) -> None:
    with dmabuf.export(dynamic, SIZE) as buf:
        other = child(obeys)
        there = Away(other, buf)
        there.do(do.attach, dynamic=True)
        there.do(do.mapped, TO)
        there.do(do.pin)
        there.do(do.vmap)
        other.kill()
        until(lambda: dynamic.count("detach"))
        assert dynamic.calls == [
            "attach", "pin", ("map", TO), "pin", "vmap", ("unmap", TO), "unpin", "unpin", "vunmap", "detach",
        ]  # fmt: skip
        assert dynamic.locked["unmap"]
        assert dynamic.locked["unpin"]
        assert not dynamic.locked["detach"]
        assert counts(dynamic, buf)[:6] == (0, 0, 0, 0, 0, False)


def exports(state_parent: Any, kind: type[Exporter]) -> None:
    exporter: Any = kind()
    buf = dmabuf.export(exporter, SIZE)
    dmabuf.send(state_parent.sock, buf)
    state_parent.recv()


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
    assert dynamic.count("detach") == dynamic.count("attach") == 2


def moves(state: Any) -> None:
    (exported,) = exports_of(dmabuf.Domain.default()).live.values()
    with exported.resv.locked():
        attachments.move_notify(exported)


@pytest.mark.crash
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
