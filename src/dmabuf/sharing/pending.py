"""``pending``, ``stand_in``: what is in the place of an object that could not be received, where an error would stop a pool.

The threads of a ``multiprocessing.Pool`` that read results, and its workers, end at an OSError while they unpickle, and then all callers
wait for ever. An executor breaks. So there something stands for the object. Its first use asks for the object again, and raises what
happened if that fails: nothing is lost when only a descriptor was missing, and the error of a worker that was killed names it.

For a buffer that is a ``DmaBuf`` with a handle that has no descriptor yet. Everything else has a stand-in: ``isinstance`` takes it for the
object, and so does code that calls its methods or reads its attributes.

What stands for an object can be pickled before it was received. Then the next receiver asks for it.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from functools import partial
from typing import Any, Final, TypeVar, cast

from dmabuf.core.buffer.handle import face_of, handle_of
from dmabuf.core.buffer.ref import BufferRef
from dmabuf.core.buffer.shared import MEMFD, SharedBuffer
from dmabuf.core.dma_buf import BufHandle, DmaBuf
from dmabuf.domain.domain import Domain
from dmabuf.domain.records import KIND_BUFFER
from dmabuf.errors import DmaBufError, fail
from dmabuf.sharing.fetching import said

T = TypeVar("T")

Pickled = tuple[Callable[..., object], tuple[object, ...]]
"""What makes the object, and the arguments: both came in a pickle, and can go into another one."""


def _failed(operation: str, what: str, error: OSError) -> DmaBufError:
    """Return the error of a use, for the error of the receiving."""
    number = error.errno or errno.EIO
    if isinstance(error, DmaBufError):
        return fail(number, operation, what, error.remedy, what=said(error))
    return fail(number, operation, what, what=error.strerror)


# ---- buffers ----


class _PendingHandle(BufHandle):
    """A handle whose descriptor is missing: every use of it asks for it."""

    __slots__ = ("_again", "_what", "pickled")

    _again: Callable[[], DmaBuf] | None
    _what: str
    pickled: Pickled

    def check(self, operation: str) -> int:
        if self.fd < 0 and self._again is not None:
            self._receive(operation, self._again)
        return super().check(operation)

    def _receive(self, operation: str, again: Callable[[], DmaBuf]) -> None:
        try:
            made = again()
        except OSError as e:
            raise _failed(operation, self._what, e) from None
        other = handle_of(made)
        other.shared.enter(self)
        self.shared, self.size, self._life = other.shared, other.size, other.shared.shm.life
        self.fd, self.left = other.detach().take(), False
        self._again = None

    def close(self) -> None:
        self._again = None
        super().close()


def pending(domain: Domain, token: BufferRef, again: Callable[[], DmaBuf], pickled: Pickled) -> DmaBuf:
    """Return a buffer that calls ``again`` when it is used."""
    if isinstance(domain, StandIn) and _is_missing(domain):
        return stand_in(DmaBuf, str(token), again, pickled)
    handle = object.__new__(_PendingHandle)
    handle.shared = SharedBuffer(domain, token.dev, token.ino, token.size, token.nonce, MEMFD, MEMFD, KIND_BUFFER)
    handle.size, handle.domain, handle.fd, handle.left = token.size, domain, -1, True
    handle.path = handle.device_view = handle.known_resv = handle.polls = None
    handle.leaving, handle.ending, handle._life = False, None, 0
    handle._again, handle._what, handle.pickled = again, str(token), pickled
    return face_of(DmaBuf, handle)


# ---- everything else ----

# What is the stand-in's own, or follows from other special methods.
_OWN: Final = frozenset((
    "__class__", "__del__", "__delattr__", "__dict__", "__dir__", "__doc__", "__enter__", "__exit__", "__format__", "__getattribute__",
    "__getstate__", "__init__", "__init_subclass__", "__module__", "__ne__", "__new__", "__reduce__", "__reduce_ex__", "__repr__",
    "__setattr__", "__sizeof__", "__slots__", "__str__", "__subclasshook__", "__weakref__",
))  # fmt: skip


class StandIn:
    """What stands for an object that is not a buffer. Every use asks for the object until it is there, and then goes to it."""

    __slots__ = ("__weakref__", "_dmabuf_again", "_dmabuf_made", "_dmabuf_pickled", "_dmabuf_what")

    _dmabuf_again: Callable[[], Any] | None  # None once the object is there, or closed before it was
    _dmabuf_made: Any
    _dmabuf_pickled: Pickled
    _dmabuf_what: str

    def __getattr__(self, name: str) -> Any:
        if self._dmabuf_made is None and hasattr(self.__class__, "close"):
            if name == "close":
                return partial(_give_up, self)
            if name == "closed" and self._dmabuf_again is None:
                return True
        return getattr(_object(self, name), name)

    def __enter__(self) -> Any:
        return _object(self, "enter").__enter__()

    def __exit__(self, *how: object) -> Any:
        return _object(self, "exit").__exit__(*how)

    def __repr__(self) -> str:
        if self._dmabuf_made is not None:
            return repr(self._dmabuf_made)
        return f"<dmabuf.{type(self).__name__} {'that is not received yet' if self._dmabuf_again else 'closed'}: {self._dmabuf_what}>"


def _give_up(one: StandIn) -> None:
    one._dmabuf_again = None


def _object(one: StandIn, operation: str) -> Any:
    """Return the object, or raise what happened (errors as of the receiving; EBADF if it was closed before)."""
    again = one._dmabuf_again
    if again is not None:
        try:
            one._dmabuf_made = again()
        except OSError as e:
            raise _failed(operation, one._dmabuf_what, e) from None
        one._dmabuf_again = None
    if one._dmabuf_made is None:
        what = "it was closed before it was received"
        raise fail(errno.EBADF, operation, one._dmabuf_what, "use it before it is closed", what=what)
    return one._dmabuf_made


def _is_missing(one: StandIn) -> bool:
    """Whether the object isn't there, although it was asked for."""
    try:
        _object(one, "look")
    except OSError:
        return True
    return False


def _forwarded(name: str) -> Callable[..., Any]:
    def forward(self: StandIn, *arguments: Any) -> Any:
        return getattr(_object(self, name.strip("_")), name)(*arguments)

    return forward


_CLASSES: Final[dict[Any, type[StandIn]]] = {}


def stand_in_class(kind: Any) -> type[StandIn]:
    """Return the class of what stands for objects of a class."""
    found = _CLASSES.get(kind)
    if found is None:
        names = (name for name in dir(kind) if name.startswith("__") and name.endswith("__") and name not in _OWN)
        special = {name: _forwarded(name) for name in names if callable(getattr(kind, name))}
        made = type(kind.__name__, (StandIn,), {"__slots__": (), "__class__": property(lambda _: kind), **special})
        found = _CLASSES.setdefault(kind, made)
    return found


def stand_in(kind: type[T], what: str, again: Callable[[], T], pickled: Pickled) -> T:
    """Return what stands for an object of a class and calls ``again`` when it is used."""
    made = object.__new__(stand_in_class(kind))
    made._dmabuf_again, made._dmabuf_made, made._dmabuf_pickled, made._dmabuf_what = again, None, pickled, what
    return cast("T", made)


def settled(thing: T) -> T:
    """Return the object that a stand-in stands for, and any other object itself."""
    return _object(thing, "use") if isinstance(thing, StandIn) else thing


def pickled_again(thing: object) -> Pickled | None:
    """Return what goes into a pickle for something that still could not be received; None if it is there, or was never missing."""
    if isinstance(thing, StandIn):
        return thing._dmabuf_pickled if thing._dmabuf_again is not None and _is_missing(thing) else None
    handle = handle_of(thing) if isinstance(thing, DmaBuf) else None
    if not isinstance(handle, _PendingHandle) or handle._again is None:
        return None
    try:
        handle.check("pickle")
    except OSError:
        return handle.pickled
    return None
