"""Devices and buffers that most tests here start from."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

import dmabuf
from dmabuf import sim
from dmabuf.devices.disk import BLOCK
from tests.conformance.conftest import buf as buf
from tests.conformance.conftest import dynamic as dynamic
from tests.conformance.conftest import other_buf as other_buf
from tests.conformance.conftest import tl as tl
from tests.support.drivers import Dynamic

BIG = 16 * BLOCK  # bytes of the buffer that files are read into and written from


@pytest.fixture
def engine(buf: dmabuf.DmaBuf, other_buf: dmabuf.DmaBuf, dynamic: Dynamic) -> Iterator[sim.Engine]:
    """Closed before the buffers are; a job that a failed test left hanging is cancelled."""
    made = sim.Engine("dma0")
    yield made
    made.close(cancel=True)


@pytest.fixture
def queue(engine: sim.Engine) -> sim.EngineQueue:
    return engine.queue("q")


@pytest.fixture
def big() -> Iterator[dmabuf.DmaBuf]:
    with dmabuf.allocate(BIG) as made:
        yield made


@pytest.fixture(params=[True, False], ids=["direct", "buffered"])
def disk(request: pytest.FixtureRequest, big: dmabuf.DmaBuf) -> Iterator[dmabuf.DiskDevice]:
    made = dmabuf.DiskDevice("disk0", direct=request.param)
    yield made
    made.close(cancel=True)


@pytest.fixture
def plain(big: dmabuf.DmaBuf) -> Iterator[dmabuf.DiskDevice]:
    made = dmabuf.DiskDevice("disk0")
    yield made
    made.close(cancel=True)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    made = tmp_path / "frames"
    made.write_bytes(random.Random(1).randbytes(BIG + 1000))
    return made
