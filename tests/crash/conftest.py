"""What the tests of forks start with; the other files here have scenes of their own."""

from collections.abc import Iterator

import pytest

from tests.support.forks import Scene


@pytest.fixture
def scene() -> Iterator[Scene]:
    made = Scene()
    yield made
    made.close()
