"""Descriptors that somebody else closes, and whose numbers a file of the program gets."""

import os
import tempfile

CONTENT = b"precious" * 512


def replaced(number: int) -> None:
    """Have a file of the program under the number."""
    with tempfile.TemporaryFile(buffering=0) as file:
        file.write(CONTENT)
        os.dup2(file.fileno(), number)


def untouched(number: int) -> bool:
    """Return True if the file of :func:`replaced` is still there, and as it was."""
    return os.fstat(number).st_size == len(CONTENT) and os.pread(number, len(CONTENT), 0) == CONTENT
