"""Asking for an errno."""

import contextlib
import errno
from collections.abc import Iterator

import pytest


@contextlib.contextmanager
def raises_errno(number: int, kind: type[OSError] = OSError) -> Iterator[pytest.ExceptionInfo[OSError]]:
    """The block raises an OSError of this errno; `kind` asks for a class as well."""
    with pytest.raises(kind) as caught:
        yield caught
    got = caught.value.errno
    assert got == number, f"{errno.errorcode[number]} was expected, not {errno.errorcode.get(got or 0, got)}: {caught.value}"
