"""Devices and buffers that most tests here start from."""

from collections.abc import Iterator

import pytest

import dmabuf
from dmabuf import sim
from tests.conformance.conftest import buf as buf
from tests.conformance.conftest import dynamic as dynamic
from tests.conformance.conftest import other_buf as other_buf
from tests.conformance.conftest import tl as tl
from tests.support.drivers import Dynamic


@pytest.fixture
def engine(buf: dmabuf.DmaBuf, other_buf: dmabuf.DmaBuf, dynamic: Dynamic) -> Iterator[sim.Engine]:
    """Closed before the buffers are; a job that a failed test left hanging is cancelled."""
    made = sim.Engine("dma0")
    yield made
    made.close(cancel=True)


@pytest.fixture
def queue(engine: sim.Engine) -> sim.EngineQueue:
    return engine.queue("q")
