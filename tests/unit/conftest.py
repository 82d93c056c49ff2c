"""Memory and domains for the tests of parts."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import dmabuf
from dmabuf._native import Mapping
from tests.support.mappings import SIZE


@pytest.fixture
def fd() -> Iterator[int]:
    number = os.memfd_create("test-mapping", os.MFD_CLOEXEC)
    os.truncate(number, SIZE)
    yield number
    os.close(number)


@pytest.fixture
def mapping(fd: int) -> Iterator[Mapping]:
    with Mapping(fd, SIZE) as opened:
        yield opened


@pytest.fixture
def domain() -> Iterator[dmabuf.Domain]:
    made = dmabuf.Domain.private()
    made.join()
    yield made
    made.leave()


@pytest.fixture
def where() -> Iterator[Path]:
    """A path for a domain, in memory where there is such a mount."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="place-", dir=base) as directory:
        yield Path(directory) / "domain"
