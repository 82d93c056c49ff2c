"""Random attaching, mapping, pinning and failing against a model of the mapping matrix (semantics 2.8–2.13a)."""

import errno
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import pytest

import dmabuf
from dmabuf import ContractError, ContractWarning, Device, Direction, DmaBufAttachment, SgTable
from dmabuf.core.attach.attachment import moving
from tests.support.budget import times
from tests.support.drivers import BIDIR, FROM, PAGE, TO, Dynamic, Mover, Static

T = TypeVar("T")
SEEDS, STEPS = times(quick=30, full=120), 60
SIZE = 2 * PAGE
FAILURES = [errno.EBUSY, errno.ENOMEM, errno.EINTR, errno.EIO]


@dataclass
class Model:
    """What one attachment holds."""

    attachment: DmaBufAttachment
    dynamic: bool
    kept: Direction | None  # of the table that is kept for it
    maps: list[tuple[SgTable, Direction, bool]] = field(default_factory=list)  # with whether mapping pinned
    pins: int = 0  # by the importer itself

    def tables(self) -> int:
        return len(self.maps) + (self.kept is not None)


def outcome(call: Callable[[], T]) -> tuple[T | None, int]:
    """What a call returned, and the errno it failed with, 0 for none."""
    try:
        return call(), 0
    except OSError as e:
        return None, e.errno or -1


class Run:
    """One exporter, and what the model says of it."""

    def __init__(self, seed: int, kind: type[Static], cache: bool) -> None:
        self.random = random.Random(seed)
        self.exporter, self.cache = kind(SIZE), cache
        self.pinning = kind is Dynamic
        self.buf = dmabuf.export(self.exporter, SIZE, cache_sgt_mapping=cache)
        self.dev = Device("random")
        self.held: list[Model] = []
        self.errors: dict[str, int] = {}  # the op that fails next, and how
        self.moves = self.random.random() < 0.5  # MOVE_NOTIFY of this run
        self.refused = self.unpinned = 0  # attach and pin ops that failed: no detach and no unpin follow

    def expected(self) -> tuple[int, int, int, int]:
        """Attachments, tables, windows of the device, pins."""
        tables = sum(model.tables() for model in self.held)
        pins = sum(model.pins + sum(pinned for *_, pinned in model.maps) for model in self.held)
        pins += sum(model.kept is not None for model in self.held) if self.pinning else 0
        return len(self.held), tables, tables, pins

    def found(self) -> tuple[int, int, int, int]:
        exporter = self.exporter
        assert exporter.count("attach") - exporter.count("detach") == len(self.held) + self.refused
        pins = exporter.count("pin") - exporter.count("unpin") - self.unpinned
        return self.buf.statistics().attachments, len(exporter.tables), self.dev.statistics().windows, pins

    def failing(self) -> str:
        """Let one op fail, or none."""
        op = self.random.choice(["", "", "attach", "pin", "map"])
        self.errors = {op: self.random.choice(FAILURES)} if op else {}
        self.exporter.fails = {**self.errors}
        return op

    def step(self) -> None:
        choices = [self.attach] + [self.map, self.map, self.unmap, self.unmap, self.pin, self.unpin, self.detach] * bool(self.held)
        self.random.choice(choices)()
        self.exporter.fails = {}
        assert self.found() == self.expected()
        assert not self.buf.resv.is_locked()

    def attach(self) -> None:
        dynamic, op = self.random.random() < 0.5, self.failing()
        mismatch = dynamic != self.pinning
        pinned = mismatch and self.pinning
        fails = op == "attach" or (op == "pin" and pinned) or (op == "map" and mismatch)
        attachment, error = outcome(lambda: self.buf.attach(self.dev, Mover() if dynamic else None))
        assert error == (self.errors[op] if fails else 0)
        if attachment is None:
            self.refused += op == "attach"
            self.unpinned += op == "pin"
        else:
            self.held.append(Model(attachment, dynamic, BIDIR if mismatch else None))

    def map(self) -> None:
        model, way, op = self.random.choice(self.held), self.random.choice([BIDIR, TO, FROM]), self.failing()
        pins = self.pinning and model.kept is None and not self.moves
        if model.kept is not None:
            expected: int = errno.EBUSY if model.kept not in (way, BIDIR) else 0
        else:
            expected = self.errors[op] if (op == "pin" and pins) or op == "map" else 0
        table, error = outcome(lambda: model.attachment.map_unlocked(way))
        assert error == expected
        if table is None:
            self.unpinned += model.kept is None and op == "pin"
            return
        assert (table.nents, table.size) == (1, SIZE)
        if model.kept is None:
            if self.cache:
                model.kept = way
            else:
                model.maps.append((table, way, pins))

    def unmap(self) -> None:
        model = self.random.choice(self.held)
        if not model.maps:
            return
        i = self.random.randrange(len(model.maps))
        table, way, _ = model.maps[i]
        if self.random.random() < 0.2:
            with pytest.raises(ContractError):
                model.attachment.unmap_unlocked(table, FROM if way is TO else TO)
            return
        del model.maps[i]
        model.attachment.unmap_unlocked(table, way)
        if self.random.random() < 0.2:
            with pytest.raises(ContractError):
                model.attachment.unmap_unlocked(table, way)

    def pin(self) -> None:
        model = self.random.choice(self.held)
        if not model.dynamic:
            return
        fails = self.failing() == "pin" and self.pinning
        with self.buf.resv.locked():
            _, error = outcome(model.attachment.pin)
        assert error == (self.errors["pin"] if fails else 0)
        self.unpinned += fails
        model.pins += self.pinning and not fails

    def unpin(self) -> None:
        model = self.random.choice(self.held)
        if model.pins:
            with self.buf.resv.locked():
                model.attachment.unpin()
            model.pins -= 1

    def detach(self) -> None:
        model = self.random.choice(self.held)
        while model.maps:
            table, way, _ = model.maps.pop()
            model.attachment.unmap_unlocked(table, way)
        while model.pins:
            with self.buf.resv.locked():
                model.attachment.unpin()
            model.pins -= 1
        model.attachment.detach()
        self.held.remove(model)
        with pytest.warns(ContractWarning):
            model.attachment.detach()

    def end(self) -> None:
        while self.held:
            self.detach()
            assert self.found() == self.expected()
        self.buf.close()
        assert self.exporter.count("release") == 1
        self.exporter.close()


@pytest.mark.parametrize(("kind", "cache"), [(Static, False), (Static, True), (Dynamic, False)], ids=["static", "cached", "dynamic"])
def test_what_is_held_is_what_the_matrix_says_whatever_fails(kind: type[Static], cache: bool) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    for seed in range(SEEDS):
        run = Run(seed, kind, cache)
        try:
            with moving(run.moves):
                for _ in range(STEPS):
                    run.step()
                run.end()
        except BaseException:
            print(f"seed {seed}, MOVE_NOTIFY {run.moves}")
            raise
        assert len(os.listdir("/proc/self/fd")) == descriptors
