"""The domain's descriptor, closed by somebody else, its number perhaps used again: the mapping goes on, and no life is taken for dead."""

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import dmabuf
from dmabuf._native import CH_TIMELINE, CHUNK_BYTES, HEADER_BYTES, OFF_NCHUNKS, TICK_CHECK
from dmabuf.core.buffer.handle import handle_of
from dmabuf.domain import lives, place
from dmabuf.domain.domain import Domain
from dmabuf.errors import ClosedError
from tests.support.children import Parent, Spawn
from tests.support.errnos import raises_errno
from tests.support.lost import replaced, untouched

LOST: list[Callable[[int], None]] = [os.close, replaced]


@pytest.fixture(params=LOST, ids=["closed", "used again"])
def lose(request: pytest.FixtureRequest) -> Iterator[Callable[[int], None]]:
    numbers = []

    def lost(number: int) -> None:
        numbers.append(number)
        request.param(number)

    yield lost
    if request.param is replaced:
        for number in numbers:
            assert untouched(number)
            os.close(number)


@pytest.fixture
def domain(tmp_path: Path) -> Iterator[Domain]:
    made = Domain.open(tmp_path / "d")
    yield made
    made.leave()


def another(parent: Parent, path: Path) -> None:
    domain = Domain.open(path)
    parent.send(domain.life)
    parent.recv()
    domain.leave()


def test_nobody_is_taken_for_dead(child: Spawn, tmp_path: Path, lose: Callable[[int], None]) -> None:
    domain = Domain.open(tmp_path / "d")
    other = child(another, tmp_path / "d")
    life = other.recv()
    lose(domain.shm.fd)
    assert lives.is_alive(domain.shm, lives.index_of(life))
    assert domain.reap_dead() == 0
    assert domain.shm.life_current(life)
    other.send()
    other.result()
    domain.leave()


def test_a_death_is_noticed_even_so(child: Spawn, tmp_path: Path, lose: Callable[[int], None]) -> None:
    domain = Domain.open(tmp_path / "d")
    other = child(another, tmp_path / "d")
    life = other.recv()
    lose(domain.shm.fd)
    other.kill()
    assert domain.reap_dead() == 1
    assert not domain.shm.life_current(life)
    domain.leave()


def test_the_domains_own_file_grows(domain: Domain, lose: Callable[[int], None]) -> None:
    before = os.stat(domain.shm.path or b"").st_size
    lose(domain.shm.fd)
    domain.shm.chunk_claim(CH_TIMELINE)
    assert os.stat(domain.shm.path or b"").st_size == before + CHUNK_BYTES


def test_the_number_of_the_domain_is_its_own_again(domain: Domain, lose: Callable[[int], None]) -> None:
    before = domain.fileno()
    lose(before)
    st, wanted = os.fstat(domain.fileno()), os.stat(domain.shm.path or b"")
    assert (st.st_dev, st.st_ino) == (wanted.st_dev, wanted.st_ino)


def lost_for_good(parent: Parent) -> list[tuple[object, ...]]:
    """A private domain has no path, and only a process with a capability can open what it maps."""
    if not os.geteuid():
        os.setgroups([])
        os.setresgid(12345, 12345, 12345)
        os.setresuid(12345, 12345, 12345)
    domain = Domain.private()
    timeline = dmabuf.Timeline("t", domain=domain)
    fence = timeline.fence()
    os.close(domain.shm.fd)
    found: list[tuple[object, ...]] = []
    calls: list[Callable[[], object]] = [
        domain.fileno,
        lambda: domain.shm.locked(place.LIFE_BYTE),
        lambda: domain.shm.chunk_claim(CH_TIMELINE),
        domain.shm.reopen,
    ]
    for call in calls:
        with pytest.raises(dmabuf.DmaBufError) as caught:
            call()
        found.append((caught.value.errno, "closed by somebody else" in str(caught.value)))
    domain.tick(TICK_CHECK, 5)  # looks for dead, and can't tell
    fence.signal()
    found.append((fence.status, domain.shm.life != 0))
    return found


def test_a_file_that_cannot_be_opened_again_is_ebadf_and_no_death(child: Spawn) -> None:
    assert child(lost_for_good).result() == [(errno.EBADF, True)] * 4 + [(1, True)]


def test_chunks_of_others_are_seen_through_the_mapping(child: Spawn) -> None:
    assert child(sees_chunks).result() == (True, True)


def sees_chunks(parent: Parent) -> tuple[bool, bool]:
    if not os.geteuid():
        os.setgroups([])
        os.setresgid(12345, 12345, 12345)
        os.setresuid(12345, 12345, 12345)
    domain = Domain.private()
    shm = domain.join()
    own = shm.reopen()
    os.close(shm.fd)
    # What another process does that makes the file larger: allocate, then publish.
    count = shm.load32(OFF_NCHUNKS)
    end = HEADER_BYTES + count * CHUNK_BYTES
    own.reserve(end, CHUNK_BYTES)
    shm.store32(OFF_NCHUNKS, count + 1)
    seen = shm.read(end, CHUNK_BYTES) == bytes(CHUNK_BYTES)
    shm.store32(OFF_NCHUNKS, count + 2)  # without memory behind it: no SIGBUS
    try:
        shm.read(end + CHUNK_BYTES, 8)
    except dmabuf.DmaBufError as e:
        return seen, e.errno == errno.EUCLEAN
    return seen, False


def test_mapping_beside_a_close_in_another_thread_says_that_the_buffer_is_closed() -> None:
    buf = dmabuf.allocate(4096)
    handle = handle_of(buf)
    buf.close()  # after the other thread had checked the handle
    with raises_errno(errno.EBADF) as caught:
        handle.map_file("write", 0, 4096, True)
    assert isinstance(caught.value, ClosedError)
    assert "write" in str(caught.value)
    assert "the buffer is closed" in str(caught.value)
