"""The one release of an exporter's buffer, and what keeps it away; owners and reservation objects (semantics 2.1-2.6)."""

import errno
import gc
import os
import queue
import socket
import sys
import threading
from collections.abc import Callable

import pytest

import dmabuf
from dmabuf import ContractError, ContractWarning, Device, DmaResv, Domain, Timeline, Usage
from dmabuf.core.export import exported
from dmabuf.core.export.module import Module
from tests.support.children import Parent, Spawn
from tests.support.drivers import FROM, PAGE, Dynamic, Mover, Static
from tests.support.errnos import raises_errno
from tests.support.fences import attach as add
from tests.support.partners import handed
from tests.support.steps import fork, reap
from tests.support.waiting import Background, until

SIZE = 4 * PAGE


# -- the release


def test_it_is_released_once_when_the_last_handle_closes(static: Static) -> None:
    buf = dmabuf.export(static, SIZE)
    other, third = dmabuf.get(buf.fileno()), buf.get_dma_buf()
    for handle in (buf, other):
        handle.close()
        assert static.calls == []
    third.close()
    assert static.calls == ["release"]
    domain = Domain.default()
    domain.sweep()
    assert static.calls == ["release"]


def test_release_tells_who_it_was(static: Static) -> None:
    seen: list[object] = []
    buf = dmabuf.export(static, SIZE, name="cam")
    static.during["release"] = lambda last: seen.append((last.ino, last.name, last.size, last.exp_name))
    expected = (buf.ino, "cam", SIZE, "drivers")
    buf.close()
    assert seen == [expected]


@pytest.mark.parametrize("how", ["dup", "detach"])
def test_a_bare_descriptor_keeps_it(static: Static, how: str) -> None:
    buf = dmabuf.export(static, SIZE)
    fd = buf.dup() if how == "dup" else buf.detach()
    buf.close()
    assert static.calls == []
    with dmabuf.get(fd) as again:
        assert again.home == "exported"
        assert again.begin_cpu_access(FROM) is None
    assert static.count("release") == 0
    os.close(fd)
    Domain.default().sweep()
    until(lambda: static.count("release"))


def test_a_mapping_keeps_it(static: Static) -> None:
    buf = dmabuf.export(static, SIZE)
    mapping = buf.mmap()
    buf.close()
    Domain.default().sweep()
    assert static.count("release") == 0
    mapping.close()
    Domain.default().sweep()
    until(lambda: static.count("release"))


def test_a_descriptor_in_flight_keeps_it(static: Static) -> None:
    one, two = socket.socketpair()
    with one, two:
        buf = dmabuf.export(static, SIZE)
        dmabuf.send(one, buf)
        buf.close()
        Domain.default().sweep()
        assert static.count("release") == 0
        (again,) = dmabuf.recv(two)
        with again.read() as view:
            assert len(view) == SIZE
        again.close()
    assert static.count("release") == 1


def hold(parent: Parent) -> None:
    (buf,) = dmabuf.recv(parent.sock)
    parent.send((buf.ino, buf.name, buf.exp_name, buf.home, buf.size))
    with buf.mmap() as mapping:
        mapping[0] = 7
    parent.send((len(buf.resv.fences(Usage.BOOKKEEP)), buf.poll(1)))
    parent.recv()
    buf.close()
    parent.send("closed")
    parent.recv()


@pytest.mark.parametrize("own", [True, False], ids=["its own reservation object", "a given one"])
def test_another_process_keeps_it_and_uses_its_exporter(static: Static, child: Spawn, tl: Timeline, own: bool) -> None:
    buf = dmabuf.export(static, SIZE, name="cam", resv=None if own else DmaResv())
    fence = tl.fence()
    add(buf.resv, fence, Usage.WRITE)
    other = handed(child(hold), buf)
    assert other.recv() == (buf.ino, "cam", "drivers", "exported", SIZE)
    assert other.recv() == (1, 0)
    assert static.whole[0] == 7
    buf.close()
    Domain.default().sweep()
    assert static.count("release") == 0
    other.send("close")
    assert other.recv() == "closed"
    fence.signal()  # until then a busy poll holds it
    until(lambda: static.count("release"))
    other.send("end")


def killed_holder(parent: Parent) -> None:
    kept = dmabuf.recv(parent.sock)
    parent.send(len(kept))
    parent.recv()


def test_the_death_of_the_last_holder_releases_it(static: Static, child: Spawn) -> None:
    buf = dmabuf.export(static, SIZE)
    other = handed(child(killed_holder), buf)
    assert other.recv() == 1
    buf.close()
    assert static.count("release") == 0
    other.kill()
    until(lambda: static.count("release"))


def test_release_is_put_off_while_the_caller_holds_a_reservation_lock(static: Static) -> None:
    buf, resv = dmabuf.export(static, SIZE), DmaResv()
    where: queue.SimpleQueue[int] = queue.SimpleQueue()
    static.during["release"] = lambda last: where.put(threading.get_ident())
    with resv.locked():
        buf.close()
        assert where.get() != threading.get_ident()


def test_release_is_put_off_out_of_a_callback(static: Static, tl: Timeline) -> None:
    buf = dmabuf.export(static, SIZE)
    where: queue.SimpleQueue[int] = queue.SimpleQueue()
    static.during["release"] = lambda last: where.put(threading.get_ident())
    fence = tl.fence()
    fence.add_callback(lambda _: buf.close())
    fence.signal()
    assert buf.closed
    assert where.get() != threading.get_ident()


def test_release_never_runs_in_the_garbage_collector(static: Static) -> None:
    buf = dmabuf.export(static, SIZE)
    where: queue.SimpleQueue[int] = queue.SimpleQueue()
    static.during["release"] = lambda last: where.put(threading.get_ident())
    del buf
    gc.collect()
    assert where.get() != threading.get_ident()


def test_close_of_last_handle_runs_release_while_releaser_thread_polls(static: Static, monkeypatch: pytest.MonkeyPatch) -> None:
    free, looks = exported.outside, list[Background[None]]()

    def outside() -> bool:
        if not looks:  # called as the handle is closed, before the release
            looks.append(Background(exported.EXPORTS.of(Domain.default()).release_orphans))
            looks[0].__enter__()
            looks[0].until_blocked()
        return free()

    where: list[int] = []
    static.during["release"] = lambda last: where.append(threading.get_ident())
    buf = dmabuf.export(static, SIZE)
    monkeypatch.setattr(exported, "outside", outside)
    buf.close()
    assert where == [threading.get_ident()]
    looks[0].__exit__(None)


def test_a_release_that_raises_is_told_and_the_rest_is_done(static: Static, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []
    monkeypatch.setattr("sys.unraisablehook", lambda info: told.append(info.exc_type))
    module = Module("vram")
    static.fails["release"] = errno.EIO
    dmabuf.export(static, SIZE, owner=module).close()
    assert told == [OSError]
    assert module.references == 0


def test_release_with_a_live_vmap_is_a_contract_error(static: Static) -> None:
    module = Module("vram")
    buf = dmabuf.export(static, SIZE, owner=module)
    map_ = buf.vmap_unlocked()
    with pytest.raises(ContractError, match="vmap"):
        buf.close()
    assert buf.closed
    assert static.calls == ["vmap"]
    map_.clear()


def test_release_with_attachments_warns(static: Static, dev: Device) -> None:
    buf = dmabuf.export(static, SIZE)
    buf.attach(dev)
    with pytest.warns(ContractWarning, match="npu0"):
        buf.close()
    assert static.calls == ["attach", "release"]


# -- reservation objects, owners


def test_a_given_reservation_object_is_the_buffers_and_outlives_it(static: Static, tl: Timeline) -> None:
    resv = DmaResv()
    with dmabuf.export(static, SIZE, resv=resv) as buf, dmabuf.export(static, SIZE, resv=resv) as other:
        assert buf.resv is resv is other.resv
        fence = tl.fence()
        add(resv, fence, Usage.WRITE)
        assert not buf.poll(1)
        assert not other.poll(1)
        fence.signal()
        with dmabuf.access(read=[buf, other]) as views:
            assert len(views) == 2
    assert resv.test_signaled(Usage.BOOKKEEP)


def test_the_owner_cannot_go_while_a_buffer_or_a_mapping_lives(static: Static) -> None:
    module = Module("vram")
    buf = dmabuf.export(static, SIZE, owner=module)
    mapping = buf.mmap()
    for step in (buf.close, mapping.close):
        with raises_errno(errno.EBUSY):
            module.unload()
        step()
    Domain.default().sweep()
    until(lambda: not module.references)
    module.unload()
    with raises_errno(errno.ENOENT):
        dmabuf.export(static, SIZE, owner=module)


def forked(parent: Parent) -> None:
    exporter = Static()
    buf = dmabuf.export(exporter, SIZE)
    pid = os.fork()
    if not pid:
        try:
            buf.begin_cpu_access(FROM)
            buf.end_cpu_access(FROM)
        except OSError as e:
            os._exit(e.errno or 255)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    buf.close()
    until(lambda: exporter.count("release"))
    parent.send((os.waitstatus_to_exitcode(status), exporter.calls))
    exporter.close()


def test_a_forked_child_asks_its_parent_as_any_process_does(child: Spawn) -> None:
    assert child(forked).recv() == (0, [("begin", FROM), ("end", FROM), "release"])


class ForksInPut(Module):
    """An owner that runs something in a forked child when its buffer's release has closed the last descriptor."""

    def __init__(self, action: Callable[[], object]) -> None:
        super().__init__("forks")
        self.action, self.code = action, -1

    def put(self) -> None:
        super().put()
        self.code = reap(fork(self.action))


def forks_in_a_release(parent: Parent) -> None:
    exporter = Static()

    def use_the_other() -> None:
        other.begin_cpu_access(FROM)
        other.end_cpu_access(FROM)

    owner = ForksInPut(use_the_other)
    first = dmabuf.export(exporter, SIZE, owner=owner)
    other = dmabuf.export(exporter, SIZE)
    sys.unraisablehook = lambda info: os._exit(1)  # an error while the child is being made
    first.close()
    parent.send((owner.code, [call for call in exporter.calls if call != "release"]))
    other.close()
    exporter.close()


def test_child_forked_during_a_release_uses_other_buffers_of_its_parent(child: Spawn) -> None:
    assert child(forks_in_a_release).recv() == (0, [("begin", FROM), ("end", FROM)])


def test_release_is_called_though_the_exporter_left_the_domain() -> None:
    domain = Domain.private()
    exporter = Static()
    buf = dmabuf.export(exporter, SIZE, domain=domain)
    domain.leave()
    buf.close()
    assert exporter.calls == ["release"]


def forks_after_leaving(parent: Parent) -> int:
    exporter = Static()
    for _ in range(2):
        with dmabuf.export(exporter, SIZE) as buf:
            dmabuf.send(parent.sock, buf)
            parent.recv()
    Domain.default().leave()
    parent.send("left")
    parent.recv()
    sys.unraisablehook = lambda info: os._exit(1)  # an error while the child is being made
    return reap(fork(lambda: None))


def test_child_can_be_forked_after_leaving_when_exported_buffers_are_gone(child: Spawn) -> None:
    other = child(forks_after_leaving)
    bufs = []
    for _ in range(2):
        bufs += dmabuf.recv(other.sock)
        other.send("have it")
    assert other.recv() == "left"
    inodes = {buf.ino for buf in bufs}
    for buf in bufs:
        buf.close()
    until(lambda: inodes.isdisjoint(record.ino for record in dmabuf.buffers()))
    other.send("fork")
    assert other.result() == 0


def test_a_dynamic_exporter_is_known_by_pin(static: Static, dynamic: Dynamic) -> None:
    with dmabuf.export(static, SIZE) as one, dmabuf.export(dynamic, SIZE) as two:
        assert (one.is_dynamic, two.is_dynamic) == (False, True)


def test_bufinfo_lists_attached_devices_by_name(static: Static) -> None:
    with dmabuf.export(static, SIZE, exp_name="vram") as buf:
        atts = [buf.attach(Device("gpu0")), buf.attach(Device("npu0"), Mover())]
        text = dmabuf.bufinfo()
        assert "\tvram\t" in text
        assert "\tAttached Devices:\n\tnpu0\n\tgpu0\nTotal 2 devices attached\n\n" in text
        for att in atts:
            att.detach()
        assert "Total 0 devices attached" in dmabuf.bufinfo()


def test_mapping_that_an_exporter_returns_twice_is_a_contract_warning(static: Static) -> None:
    kept = static.memory.mmap()
    static.mmap = lambda buf, offset, length: kept  # type: ignore[method-assign]
    with dmabuf.export(static, SIZE) as buf:
        one = buf.mmap()
        with pytest.warns(ContractWarning, match="its exporter returned a mapping that it had returned before; make a new one each time"):
            assert buf.mmap() is one
    kept.close()
