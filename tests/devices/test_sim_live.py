"""A device on a buffer whose exporter is another process: its ops are called there, the bytes are the same."""

import errno
import zlib
from typing import Any

import pytest

import dmabuf
from dmabuf import sim
from tests.support.children import Parent, Spawn
from tests.support.drivers import Dynamic
from tests.support.engines import SIZE
from tests.support.errnos import raises_errno
from tests.support.partners import give, take
from tests.support.waiting import until


def fills_and_sums(parent: Parent) -> tuple[int, int, int]:
    with take(parent) as buf, sim.Engine("elsewhere") as engine:
        queue, attached = engine.queue(), engine.attach(buf)
        assert queue.fill(attached, 7).wait() == SIZE
        parent.send("filled")
        parent.recv()
        crc = queue.checksum(attached).wait()
        found = attached.statistics()
        engine.close()
    return crc, found.moves, found.maps


def test_device_of_another_process_uses_exporters_memory_across_moves(child: Spawn, dynamic: Dynamic) -> None:
    with dmabuf.export(dynamic, SIZE) as buf:
        other = child(fills_and_sums)
        give(other, buf)
        assert other.recv() == "filled"
        assert dynamic.whole[:] == b"\7" * SIZE
        with buf.resv.locked():
            buf.move_notify()
            buf.resv.wait(dmabuf.Usage.BOOKKEEP)
            dynamic.whole[:] = b"\1" * SIZE
        until(lambda: dynamic.count("unmap"))
        other.send("moved")
        assert other.result() == (zlib.crc32(b"\1" * SIZE), 1, 2)
    assert (dynamic.pins, dynamic.tables) == (0, [])


def test_attached_counts_a_move_that_comes_as_it_attaches(dynamic: Dynamic, engine: sim.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    attach = dmabuf.DmaBuf.attach

    def attach_and_move(buf: dmabuf.DmaBuf, *args: Any) -> Any:
        made = attach(buf, *args)
        with buf.resv.locked():
            buf.move_notify()
        return made

    monkeypatch.setattr(dmabuf.DmaBuf, "attach", attach_and_move)
    with dmabuf.export(dynamic, SIZE) as buf, engine.attach(buf) as attached:
        assert attached.statistics().moves == 1


def exports(parent: Parent) -> None:
    exporter = Dynamic(SIZE)
    buf = dmabuf.export(exporter, SIZE)
    give(parent, buf)
    parent.recv()


def test_when_the_exporter_is_killed_the_device_goes_on_with_other_buffers(child: Spawn, engine: sim.Engine, buf: dmabuf.DmaBuf) -> None:
    other = child(exports)
    theirs, queue = take(other), engine.queue()
    attached = engine.attach(theirs)
    assert queue.fill(attached, 1).wait() == SIZE
    other.kill()
    assert queue.fill(buf, 3).wait() == SIZE
    with raises_errno(errno.ENODEV):
        engine.attach(theirs)
    engine.close()
    assert engine.statistics().attached == 0
    theirs.close()
