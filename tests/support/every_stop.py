"""A signal handler that raises, at every place of an operation where one can.

Python runs signal handlers at *stops*: after a call, at the beginning of a function, and at a jump backwards. `at_every_stop` runs an
operation once for each of its stops, with a signal that arrives just before, and looks what is left. So nothing depends on chance:

    at_every_stop(lambda: dmabuf.allocate(4096).close())

An operation takes and releases. Nothing may be left of it, wherever it ended, and the exception must arrive. What arrives in a C function
without a stop inside is the same as what arrives before it.
"""

from __future__ import annotations

import ctypes
import dis
import gc
import os
import random
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from dmabuf import Domain, _native
from dmabuf.domain.lives import index_of
from tests.support.leaks import rest
from tests.support.mappings import shared_mappings

_STOPS = bytes(
    code for name, code in dis.opmap.items() if name in ("RESUME", "JUMP_BACKWARD", "CALL", "CALL_KW", "CALL_FUNCTION_EX") and code < 256
)
_MOST = 20_000
_SOURCE = Path(__file__).with_name("signal_stepper.c")
FENCE_BYTES, FENCE_WORD = 128, 0  # docs/layout.md
_SIGNALED = 1
STAYING = ("dmabuf-releaser", "dmabuf-dispatcher", "dmabuf-log")  # threads that a process has once


class Raised(BaseException):
    """What the signal handler raises."""


@cache
def _stepper() -> ctypes.PyDLL:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    with tempfile.TemporaryDirectory(prefix="dmabuf-stepper-") as where:
        target = f"{where}/stepper.so"
        subprocess.run([compiler, "-O1", "-shared", "-fPIC", f"-I{sysconfig.get_paths()['include']}", "-o", target, _SOURCE], check=True)
        found = ctypes.PyDLL(target)
    found.stepper_start.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.c_int]
    found.stepper_start.restype = None
    found.stepper_end.restype = ctypes.c_long
    sys._getframe().f_trace_opcodes = True  # from 3.12 on, only a trace that begins after a frame has asked is told of instructions
    return found


class Trip:
    """One run of an operation with a signal before its n-th stop. ``where``: what the handler interrupted. ``seen``: how many stops."""

    def __init__(self, n: int) -> None:
        self.n, self.where, self.seen, self.arrived = n, "", 0, False

    def run(self, operation: Callable[[], object]) -> None:
        """Run it. ``arrived``: whether the exception came out."""
        stepper = _stepper()

        def handler(_: int, frame: FrameType | None) -> None:
            self.where = " < ".join(_names(frame))
            raise Raised

        before = signal.signal(signal.SIGUSR1, handler)
        stepper.stepper_start(self.n, signal.SIGUSR1, _STOPS, len(_STOPS))
        try:
            try:
                operation()
            finally:
                self.seen = stepper.stepper_end()
            for _ in range(3):  # what a finalizer has put off comes at the next stop
                pass
        except Raised:
            self.arrived = True
        finally:
            signal.signal(signal.SIGUSR1, before)


def _names(frame: FrameType | None) -> Iterator[str]:
    for _ in range(6):
        if frame is None:
            return
        yield f"{frame.f_code.co_name}:{frame.f_lineno}"
        frame = frame.f_back


def holdings(domain: Domain) -> dict[str, Any]:
    """What this process holds now, beside memory."""
    shm, links = domain.shm, Counter[str]()
    for fd in os.listdir("/proc/self/fd"):
        try:
            links[os.readlink(f"/proc/self/fd/{fd}")] += 1
        except FileNotFoundError:
            continue  # that of the listing
    return {
        "descriptors": links,
        "mappings": Counter(shared_mappings()),
        "threads": Counter(thread.name for thread in threading.enumerate() if thread.name not in STAYING),
        "contexts": Counter({"free": -len(domain._free_ctx)}),
        "timelines": Counter({"free": -len(domain._free_timelines) - len(domain._closed_timelines)}),
        "records": Counter({f"record {i}": 1 for i in shm.rec_list() if index_of(shm.life) in shm.rec_holders(i)}),
        "fences": Counter({f"fence {at}": 1 for at in _pending(shm)}),
    }


def _pending(shm: _native.Shm) -> Iterator[int]:
    for chunk, kind in shm.chunks_of(shm.life):
        if kind != _native.CH_FENCE:
            continue
        start = _native.HEADER_BYTES + chunk * _native.CHUNK_BYTES
        for at in range(start, start + _native.CHUNK_BYTES, FENCE_BYTES):
            if not shm.load32(at + FENCE_WORD) & _SIGNALED:
                yield at


def left(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What is there now that was not there before, a line each."""
    return [f"{kind}: {name} ({more})" for kind in before for name, more in (after[kind] - before[kind]).items()]


@contextmanager
def nothing_unraisable() -> Iterator[list[str]]:
    """Collect what could not be raised in the block."""
    found: list[str] = []

    def note(what: Any) -> None:
        # An interrupted open() of Python's own leaves its file to the garbage collector, which closes it with this warning.
        if not (isinstance(what.exc_value, ResourceWarning) and "unclosed" in str(what.exc_value)):
            found.append(f"{what.exc_value!r} in {what.object!r}")

    before, sys.unraisablehook = sys.unraisablehook, note
    try:
        yield found
    finally:
        sys.unraisablehook = before


def at_every_stop(
    operation: Callable[[], object],
    check: Callable[[], object] = lambda: None,
    *,
    domain: Domain | None = None,
    most: int = _MOST,
    step: int = 1,
) -> tuple[int, list[str]]:
    """Run an operation once for each of its stops. ``check``: run after each one, to see that what it used is usable.

    Returns how many stops there are, and what went wrong, a line each.
    """
    where = domain or Domain.default()
    operation()
    operation()
    check()
    gc.collect()
    faults: list[str] = []
    before = holdings(where)
    n, most_seen, last = (
        -random.randrange(step),
        0,
        "",
    )  # so that what has fewer stops than a step is interrupted somewhere, one run in a few
    with nothing_unraisable() as unraisable:
        while n < most:
            n += step
            trip = Trip(n)
            error = ""
            try:
                trip.run(operation)
            except Exception as e:
                error = f"{type(e).__name__}: {e}"
            most_seen = max(most_seen, trip.seen)
            if trip.seen < n and not trip.arrived:
                break
            if error:
                faults.append(f"{n} at {trip.where}: {error}")
            elif not trip.arrived:
                faults.append(f"{n} at {trip.where}: swallowed")
            if trip.where == last:
                continue
            last = trip.where
            try:
                check()
            except BaseException as e:
                faults.append(f"{n} at {trip.where}: afterwards {type(e).__name__}: {e}")
            gc.collect()
            lost = left(before, holdings(where))
            if lost:  # unless another thread is in the middle of closing it
                rest()
                after = holdings(where)
                lost = left(before, after)
                before = after if lost else before
            if lost:
                faults.append(f"{n} at {trip.where}: left {'; '.join(lost)}")
            if unraisable:
                faults.append(f"{n} at {trip.where}: unraisable {unraisable[0]}")
                unraisable.clear()
    return max(n, most_seen), faults
