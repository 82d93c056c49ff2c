"""Drivers with types work as they are checked."""

import pytest

import dmabuf
from dmabuf import Device, Direction
from tests.support.typed_drivers import NamesClasses, NamesProtocols, Notified

SIZE = 4096


@pytest.mark.parametrize("kind", [NamesClasses, NamesProtocols])
def test_typed_exporter_gets_the_classes_that_its_ops_name(kind: type[NamesClasses]) -> None:
    exporter = kind(SIZE)
    with dmabuf.export(exporter, SIZE, name="typed") as buf:
        attachment = buf.attach(Device("npu0"))
        with attachment.mapped(Direction.TO_DEVICE) as sgt:
            assert sgt.size == SIZE
        attachment.detach()
    assert exporter.released == ["typed"]


def test_typed_importer_gets_its_attachment_at_a_move() -> None:
    importer = Notified()
    with dmabuf.export(NamesClasses(SIZE), SIZE) as buf:
        attachment = buf.attach(Device("npu0"), importer)
        with buf.resv.locked():
            buf.move_notify()
        assert importer.moves == [attachment]
        attachment.detach()
