"""SIGKILL at every named step of every change of shared state, with another process waiting for what the dead one held.

Each scenario is an action of a child. Its steps are listed by a traced run; then the action is run once for every step and dies there,
stopped at the step until a waiter in a third process sleeps for what is held. Afterwards the waiter must have ended by itself, and the
domain must look as if the dead one had never been. With the quick budget a long scenario has its deaths at some of its steps.
"""

from __future__ import annotations

import errno
import itertools
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest

import dmabuf
from dmabuf import Usage
from dmabuf.core.buffer.handle import handle_of
from dmabuf.domain import lives, records
from tests.support.apart import Apart
from tests.support.budget import times
from tests.support.fences import attach
from tests.support.steps import Held, fork, numbers, reap
from tests.support.waiting import until, until_asleep

pytestmark = [pytest.mark.crash, pytest.mark.timeout(600)]


class Scene(NamedTuple):
    """What every scenario starts from."""

    buf: dmabuf.DmaBuf
    other: dmabuf.DmaBuf


def join(_: Scene) -> None:
    dmabuf.Domain.default().join()


def leave(_: Scene) -> None:
    domain = dmabuf.Domain.default()
    domain.join()
    domain.leave()


def allocate(_: Scene) -> None:
    dmabuf.allocate(8192, name="short-lived").close()


def allocate_described(_: Scene) -> None:
    dmabuf.allocate(shape=(4, 4), dtype="float32", name="short-lived").close()


def describe(_: Scene) -> None:
    with dmabuf.allocate(4096, name="short-lived") as buf:
        buf.describe(dmabuf.TensorLayout("uint8", (64,)))


def rename(scene: Scene) -> None:
    scene.buf.name = "after"


def write(scene: Scene) -> None:
    with scene.buf.write() as view:
        view[0] = 1


def read(scene: Scene) -> None:
    with scene.buf.read() as view:
        assert view[0] in (0, 1)


def write_and_raise(scene: Scene) -> None:
    try:
        with scene.buf.write():
            raise KeyError
    except KeyError:
        pass


def access_both(scene: Scene) -> None:
    with dmabuf.access(read=[scene.buf], write=[scene.other]):
        pass


def fence(scene: Scene) -> None:
    timeline = dmabuf.Timeline("crash")
    f = timeline.fence()
    attach(scene.buf.resv, f, Usage.WRITE)
    f.signal()


def failed_fence(scene: Scene) -> None:
    timeline = dmabuf.Timeline("crash")
    f = timeline.fence()
    attach(scene.buf.resv, f, Usage.READ)
    f.signal(-errno.EIO)


def many_fences(scene: Scene) -> None:
    # More than the 16 entries in a record, so that a block is added to the list; the full budget adds two.
    timelines = [dmabuf.Timeline(f"crash {i}") for i in range(times(quick=17, full=40))]
    fences = [t.fence() for t in timelines]
    with scene.buf.resv.locked():
        scene.buf.resv.reserve(len(fences))
        for f in fences:
            scene.buf.resv.add(f, Usage.READ)
    for f in fences:
        f.signal()


def copy_fences(scene: Scene) -> None:
    timelines = [dmabuf.Timeline(f"copied {i}") for i in range(5)]
    fences = [t.fence() for t in timelines]
    for f in fences[:2]:
        attach(scene.buf.resv, f, Usage.READ)
    for f in fences:
        attach(scene.other.resv, f, Usage.WRITE)
    with scene.buf.resv.locked():
        scene.buf.resv.copy(scene.other.resv)
    for f in fences:
        f.signal()


def lock(scene: Scene) -> None:
    with scene.buf.resv.locked():
        pass


def lock_both(scene: Scene) -> None:
    with dmabuf.lock_all([scene.buf.resv, scene.other.resv]):
        pass


def free_records(scene: Scene) -> None:
    buf = dmabuf.allocate(4096)
    index, gen = handle_of(buf).shared.index, handle_of(buf).shared.gen
    shm = buf.domain.shm
    buf.close()
    del buf
    shm.rec_free(index, gen)


def reap_another(scene: Scene) -> None:
    def die() -> None:
        timeline = dmabuf.Timeline("dead")
        attach(scene.buf.resv, timeline.fence(), Usage.WRITE)
        with scene.other.write():
            os.kill(os.getpid(), signal.SIGKILL)

    from dmabuf import _native

    def disarmed() -> None:
        _native.step_disarm()
        die()

    reap(fork(disarmed))
    dmabuf.Domain.default().sweep()
    with scene.other.write():  # whole again
        pass


SCENARIOS: list[Callable[[Scene], None]] = [
    join, leave, allocate, allocate_described, describe, rename, write, read, write_and_raise, access_both, fence, failed_fence,
    many_fences, copy_fences, lock, lock_both, free_records, reap_another,
]  # fmt: skip
FEW = 24  # deaths of a scenario with the quick budget; those have more that do the same many times
# Content may be torn by who dies while writing, and by nobody else.
MAY_TEAR = {write: "buf", write_and_raise: "buf", access_both: "other", reap_another: "other"}


def wait_for_everything(scene: Scene) -> None:
    """What a bystander does: every lock, every fence, every access."""
    for buf in scene:
        with buf.resv.locked():
            pass
        buf.resv.wait(Usage.BOOKKEEP)
        with buf.write() as view:
            view[0] = 1
        with buf.read():
            pass


@contextmanager
def scene() -> Iterator[Scene]:
    with dmabuf.allocate(4096, name="before") as buf, dmabuf.allocate(4096, name="other") as other:
        yield Scene(buf, other)


def inhabitants() -> list[int]:
    domain = dmabuf.Domain.default()
    return lives.alive_slots(domain.shm)


def settled(scene: Scene) -> None:
    """The domain holds what this process made, and nothing of anybody else."""
    domain = dmabuf.Domain.default()
    domain.sweep()
    shm = domain.shm
    mine = lives.index_of(shm.life)
    assert inhabitants() == [mine]
    assert sorted(records.present(domain)) == sorted(handle_of(b).shared.index for b in scene)
    until(lambda: not records.sweep(domain) and not shm.rec_orphans())
    for buf in scene:
        assert not buf.resv.is_locked()
        assert buf.resv.fences(Usage.BOOKKEEP) == []
        assert buf.resv.trylock()
        buf.resv.unlock()
    owned = {chunk for chunk, _ in shm.chunks_of(shm.life)}
    from dmabuf import _native

    for chunk in range(shm.load32(_native.OFF_NCHUNKS)):
        owner = shm.load64(_native.OFF_CHUNKTAB + 8 * chunk) >> 32
        assert owner == 0 or chunk in owned
    assert shm.load32(_native.OFF_TABLE_LOCK) == 0
    assert shm.table_audit() == (0, 0, 0, 0), "a record or block is lost to everybody"


def die_at_every_step(scenario: Callable[[Scene], None], scene: Scene) -> int:
    """After each death the waiter must end, and all be settled. How many deaths there were."""
    count = 0
    for nth in numbers(lambda: scenario(scene), quick=FEW):
        with Held(lambda: scenario(scene)) as doomed:
            step = doomed.run_to_nth(nth)
            if step is None:
                break  # the action ended before
            waiter = fork(lambda: wait_for_everything(scene))
            until_asleep(waiter)
            doomed.kill()
        assert reap(waiter) == 0, f"the waiter failed after a death at step {nth} ({step})"
        settled(scene)
        count += 1
    return count


def deaths(scenario: Callable[[Scene], None]) -> int:
    with scene() as made:
        return die_at_every_step(scenario, made)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.__name__)
def test_death_at_every_step_is_repaired_by_whoever_comes_next(scenario: Callable[[Scene], None], apart: Apart) -> None:
    assert apart(deaths, scenario) >= 1, "a scenario without steps proves nothing"


def torn_by_deaths(scenario: Callable[[Scene], None]) -> dict[str, set[str]]:
    """The steps at which a death leaves the content of each buffer torn."""
    with scene() as made:
        return tear_at_every_step(scenario, made)


def tear_at_every_step(scenario: Callable[[Scene], None], scene: Scene) -> dict[str, set[str]]:
    torn_at: dict[str, set[str]] = {"buf": set(), "other": set()}
    for nth in itertools.count(1) if scenario in MAY_TEAR else numbers(lambda: scenario(scene), quick=FEW):
        for buf in scene:
            with buf.write():
                pass
        with Held(lambda: scenario(scene)) as doomed:
            step = doomed.run_to_nth(nth)
            if step is None:
                break  # the action ended before
            doomed.kill()
        dmabuf.Domain.default().sweep()
        for which, buf in zip(("buf", "other"), scene, strict=True):
            try:
                with buf.read():
                    pass
            except OSError as error:
                if error.errno not in (errno.EOWNERDEAD, errno.ECANCELED):
                    raise
                torn_at[which].add(step)
    settled(scene)
    return torn_at


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.__name__)
def test_content_is_torn_only_by_who_may_have_written(scenario: Callable[[Scene], None], apart: Apart) -> None:
    torn_at, allowed = apart(torn_by_deaths, scenario), MAY_TEAR.get(scenario)
    for which, where in torn_at.items():
        if which != allowed:
            assert not where
    if allowed:
        assert "access_granted" in torn_at[allowed] or scenario is reap_another
        assert not torn_at[allowed] & {"access_fence", "access_added", "access_waiting", "resv_locked"} or scenario is reap_another
