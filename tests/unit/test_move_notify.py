"""``DMABUF_MOVE_NOTIFY``: memory may move while a dynamic importer has it mapped, unless the process was started otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CODE = """
import dmabuf
from tests.support.drivers import Dynamic
exporter = Dynamic()
class Importer(dmabuf.Importer):
    def move_notify(self, attachment): pass
with dmabuf.export(exporter, 4096) as buf:
    attachment = buf.attach(dmabuf.Device("npu0"), Importer())
    with attachment.mapped(dmabuf.Direction.TO_DEVICE):
        print(exporter.count("pin"))
    attachment.detach()
"""


@pytest.mark.parametrize(("given", "pins"), [(None, 0), ("1", 0), ("0", 1)])
def test_a_mapping_pins_only_where_the_option_is_off(given: str | None, pins: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "DMABUF_MOVE_NOTIFY"}
    if given is not None:
        environment["DMABUF_MOVE_NOTIFY"] = given
    told = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True)
    assert told.stdout == f"{pins}\n"
