"""What outlives its block: who keeps it, for a warning, and when a reader's must give way (docs/views.md).

What is kept of a ``write()`` is detached at once, and of a ``read()`` when a writer has waited for it for :data:`WAIT_NS`. The detaching
itself is native/access/detach.c. A writer of this process does it itself. One of another process sets a deadline for the access's fence,
and the dispatcher of the reader's process hears of it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import types
import warnings
from collections.abc import Iterator
from typing import Any, Final

from dmabuf._native import FF_ACCESS, FF_WRITE, Access, Hold, kept_before_fork, release_kept
from dmabuf.domain.dispatcher import dispatcher
from dmabuf.domain.domain import Domain
from dmabuf.errors import KeptWarning

WAIT_NS: Final = 50_000_000
"""How long a writer waits for what a ``read()`` block left, before that is detached."""

_ANY_TARGET: Final = (1 << 32) - 1
_MOST: Final = 1000  # entries of a container, and locals of a frame, that are looked through for a name
_DEPTH: Final = 8  # from an array to the object that its memory is of


os.register_at_fork(before=kept_before_fork)


def yields(part: Access) -> None:
    """Have a ``read()`` access that was left end once a process wants the buffer for as long as :data:`WAIT_NS`."""
    shm, target, fence, domain = part.shm, part.target, part.fence, part.handle.domain
    if shm is None:
        return

    def look() -> None:
        info = shm.fence_info(fence)
        if info is None or not info["pending"]:
            watcher.watch_deadline(fence, None)
        elif info["deadline"]:
            release_kept(shm, target, fence)

    domain.leave_hooks.ensure("kept", lambda: release_kept(shm, _ANY_TARGET, 0))  # its fences end then, and others write
    watcher = dispatcher(domain)
    watcher.watch_deadline(fence, look)
    look()  # the deadline may have come before anybody watched


def ask(domain: Domain, part: Access, fence: int) -> None:
    """Have what a ``read()`` block left give way to an access that has waited for :data:`WAIT_NS`. Does nothing to any other fence."""
    shm = domain.shm
    info = shm.fence_info(fence)
    if info is None or not info["flags"] & FF_ACCESS or info["flags"] & FF_WRITE:
        return
    # The block of a reader of this process may be open still: then the deadline is found when it is left.
    if info["life"] != shm.life or not release_kept(shm, part.target, fence):
        shm.fence_set_deadline(fence, time.monotonic_ns())


def warn(part: Access, *, zeros: bool) -> None:
    """Warn of what a block left behind. Raises KeptWarning where warnings are errors."""
    try:
        frame: types.FrameType | None = sys._getframe(2)
    except ValueError:  # called with no Python code below
        frame = None
    names = _names(part, frame)
    who = ", ".join(names) or "something"
    start = f"{'write' if part.write else 'read'}: {part.handle}: {who}"
    remedy = "copy what you need inside the block, or use view.array() there and keep no name of it"
    warnings.warn(
        f"{start} outlived the block: it was too large for a copy, and shows zeros; {remedy}"
        if zeros
        else f"{start} outlived the block: it was given a private copy, which nobody else sees; {remedy}",
        KeptWarning,
        stacklevel=3,
    )


def _names(part: Access, frame: types.FrameType | None) -> list[str]:
    """Return the names of locals, and one level into what they contain, that keep memory of the block: "crop (numpy.ndarray)"."""
    found: dict[str, None] = {}
    while frame is not None and not found:
        for name, value in list(frame.f_locals.items())[:_MOST]:
            for path, inner in _inside(name, value):
                if _keeps(inner, part):
                    found[f"{path} ({type(inner).__module__.partition('.')[0]}.{type(inner).__name__})".replace("builtins.", "")] = None
        frame = frame.f_back
    return list(found)


def _inside(name: str, value: object) -> Iterator[tuple[str, object]]:
    yield name, value
    if isinstance(value, dict):
        yield from ((f"{name}[{key!r}]", inner) for key, inner in list(value.items())[:_MOST])
    elif isinstance(value, (list, tuple)):
        yield from ((f"{name}[{i}]", inner) for i, inner in enumerate(value[:_MOST]))
    elif not isinstance(value, (types.ModuleType, type, types.FunctionType)):
        with contextlib.suppress(Exception):  # a foreign object may do anything when it is looked at
            yield from ((f"{name}.{key}", inner) for key, inner in list(vars(value).items())[:_MOST])


def _keeps(value: object, part: Access) -> bool:
    """Return True if the value's memory is of the block, as far as its type says whose memory it is."""
    seen: Any = value
    for _ in range(_DEPTH):
        if isinstance(seen, Hold):
            return seen.access is part
        if isinstance(seen, memoryview):
            try:
                seen = seen.obj
            except ValueError:  # released
                return False
            continue
        if type(seen).__module__.partition(".")[0] not in ("numpy", "pyarrow", "PIL", "torch"):
            return False
        with contextlib.suppress(Exception):
            seen = getattr(seen, "base", None)
            continue
        return False
    return False
