"""Runs a target many times, and looks whether something is left."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import random
import resource
import sys
import time
from collections import Counter
from typing import NamedTuple

from dmabuf._native import OFF_NCHUNKS
from tests.fuzz.targets import World, opened

BATCH = 500
LONGEST_S = 60  # of a batch: one that takes longer hangs
MOST_MIB = 256  # more memory than at the beginning
MOST_CHUNKS = 64


class Left(NamedTuple):
    """What a target could leave."""

    descriptors: tuple[str, ...]
    records: int
    orphans: int
    chunks: int


class FaultError(AssertionError):
    """An input did what it must not."""


def left(world: World) -> Left:
    """Count, after a collection."""
    gc.collect()
    world.domain.sweep()
    shm = world.domain.shm
    return Left(_descriptors(), len(shm.rec_list()), len(shm.rec_orphans()), shm.load32(OFF_NCHUNKS))


def _descriptors() -> tuple[str, ...]:
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one of this listing
            found.append(os.readlink(f"/proc/self/fd/{name}"))
    return tuple(sorted(found))


def memory() -> int:
    """Return the most memory that this process has had, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def run(name: str, count: int, seed: int) -> float:
    """Give ``count`` inputs to a target. Return the seconds.

    Raises:
        FaultError: An input raised something else than a refusal, or something is left. The text has the input's own seed.
    """
    begun = time.monotonic()
    hook, sys.unraisablehook = sys.unraisablehook, lambda told: None  # posts have no caller, and report what they refuse
    try:
        with opened(name) as (world, target):
            _inputs(name, target, seed, 20)
            before, most = left(world), memory()
            _inputs(name, target, seed, count)
            after = left(world)
            for again in range(1, 4):  # what is made once, by a thread that had no time yet, is no leak
                if _kept(before) == _kept(after):
                    break
                before = after
                _inputs(name, target, seed + again, min(count, BATCH))
                after = left(world)
            else:
                new = sorted((Counter(after.descriptors) - Counter(before.descriptors)).elements())
                raise FaultError(f"{name}: seed {seed}: {before[1:]} became {after[1:]}, with new descriptors {new}")
            if after.chunks > before.chunks + MOST_CHUNKS:
                raise FaultError(f"{name}: seed {seed}: the domain grew from {before.chunks} to {after.chunks} chunks")
            if memory() > most + MOST_MIB:
                raise FaultError(f"{name}: seed {seed}: memory grew from {most} to {memory()} MiB")
    finally:
        sys.unraisablehook = hook
    return time.monotonic() - begun


def _kept(now: Left) -> tuple[int, int, int]:
    return len(now.descriptors), now.records, now.orphans


def _inputs(name: str, target: object, seed: int, count: int) -> None:
    try:
        for at in range(count):
            if not at % BATCH:
                faulthandler.dump_traceback_later(LONGEST_S, exit=True)
            _one(name, target, seed * 1_000_003 + at)
    finally:
        faulthandler.cancel_dump_traceback_later()


def _one(name: str, target: object, seed: int) -> None:
    try:
        target(random.Random(seed))  # type: ignore[operator]
    except Exception as e:
        raise FaultError(f"{name}: input {seed}: {type(e).__name__}: {e}") from e
