"""The cost of a poll of many fences, counted: each entry of the list is looked at a few times, in whatever order the fences end."""

import os
import random
import select

import pytest

import dmabuf
from dmabuf import Domain, Timeline, Usage
from dmabuf.core.access.poll import _Look, _PollFds
from dmabuf.core.buffer.handle import handle_of
from tests.support.steps import trace

ORDERS = {
    "first to last": lambda n: list(range(n)),
    "last to first": lambda n: list(range(n))[::-1],
    "random": lambda n: random.Random(n).sample(range(n), n),
}


def entries_seen(order: list[int]) -> int:
    """How many entries a poll looks at while the fences of a list end in an order."""

    def action() -> None:
        with dmabuf.allocate(4096) as buf:
            fences = [Timeline(f"t{i}").fence() for i in range(len(order))]
            with buf.resv.locked():
                buf.resv.reserve(len(fences))
                for fence in fences:
                    buf.resv.add(fence, Usage.READ)
            look = _Look(handle_of(buf), select.POLLOUT)
            for i in order:
                assert look.blocking()
                fences[i].signal()
            assert not look.blocking()

    return trace(action).count("resv_read")


@pytest.mark.parametrize("order", ORDERS)
def test_poll_of_twice_as_many_fences_looks_at_twice_as_many_entries(order: str) -> None:
    few, many = (entries_seen(ORDERS[order](n)) for n in (40, 80))
    assert many <= 3 * few


@pytest.mark.parametrize("place", [1 << 32 | 7, 17 << 32 | 1, 31 << 32 | 0xFFFFFFFF, 0xFFFFFFFF << 32 | 1], ids=hex)
def test_wrong_place_costs_time_only(buf: dmabuf.DmaBuf, tl: Timeline, place: int) -> None:
    shared, resv = handle_of(buf).shared, buf.resv
    assert shared.shm.resv_busy_from(shared.index, Usage.READ, place) == (0, 0)
    fence = tl.fence()
    with resv.locked():
        resv.reserve(1)
        resv.add(fence, Usage.WRITE)
    assert shared.shm.resv_busy_from(shared.index, Usage.READ, place)[0] == fence.handle
    fence.signal()


def test_given_up_descriptors_are_taken_back_in_one_walk(buf: dmabuf.DmaBuf, tl: Timeline, monkeypatch: pytest.MonkeyPatch) -> None:
    fence = tl.fence()
    with buf.resv.locked():
        buf.resv.reserve(1)
        buf.resv.add(fence, Usage.WRITE)
    walks: list[int] = []
    real = _PollFds.discard_where

    def counted(self: _PollFds, unwanted: object) -> None:
        walks.append(len(self))
        real(self, unwanted)  # type: ignore[arg-type]

    monkeypatch.setattr(_PollFds, "discard_where", counted)
    monkeypatch.setattr(_PollFds, "discard", None)  # walks the whole set for one object
    for _ in range(200):
        os.close(buf.poll_fd(select.POLLIN))
    assert sum(walks) <= 3 * 200
    fence.signal()


def test_private_domain_is_found_without_a_walk_over_all(monkeypatch: pytest.MonkeyPatch) -> None:
    domains = [Domain.private() for _ in range(3)]
    with dmabuf.SwSync("one", domain=domains[0]) as one:
        monkeypatch.setattr("dmabuf.domain.domain._ALL", ())
        with dmabuf.SwSync.from_fd(one.fileno()) as again:
            assert again.domain is domains[0]
    monkeypatch.undo()
    for domain in domains:
        domain.leave()
