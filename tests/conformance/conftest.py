"""Objects that most tests of the suite start from."""

from collections.abc import Iterator

import pytest

import dmabuf
from tests.support.drivers import Bare, Dynamic, Static

# The facts of the kernel were asked with buffers of this size (bytes).
SIZE = 16384


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
    made = dmabuf.Timeline("test")
    yield made
    made.close()


@pytest.fixture
def other_tl() -> Iterator[dmabuf.Timeline]:
    made = dmabuf.Timeline("other")
    yield made
    made.close()


@pytest.fixture(params=["alone", "of a buffer"])
def resv(request: pytest.FixtureRequest) -> dmabuf.DmaResv:
    """A reservation object: one made by itself, and the one that a buffer brings."""
    if request.param == "alone":
        return dmabuf.DmaResv()
    made: dmabuf.DmaBuf = request.getfixturevalue("buf")
    return made.resv


@pytest.fixture(params=[Static, Dynamic], ids=["static", "dynamic"])
def either(request: pytest.FixtureRequest) -> Iterator[Static]:
    """An exporter of each kind."""
    made: Static = request.param()
    yield made
    made.close()


@pytest.fixture
def bare() -> Iterator[Bare]:
    made = Bare()
    yield made
    made.close()


@pytest.fixture
def static() -> Iterator[Static]:
    made = Static()
    yield made
    made.close()


@pytest.fixture
def dynamic() -> Iterator[Dynamic]:
    made = Dynamic()
    yield made
    made.close()


@pytest.fixture
def dev() -> dmabuf.Device:
    return dmabuf.Device("npu0")
