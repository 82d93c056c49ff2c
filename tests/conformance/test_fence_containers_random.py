"""Containers against a model: random arrays and chains over random fences, signalled in a random order, looked at after each signal."""

from __future__ import annotations

import errno
import random
from dataclasses import dataclass, field

import pytest

import dmabuf
from dmabuf import DmaFence, DmaFenceArray, DmaFenceChain, Timeline, Usage
from dmabuf.domain.dispatcher import dispatcher
from tests.support.waiting import Background

ERRORS = (0, 0, -errno.EIO, -errno.ENODATA, -errno.ECANCELED)


@dataclass
class Model:
    """What is known of fences by number: in which order they ended, and how."""

    order: list[int] = field(default_factory=list)
    errors: dict[int, int] = field(default_factory=dict)

    def ended(self, fence: int) -> bool:
        return fence in self.errors

    def array(self, members: list[int], any_: bool, before: list[int]) -> int:
        """Status of an array that was enabled when ``before`` had ended: 0, 1 or its error."""
        seen = [m for m in members if m in before] + [m for m in self.order if m in members and m not in before]
        # A fence that is there twice counts twice, at the same moment.
        seen = [m for m in seen for _ in range(members.count(m) if m not in before else 1)]
        needed = 1 if any_ else len(members)
        if len(seen) < needed:
            return 0
        return next((self.errors[m] for m in seen[:needed] if self.errors[m]), 1)

    def point(self, fences: list[int]) -> int:
        return int(all(map(self.ended, fences)))


@pytest.mark.parametrize("seed", range(60))
def test_containers_end_as_the_model_says(seed: int) -> None:
    chance = random.Random(seed)
    lines = [Timeline(f"{i}") for i in range(4)]
    fences = [chance.choice(lines).fence() for _ in range(chance.randrange(1, 13))]
    model, numbers = Model(), list(range(len(fences)))
    chance.shuffle(numbers)
    arrays: list[tuple[DmaFenceArray, list[int], bool, list[int]]] = []
    chains: list[tuple[DmaFenceChain, list[int]]] = []

    def make() -> None:
        members = [chance.randrange(len(fences)) for _ in range(chance.randrange(1, 6))]
        any_ = chance.random() < 0.4
        array = DmaFenceArray([fences[i] for i in members], any_)
        array.enable_signaling()
        arrays.append((array, members, any_, list(model.order)))
        point: DmaFenceChain | None = None
        inside: list[int] = []
        for seqno in range(chance.randrange(1, 6)):
            i = chance.randrange(len(fences))
            point = DmaFenceChain(point, fences[i], seqno + 1)
            inside = [*inside, i]
            if chance.random() < 0.5:
                point.enable_signaling()
            chains.append((point, inside))

    def look() -> None:
        for array, members, any_, before in arrays:
            assert array.status == model.array(members, any_, before), (members, any_, before, model)
        for point, inside in chains:
            assert point.status == model.point(inside)

    for i in numbers:
        make()
        look()
        error = chance.choice(ERRORS)
        model.order.append(i)
        model.errors[i] = error
        fences[i].signal(error=error)
        look()
    make()
    look()
    assert all(array.is_signaled() for array, *_ in arrays)
    assert dispatcher(fences[0].domain).watching == 0
    for line in lines:
        line.close()


@pytest.mark.parametrize("seed", range(6))
def test_containers_end_once_whatever_threads_do(seed: int) -> None:
    """Threads signal the members of shared arrays and chains while others enable and wait: every callback runs once, every wait ends."""
    chance = random.Random(seed)
    lines = [Timeline(f"{i}") for i in range(3)]
    fences = [lines[i % 3].fence() for i in range(120)]
    made: list[DmaFence] = []
    for _ in range(60):
        members = chance.sample(fences, chance.randrange(1, 9))
        made.append(DmaFenceArray(members, chance.random() < 0.5) if chance.random() < 0.5 else chain(members))
    ended: list[int] = []
    for i, each in enumerate(made):
        if i % 3:
            each.add_callback(lambda _, i=i: ended.append(i))  # type: ignore[misc]
    parts = [fences[i::3] for i in range(3)]

    def signal(part: list[DmaFence]) -> int:
        for fence in part:
            fence.signal()
        return 0

    def wait() -> int:
        return sum(each.wait() > 0 for each in made)

    jobs: list[Background[int]] = [Background(wait), Background(wait), *(Background(lambda p=p: signal(p)) for p in parts)]  # type: ignore[misc]
    for job in jobs:
        job.__enter__()
    assert [job.result() for job in jobs[:2]] == [len(made)] * 2
    for job in jobs:
        job.__exit__(None)
    assert sorted(ended) == [i for i in range(len(made)) if i % 3]
    assert dispatcher(fences[0].domain).watching == 0
    for line in lines:
        line.close()


def chain(fences: list[DmaFence]) -> DmaFenceChain:
    point: DmaFenceChain | None = None
    for seqno, fence in enumerate(fences):
        point = DmaFenceChain(point, fence, seqno + 1)
    assert point is not None
    return point


def test_merged_fences_stand_for_all_of_their_inputs() -> None:
    """For random inputs: the merged fence is signalled exactly when every input is."""
    for seed in range(40):
        chance = random.Random(seed)
        lines = [Timeline(f"{i}") for i in range(5)]
        fences = [chance.choice(lines).fence() for _ in range(10)]
        inputs: list[DmaFence] = []
        for _ in range(chance.randrange(1, 6)):
            members = chance.sample(fences, chance.randrange(1, 6))
            inputs.append(chance.choice([lambda m: m[0], DmaFenceArray, chain])(members))
        merged = dmabuf.merge(*inputs)
        leaves = {leaf for each in inputs for leaf in dmabuf.unwrap(each)}
        kept = set(dmabuf.unwrap(merged))
        assert kept <= leaves
        for leaf in leaves - kept:  # left out for a later one of its context
            assert any(other.context == leaf.context and other.seqno > leaf.seqno for other in kept)
        merged.enable_signaling()
        # A context's fences complete in order: so whoever is left out has ended when the later one has.
        for fence in sorted(fences, key=lambda f: (f.seqno, f.context)):
            assert merged.is_signaled() == all(leaf.is_signaled() for leaf in kept)
            fence.signal()
        assert merged.is_signaled()
        assert all(each.wait(0) > 0 for each in inputs)
        for line in lines:
            line.close()


def test_containers_that_come_and_go_leave_no_slot_behind(tl: Timeline) -> None:
    from dmabuf import _native

    fence, shm = tl.fence(), tl.domain.shm
    resv = dmabuf.DmaResv()
    with resv.locked():
        resv.reserve(1)
        resv.add(fence, Usage.READ)
    chunks: list[int] = []
    for _ in range(3):
        for _ in range(2000):
            DmaFenceArray([fence, fence])
            DmaFenceChain(None, fence, 1)
            dmabuf.merge(fence, dmabuf.stub_fence())
            dmabuf.private_stub(1)
        chunks.append(shm.load32(_native.OFF_NCHUNKS))
    assert chunks[0] == chunks[1] == chunks[2]
    fence.signal()
