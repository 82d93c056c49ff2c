"""Every crash test logs the named steps of its processes, and the protocol's machines accept the log or refuse it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dmabuf import Domain
from tests.support import protocol
from tests.support.children import Child, Parent, Spawn
from tests.support.forks import Scene
from tests.support.tracing import Tracing, log_to


@pytest.fixture
def domain() -> Iterator[Domain]:
    """A domain that only this process is in, and those that it forks."""
    made = Domain.private()
    made.join()
    yield made
    made.leave()


@pytest.fixture
def scene() -> Iterator[Scene]:
    """What the tests of forks start with; the other files here have scenes of their own."""
    made = Scene()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def tracing() -> Iterator[Tracing]:
    """Log what this process does and those that it forks; a log that the protocol doesn't allow fails the test."""
    with Tracing() as made:
        yield made
    # After the processes of the test have ended.
    protocol.check(made.entries())


@pytest.fixture
def child(child: Spawn, tracing: Tracing) -> Spawn:
    """Children that are started anew log too."""

    def start(function: Callable[..., Any], /, *arguments: Any, **keywords: Any) -> Child:
        return child(_logged, tracing.path, function, *arguments, **keywords)

    return start


def _logged(parent: Parent, path: Path, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    log_to(path)
    return function(parent, *arguments, **keywords)
