"""Values that belong together are read together, whatever changes between two reads."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

import dmabuf
from dmabuf import _native
from dmabuf.domain import holders, lives
from dmabuf.domain.domain import Domain
from tests.support.scenarios import Ghost
from tests.support.steps import Held, fork, reap

pytestmark = pytest.mark.crash


@pytest.fixture
def context(domain: Domain) -> int:
    """The number of a free context."""
    return domain.shm.chunk_claim(_native.CH_CTX) * _native.CTX_PER


def read_while(change: Callable[[], object], read: Callable[[], object], step: str) -> str:
    """What a read gives in a child, if the change comes while the child stands at a step in the middle of it."""
    r, w = os.pipe()

    def child() -> None:
        os.write(w, repr(read()).encode())

    with Held(child, step) as reader:
        assert reader.run_to(step)
        change()
        reader.go_on()
        reader.release()
        assert reader.code == 0
    os.close(w)
    with open(r, "rb") as f:
        return f.read().decode()


def test_ctx_info_is_none_when_the_context_is_closed_meanwhile(domain: Domain, context: int) -> None:
    shm = domain.shm
    word = shm.ctx_open(context, 7, True, 1)
    assert read_while(lambda: shm.ctx_close(word), lambda: shm.ctx_info(word), "ctx_read") == "None"


def test_ctx_info_is_none_when_the_slot_is_used_again_meanwhile(domain: Domain, context: int) -> None:
    shm = domain.shm
    word = shm.ctx_open(context, 7, True, 1)

    def reopen() -> None:
        shm.ctx_close(word)
        shm.ctx_open(context, 8, False, 2)

    assert read_while(reopen, lambda: shm.ctx_info(word), "ctx_read") == "None"


@pytest.mark.parametrize(("after", "stamp"), [(0, 0), (0x1000002, 22)])
def test_ctx_info_pairs_a_wait_with_its_own_stamp(domain: Domain, context: int, after: int, stamp: int) -> None:
    shm = domain.shm
    word = shm.ctx_open(context, 7, True, 1)
    shm.ctx_waits(word, 0x1000001, 11)
    seen = read_while(lambda: shm.ctx_waits(word, after, stamp), lambda: shm.ctx_info(word)[4:], "ctx_read")
    assert seen == repr((after, stamp))


def test_pid_of_is_none_of_the_next_life_of_the_slot(domain: Domain, monkeypatch: pytest.MonkeyPatch) -> None:
    ghost = Ghost(domain)
    life = ghost.live()
    assert domain.pid_of(life) == os.getpid()
    index = lives.index_of(life)
    real = Domain.reap_dead
    shm = domain.shm

    class Shm:
        """A mapping in which the life ends, and the slot begins another, between two looks."""

        looks = 0

        def __getattr__(self, name: str) -> object:
            function = getattr(shm, name)
            if name not in ("load32", "life_current"):
                return function

            def call(*arguments: int) -> object:
                answer = function(*arguments)
                if not Shm.looks:
                    Shm.looks = 1
                    ghost.die()
                    real(domain)
                    ghost.live()
                    shm.store32(lives.slot_offset(index) + _native.LIFE_PID, 4242)
                return answer

            return call

    monkeypatch.setattr(domain, "shm", Shm())
    assert domain.pid_of(life) == 0
    monkeypatch.undo()
    assert lives.index_of(ghost.shm.life) == index
    assert domain.pid_of(ghost.shm.life) == 4242
    ghost.die()
    domain.reap_dead()


def test_missing_lock_is_not_noted_of_the_next_buffer_with_the_record(domain: Domain) -> None:
    shm = domain.shm
    index, gen, _ = shm.rec_create(1, 4711, 4096, b"n" * 16, b"memfd", b"memfd", None, 0, 1, 1)
    shm.rec_set_absent(index, gen, 1, 42)
    assert [found[4:] for found in shm.rec_orphans() if found[0] == index] == []  # this process references it
    shm.rec_put(index)
    assert [found for found in shm.rec_orphans() if found[0] == index] == [(index, gen, 1, 4711, 1, 42)]
    assert shm.rec_free(index, gen)
    again = shm.rec_create(1, 4712, 4096, b"m" * 16, b"memfd", b"memfd", None, 0, 1, 1)
    assert again[0] == index
    shm.rec_set_absent(index, gen, 2, 43)
    shm.rec_put(index)
    assert [found for found in shm.rec_orphans() if found[0] == index] == [(index, again[1], 1, 4712, 0, 0)]
    assert shm.rec_free(index, again[1])


def test_layout_is_not_that_of_the_next_buffer_with_the_record(domain: Domain) -> None:
    shm = domain.shm
    index, gen, _ = shm.rec_create(1, 4711, 4096, b"n" * 16, b"memfd", b"memfd", None, 0, 1, 1, 0, b"first")
    assert shm.rec_layout(index, gen) == (0, b"first")

    def use_again() -> None:
        shm.rec_put(index)
        assert shm.rec_free(index, gen)
        assert shm.rec_create(1, 4712, 4096, b"m" * 16, b"memfd", b"memfd", None, 0, 1, 1, 1, b"second")[0] == index

    assert read_while(use_again, lambda: shm.rec_layout(index, gen), "read_layout") == "None"
    again = shm.rec_find(1, 4712)
    assert again is not None
    assert shm.rec_layout(index, again[1]) == (1, b"second")
    shm.rec_put(index)
    assert shm.rec_free(index, again[1])


def test_holders_are_of_one_process_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows the opening of /proc/PID fails once the process is gone, and never shows another."""
    with dmabuf.allocate(4096) as buf:
        r, w = os.pipe()

        def child() -> None:
            os.close(w)
            os.read(r, 1)

        pid = fork(child)
        os.close(r)
        process = os.open(f"/proc/{pid}", os.O_PATH | os.O_DIRECTORY)
        st = os.fstat(buf.fileno())
        found: dict[tuple[int, int], list[holders.Holder]] = {}
        holders._look(pid, process, {(st.st_dev, st.st_ino)}, found)
        assert found[st.st_dev, st.st_ino][0].pid == pid
        os.close(w)
        reap(pid)
        with pytest.raises(OSError):
            holders._look(pid, process, {(st.st_dev, st.st_ino)}, {})
        os.close(process)


def test_sweep_time_never_goes_back(domain: Domain, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process sweeps between the two reads."""
    shm, times = domain.shm, []
    import dmabuf.domain.domain as module

    real = module.time.monotonic_ns

    def late() -> int:
        now = real()
        times.append(now)
        return now

    monkeypatch.setattr(module.time, "monotonic_ns", late)
    shm.store64(_native.OFF_SWEEP, 0)
    domain.sweep_if_due()
    assert shm.load64(_native.OFF_SWEEP) == times[-1]
    shm.store64(_native.OFF_SWEEP, real())
    before = shm.load64(_native.OFF_SWEEP)
    domain.sweep_if_due()
    assert shm.load64(_native.OFF_SWEEP) == before
