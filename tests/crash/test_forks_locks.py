"""Locks and forks: what is locked as another thread or a raw system call forks, in the child and in the parent."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import threading

import pytest

import dmabuf
from dmabuf import _native
from dmabuf.core.access import poll
from dmabuf.core.buffer.handle import handle_of
from dmabuf.domain import domain, lives, place
from tests.support.forks import Scene, in_child, python_fork
from tests.support.steps import reap
from tests.support.waiting import Background, held_by_another_thread

pytestmark = [pytest.mark.crash, pytest.mark.timeout(300)]


def test_forks_never_share_the_lock_of_a_life_that_is_being_made() -> None:
    """A thread joins and leaves a domain over and over while another forks; a child that lives on keeps no life alive."""
    domain = dmabuf.Domain.private()
    stop = threading.Event()

    def come_and_go() -> int:
        rounds = 0
        while not stop.is_set():
            domain.join()
            domain.leave()
            rounds += 1
        return rounds

    children = []
    ours, theirs = socket.socketpair()
    with Background(come_and_go) as job:
        for _ in range(30):
            pid = python_fork()
            if not pid:
                ours.close()
                theirs.recv(1)  # lives until the end
                os._exit(0)
            children.append(pid)
        stop.set()
        assert job.result() > 0
    theirs.close()
    assert not any(lives.is_alive(domain.shm, index) for index in range(64))
    ours.close()
    for pid in children:
        assert reap(pid) == 0


def test_what_another_thread_locks_as_it_forks_is_free_in_the_child(scene: Scene) -> None:
    """The dispatcher's thread, for one, closes handles and looks at sync files whenever a fence ends."""
    sync = dmabuf.SyncFile(scene.fence)
    sync.fileno()

    def use() -> None:
        with scene.buf.write() as view:
            view[0] = 5
        assert scene.other.poll(select.POLLIN) == select.POLLIN
        dmabuf.get(scene.buf.fileno()).close()
        dmabuf.Domain.open(scene.buf.domain.path or "")
        sync.close()
        scene.buf.close()

    with contextlib.ExitStack() as held:
        for lock in (handle_of(scene.buf).shared.lock, scene.buf.domain.lock, sync._lock, poll._lock, domain._lock):
            held.enter_context(held_by_another_thread(lock))
        assert in_child(python_fork, use) == 0
    with scene.buf.read() as view:
        assert view[0] == 5
    sync.close()


def test_what_the_forking_thread_holds_it_releases_in_the_child_too(scene: Scene) -> None:
    pid = -1
    with handle_of(scene.buf).shared.lock:
        pid = python_fork()
    if not pid:
        code = 1
        try:
            scene.buf.close()
            code = 0
        finally:
            os._exit(code)
    assert reap(pid) == 0


def test_raw_fork_keeps_neither_reapers_lock_nor_lifecycle_lock() -> None:
    """A child that lives on has a share in every description that was open for a moment: the locks on them end all the same."""
    domain = dmabuf.Domain.private()
    ours, theirs = socket.socketpair()

    def die_inside() -> None:
        domain.join()
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(python_fork, die_inside) == -signal.SIGKILL
    (dead,) = lives.alive_slots(domain.shm)
    _native.step_arm("fork", "reap_locked,reap_clean", theirs.fileno())
    try:
        domain.join()  # reaps the dead one, with the lifecycle lock held
    finally:
        _native.step_disarm()
    assert not domain.shm.locked(place.LIFECYCLE_BYTE)
    assert lives.index_of(domain.shm.life) == dead  # its slot could be used again at once
    domain.leave()
    assert not lives.is_alive(domain.shm, dead)
    ours.send(b"..")  # a byte for each child
    for _ in range(2):
        assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
    ours.close()
    theirs.close()
