"""State that a layer keeps for each domain of this process."""

from __future__ import annotations

import gc
import os
import threading
import weakref

import pytest

import dmabuf
from dmabuf.domain.domain import Domain
from dmabuf.domain.local import Local


class Kept:
    """A value of a slot."""

    def __init__(self, domain: Domain) -> None:
        self.identity = domain.id


KEPT: Local[Kept] = Local(Kept)
OTHER: Local[Kept] = Local(Kept)


@pytest.fixture
def domain() -> Domain:
    return dmabuf.Domain.private()


def test_value_is_made_at_first_use_and_stays(domain: Domain) -> None:
    assert KEPT.peek(domain) is None
    made = KEPT.of(domain)
    assert made.identity == domain.id
    assert KEPT.of(domain) is made
    assert KEPT.peek(domain) is made


def test_every_domain_has_its_own_value(domain: Domain) -> None:
    other = dmabuf.Domain.private()
    assert KEPT.of(domain) is not KEPT.of(other)


def test_two_slots_of_a_domain_share_nothing(domain: Domain) -> None:
    assert KEPT.of(domain) is not OTHER.of(domain)


def test_threads_that_come_at_once_get_one_value(domain: Domain) -> None:
    calls: list[int] = []
    first_is_inside, go_on = threading.Event(), threading.Event()

    def slow(domain: Domain) -> Kept:
        calls.append(1)
        first_is_inside.set()
        go_on.wait()
        return Kept(domain)

    slot: Local[Kept] = Local(slow)
    found: list[Kept] = []
    threads = [threading.Thread(target=lambda: found.append(slot.of(domain))) for _ in range(4)]
    for thread in threads:
        thread.start()
    first_is_inside.wait()
    go_on.set()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert len(set(map(id, found))) == 1


def test_value_made_inside_of_make_stays(domain: Domain) -> None:
    """As by a signal handler that uses the slot while its value is being made."""
    inner: list[Kept] = []

    def make(domain: Domain) -> Kept:
        if not inner:
            inner.append(Kept(domain))
            inner[0] = slot.of(domain)
        return Kept(domain)

    slot: Local[Kept] = Local(make)
    assert slot.of(domain) is inner[0]
    assert slot.of(domain) is inner[0]


def test_failed_make_leaves_nothing(domain: Domain) -> None:
    fails = [True]

    def make(domain: Domain) -> Kept:
        if fails.pop():
            raise OSError("no room")
        return Kept(domain)

    slot: Local[Kept] = Local(make)
    with pytest.raises(OSError, match="no room"):
        slot.of(domain)
    assert slot.peek(domain) is None
    fails.append(False)
    assert slot.of(domain).identity == domain.id


def test_renew_replaces_old_value_once(domain: Domain) -> None:
    old = KEPT.of(domain)
    new = KEPT.renew(domain, old)
    assert new is not old
    assert KEPT.renew(domain, old) is new
    assert KEPT.of(domain) is new


def test_set_value_is_found(domain: Domain) -> None:
    value = Kept(domain)
    KEPT.set(domain, value)
    assert KEPT.of(domain) is value


def test_value_goes_with_its_domain() -> None:
    domain = dmabuf.Domain.private()
    value = weakref.ref(KEPT.of(domain))
    del domain
    gc.collect()
    assert value() is None


def test_leaving_keeps_the_value(domain: Domain) -> None:
    domain.join()
    value = KEPT.of(domain)
    domain.leave()
    domain.join()
    assert KEPT.of(domain) is value


def test_forked_child_forgets_the_value_when_it_joins(domain: Domain) -> None:
    domain.join()
    value = KEPT.of(domain)
    pid = os.fork()
    if not pid:
        inherited = KEPT.peek(domain) is value
        domain.join()
        os._exit(0 if inherited and KEPT.peek(domain) is None else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert KEPT.of(domain) is value
