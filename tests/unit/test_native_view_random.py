"""Random operations on views, slices and arrays, beside a model in Python: each shows what the model has, and no access is left."""

from __future__ import annotations

import errno
import gc
import os
import random
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest

import dmabuf
from dmabuf import DmaBuf, KeptWarning, Usage
from dmabuf.core.buffer.handle import handle_of
from tests.support.budget import times
from tests.support.errnos import raises_errno

np = pytest.importorskip("numpy")
SIZE = 4096
MOST = 40  # objects that live at a time


class Mishap(Exception):
    """What goes wrong inside a block."""


class Memory:
    """What lies at the addresses of a mapping: the shared bytes, or a copy of its own once it is detached."""

    def __init__(self, data: bytearray) -> None:
        self.data = data


class Block:
    def __init__(self, at: int, write: bool, manager: Any, memory: Memory) -> None:
        self.at, self.write, self.manager, self.memory = at, write, manager, memory
        self.open = True
        self.objects: list[Thing] = []


class Thing:
    """An object under test. ``where``: the bytes that it shows, as indices; ``holds``: it keeps the access."""

    def __init__(self, block: Block, it: Any, where: range, writable: bool, holds: bool) -> None:
        self.block, self.it, self.where, self.writable, self.holds = block, it, where, writable, holds
        block.objects.append(self)

    @property
    def over(self) -> bool:
        return not self.holds and not self.block.open

    def expected(self) -> bytes:
        data = self.block.memory.data
        return bytes(data[i] for i in self.where)


class Machine:
    def __init__(self, seed: int) -> None:
        self.choose = random.Random(seed)
        first = dmabuf.allocate(SIZE)
        self.handles: list[DmaBuf] = [first, dmabuf.get(first.fileno())]
        self.shared = bytearray(SIZE)
        self.current = [Memory(self.shared) for _ in self.handles]
        self.blocks: list[Block] = []  # open, or with objects
        self.things: list[Thing] = []
        self.steps = 0

    # ---- the model ----

    def detach(self, block: Block) -> None:
        """What the handle's mapping shows becomes private, and the handle makes another."""
        if block.memory is self.current[block.at]:
            block.memory.data = bytearray(self.shared)
            self.current[block.at] = Memory(self.shared)

    def kept(self, block: Block) -> bool:
        return any(thing.holds for thing in block.objects)

    def give_way(self) -> None:
        """A writer of this thread comes: what reads have left is detached, and holds nothing any more."""
        for block in self.blocks:
            if not block.open and not block.write and self.kept(block):
                self.detach(block)

    def fences(self) -> int:
        return len(self.handles[0].resv.fences(Usage.BOOKKEEP))

    # ---- blocks ----

    def enter(self) -> None:
        at, write = self.choose.randrange(2), self.choose.random() < 0.4
        busy = [block for block in self.blocks if block.open]
        if len(busy) == 3:
            return
        manager: Any = self.handles[at].write(timeout=0) if write else self.handles[at].read(timeout=0)
        refused = (write and busy) or any(block.write for block in busy)
        if write or refused:
            self.give_way()
        if refused:
            with raises_errno(errno.EDEADLK):
                manager.__enter__()
            return
        view = manager.__enter__()
        block = Block(at, write, manager, self.current[at])
        self.blocks.append(block)
        self.things.append(Thing(block, view, range(SIZE), write, False))

    def leave(self) -> None:
        busy = [block for block in self.blocks if block.open]
        if not busy:
            return
        block, mishap = self.choose.choice(busy), self.choose.random() < 0.3
        error = Mishap() if mishap else None
        kept = self.kept(block)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", KeptWarning)
            block.manager.__exit__(type(error) if error else None, error, None)
        assert len(told) == (kept and block.write and not mishap)
        block.open = False
        if kept and (block.write or mishap):
            self.detach(block)
        if mishap and block.write:  # torn: the next write makes it whole
            self.give_way()
            with self.handles[0].write(timeout=0):
                pass
        self.forget()

    def forget(self) -> None:
        self.blocks = [block for block in self.blocks if block.open or block.objects]

    # ---- objects ----

    def any(self) -> Thing | None:
        return self.choose.choice(self.things) if self.things else None

    def part(self, n: int) -> slice:
        ends = [None, *(self.choose.randint(-n - 3, n + 3) for _ in range(3))]
        return slice(self.choose.choice(ends), self.choose.choice(ends), self.choose.choice([None, 1, 1, 2, 3, 7, -1, -2, n + 1]))

    def make(self) -> None:
        thing = self.any()
        if thing is None or len(self.things) >= MOST:
            return
        kind = self.choose.choice(KINDS)
        if thing.over:
            with pytest.raises(ValueError, match="released"):
                kind(self, thing)
            return
        made = kind(self, thing)
        if made is not None:
            self.things.append(made)

    def drop(self) -> None:
        if self.things:
            thing = self.things.pop(self.choose.randrange(len(self.things)))
            thing.block.objects.remove(thing)
            self.forget()

    def look(self) -> None:
        thing = self.any()
        if thing is None:
            return
        if thing.over:
            with pytest.raises(ValueError, match="released"):
                bytes(thing.it)
            return
        expected = thing.expected()
        assert bytes(thing.it) == expected
        assert len(thing.it) == len(expected)
        if expected:
            i = self.choose.randrange(-len(expected), len(expected))
            assert int(thing.it[i]) == expected[i]

    def store(self) -> None:
        thing = self.any()
        if thing is None or thing.over or not len(thing.where):
            return
        data = thing.block.memory.data
        if self.choose.random() < 0.5:
            i, byte = self.choose.randrange(len(thing.where)), self.choose.randrange(256)
            if not thing.writable:
                with pytest.raises((TypeError, ValueError)):
                    thing.it[i] = byte
                return
            thing.it[i] = byte
            data[thing.where[i]] = byte
        elif thing.writable:
            part = self.part(len(thing.where))
            where = thing.where[part]
            new = self.choose.randbytes(len(where))
            thing.it[part] = np.frombuffer(new, "u1") if isinstance(thing.it, np.ndarray) else new
            for i, byte in zip(where, new, strict=True):
                data[i] = byte

    def compare(self) -> None:
        a, b = self.any(), self.any()
        if a is None or b is None or a.over or b.over or isinstance(a.it, np.ndarray) or isinstance(b.it, np.ndarray):
            return
        assert (a.it == b.it) == (a.expected() == b.expected())

    def step(self) -> None:
        self.steps += 1
        self.choose.choices(OPERATIONS, WEIGHTS)[0](self)

    def close(self) -> None:
        while any(block.open for block in self.blocks):
            self.leave()
        assert all(bytes(thing.it) == thing.expected() for thing in self.things if thing.holds)
        self.blocks = []
        self.things.clear()
        gc.collect()  # frames of exceptions that were expected
        assert self.fences() == 0
        assert [handle_of(handle).accesses for handle in self.handles] == [0, 0]
        for handle in self.handles:
            handle.close()


def sliced(machine: Machine, thing: Thing) -> Thing:
    part = machine.part(len(thing.where))
    return Thing(thing.block, thing.it[part], thing.where[part], thing.writable, thing.holds)


def memory(_: Machine, thing: Thing) -> Thing:
    return Thing(thing.block, memoryview(thing.it), thing.where, thing.writable, True)


def as_array(_: Machine, thing: Thing) -> Thing:
    return Thing(thing.block, np.asarray(thing.it), thing.where, thing.writable, True)


def readonly(_: Machine, thing: Thing) -> Thing | None:
    if isinstance(thing.it, np.ndarray):
        return None
    return Thing(thing.block, thing.it.toreadonly(), thing.where, False, thing.holds)


def array(machine: Machine, thing: Thing) -> Thing | None:
    if not isinstance(thing.it, dmabuf.View):
        return None
    n = len(thing.where)
    offset, count, stride = machine.choose.randint(0, n), machine.choose.randint(0, 50), machine.choose.choice([1, 1, 3, -1, -2])
    fits = not count or (offset < n and 0 <= offset + (count - 1) * stride < n)
    if not thing.it.contiguous or not fits:
        with pytest.raises(ValueError, match=r"reaches beyond|has a step|released"):
            thing.it.array("u1", (count,), offset, (stride,))
        return None
    made = thing.it.array("u1", (count,), offset, (stride,))
    where = range(thing.where[offset], thing.where[offset] + count * stride, stride) if count else range(0)
    return Thing(thing.block, made, where, thing.writable, True)


def dlpack(_: Machine, thing: Thing) -> Thing | None:
    if not isinstance(thing.it, dmabuf.View):
        return None
    return Thing(thing.block, np.from_dlpack(thing.it), thing.where, thing.writable, True)


def capsule_dropped(_: Machine, thing: Thing) -> None:
    if isinstance(thing.it, dmabuf.View):
        thing.it.__dlpack__(max_version=(1, 0))
    else:
        bytes(thing.it)


KINDS: tuple[Callable[[Machine, Thing], Thing | None], ...] = (sliced, sliced, memory, as_array, readonly, array, dlpack, capsule_dropped)
OPERATIONS: tuple[Callable[[Machine], None], ...] = (
    Machine.enter, Machine.leave, Machine.make, Machine.drop, Machine.look, Machine.store, Machine.compare,
)  # fmt: skip
WEIGHTS = (3, 3, 10, 8, 6, 6, 3)


def run(steps: int, seed: int) -> None:
    machine = Machine(seed)
    try:
        for _ in range(steps):
            machine.step()
    except BaseException as e:
        e.add_note(f"seed {seed}, step {machine.steps}")
        raise
    machine.close()


def test_random_operations_show_what_the_model_has() -> None:
    for _ in range(times(quick=8, full=40)):
        run(500, int(os.environ.get("DMABUF_TEST_SEED", random.randrange(1 << 32))))


@pytest.mark.long
@pytest.mark.timeout(7_000)
def test_million_random_operations_with_debugging_malloc() -> None:
    program = f"import random; from {__name__} import run\nfor _ in range(1000): run(1000, random.randrange(1 << 32))\nprint('done')"
    path = os.pathsep.join(one for one in sys.path if one)
    env = {**os.environ, "PYTHONMALLOC": "debug", "PYTHONFAULTHANDLER": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"
