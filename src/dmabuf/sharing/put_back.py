"""What a receiver took out of a queue or a pipe, and could not unpickle for now, goes back to the front.

``Queue.get()`` and ``Connection.recv()`` of multiprocessing first read the bytes of an object and then unpickle it. If that needs a
descriptor and none is free, or a signal handler raises meanwhile, the bytes are gone from the pipe. They are then put back, in this
process: the next ``get()`` or ``recv()`` has them again.

multiprocessing has no call for that. So the connection gets methods of its own for its two lowest steps, ``_recv_bytes`` and ``_poll``. If
one of the functions or attributes isn't there, in some later version, nothing is put back, and the caller has the error only.
"""

from __future__ import annotations

import io
import sys
import weakref
from collections import deque
from collections.abc import Container, Iterable
from types import CodeType, FrameType
from typing import Any, Final

from dmabuf._native import WeakValues

_FRONT: Final = "_dmabuf_front"
_RECEIVE, _POLL, _PLACES = "_recv_bytes", "_poll", "_sem"  # what multiprocessing calls them
_EXECUTORS: Final = ("concurrent.futures.process", "loky.process_executor", "joblib.externals.loky.process_executor")
_POOLS: Final = (  # the functions of pools that read messages: module, class, name
    ("multiprocessing.pool", "Pool", "_handle_results"),
    ("multiprocessing.pool", "Pool", "_help_stuff_finish"),
    ("multiprocessing.pool", "", "worker"),
    *((module, "", "_process_worker") for module in _EXECUTORS),
    *((module, "_ExecutorManagerThread", "wait_result_broken_or_wakeup") for module in _EXECUTORS),
)
_CALLS: Final = (  # and those of managers, whose messages are calls and their answers
    ("multiprocessing.managers", "Server", "serve_client"),
    ("multiprocessing.managers", "Server", "_handle_request"),
    ("multiprocessing.managers", "Server", "handle_request"),
    ("multiprocessing.managers", "BaseProxy", "_callmethod"),
    ("multiprocessing.managers", "", "dispatch"),
)
_BETWEEN: Final = "joblib.pool"  # its queue has a function between the pool's and the reader

# What was received lately, by its key, and what of it waits for its message to be unpickled again. A message may have several objects, of
# which only one is there no descriptor for.
_alive: WeakValues[bytes, Any] = WeakValues()
_again: dict[bytes, Any] = {}


class _Front:
    """What was put back to the front of one connection.

    ``owed``: how many of the queue's places were freed for messages that are here, and will be freed again.
    """

    def __init__(self, connection: Any) -> None:
        self._connection = weakref.ref(connection)
        self._messages: deque[bytes] = deque()
        self._owed = 0
        self._places: Any = None
        setattr(connection, _RECEIVE, self._receive)
        setattr(connection, _POLL, self._ready)

    def add(self, message: bytes, places: Any) -> None:
        self._places = places
        self._owed += places is not None
        self._pay()
        self._messages.appendleft(message)

    def _pay(self) -> None:
        # A producer may have taken the place meanwhile. There is one again before the queue is empty.
        while self._owed and self._places.acquire(False):
            self._owed -= 1

    def _receive(self, most: int | None = None) -> io.BytesIO | None:
        self._pay()
        connection: Any = self._connection()
        if not self._messages:
            found: io.BytesIO | None = getattr(type(connection), _RECEIVE)(connection, most)
            return found
        message = self._messages.popleft()
        if most is not None and len(message) > most:
            return None
        made = io.BytesIO()
        made.write(message)  # and not by the constructor: the position is at the end
        return made

    def _ready(self, timeout: float | None) -> bool:
        connection: Any = self._connection()
        return bool(self._messages) or bool(getattr(type(connection), _POLL)(connection, timeout))


def _readers() -> dict[CodeType, tuple[str, str]]:
    """Return the functions that read a message and unpickle it: their code, the name of the message in them, and where the reader is."""
    queues: Any = sys.modules.get("multiprocessing.queues")
    connections: Any = sys.modules.get("multiprocessing.connection")
    found: dict[CodeType, tuple[str, str]] = {}
    if queues is not None:
        found[queues.Queue.get.__code__] = found[queues.SimpleQueue.get.__code__] = ("res", "_reader")
    if connections is not None:
        found[connections.Connection.recv.__code__] = ("buf", "")
    return found


def _reading(frame: FrameType | None, readers: Container[CodeType]) -> FrameType | None:
    """Return the frame of the innermost reader, which is unpickling."""
    while frame is not None and frame.f_code not in readers:
        frame = frame.f_back
    return frame


def _called_by(functions: Iterable[tuple[str, str, str]]) -> bool:
    """Return True if one of the functions has called the reader that is unpickling."""
    frame = _reading(sys._getframe(2), _readers())
    caller = None if frame is None else frame.f_back
    while caller is not None and caller.f_globals.get("__name__") == _BETWEEN:
        caller = caller.f_back
    if caller is None:
        return False
    for module, owner, name in functions:
        place: Any = sys.modules.get(module)
        function = getattr(getattr(place, owner, None) if owner else place, name, None)
        if getattr(function, "__code__", None) is caller.f_code:
            return True
    return False


def for_pool() -> bool:
    """Return True if a function of a pool has called the reader. No error may come up there: its thread or its process would end."""
    return _called_by(_POOLS)


def for_call() -> bool:
    """Return True if a manager or a proxy has called the reader. An error ends the call; what was put back would answer the next one."""
    return _called_by(_CALLS)


def _found(frame: FrameType | None) -> tuple[Any, Any, bytes] | None:
    """Return (who reads, the connection, the message) of the innermost reader that is unpickling."""
    readers = _readers()
    frame = _reading(frame, readers)
    if frame is None:
        return None
    name, attribute = readers[frame.f_code]
    reader, message = frame.f_locals.get("self"), frame.f_locals.get(name)
    connection = getattr(reader, attribute) if attribute else reader
    connection = getattr(connection, "conn", connection)  # torch.multiprocessing wraps it
    if isinstance(message, io.BytesIO):
        message = message.getvalue()
    if not isinstance(message, bytes) or not isinstance(connection, sys.modules["multiprocessing.connection"].Connection):
        return None
    return reader, connection, message


def put_back(key: bytes) -> bool:
    """Put back the message that is being unpickled in this thread, and has this key. Returns whether that was possible."""
    try:
        found = _found(sys._getframe(1))
        if found is None or key not in found[2] or for_pool() or for_call():
            return False
        reader, connection, message = found
        front = vars(connection).get(_FRONT)
        if front is None:
            front = _Front(connection)
            setattr(connection, _FRONT, front)
    except AttributeError:
        return False
    _again.update((key, made) for key, made in _alive.items() if key in message)
    front.add(message, getattr(reader, _PLACES, None))
    return True


def remember(key: bytes, made: object) -> None:
    """Remember what was received, as long as it lives: its message may be put back because of another object in it."""
    _alive[key] = made


def recall(key: bytes) -> Any:
    """Return what was received when its message was unpickled before; None if it wasn't."""
    return _again.pop(key, None)
