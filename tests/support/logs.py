"""What the package logs."""

import contextlib
import logging
import threading
from collections.abc import Iterator


class Log(logging.Handler):
    """What the logger ``dmabuf`` was given, and in which threads."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.threads: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.threads.append(threading.current_thread().name)
        self.texts.append(record.getMessage())


@contextlib.contextmanager
def logged(level: int = logging.NOTSET) -> Iterator[Log]:
    """For the block keep what the package logs at a level and above."""
    logger, found = logging.getLogger("dmabuf"), Log()
    before = logger.level
    logger.setLevel(level)
    logger.addHandler(found)
    try:
        yield found
    finally:
        logger.removeHandler(found)
        logger.setLevel(before)
