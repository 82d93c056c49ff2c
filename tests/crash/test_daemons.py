"""A process becomes a daemon: a fork that closes all descriptors and opens files of its own, which get the numbers."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

import dmabuf
from tests.support.errnos import raises_errno
from tests.support.forks import FORKS, Scene, in_child

CONTENT = b"precious\n"
MOST = 900  # the highest number that is closed: whatever the test run has is below


def become_daemon(place: Path) -> None:
    """Close everything, and open logs in its place."""
    os.closerange(3, MOST)
    for n in range(64):
        os.write(os.open(place / f"log{n}", os.O_RDWR | os.O_CREAT), CONTENT)


def untouched(place: Path) -> bool:
    found = [path.read_bytes() for path in place.iterdir()]
    return len(found) == 64 and all(content == CONTENT for content in found)


@pytest.mark.parametrize("fork", FORKS)
def test_daemon_takes_its_living_parent_for_alive(fork: Callable[[], int], tmp_path: Path) -> None:
    scene = Scene()
    domain, life = scene.buf.domain, scene.buf.domain.life

    def waits() -> None:
        become_daemon(tmp_path)
        assert scene.fence.wait(0.2) == 0.0
        assert scene.fence.status == 0

    with scene.buf.write() as view:
        assert in_child(fork, waits) == 0
        view[:4] = b"here"
    assert domain.shm.life_current(life)
    assert scene.fence.status == 0
    assert untouched(tmp_path)
    with scene.buf.read() as view:
        assert bytes(view[:4]) == b"here"
    scene.close()


@pytest.mark.parametrize("fork", FORKS)
def test_daemon_works_on_in_the_domain(fork: Callable[[], int], tmp_path: Path) -> None:
    scene = Scene()
    with scene.buf.write() as view:
        view[:4] = b"here"

    def works() -> None:
        become_daemon(tmp_path)
        with scene.buf.read() as view:  # by the mapping
            assert bytes(view[:4]) == b"here"
        with raises_errno(9):
            scene.other.mmap()
        timeline = dmabuf.Timeline("of the daemon")
        fences = [timeline.fence() for _ in range(600)]  # more than a chunk has: the domain's own file grows
        for fence in fences:
            fence.signal()
        with dmabuf.allocate(4096) as made, made.write() as view:
            view[0] = 1
        scene.buf.close()

    assert in_child(fork, works) == 0
    assert untouched(tmp_path)
    scene.close()
