"""Memory for the tests of the native extension."""

import os
from collections.abc import Iterator

import pytest

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
