"""Every order of the steps (up to seven each) of two processes that change the tables of records and chunks.

Two forked children live as long as their test and run the same pair of programs once for each order; see tests/support/scenarios.py.
After each order: both have ended, every lock is free, no fence is lost, and the record table is what it was.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

import dmabuf
from dmabuf import _native
from dmabuf.core.buffer.handle import handle_of
from tests.support.scenarios import Scenario, World, step_through
from tests.support.stepper import Program

pytestmark = [pytest.mark.crash, pytest.mark.timeout(600)]


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.close()


# ---- records ----


class Rename(Program):
    """Two names after each other."""

    interesting = frozenset({"name_written", "name_switched"})

    def __init__(self, buf: dmabuf.DmaBuf, names: list[str]) -> None:
        self.buf, self.names = buf, names

    def run(self) -> None:
        for name in self.names:
            self.buf.name = name


class RenameAgainstRename(Scenario):
    """One of the last names is the name."""

    def programs(self) -> tuple[Program, Program]:
        buf = self.world.bufs[0]
        return Rename(buf, ["a" * 31, "aa"]), Rename(buf, ["b" * 31, "bb"])

    def check(self, results: tuple[str, str]) -> None:
        assert self.world.bufs[0].name in ("aa", "bb")


class Renamed(Program):
    """Reads the name again and again."""

    interesting = frozenset({"look"})

    def __init__(self, buf: dmabuf.DmaBuf) -> None:
        self.buf = buf

    def run(self) -> str:
        seen = set()
        for _ in range(4):
            _native.step("look")
            seen.add(self.buf.name)
        assert seen <= {"whole", "a" * 31, "aa"}, seen
        return "seen"


class RenameAgainstLook(Scenario):
    """A name is read whole, the old one or the new."""

    def programs(self) -> tuple[Program, Program]:
        buf = self.world.bufs[0]
        return Rename(buf, ["a" * 31, "aa"]), Renamed(buf)

    def prepare(self) -> None:
        self.world.bufs[0].name = "whole"


class CreateAndFree(Program):
    """A record of its own, made and freed."""

    def __init__(self, steps: frozenset[str]) -> None:
        self.interesting = steps

    def run(self) -> None:
        buf = dmabuf.allocate(4096)
        shm, index, gen = buf.domain.shm, handle_of(buf).shared.index, handle_of(buf).shared.gen
        found = shm.rec_find(handle_of(buf).shared.dev, handle_of(buf).shared.ino)
        assert found is not None
        assert found[0] == index
        buf.close()
        del buf
        shm.rec_free(index, gen)  # False when the close has done it
        assert not shm.rec_free(index, gen)


class CreateAgainstFree(Scenario):
    """The table under its lock: no record is lost or given twice."""

    symmetric = True

    def programs(self) -> tuple[Program, Program]:
        steps = frozenset({"rec_locked", "rec_live", "rec_linked", "rec_dying", "rec_unlinked", "rec_freed"})
        return CreateAndFree(steps), CreateAndFree(steps)


class Forget(Program):
    """Frees the record of a buffer that nobody living holds (its fd is open all the same)."""

    interesting = frozenset({"forget", "rec_dying", "rec_unlinked", "rec_cleared", "rec_freed"})

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def ready(self) -> None:
        st = os.fstat(self.fd)
        self.key = st.st_dev, st.st_ino

    def run(self) -> bool:
        shm = dmabuf.Domain.default().join()
        found = shm.rec_find(*self.key)
        _native.step("forget")
        return found is not None and shm.rec_free(found[0], found[1])


class Receive(Program):
    """Takes an fd that came in, as recv() and get() do."""

    interesting = frozenset({"rec_locked", "rec_filled", "rec_held", "rec_live", "rec_linked", "got"})

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.buf: dmabuf.DmaBuf | None = None

    def run(self) -> int:
        self.buf = dmabuf.get(self.fd)
        _native.step("got")
        assert self.buf.name in (None, "in flight")
        return handle_of(self.buf).shared.index

    def clean(self) -> None:
        if self.buf is not None:
            index, gen = handle_of(self.buf).shared.index, handle_of(self.buf).shared.gen
            shm = self.buf.domain.shm
            self.buf.close()
            self.buf = None
            assert not shm.rec_put(index)
            shm.rec_free(index, gen)


class _InFlight(Scenario):
    """A buffer whose fd lives, and whose record nobody holds."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        buf = dmabuf.allocate(4096, name="in flight")
        self.fd = buf.dup()
        shared = handle_of(buf).shared
        self.arguments = (shared.dev, shared.ino, 4096, shared.nonce, b"memfd", b"memfd", b"in flight", 0, os.getpid(), 1)
        index, gen = shared.index, shared.gen
        buf.close()
        del buf
        world.shm.rec_put(index)
        world.shm.rec_free(index, gen)

    def prepare(self) -> None:
        index, _, _ = self.world.shm.rec_create(*self.arguments)
        self.world.shm.rec_put(index)

    def close(self) -> None:
        os.close(self.fd)

    def one_record(self, index: int) -> None:
        st = os.fstat(self.fd)
        found = self.world.shm.rec_find(st.st_dev, st.st_ino)
        assert found is not None
        assert found[0] == index
        infos = [self.world.shm.rec_info(i) for i in self.world.shm.rec_list()]
        assert [i["ino"] for i in infos if i].count(st.st_ino) == 1


class ReceiveAgainstForget(_InFlight):
    """The sweep forgets a buffer just as it arrives: the receiver has a record all the same."""

    def programs(self) -> tuple[Program, Program]:
        return Receive(self.fd), Forget(self.fd)

    def check(self, results: tuple[str, str]) -> None:
        self.one_record(int(results[0]))


class ReceiveAgainstReceive(_InFlight):
    """Two receivers of one buffer share one record."""

    symmetric = True

    def prepare(self) -> None:
        pass  # without a record: both want to make it

    def programs(self) -> tuple[Program, Program]:
        return ReceiveFirst(self.fd), Receive(self.fd)

    def check(self, results: tuple[str, str]) -> None:
        assert results[0] == results[1]
        self.one_record(int(results[0]))


class ReceiveFirst(Receive):
    """The one that lets go first."""

    def clean(self) -> None:
        if self.buf is not None:
            index = handle_of(self.buf).shared.index
            shm = self.buf.domain.shm
            self.buf.close()
            self.buf = None
            shm.rec_put(index)


class Claim(Program):
    """A chunk of fences of its own, in a domain that must grow for it."""

    interesting = frozenset({"chunk_allocated", "chunk_typed", "chunk_published", "chunk_owned"})

    def run(self) -> str:
        shm = dmabuf.Domain.default().join()
        return f"{shm.chunk_claim(_native.CH_BLOCK)} {shm.life}"


class ClaimAgainstClaim(Scenario):
    """Two never own the same chunk, grown or found."""

    symmetric = True

    def programs(self) -> tuple[Program, Program]:
        return Claim(), Claim()

    def check(self, results: tuple[str, str]) -> None:
        owned = dict(tuple(map(int, r.split())) for r in results)  # type: ignore[misc]
        assert len(owned) == 2
        for chunk, life in owned.items():
            assert self.world.shm.load64(_native.OFF_CHUNKTAB + 8 * chunk) >> 32 == life
        if self.reuse:
            for chunk in owned:
                entry = self.world.shm.load64(_native.OFF_CHUNKTAB + 8 * chunk)
                self.world.shm.store64(_native.OFF_CHUNKTAB + 8 * chunk, entry & 0xFFFFFFFF)
                _native.step("test_returned_chunk", _native.OFF_CHUNKTAB + 8 * chunk)

    reuse = False


class ClaimAgainstClaimOfFree(ClaimAgainstClaim):
    """As before, with chunks that lie about."""

    reuse = True
    symmetric = False


SCENARIOS: list[type[Scenario]] = [
    RenameAgainstRename, RenameAgainstLook, CreateAgainstFree, ReceiveAgainstForget, ReceiveAgainstReceive, ClaimAgainstClaim,
    ClaimAgainstClaimOfFree,
]  # fmt: skip


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.__name__)
def test_every_order_of_table_changes(scenario: type[Scenario], world: World) -> None:
    made = scenario(world)
    assert step_through(made) > 1
    made.close()
