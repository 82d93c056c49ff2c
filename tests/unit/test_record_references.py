"""A reference to a record, and who is told of it: the object that has to give it back, in the step that takes it."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

import dmabuf
from dmabuf.core.buffer.handle import handle_of
from tests.support.every_stop import holdings


class Unwilling:
    """A record that can't be told."""

    def __setattr__(self, name: str, value: object) -> None:
        raise MemoryError


def create(domain: dmabuf.Domain, ino: int, record: object) -> tuple[int, int, bool]:
    return domain.shm.rec_create(0, ino, 4096, ino.to_bytes(16, "little"), b"memfd", b"memfd", None, 0, os.getpid(), 0, 0, None, record)


def test_who_makes_a_record_or_references_it_is_told_index_generation_and_life(domain: dmabuf.Domain) -> None:
    shm = domain.shm
    for fresh in (True, False):  # the second one shares the record
        told = SimpleNamespace()
        index, gen, made = create(domain, 77, told)
        assert made is fresh
        assert vars(told) == {"index": index, "gen": gen, "life": shm.life}
    shm.rec_put(index)
    told = SimpleNamespace()
    assert shm.rec_get(index, gen, told)
    assert vars(told) == {"index": index, "gen": gen, "life": shm.life}
    told = SimpleNamespace()
    assert not shm.rec_get(index, gen + 1, told)
    assert vars(told) == {}


def test_reference_that_nobody_can_be_told_of_is_not_taken(domain: dmabuf.Domain) -> None:
    shm = domain.shm
    with pytest.raises(MemoryError):
        create(domain, 78, Unwilling())
    found = shm.rec_find(0, 78)
    assert found is not None
    assert shm.rec_holders(found[0]) == []
    with pytest.raises(MemoryError):
        shm.rec_get(found[0], found[1], Unwilling())
    assert shm.rec_holders(found[0]) == []


def test_what_an_interrupted_operation_is_searched_for_has_the_records_of_this_process() -> None:
    domain = dmabuf.Domain.default()
    with dmabuf.allocate(4096) as buf:
        assert f"record {handle_of(buf).shared.ensure()}" in holdings(domain)["records"]
