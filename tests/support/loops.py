"""Both kinds of event loops, as anyio runs them. A test file that takes `run` has it from its directory's conftest."""

from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

import dmabuf
from dmabuf.domain.dispatcher import dispatcher

Run = Callable[[Callable[[], Awaitable[Any]]], Any]


@pytest.fixture(params=["asyncio", "trio"])
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    """Runs an async function in a loop of each kind."""
    backend = request.param
    anyio = pytest.importorskip("anyio")
    if backend == "trio":
        pytest.importorskip("trio")
    yield lambda main: anyio.run(main, backend=backend)
    assert dispatcher(dmabuf.Domain.default()).watching == 0
