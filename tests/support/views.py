"""What the tests of views start from: a buffer with known bytes, and a view of it."""

import contextlib
import gc
from collections.abc import Iterator
from typing import Final

import dmabuf
from dmabuf import DmaBuf, View

SIZE: Final = 4096
BYTES: Final = bytes(i * 7 % 256 for i in range(SIZE))


@contextlib.contextmanager
def filled() -> Iterator[DmaBuf]:
    """A buffer of `SIZE` bytes, which are `BYTES`."""
    with dmabuf.allocate(SIZE) as made:
        with made.write() as view:
            view[:] = BYTES
        yield made


@contextlib.contextmanager
def written(buf: DmaBuf) -> Iterator[View]:
    """The view of a write() block. What was made of it and is in a cycle is gone before the block ends, so that no warning comes."""
    with buf.write() as made:
        yield made
        gc.collect()
