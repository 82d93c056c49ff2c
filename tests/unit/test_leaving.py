"""``Domain.leave()`` in the middle of something: what goes on needs no life, and what ended is told as it was."""

import os
import socket
from pathlib import Path

import pytest

import dmabuf
from dmabuf import Domain, Timeline
from dmabuf.errors import OwnerDeadError
from tests.support.places import in_process
from tests.support.steps import fork, reap


def test_callback_is_removed_after_leave_without_joining_again(where: Path) -> None:
    def look() -> None:
        domain = Domain.open(where)
        with Timeline("other", domain=domain) as timeline:
            fence = timeline.fence()
            token = fence.add_callback(lambda _: None)
            domain.leave()
            assert fence.remove_callback(token) is False  # it ran as the life ended
            assert domain.shm.life == 0

    in_process(look)


def test_callback_of_somebody_elses_fence_is_removed_after_leave(where: Path) -> None:
    def look() -> None:
        domain = Domain.open(where)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

        def holds() -> None:
            timeline = Timeline("theirs", domain=domain)
            dmabuf.send(theirs, timeline.fence())
            theirs.recv(1)

        pid = fork(holds)
        (fence,) = dmabuf.recv(ours)
        called: list[object] = []
        token = fence.add_callback(called.append)
        domain.leave()
        assert fence.remove_callback(token) is True
        assert fence.remove_callback(token) is False
        assert domain.shm.life == 0
        ours.send(b"x")
        assert reap(pid) == 0
        assert called == []

    in_process(look)


def test_forked_child_removes_no_callback_of_its_parent(where: Path) -> None:
    def look() -> None:
        domain = Domain.open(where)
        with Timeline("parent", domain=domain) as timeline:
            fence = timeline.fence()
            token = fence.add_callback(lambda _: None)
            pid = fork(lambda: os._exit(fence.remove_callback(token)))
            assert reap(pid) == 0
            assert fence.remove_callback(token) is True
            fence.signal()

    in_process(look)


def test_write_that_a_leave_ended_is_torn_and_nobody_is_said_to_have_died(where: Path) -> None:
    def look() -> None:
        domain = Domain.open(where)
        with dmabuf.allocate(4096, domain=domain) as buf:
            with buf.write() as view:
                view[:4] = b"half"
                domain.leave()
            with pytest.raises(OwnerDeadError, match=f"process {os.getpid()} died or left the domain while writing"), buf.read():
                pass
            with buf.write():
                pass
            with buf.read() as view:
                assert bytes(view[:4]) == b"half"

    in_process(look)
