"""Objects that most tests of the suite start from."""

import os
from collections.abc import Iterator
from multiprocessing import resource_sharer

import pytest

import dmabuf
from dmabuf.core.attach.attachment import moving
from tests.support.children import Spawn
from tests.support.drivers import Bare, Dynamic, Static
from tests.support.elsewhere import Place
from tests.support.lines import Here, There
from tests.support.loops import run  # noqa: F401  (a fixture)

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


@pytest.fixture(params=["here", "there"])
def line(request: pytest.FixtureRequest, child: Spawn) -> Iterator[Here]:
    """Where fences come from: this process, or another."""
    made = Here() if request.param == "here" else There(child)
    yield made
    made.end()


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


@pytest.fixture(params=["here", "elsewhere"])
def place(request: pytest.FixtureRequest, child: Spawn) -> Place:
    """Where a buffer is used: in this process, and in another one."""
    return Place(child, request.param == "here")


@pytest.fixture(params=[True, False], ids=["move notify on", "move notify off"])
def move_notify(request: pytest.FixtureRequest) -> Iterator[bool]:
    """CONFIG_DMABUF_MOVE_NOTIFY in this process, and in the children that the test starts: semantics 2.13a has a row for each."""
    on: bool = request.param
    with moving(on):
        yield on


@pytest.fixture
def fence(tl: dmabuf.Timeline) -> dmabuf.DmaFence:
    return tl.fence()


@pytest.fixture
def sf(fence: dmabuf.DmaFence) -> Iterator[dmabuf.SyncFile]:
    with dmabuf.SyncFile(fence) as made:
        yield made


@pytest.fixture
def merged(tl: dmabuf.Timeline, other_tl: dmabuf.Timeline) -> Iterator[tuple[dmabuf.SyncFile, dmabuf.DmaFence, dmabuf.DmaFence]]:
    a, b = tl.fence(), other_tl.fence()
    with dmabuf.SyncFile(a) as one, dmabuf.SyncFile(b) as two, one.merge(two, "both") as both:
        yield both, a, b


@pytest.fixture
def sem() -> Iterator[dmabuf.TimelineSemaphore]:
    with dmabuf.TimelineSemaphore() as made:
        yield made


@pytest.fixture
def fences(tl: dmabuf.Timeline) -> list[dmabuf.DmaFence]:
    return [tl.fence() for _ in range(5)]


@pytest.fixture
def event() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


@pytest.fixture
def sharer_ends() -> Iterator[None]:
    """multiprocessing keeps a thread and a socket for descriptors on their way; end them with the test."""
    yield
    resource_sharer.stop()
