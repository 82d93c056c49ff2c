"""What a reader without a lock is told while another process stands, or has died, in the middle of a change."""

from __future__ import annotations

import os
import signal
import socket

import pytest

import dmabuf
from dmabuf import DmaResv, Timeline, Usage, _native
from dmabuf.core.resv.lock import record_of
from dmabuf.domain.domain import Domain
from tests.support.steps import Held, fork, reap

pytestmark = pytest.mark.crash


def add(resv: DmaResv, fence: dmabuf.DmaFence) -> None:
    with resv.locked():
        resv.reserve(1)
        resv.add(fence, Usage.WRITE)


# ---- a reservation object that never was idle ----


LOOKS = {
    "resv_busy": lambda shm, index: shm.resv_busy(index, Usage.READ),
    "resv_busy_from": lambda shm, index: shm.resv_busy_from(index, Usage.READ, 0)[0],
    "resv_pending": lambda shm, index: sum(shm.resv_pending(index, Usage.READ, 0)),
    "resv_entries": lambda shm, index: sum(handle for handle, _ in shm.resv_entries(index, Usage.READ, True)),
}


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("places", [1, 2, 3], ids=lambda n: f"after {n} entries")
def test_reader_is_not_told_idle_when_a_fence_comes_behind_it(look: str, places: int) -> None:
    """The reader has passed the place of a signaled fence. A new fence is put there, and only then the last one ends."""
    resv = DmaResv()
    timelines = [Timeline(f"t{i}") for i in range(5)]
    early = [timeline.fence() for timeline in timelines[:places]]
    last, new = timelines[3].fence(), timelines[4].fence()
    for fence in (*early, last):
        add(resv, fence)
    for fence in early:
        fence.signal()
    shm, index = record_of(resv).at()
    ours, theirs = socket.socketpair()

    def reads() -> None:
        theirs.sendall(LOOKS[look](shm, index).to_bytes(8, "little"))

    with ours, Held(reads, only="resv_read") as reader:
        theirs.close()
        assert reader.run_to("resv_read", places)
        add(resv, new)
        last.signal()
        reader.go_on()
        reader.release()
        assert int.from_bytes(ours.recv(8), "little") == new.handle
    new.signal()
    assert shm.resv_busy(index, Usage.READ) == 0


# ---- names ----


def test_name_of_a_dead_process_is_not_on_a_later_buffer() -> None:
    """It is killed when it has written the name, and before anything says that the record is in use."""
    Domain.default().join()

    def makes() -> None:
        Domain.default().join()
        _native.step_arm("kill", "rec_filled", 1)
        dmabuf.allocate(4096, name="of the dead")

    assert reap(fork(makes)) == -signal.SIGKILL
    Domain.default().reap_dead()
    bufs = [dmabuf.allocate(4096) for _ in range(70)]  # more than a chunk has records
    assert [buf.name for buf in bufs if buf.name is not None] == []
    for buf in bufs:
        buf.close()


@pytest.mark.parametrize("dies", [False, True], ids=["stands", "is killed"])
@pytest.mark.parametrize(
    ("step", "names"),
    [
        ("timeline_half", (7, b"old driver", b"old name")),
        ("timeline_filled", (7, b"old driver", b"old name")),
        ("timeline_switched", (8, b"new driver", b"new name")),
    ],
)
def test_timeline_has_names_of_one_use_when_its_opener(step: str, names: tuple[int, bytes, bytes], dies: bool) -> None:
    shm = Domain.default().join()
    told, tell = os.pipe()

    def opens() -> None:
        own = Domain.default().join()
        at = own.chunk_claim(_native.CH_TIMELINE) * _native.TIMELINES_PER
        own.timeline_open(at, 7, b"old driver", b"old name")
        own.timeline_close(at)
        os.write(tell, at.to_bytes(4, "little"))
        own.timeline_open(at, 8, b"new driver", b"new name")

    with Held(opens, only=step) as other:
        assert other.run_to(step, 2)
        index = int.from_bytes(os.read(told, 4), "little")
        if dies:
            other.kill()
        found = shm.timeline_info(index)
        assert found is not None
        assert (found[2], found[4], found[5]) == names
        assert found[1] == 0  # not in use, whichever names it has
        if not dies:
            other.go_on()
            other.release()
    os.close(told)
    os.close(tell)
    Domain.default().reap_dead()
    while shm.chunk_claim(_native.CH_TIMELINE) != index // _native.TIMELINES_PER:
        pass
    before = found[0] + (0 if dies or step == "timeline_switched" else 1)
    assert shm.timeline_open(index, 9, b"d", b"n") == before + 1
    assert shm.timeline_info(index) == (before + 1, 1, 9, shm.life, b"d", b"n")
    shm.timeline_close(index)
