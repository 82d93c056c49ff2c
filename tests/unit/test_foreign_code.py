"""Code of the program that runs in the middle of a call: finalizers that the garbage collector calls, and hooks that are replaced."""

import errno
import gc
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest

import dmabuf
from dmabuf._native import Mapping
from dmabuf.core.access import poll
from dmabuf.core.buffer.handle import handle_of
from dmabuf.core.export.module import Module
from dmabuf.core.memory.device import DeviceStatistics
from dmabuf.heap import budget
from tests.support.errnos import raises_errno
from tests.support.mappings import SIZE
from tests.support.waiting import Background

IN_ALLOCATIONS = pytest.mark.skipif(sys.version_info >= (3, 12), reason="from CPython 3.12 on no allocation collects garbage")


class _Finalized:
    def __init__(self, call: Callable[[], object]) -> None:
        self.call, self.me = call, self  # a circle, which only the collector takes apart

    def __del__(self) -> None:
        self.call()


@contextmanager
def garbage(call: Callable[[], object], allocations: int) -> Iterator[None]:
    """In the block, collect garbage whose finalizer is ``call`` after so many allocations."""
    thresholds, inside = gc.get_threshold(), [True]
    spare: list[list[None]] = [[] for _ in range(200)]  # else lists come from those that CPython has kept, without an allocation
    gc.disable()
    gc.collect()
    _Finalized(lambda: inside and call())
    gc.set_threshold(allocations, 1000, 1000)
    gc.enable()
    try:
        yield
    finally:
        gc.disable()
        inside.clear()
        gc.set_threshold(*thresholds)
        gc.enable()
        spare.clear()


MOMENTS = range(1, 60)  # one of these many allocations comes where the test wants it


def closed_or_not(mapping: Mapping) -> bool:
    """Close the mapping, unless something uses it."""
    try:
        mapping.close()
    except BufferError:
        return False
    return True


@IN_ALLOCATIONS
def test_block_keeps_its_mapping_though_a_finalizer_closes_it_amid_its_making() -> None:
    outcomes = set()
    for moment in MOMENTS:
        with dmabuf.allocate(SIZE) as buf:
            with buf.read():
                pass
            mapping = handle_of(buf).view
            assert mapping is not None
            block, closed = buf.read(), list[bool]()
            with garbage(partial(lambda mapping, closed: closed.append(closed_or_not(mapping)), mapping, closed), moment):
                view = block.__enter__()
            outcomes.update(closed)
            assert view[SIZE - 1] == 0
            block.__exit__(None, None, None)
    assert outcomes


@IN_ALLOCATIONS
def test_mapping_looks_at_a_file_that_a_finalizer_makes_shorter_einval() -> None:
    refused = 0
    for moment in MOMENTS:
        fd, shorter = os.memfd_create("mapping"), list[None]()
        os.ftruncate(fd, SIZE)
        mapping = None
        try:
            with garbage(partial(lambda fd, shorter: shorter.append(os.ftruncate(fd, 0)), fd, shorter), moment):
                mapping = Mapping(fd, SIZE)
                seen = len(shorter)
            assert not seen, "it was mapped beyond its end"
        except OSError as e:
            refused += e.errno == errno.EINVAL
        finally:
            os.close(fd)
            if mapping is not None:
                mapping.close()
    assert refused


@pytest.mark.parametrize("blocking", [1, 16, 17, 70])
def test_access_runs_no_finalizer_under_the_reservation_lock(blocking: int) -> None:
    """The fences that block it become a list when the lock is free again."""
    buf = dmabuf.allocate(4096)
    fences = [dmabuf.Timeline(f"work {i}").fence() for i in range(blocking)]
    with buf.resv.locked() as resv:
        resv.reserve(blocking)
        for fence in fences:
            resv.add(fence, dmabuf.Usage.WRITE)
    shm, index = handle_of(buf).shared.at()
    locked = set[int]()
    for moment in MOMENTS:
        with garbage(lambda: locked.add(shm.resv_owner(index)), moment), pytest.raises(TimeoutError):
            buf.read(timeout=0).__enter__()
    assert locked == {0}
    for fence in fences:
        fence.signal()
    with buf.read(timeout=0):
        pass
    buf.close()


def test_hook_that_is_replaced_during_its_call_lives_until_its_end() -> None:
    """Nothing but the domain's object refers to the hook, which its replacement would free."""
    domain = dmabuf.Domain.private()
    shm = domain.join()
    fence = dmabuf.Timeline("work", domain=domain).fence()

    class Replaced:
        def __call__(self, handle: int) -> bool:
            shm.on_local = before
            raise ValueError(handle)

    shm.fence_watch(fence.handle)
    before = shm.on_local
    shm.on_local = Replaced()

    def signal() -> None:
        fence.signal()  # the exception is raised in this thread a moment after the call
        for _ in range(1000):
            pass

    with pytest.raises(ValueError, match=str(fence.handle)):
        signal()
    assert fence.is_signaled()


class Named(dmabuf.Device):
    """A device whose ``repr`` uses the device, and waits for another thread that does."""

    def __repr__(self) -> str:
        found: list[DeviceStatistics] = []
        thread = threading.Thread(target=lambda: found.append(self.statistics()))
        thread.start()
        thread.join()
        return f"<Named {found[0].faults} faults>"


@pytest.mark.parametrize("call", ["read", "write", "views"])
def test_repr_of_a_device_runs_without_its_lock(call: str) -> None:
    """An address that isn't mapped is told with the device's name."""
    device = Named("npu0")
    calls: dict[str, Callable[[], object]] = {
        "read": lambda: device.read(4096, 16),
        "write": lambda: device.write(4096, b"x"),
        "views": lambda: device.views(4096, 16, dmabuf.Direction.TO_DEVICE).__enter__(),
    }
    with raises_errno(errno.EFAULT) as caught:
        calls[call]()
    assert "<Named 1 faults>" in str(caught.value)


def test_repr_of_a_module_runs_without_its_lock() -> None:
    class Loud(Module):
        def __repr__(self) -> str:
            with Background(lambda: (self.try_get(), self.put())):
                pass
            return "<Loud>"

    module = Loud("vram")
    assert module.try_get()
    with raises_errno(errno.EBUSY) as caught:
        module.unload()
    assert "<Loud>" in str(caught.value)
    assert module.alive
    module.put()
    module.unload()
    assert not module.alive


def test_device_may_be_used_by_a_finalizer_amid_an_access() -> None:
    """The lock of a device is the thread's own then, which it would wait for."""
    device, seen = dmabuf.Device("npu0"), list[int]()
    with device._lock:
        seen.append(device.statistics().faults)
    assert seen == [0]


def test_allocation_in_a_handler_amid_one_that_needs_the_rest_is_enomem() -> None:
    """It would wait until the allocation that it interrupts has ended."""
    room = budget.Budget()
    left = room.left()
    with room.claim(left // 4 * 3), raises_errno(errno.ENOMEM), room.claim(left // 2):
        pass
    with room.claim(left // 2):
        pass


def test_poll_slot_is_made_without_a_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Making it may wait for the table of the domain, and callbacks in other threads come to the same lock."""
    fence = dmabuf.Timeline("work").fence()
    with dmabuf.allocate(4096) as buf:
        with buf.resv.locked() as resv:
            resv.reserve(1)
            resv.add(fence, dmabuf.Usage.WRITE)
        real, free = poll._Slot, list[bool]()

        def slot(*args: Any) -> Any:
            with Background(lambda: free.append(bool(poll._lock.__enter__() and poll._lock.__exit__(None, None, None) is None))):
                pass  # else the watchdog ends the test
            return real(*args)

        monkeypatch.setattr(poll, "_Slot", slot)
        assert buf.poll(1, 0) == 0
        fence.signal()
        assert free == [True]
