"""The choice of the default heap. No other file makes it.

The default is ``memfd``. It works on every Linux, without root and without devices. Its buffers can be reopened through /proc, and their
memory is reserved and accounted to the cgroup of the process that allocates. ``spill`` is for programs that need more buffers than they
have memory for: every access calls the process that allocated, and may wait for a disk. A kernel heap is for buffers that go to a driver,
by a program that knows its name.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from dmabuf.core.dma_buf import DmaBuf
from dmabuf.domain.domain import Domain
from dmabuf.errors import fail
from dmabuf.heap import devices, dma_heap, memfd, spill, udmabuf
from dmabuf.heap.wanted import wanted
from dmabuf.layout.image import ImageLayout
from dmabuf.layout.stored import Layout


@dataclass(frozen=True)
class Heap:
    """One heap. ``unavailable``: why it can't be used here, None if it can. ``about``: what it is."""

    name: str
    unavailable: str | None
    about: str


class _Known(NamedTuple):
    """How to use a heap, and whether that is possible."""

    allocate: Callable[..., DmaBuf]
    unavailable: Callable[[], str | None]
    about: str
    node: Callable[[], devices.Node] | None = None  # the device, of a heap that has one


def _known() -> dict[str, _Known]:
    """Return every heap by name, the default first, and the kernel heaps last."""
    found = {
        memfd.NAME: _Known(memfd.allocate, memfd.unavailable, "plain shared memory, without kernel support"),
        spill.NAME: _Known(spill.allocate, spill.unavailable, "memory with a budget; the rest is in a file (DMABUF_SPILL_BUDGET)"),
        udmabuf.NAME: _Known(udmabuf.allocate, udmabuf.unavailable, _udmabuf_about(), lambda: udmabuf.node(udmabuf.DEVICE)),
    }
    for name in dma_heap.names() or ["system"]:
        about = "kernel dma-bufs of pages" if name == "system" else "kernel dma-bufs of contiguous memory, or of its driver's memory"
        found[dma_heap.PREFIX + name] = _Known(
            partial(dma_heap.allocate, name), partial(dma_heap.unavailable, name), about, partial(dma_heap.node, name)
        )
    return found


def _udmabuf_about() -> str:
    most = udmabuf.limits().size
    return "kernel dma-bufs made of memfds" + ("" if most is None else f", at most {most // udmabuf.MIB} MiB each")


def heaps() -> list[Heap]:
    """Return every heap, the default first."""
    return [Heap(name, known.unavailable(), known.about) for name, known in _known().items()]


def allocate(
    size: int | None = None,
    *,
    layout: Layout | None = None,
    shape: Sequence[int] | int | None = None,
    dtype: Any = None,
    heap: str | None = None,
    name: str | bytes | None = None,
    domain: Domain | None = None,
) -> DmaBuf:
    """Return a new buffer: zeroed, rounded up to whole pages, with its memory reserved.

    Args:
        size: The number of bytes. Not needed with a layout, which then says it.
        layout: What the bytes will mean, an ``ImageLayout`` or a ``TensorLayout``. Every process that gets the buffer finds it in
            ``buf.layout``.
        shape: The shape of a tensor without gaps, instead of a layout.
        dtype: Its type, as ``"float32"``, or one of numpy's or torch's.
        heap: The name of one of :func:`dmabuf.heaps`; None means the default heap.
        name: A label of at most 31 bytes.
        domain: The domain; None means the user's default domain.

    Raises:
        InvalidError: The size is below 1 or too small for the layout, the layout is spread over several buffers, or the name is bad
            (EINVAL).
        NoMemoryError: The limits of this machine or cgroup don't allow it (ENOMEM).
        NoSpaceError: The domain is full (ENOSPC).
        NoDeviceError: There is no such heap, or it can't be used here (ENODEV).
        NotPermittedError: This user may not use the heap's device (EACCES).
        DmaBufError: No descriptor is left (EMFILE).
    """
    if layout is None and shape is None and dtype is None:
        if size is None:
            raise TypeError("allocate: pass a number of bytes, or shape= and dtype=, or layout=")
        return _allocate(size, heap, name, domain, None)
    size, layout = wanted(size, layout, shape, dtype)
    return _allocate(size, heap, name, domain, layout)


def allocate_planes(
    layout: ImageLayout, *, heap: str | None = None, name: str | bytes | None = None, domain: Domain | None = None
) -> tuple[DmaBuf, ...]:
    """Return the buffers of a picture that is spread over several, as ``ImageLayout.linear(…, apart=True)`` is, in their order.

    Each buffer has the whole layout, and says in ``buf.layout_part`` which one it is. Enter all with ``dmabuf.access()``, and pass the
    views to ``layout.planes()``.

    Args:
        layout: The layout.
        heap: As in :func:`allocate`.
        name: As in :func:`allocate`; the second buffer and those after it get the name with ``:1`` and so on.
        domain: As in :func:`allocate`.

    Raises:
        InvalidError: A name is bad (EINVAL).
        TypeError: ``layout`` is not an ``ImageLayout``.
        DmaBufError: As :func:`allocate`. Nothing is left.
    """
    if not isinstance(layout, ImageLayout):
        raise TypeError(f"allocate_planes: layout is an ImageLayout, not {type(layout).__name__}")
    made: list[DmaBuf] = []
    try:
        for part, size in enumerate(layout.sizes):
            label = None if name is None else os.fsencode(name) + (b":%d" % part if part else b"")
            made.append(_allocate(size, heap, label, domain, layout, part))
    except BaseException:
        for buf in made:
            buf.close()
        raise
    return tuple(made)


def _allocate(size: int, heap: str | None, name: str | bytes | None, domain: Domain | None, layout: Layout | None, part: int = 0) -> DmaBuf:
    if heap is None or heap == memfd.NAME:  # without memfds nothing of this package works
        return memfd.allocate(size, name=name, domain=domain, layout=None if layout is None else layout.pack(), part=part)
    known = _known()
    found = known.get(heap)
    if found is None:
        raise fail(errno.ENODEV, "allocate", f"heap {heap!r}", f"use one of: {', '.join(known)}", what="there is no such heap")
    if why := found.unavailable():
        number = errno.EACCES if found.node is not None and found.node().denied else errno.ENODEV
        raise fail(number, "allocate", f"heap {heap!r}", why, what="it can't be used here")
    made = found.allocate(size, name=name, domain=domain)
    if layout is not None:
        try:
            made.describe(layout, part)
        except BaseException:
            made.close()
            raise
    return made
