"""Every test in this directory needs the guest that `make test-kernel` starts."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import dmabuf
from tests.support.kernel_homes import HOMES, made

_HERE = Path(__file__).parent
# The guest's name, as 6.12.117-uml; set by tools/kernel.
GUEST = os.environ.get("DMABUF_KERNEL")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker(pytest.mark.kernel)
            if GUEST is None:
                item.add_marker(pytest.mark.skip(reason="asks a kernel in a guest: make test-kernel"))


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
