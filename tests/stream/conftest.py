"""Streams that most tests here start from."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

import dmabuf
from dmabuf import Stream
from tests.support.loops import run  # noqa: F401  (a fixture)

SIZE = 4096
_numbers = itertools.count()

Make = Callable[..., Stream]


@pytest.fixture
def name() -> str:
    """A name that no other test has."""
    return f"stream {next(_numbers)}"


@pytest.fixture
def make() -> Iterator[Make]:
    """Make streams, which are closed after the test."""
    with ExitStack() as stack:

        def made(name: str | None = None, **keywords: Any) -> Stream:
            return stack.enter_context(Stream.create(name, **{"size": SIZE, **keywords}))

        yield made


@pytest.fixture
def stream(make: Make) -> Stream:
    """A stream of 4 buffers whose producer waits."""
    return make()


@pytest.fixture
def dropping(make: Make) -> Stream:
    """A stream of 4 buffers whose producer drops."""
    return make(when_full="drop")


def put(stream: Stream, number: int) -> int:
    """Produce a frame with a number in it, without waiting. Its seq."""
    with stream.produce(timeout=0) as frame:
        frame.view[0] = number & 255
        return frame.seq


def content(frame: dmabuf.Frame) -> int:
    """The number in a frame."""
    return frame.view[0]
