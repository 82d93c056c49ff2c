"""A part of a test in a small process with a domain of its own.

The process of a test run has imported everything and keeps thousands of tests, so each fork of it costs several times as much as one of a
process that has imported little. A test that forks hundreds of times does it here::

    def test_many_forks(apart: Apart) -> None:
        assert apart(forks_a_lot, 500) == 0
"""

import os
from collections.abc import Callable
from typing import ParamSpec, Protocol, TypeVar, cast

from tests.support.children import Parent, Spawn

P = ParamSpec("P")
T = TypeVar("T")


class Apart(Protocol):
    """The `apart` fixture: call a function of a module in a process of its own, and return what it returns."""

    def __call__(self, function: Callable[P, T], /, *arguments: P.args, **keywords: P.kwargs) -> T: ...


class _Apart:
    def __init__(self, child: Spawn, domain: str) -> None:
        self._child, self._domain = child, domain

    def __call__(self, function: Callable[P, T], /, *arguments: P.args, **keywords: P.kwargs) -> T:
        return cast("T", self._child(_call, self._domain, function, arguments, keywords).result())


def apart(child: Spawn, domain: str) -> Apart:
    """Start the processes with `child`, with this directory as their default domain."""
    return _Apart(child, domain)


def _call(_: Parent, domain: str, function: Callable[..., object], arguments: tuple[object, ...], keywords: dict[str, object]) -> object:
    # No module that a child has imported has opened the default domain.
    os.environ["DMABUF_DOMAIN"] = domain
    return function(*arguments, **keywords)
