"""Attachments: the mapping matrix, waits, failures that leave nothing, the lock table (semantics 2.8–2.14, 2.19)."""

import errno
import os
import threading
from typing import Any

import pytest

import dmabuf
from dmabuf import ContractError, ContractWarning, Device, Direction, DmaBuf, DmaBufAttachment, Importer, SgTable, Timeline, Usage
from dmabuf.core.attach import attachment as attachments
from dmabuf.core.buffer.handle import handle_of
from tests.support.drivers import BIDIR, FROM, PAGE, TO, Bare, Dynamic, Mover, Static
from tests.support.errnos import raises_errno
from tests.support.fences import attach as add
from tests.support.interrupts import Interrupt, interrupted
from tests.support.waiting import Background

SIZE = 4 * PAGE


def state(buf: DmaBuf, exporter: Bare, dev: Device) -> Any:
    """All that an operation may change and a failing one must not."""
    return (
        buf.statistics(),
        len(os.listdir("/proc/self/fd")),
        (dev.statistics().mapped, dev.statistics().windows),
        len(exporter.tables),
        exporter.count("attach") - exporter.count("detach"),
        exporter.count("pin") - exporter.count("unpin"),
        exporter.count("map") - exporter.count("unmap"),
        buf.resv.is_locked(),
        threading.active_count(),
    )


# -- the matrix (2.13a)


def test_static_with_static_maps_at_map_and_unmaps_at_unmap(static: Static, dev: Device) -> None:
    with dmabuf.export(static, SIZE) as buf:
        att = buf.attach(dev)
        assert static.calls == ["attach"]
        for _ in range(2):
            with att.mapped(TO) as sgt:
                assert static.tables == [sgt]
        assert static.calls == ["attach", ("map", TO), ("unmap", TO), ("map", TO), ("unmap", TO)]
        att.detach()
        assert static.calls[5:] == ["detach"]


def test_static_exporter_maps_bidirectional_when_dynamic_attaches(static: Static, dev: Device, tl: Timeline) -> None:
    with dmabuf.export(static, SIZE) as buf:
        fence = tl.fence()
        add(buf.resv, fence, Usage.KERNEL)
        att = buf.attach(dev, Mover())
        assert static.calls == ["attach", ("map", BIDIR)]
        with att.mapped(TO) as one, att.mapped(FROM) as two:
            assert one is two
        assert static.count("map") == 1
        att.detach()
        assert static.calls[2:] == [("unmap", BIDIR), "detach"]
        fence.signal()


def test_dynamic_exporter_pins_and_maps_when_static_attaches(dynamic: Dynamic, dev: Device, tl: Timeline) -> None:
    with dmabuf.export(dynamic, SIZE) as buf:
        fence = tl.fence()
        add(buf.resv, fence, Usage.KERNEL)
        with Background(lambda: buf.attach(dev)) as job:
            job.until_blocked()
            assert not job.done
            assert dynamic.calls == ["attach", "pin", ("map", BIDIR)]
            fence.signal()
            att = job.result()
        with att.mapped(TO), att.mapped(FROM):
            pass
        assert dynamic.count("map") == 1
        att.detach()
        assert dynamic.calls[3:] == [("unmap", BIDIR), "unpin", "detach"]


def test_dynamic_with_dynamic_maps_at_map_and_pins_only_without_the_option(
    dynamic: Dynamic, dev: Device, tl: Timeline, move_notify: bool
) -> None:
    with dmabuf.export(dynamic, SIZE) as buf:
        fence = tl.fence()
        add(buf.resv, fence, Usage.KERNEL)  # not waited for
        att = buf.attach(dev, Mover())
        assert dynamic.calls == ["attach"]
        with att.mapped(FROM):
            assert dynamic.calls[1:] == ([] if move_notify else ["pin"]) + [("map", FROM)]
        assert dynamic.calls[-1:] == ([("unmap", FROM)] if move_notify else ["unpin"])
        assert dynamic.pins == 0
        att.detach()
        fence.signal()


def test_what_was_mapped_with_a_pin_or_without_is_unmapped_so_though_the_option_changed(
    dynamic: Dynamic, dev: Device, move_notify: bool
) -> None:
    with dmabuf.export(dynamic, SIZE) as buf:
        att = buf.attach(dev, Mover())
        sgt = att.map_unlocked(TO)
        with attachments.moving(not move_notify):
            att.unmap_unlocked(sgt, TO)
        assert (dynamic.count("pin"), dynamic.pins) == (not move_notify, 0)
        att.detach()


def test_a_caching_exporter_maps_once_until_detach(static: Static, dev: Device) -> None:
    with dmabuf.export(static, SIZE, cache_sgt_mapping=True) as buf:
        att = buf.attach(dev)
        with buf.resv.locked():
            one = att.map(TO)
            att.unmap(one, TO)
            assert att.map(TO) is one
            with raises_errno(errno.EBUSY):
                att.map(FROM)
            with raises_errno(errno.EBUSY):
                att.map(BIDIR)
        assert static.calls == ["attach", ("map", TO)]
        att.detach()
        assert static.calls[2:] == [("unmap", TO), "detach"]


def test_a_kept_bidirectional_table_serves_every_direction(static: Static, dev: Device) -> None:
    with dmabuf.export(static, SIZE, cache_sgt_mapping=True) as buf:
        att = buf.attach(dev)
        assert att.map_unlocked(BIDIR) is att.map_unlocked(TO) is att.map_unlocked(FROM)
        att.detach()


def test_the_kept_table_waits_for_no_fence(static: Static, dev: Device, tl: Timeline) -> None:
    with dmabuf.export(static, SIZE, cache_sgt_mapping=True) as buf:
        att = buf.attach(dev)
        att.map_unlocked(TO)
        fence = tl.fence()
        add(buf.resv, fence, Usage.KERNEL)
        att.map_unlocked(TO)
        fence.signal()
        att.detach()


@pytest.mark.parametrize("usage", [Usage.WRITE, Usage.READ, Usage.BOOKKEEP], ids=lambda usage: usage.name)
def test_a_static_importer_waits_for_no_other_fences(static: Static, dev: Device, tl: Timeline, usage: Usage) -> None:
    with dmabuf.export(static, SIZE) as buf:
        fence = tl.fence()
        add(buf.resv, fence, usage)
        att = buf.attach(dev)
        with att.mapped(TO):
            assert not fence.is_signaled()
        fence.signal()
        att.detach()


# -- signals end the wait, and nothing is left mapped


@pytest.mark.parametrize("raising", [False, True], ids=["EINTR", "the handler raises"])
def test_an_interrupted_map_leaves_nothing_mapped(static: Static, dev: Device, tl: Timeline, raising: bool) -> None:
    with dmabuf.export(static, SIZE) as buf:
        att = buf.attach(dev)
        fence = tl.fence()
        add(buf.resv, fence, Usage.KERNEL)
        before = state(buf, static, dev)
        error = interrupted(lambda: att.map_unlocked(TO, interruptible=not raising), raising=raising)
        assert isinstance(error, Interrupt) if raising else getattr(error, "errno", 0) == errno.EINTR
        assert state(buf, static, dev) == before
        assert att.statistics().mapped == 0
        fence.signal()
        att.detach()


@pytest.mark.parametrize("raising", [False, True], ids=["EINTR", "the handler raises"])
def test_an_interrupted_attach_leaves_nothing_attached(dynamic: Dynamic, dev: Device, tl: Timeline, raising: bool) -> None:
    with dmabuf.export(dynamic, SIZE) as buf:
        fence = tl.fence()
        add(buf.resv, fence, Usage.KERNEL)
        before = state(buf, dynamic, dev)
        error = interrupted(lambda: buf.attach(dev, interruptible=not raising), raising=raising)
        assert isinstance(error, Interrupt) if raising else getattr(error, "errno", 0) == errno.EINTR
        assert state(buf, dynamic, dev) == before
        assert dynamic.calls == ["attach", "pin", ("map", BIDIR), ("unmap", BIDIR), "unpin", "detach"]
        fence.signal()


# -- failures leave the state as it was


def test_an_attachment_that_the_exporter_refused_cannot_be_used(static: Static, dev: Device) -> None:
    kept: list[DmaBufAttachment] = []
    static.during["attach"] = kept.append
    static.fails["attach"] = errno.EBUSY
    with dmabuf.export(static, SIZE) as buf:
        with raises_errno(errno.EBUSY):
            buf.attach(dev)
        (refused,) = kept
        assert not refused.attached
        with pytest.warns(ContractWarning), raises_errno(errno.EINVAL):
            refused.map_unlocked(TO)
        with pytest.warns(ContractWarning):
            refused.detach()
    assert static.calls == ["attach", "release"]


@pytest.mark.parametrize("op", ["attach", "pin", "map"])
def test_a_failing_attach_undoes_what_came_before(dynamic: Dynamic, dev: Device, op: str) -> None:
    with dmabuf.export(dynamic, SIZE) as buf:
        before = state(buf, dynamic, dev)
        dynamic.fails[op] = errno.EBUSY
        with raises_errno(errno.EBUSY):
            buf.attach(dev)
        done = [call for call in dynamic.calls if call not in ("detach", "unpin")]
        undone = dynamic.calls[len(done) :]
        assert undone == {"attach": [], "pin": ["detach"], "map": ["unpin", "detach"]}[op]
        dynamic.fails.clear()
        dynamic.calls.clear()
        assert state(buf, dynamic, dev)[:4] == before[:4]
        assert not buf.resv.is_locked()


@pytest.mark.parametrize(("op", "move_notify"), [("pin", False), ("map", False), ("map", True)], indirect=["move_notify"])
def test_a_failing_map_undoes_what_came_before(dynamic: Dynamic, dev: Device, op: str, move_notify: bool) -> None:
    with dmabuf.export(dynamic, SIZE) as buf:
        att = buf.attach(dev, Mover())
        before = state(buf, dynamic, dev)
        dynamic.calls.clear()
        dynamic.fails[op] = errno.ENOSPC
        with raises_errno(errno.ENOSPC):
            att.map_unlocked(TO)
        assert dynamic.calls == ([("map", TO)] if move_notify else {"pin": ["pin"], "map": ["pin", ("map", TO), "unpin"]}[op])
        dynamic.fails.clear()
        dynamic.calls[:] = ["attach"]
        assert state(buf, dynamic, dev) == before
        att.detach()


def test_a_map_that_returns_no_table_is_enomem(dev: Device) -> None:
    class Empty(Dynamic):
        def map(self, attachment: DmaBufAttachment, direction: Direction) -> SgTable | None:
            return None

    exporter = Empty()
    with dmabuf.export(exporter, SIZE) as buf:
        with raises_errno(errno.ENOMEM):
            buf.attach(dev)
        assert exporter.pins == 0
        assert buf.statistics().attachments == 0
    exporter.close()


def test_an_exception_that_is_no_oserror_undoes_all_the_same(dynamic: Dynamic, dev: Device) -> None:
    with dmabuf.export(dynamic, SIZE) as buf:
        dynamic.fails["map"] = KeyError("bug")
        with pytest.raises(KeyError):
            buf.attach(dev)
        assert (dynamic.pins, dynamic.calls[-1], buf.statistics().attachments) == (0, "detach", 0)


def test_a_failing_pin_is_told(dynamic: Dynamic, dev: Device) -> None:
    with dmabuf.export(dynamic, SIZE) as buf:
        att = buf.attach(dev, Mover())
        dynamic.fails["pin"] = errno.ENOMEM
        with raises_errno(errno.ENOMEM), buf.resv.locked():
            att.pin()
        assert not buf.resv.is_locked()
        att.detach()


def test_an_exporter_without_attach_and_detach_is_attached_to(bare: Bare, dev: Device) -> None:
    with dmabuf.export(bare, SIZE) as buf:
        att = buf.attach(dev)
        with att.mapped(TO):
            assert bare.calls == [("map", TO)]
        att.detach()


# -- pin, move_notify


def test_pin_of_a_static_attachment_warns_and_goes_on(dynamic: Dynamic, dev: Device) -> None:
    with dmabuf.export(dynamic, SIZE) as buf:
        att = buf.attach(dev)
        with buf.resv.locked():
            with pytest.warns(ContractWarning):
                att.pin()
            with pytest.warns(ContractWarning):
                att.unpin()
        assert (dynamic.count("pin"), dynamic.count("unpin")) == (2, 1)
        att.detach()


def test_pin_without_an_op_does_nothing(static: Static, dev: Device) -> None:
    with dmabuf.export(static, SIZE) as buf:
        att = buf.attach(dev, Mover())
        with buf.resv.locked():
            att.pin()
            att.unpin()
        att.detach()


def test_move_notify_reaches_dynamic_attachments_newest_first(dynamic: Dynamic, dev: Device) -> None:
    with dmabuf.export(dynamic, SIZE) as buf:
        importer = Mover()
        one, still, two = buf.attach(dev, importer), buf.attach(dev), buf.attach(dev, importer)
        with buf.resv.locked():
            buf.move_notify()
        assert importer.moved == [two, one]
        assert importer.locked == [True, True]
        for att in (one, still, two):
            att.detach()
        importer.moved.clear()


def test_notify_moves_without_the_lock_is_a_contract_error(dynamic: Dynamic, dev: Device) -> None:
    with dmabuf.export(dynamic, SIZE) as buf:
        importer = Mover()
        att = buf.attach(dev, importer)
        with pytest.raises(ContractError, match="its reservation lock is not held"):
            attachments.notify_moves(handle_of(buf).shared.ensure_backing())
        assert importer.moved == []
        att.detach()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_importer_that_fails_keeps_the_others_from_nothing(dynamic: Dynamic, dev: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Importer):
        def move_notify(self, attachment: DmaBufAttachment) -> None:
            raise KeyError

    told: list[object] = []
    monkeypatch.setattr("sys.unraisablehook", lambda info: told.append(info.exc_type))
    with dmabuf.export(dynamic, SIZE) as buf:
        importer = Mover()
        one, two = buf.attach(dev, importer), buf.attach(dev, Broken())
        with buf.resv.locked():
            buf.move_notify()
        assert importer.moved == [one]
        assert told == [KeyError]
        one.detach()
        two.detach()
        importer.moved.clear()


def test_move_notify_must_not_take_the_lock(dynamic: Dynamic, dev: Device) -> None:
    class Greedy(Mover):
        def move_notify(self, attachment: DmaBufAttachment) -> None:
            with pytest.warns(ContractWarning), raises_errno(errno.EDEADLK):
                attachment.dmabuf.resv.lock()
            super().move_notify(attachment)

    with dmabuf.export(dynamic, SIZE) as buf:
        importer = Greedy()
        att = buf.attach(dev, importer)
        with buf.resv.locked():
            buf.move_notify()
        assert importer.moved == [att]
        att.detach()
        importer.moved.clear()


# -- plain buffers


def test_a_plain_buffer_is_attached_and_used_by_dma_address(buf: DmaBuf, dev: Device) -> None:
    att = buf.attach(dev)
    with buf.write() as view:
        view[:5] = b"hello"
    with att.mapped(BIDIR) as sgt:
        ((address, length),) = sgt
        assert (length, address % PAGE, dev.read(address, 5)) == (buf.size, 0, b"hello")
        dev.write(address + buf.size - 1, b"!")
    with raises_errno(errno.EFAULT):
        dev.read(address, 5)
    with buf.read() as view:
        assert view[-1:] == b"!"
    att.detach()
    assert dev.statistics().windows == 0


def test_a_plain_buffer_is_static(buf: DmaBuf, dev: Device) -> None:
    assert not buf.is_dynamic
    att = buf.attach(dev, Mover())
    assert att.statistics().cached
    att.detach()


def test_an_attachment_goes_with_its_buffer_when_nobody_detaches(dev: Device) -> None:
    buf = dmabuf.allocate(PAGE)
    att = buf.attach(dev)
    sgt = att.map_unlocked(TO)
    att.unmap_unlocked(sgt, TO)
    buf.close()
    del att, sgt  # the fixture of every test looks for what is left


def test_peer2peer_comes_from_the_importer_and_the_exporter_may_refuse_it(static: Static, dev: Device) -> None:
    def refuse(att: DmaBufAttachment) -> None:
        att.peer2peer = False

    with dmabuf.export(static, SIZE) as buf:
        for importer, expected in [(None, False), (Mover(), False), (Mover(allow_peer2peer=True), True)]:
            att = buf.attach(dev, importer)
            assert att.peer2peer is expected
            att.detach()
        static.during["attach"] = refuse
        att = buf.attach(dev, Mover(allow_peer2peer=True))
        assert att.peer2peer is False
        att.detach()
