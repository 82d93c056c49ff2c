"""Every test in this directory needs the guest that `make test-kernel` starts."""

import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

import dmabuf
from dmabuf.drivers.drm import DrmNode, DumbBuffer
from dmabuf.drivers.sw_sync import SwSyncTimeline
from tests.support.kernel_homes import HOMES, made

_HERE = Path(__file__).parent
SW_SYNC = "/sys/kernel/debug/sync/sw_sync"
# The guest's name, as 6.12.117-uml; set by tools/kernel.
GUEST = os.environ.get("DMABUF_KERNEL")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker(pytest.mark.kernel)
            if GUEST is None:
                item.add_marker(pytest.mark.skip(reason="asks a kernel in a guest: make test-kernel"))


def _without_sw_sync() -> Generator[None, None, None]:
    """Debian's images have no sw_sync: what needs it is skipped there, wherever in the test it was missed."""
    try:
        yield
    except FileNotFoundError as e:
        if SW_SYNC not in str(e) or os.path.exists(SW_SYNC):
            raise
    else:
        return
    pytest.skip("this kernel is built without sw_sync")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, None, None]:
    yield from _without_sw_sync()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    yield from _without_sw_sync()


def pytest_runtest_logstart(nodeid: str) -> None:
    """Tell the host what begins: the last it heard of is what hung."""
    if GUEST is not None:
        with open("/dev/console", "w", encoding="utf-8") as console:
            console.write(f"@@NOW {nodeid}\n")


@pytest.fixture(params=HOMES)
def home(request: pytest.FixtureRequest) -> str:
    """Each home of a real dma-buf."""
    name: str = request.param
    return name


@pytest.fixture
def buf(home: str) -> Iterator[dmabuf.DmaBuf]:
    with made(home) as here:
        yield here


@pytest.fixture
def kernel_timeline() -> Iterator[SwSyncTimeline]:
    if not os.path.exists(SW_SYNC):
        pytest.skip("this kernel has no sw_sync: KERNEL=uml or full")
    with SwSyncTimeline() as timeline:
        yield timeline


@pytest.fixture
def node() -> Iterator[DrmNode]:
    """A node of vgem's, which is a driver without a device."""
    with DrmNode.of("vgem") as opened:
        yield opened


@pytest.fixture
def dumb(node: DrmNode) -> Iterator[DumbBuffer]:
    """16 KiB that vgem made."""
    with node.create_dumb(64, 64) as opened:
        yield opened
