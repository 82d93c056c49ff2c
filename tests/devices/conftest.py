"""Devices and buffers that most tests here start from."""

from collections.abc import Iterator

import pytest

import dmabuf
from dmabuf import sim
from tests.support.drivers import PAGE, Dynamic

SIZE = 4 * PAGE


@pytest.fixture
def buf() -> Iterator[dmabuf.DmaBuf]:
    with dmabuf.allocate(SIZE) as made:
        yield made


@pytest.fixture
def other_buf() -> Iterator[dmabuf.DmaBuf]:
    with dmabuf.allocate(SIZE) as made:
        yield made


@pytest.fixture
def tl() -> Iterator[dmabuf.Timeline]:
    with dmabuf.Timeline("test") as made:
        yield made


@pytest.fixture
def dynamic() -> Iterator[Dynamic]:
    made = Dynamic(SIZE)
    yield made
    made.close()


@pytest.fixture
def engine(buf: dmabuf.DmaBuf, other_buf: dmabuf.DmaBuf, dynamic: Dynamic) -> Iterator[sim.Engine]:
    """Closed before the buffers are; a job that a failed test left hanging is cancelled."""
    made = sim.Engine("dma0")
    yield made
    made.close(cancel=True)


@pytest.fixture
def queue(engine: sim.Engine) -> sim.EngineQueue:
    return engine.queue("q")
