"""Every call to the system of a scenario fails once in turn, and nothing is lost by it.

    for fault in faults(scenario):          # the scenario is run once to see what it calls, then once for each fault
        fault()                             # raises AssertionError when something is lost

A fault is one call, at one of the places where the package calls the system for the kernel's dma-bufs, that answers with one errno it can
answer with. Afterwards: the scenario has gone through (what is restarted), or raised an OSError of that errno; no descriptor and no mapping
more or less than before, none closed twice, and no bracket of SYNC open that could have been closed.

Only calls of the thread that runs the scenario count and fail: what the threads that stay do meanwhile has nothing to do with it.

A whole collection after each fault would look at all that the test run has made so far. So none runs by itself in a scenario: what it
leaves is then all in the youngest generation, and a collection of that is enough. What looks wrong is looked at again after a whole one.
"""

import contextlib
import errno
import fcntl
import gc
import os
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

import dmabuf
from dmabuf import _native
from dmabuf.core.buffer import backing_kernel as kernel
from dmabuf.domain import place
from dmabuf.heap import memfd
from dmabuf.uapi import call, dma_buf, table
from tests.support.leaks import rest
from tests.support.mappings import shared_mappings
from tests.support.native import patch_native

GIVES_FD = {
    table.DMA_BUF_EXPORT_SYNC_FILE.number,
    table.SYNC_MERGE.number,
    table.DMA_HEAP_ALLOC.number,
    table.UDMABUF_CREATE.number,
    table.UDMABUF_CREATE_LIST.number,
    table.SW_SYNC_CREATE_FENCE.number,
    table.PRIME_HANDLE_TO_FD.number,
    table.SYNCOBJ_HANDLE_TO_FD.number,
    table.VIDIOC_EXPBUF.number,
}
RESTARTED = (errno.EINTR, errno.EAGAIN)


class Place(NamedTuple):
    """Where the system is called: an attribute of a module; and which errnos a call of it can have."""

    module: Any
    name: str
    errnos: Callable[[tuple[Any, ...]], tuple[int, ...]]


def _of_ioctl(arguments: tuple[Any, ...]) -> tuple[int, ...]:
    more = (errno.EMFILE, errno.ENFILE) if arguments[1] in GIVES_FD else ()
    return (*RESTARTED, errno.ENOMEM, *more)


def _of_fcntl(arguments: tuple[Any, ...]) -> tuple[int, ...]:
    if arguments[1] in (fcntl.F_DUPFD_CLOEXEC, fcntl.F_DUPFD):
        return (errno.EMFILE,)
    return (errno.ENOLCK,) if arguments[1] == place.OFD_SETLK else ()


def _always(*numbers: int) -> Callable[[tuple[Any, ...]], tuple[int, ...]]:
    return lambda _: numbers


PLACES = (
    Place(call, "system", _of_ioctl),
    Place(call, "opening", _always(errno.EMFILE, errno.ENFILE, errno.ENOMEM)),
    Place(os, "memfd_create", _always(errno.EMFILE, errno.ENFILE, errno.ENOMEM)),
    Place(os, "ftruncate", _always(errno.ENOMEM)),
    Place(memfd, "reserve_range", _always(errno.ENOSPC, errno.ENOMEM)),
    Place(memfd, "write_at", _always(errno.ENOSPC, errno.ENOMEM)),
    Place(os, "pidfd_open", _always(errno.EMFILE, errno.ENFILE, errno.ENOMEM)),
    Place(fcntl, "fcntl", _of_fcntl),
    Place(_native, "Mapping", _always(errno.ENOMEM, errno.EAGAIN)),
    Place(_native, "map_same", _always(errno.ENOMEM, errno.EAGAIN)),
    Place(_native, "fd_of", _always(errno.EMFILE)),
    Place(dma_buf, "fdinfo", _always(errno.EMFILE, errno.ENOMEM)),
    Place(kernel, "poll_until", _always(errno.ENOMEM)),
)


class _Watch:
    """Stands at every place; counts the calls, and fails the one that it is told to."""

    def __init__(self, fail_at: int = -1, number: int = 0) -> None:
        self.fail_at, self.number = fail_at, number
        self.calls: list[tuple[int, ...]] = []  # of each: the errnos it can have
        self.names: list[str] = []
        self.sync: list[int] = []  # flags of each SYNC that succeeded
        self.lost_end = False  # the fault hit an END
        self.thread = threading.get_ident()

    @contextlib.contextmanager
    def standing(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for there in PLACES:
                instead = self._instead(there, getattr(there.module, there.name))
                if there.module is _native:
                    patch_native(patch, there.name, instead)
                else:
                    patch.setattr(there.module, there.name, instead)
            yield

    def _instead(self, there: Place, real: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **keywords: Any) -> Any:
            if threading.get_ident() != self.thread:
                return real(*arguments, **keywords)
            errnos, at = there.errnos(arguments), len(self.calls)
            sync = there.name == "system" and arguments[1] == table.DMA_BUF_SYNC.number
            flags = table.DMA_BUF_SYNC.layout.unpack(arguments[2]).flags if sync else 0
            if errnos:
                self.calls.append(errnos)
                known = table.BY_NUMBER.get(arguments[1]) if there.name == "system" else None
                self.names.append(known.name if known else there.name)
                if at == self.fail_at:
                    self.lost_end = bool(flags & dma_buf.END) and self.number not in RESTARTED
                    raise OSError(self.number, os.strerror(self.number))
            answer = real(*arguments, **keywords)
            if sync:
                self.sync.append(flags)
            return answer

        return called

    def open_brackets(self) -> int:
        ends = sum(1 for flags in self.sync if flags & dma_buf.END)
        return len(self.sync) - 2 * ends - self.lost_end


@contextlib.contextmanager
def young() -> Iterator[None]:
    """What the block leaves is in the youngest generation."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Fault:
    """One run of the scenario with one fault. ``before``: what is held before and after."""

    def __init__(
        self, scenario: Callable[[], None], at: int, name: str, number: int, check: Callable[[], None], before: Counter[str]
    ) -> None:
        self.scenario, self.at, self.name, self.number, self.check, self.before = scenario, at, name, number, check, before

    def __repr__(self) -> str:
        return f"call {self.at} ({self.name}) fails with {errno.errorcode[self.number]}"

    def __call__(self) -> None:
        with young():
            self._run()

    def _run(self) -> None:
        watch = _Watch(self.at, self.number)
        raised: OSError | None = None
        reported: list[int | None] = []  # where there was nobody to raise to
        with watch.standing(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "unraisablehook", lambda told: reported.append(getattr(told.exc_value, "errno", None)))
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", dmabuf.ContractWarning)  # a failing vmap warns, as the kernel does
                    self.scenario()
            except OSError as e:
                raised = e.with_traceback(None)
        got, said = (raised.errno, str(raised)) if raised else (None, "")
        del raised
        canaries = Canaries()
        gc.collect(0)
        canaries.check(self)
        assert len(watch.calls) > self.at, f"{self}: the scenario calls something else each time"
        if self.number in RESTARTED and self.name not in ("Mapping", "map_same"):
            assert got is None, f"{self}: was not restarted: {said}"
        assert got in (None, self.number), f"{self}: raised {said}"
        assert set(reported) <= {self.number}, f"{self}: reported {reported}"
        assert not watch.open_brackets(), f"{self}: brackets {watch.sync}"
        try:
            self.check()
        except AssertionError as e:
            raise AssertionError(f"{self}: {e}") from None
        if held() != self.before:
            gc.collect()
            rest()
            after = held()
            assert after == self.before, f"{self}: {after - self.before} more, {self.before - after} less"


class Canaries:
    """Descriptors in the numbers that were just freed: who closes one of those a second time closes one of them."""

    def __init__(self, count: int = 12) -> None:
        self.fds = [os.memfd_create("canary") for _ in range(count)]

    def check(self, fault: object) -> None:
        for fd in self.fds:
            try:
                alive = "canary" in os.readlink(f"/proc/self/fd/{fd}")
            except FileNotFoundError:
                alive = False
            assert alive, f"{fault}: fd {fd} was closed twice"
            os.close(fd)


def held() -> Counter[str]:
    """Descriptors and shared mappings of this process, without their numbers."""
    found: Counter[str] = Counter()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            link = os.readlink(f"/proc/self/fd/{name}")
            if link != "/proc/self/fd" and not link.endswith("/fd"):
                found[f"fd {link}"] += 1
    for name in shared_mappings():
        found[f"mapping {name}"] += 1
    return found


def faults(scenario: Callable[[], None], check: Callable[[], None] = lambda: None) -> Iterator[Fault]:
    """A fault for each call of the scenario and each errno that it can have. ``check``: called after each."""
    scenario()  # what is made once and stays
    gc.collect()
    rest()
    before = held()
    watch = _Watch()
    with watch.standing():
        scenario()
    assert not watch.open_brackets()
    for at, (errnos, name) in enumerate(zip(watch.calls, watch.names, strict=True)):
        for number in errnos:
            yield Fault(scenario, at, name, number, check, before)
