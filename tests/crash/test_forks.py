"""Forks inside every kind of block: what a child inherits is inert, whatever way it was made and however it ends.

The child leaves the block, collects garbage, tries to use what it inherited, exits in several ways or is killed; the parent's access,
lock, fences and life are what they were. A raw fork system call knows nothing of Python's hooks, so nothing here may depend on them.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest

import dmabuf
from dmabuf import Usage
from dmabuf.core.buffer.handle import handle_of
from dmabuf.core.export.exported import EXPORTS
from dmabuf.domain import lives
from tests.support.drivers import Bare
from tests.support.fences import attach
from tests.support.forks import FORKS, Scene, in_child, python_fork
from tests.support.steps import reap
from tests.support.waiting import Background

pytestmark = [pytest.mark.crash, pytest.mark.timeout(300)]


@contextlib.contextmanager
def reading(scene: Scene) -> Iterator[None]:
    with scene.buf.read():
        yield


@contextlib.contextmanager
def writing(scene: Scene) -> Iterator[None]:
    with scene.buf.write() as view:
        view[0] = 7
        yield


@contextlib.contextmanager
def accessing(scene: Scene) -> Iterator[None]:
    with dmabuf.access(read=[scene.other], write=[scene.buf]):
        yield


@contextlib.contextmanager
def locked(scene: Scene) -> Iterator[None]:
    with scene.buf.resv.locked():
        yield


@contextlib.contextmanager
def lock_all(scene: Scene) -> Iterator[None]:
    with dmabuf.lock_all([scene.buf.resv, scene.other.resv]):
        yield


@contextlib.contextmanager
def pending(scene: Scene) -> Iterator[None]:
    with dmabuf.Timeline("block") as timeline:
        fence = timeline.fence()
        attach(scene.buf.resv, fence, Usage.WRITE)
        yield
        assert not fence.is_signaled()
        fence.signal()


@contextlib.contextmanager
def waiting_in_a_thread(scene: Scene) -> Iterator[None]:
    with dmabuf.Timeline("slow") as timeline:
        fence = timeline.fence()
        attach(scene.buf.resv, fence, Usage.WRITE)
        other = dmabuf.get(scene.buf.fileno())
        with Background(lambda: other.resv.wait(Usage.BOOKKEEP)) as job:
            job.until_blocked()
            yield
            assert not job.done
            fence.signal()
            assert job.result() > 0
        other.close()


BLOCKS: list[Callable[[Scene], AbstractContextManager[None]]] = [
    reading, writing, accessing, locked, lock_all, pending, waiting_in_a_thread,
]  # fmt: skip


def state(scene: Scene) -> dict[str, object]:
    """What of the parent must not change."""
    shm = scene.buf.domain.shm
    found: dict[str, object] = {"life": shm.life, "breathes": lives.is_alive(scene.buf.domain.shm, lives.index_of(shm.life))}
    for name in ("buf", "other"):
        index = handle_of(getattr(scene, name)).shared.index
        found[name] = (shm.resv_owner(index), shm.resv_pending(index, Usage.BOOKKEEP, 0), shm.rec_torn(index), shm.rec_holders(index))
    found["fence"] = scene.fence.status
    found["alive"] = lives.alive_slots(shm)
    return found


def collect() -> None:
    gc.collect()
    gc.collect()


@pytest.mark.parametrize("fork", FORKS)
@pytest.mark.parametrize("block", BLOCKS)
def test_a_child_that_collects_garbage_and_exits_changes_nothing(
    block: Callable[[Scene], AbstractContextManager[None]], fork: Callable[[], int], scene: Scene
) -> None:
    with block(scene):
        before = state(scene)
        assert in_child(fork, collect) == 0
        assert state(scene) == before


@pytest.mark.parametrize("fork", FORKS)
@pytest.mark.parametrize("block", BLOCKS[:5])  # the others end by what only the parent can do
def test_a_child_that_leaves_the_block_changes_nothing(
    block: Callable[[Scene], AbstractContextManager[None]], fork: Callable[[], int], scene: Scene
) -> None:
    with contextlib.ExitStack() as stack:
        stack.enter_context(block(scene))
        before = state(scene)
        assert in_child(fork, stack.close) == 0
        assert state(scene) == before


@pytest.mark.parametrize("fork", FORKS)
@pytest.mark.parametrize("block", BLOCKS[:5])
def test_a_child_that_raises_out_of_the_block_changes_nothing(
    block: Callable[[Scene], AbstractContextManager[None]], fork: Callable[[], int], scene: Scene
) -> None:
    parent, left = os.getpid(), 1
    try:
        with block(scene):
            before = state(scene)
            pid = fork()
            if not pid:
                raise KeyError
            assert reap(pid) == 0
            assert state(scene) == before
    except KeyError:
        collect()
        left = 0
    finally:
        if os.getpid() != parent:  # whatever happened: no second test run
            os._exit(left)


def delete_everything(scene: Scene) -> None:
    del scene.fence, scene.timeline
    del scene.buf, scene.other
    collect()


@pytest.mark.parametrize("fork", FORKS)
@pytest.mark.parametrize("block", BLOCKS)
def test_a_child_that_drops_everything_changes_nothing(
    block: Callable[[Scene], AbstractContextManager[None]], fork: Callable[[], int], scene: Scene
) -> None:
    with block(scene):
        before = state(scene)
        assert in_child(fork, lambda: delete_everything(scene)) == 0
        assert state(scene) == before


@pytest.mark.parametrize("fork", FORKS)
@pytest.mark.parametrize("block", BLOCKS)
def test_a_child_that_is_killed_changes_nothing(
    block: Callable[[Scene], AbstractContextManager[None]], fork: Callable[[], int], scene: Scene
) -> None:
    with block(scene):
        before = state(scene)
        assert in_child(fork, lambda: os.kill(os.getpid(), signal.SIGKILL)) == -signal.SIGKILL
        scene.buf.domain.sweep()
        assert state(scene) == before


def errno_of(action: Callable[[], object]) -> int:
    """The errno of an OSError, -1 for a ContractError, 0 when it just worked."""
    try:
        action()
    except OSError as e:
        return e.errno or 0
    except dmabuf.ContractError:
        return -1
    return 0


def use_inherited(scene: Scene) -> None:
    assert errno_of(scene.fence.signal) == errno.EPERM
    assert errno_of(lambda: scene.fence.set_error(-errno.EIO)) == errno.EPERM
    assert errno_of(scene.timeline.fence) == errno.EPERM
    assert scene.fence.status == 0
    scene.timeline.close()
    assert scene.fence.status == 0


@pytest.mark.parametrize("fork", FORKS)
def test_inherited_fences_and_timelines_are_eperm(fork: Callable[[], int], scene: Scene) -> None:
    before = state(scene)
    assert in_child(fork, lambda: use_inherited(scene)) == 0
    assert state(scene) == before
    assert scene.timeline.fence().seqno == 2


@pytest.mark.parametrize("fork", FORKS)
def test_an_inherited_lock_can_not_be_unlocked_or_used(fork: Callable[[], int], scene: Scene) -> None:
    resv = scene.buf.resv
    with resv.locked():
        before = state(scene)

        def use() -> None:
            assert errno_of(resv.unlock) in (errno.EPERM, -1)
            assert errno_of(lambda: resv.reserve(1)) in (errno.EPERM, -1)
            assert not resv.trylock()
            assert not resv.held_here()
            assert resv.is_locked()

        assert in_child(fork, use) == 0
        after = state(scene)
        assert {k: v for k, v in after.items() if k not in ("buf", "alive")} == {
            k: v for k, v in before.items() if k not in ("buf", "alive")
        }
        assert resv.held_here()
        resv.reserve(1)


@pytest.mark.parametrize("fork", FORKS)
def test_a_child_opens_an_access_of_its_own(fork: Callable[[], int], scene: Scene) -> None:
    def use() -> None:
        with scene.buf.write() as view:
            view[1] = 42
        with scene.buf.read() as view:
            assert view[1] == 42
        with dmabuf.Timeline("child") as timeline:
            fence = timeline.fence()
            attach(scene.buf.resv, fence, Usage.READ)
            fence.signal()
        again = dmabuf.get(scene.buf.fileno())
        again.name = "renamed"
        again.close()

    assert in_child(fork, use) == 0
    scene.buf.domain.sweep()
    with scene.buf.read() as view:
        assert view[1] == 42
    assert scene.buf.name == "renamed"


@pytest.mark.parametrize("fork", FORKS)
def test_a_child_waits_for_the_access_it_inherited(fork: Callable[[], int], scene: Scene) -> None:
    ours, theirs = socket.socketpair()
    with contextlib.ExitStack() as stack:
        view = stack.enter_context(scene.buf.write())
        pid = fork()
        if not pid:
            code = 1
            try:
                ours.close()
                assert errno_of(lambda: scene.buf.write(timeout=0).__enter__()) == errno.ETIMEDOUT
                theirs.send(b"w")
                with scene.buf.read() as seen:
                    assert seen[0] == 9
                code = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                os._exit(code)
        theirs.close()
        assert ours.recv(1) == b"w"
        view[0] = 9
        del view
    assert reap(pid) == 0
    ours.close()


@pytest.mark.parametrize("fork", FORKS)
def test_a_view_in_the_child_still_shows_the_memory(fork: Callable[[], int], scene: Scene) -> None:
    with scene.buf.write() as view:
        view[0] = 3

        def use() -> None:
            assert view[0] == 3

        assert in_child(fork, use) == 0
    with scene.buf.read() as view:
        assert view[0] == 3


@pytest.mark.parametrize("fork", FORKS)
@pytest.mark.parametrize("inside", [False, True], ids=["idle", "inside an access"])
def test_a_dead_parent_is_dead_though_its_child_lives(fork: Callable[[], int], inside: bool, scene: Scene) -> None:
    """The child shares every descriptor and mapping that a fork shares: the parent's life ends all the same."""
    ours, theirs = socket.socketpair()
    middle = python_fork()
    if not middle:
        try:
            ours.close()
            stack = contextlib.ExitStack()
            if inside:
                stack.enter_context(scene.buf.write())
                stack.enter_context(scene.other.resv.locked())
            timeline = dmabuf.Timeline("middle")
            fence = timeline.fence()
            scene.other.domain.join()
            child = fork()
            if not child:
                theirs.recv(1)  # until the test lets it go
                os._exit(0)
            theirs.send(b"%d %d %d" % (scene.buf.domain.shm.life, fence.handle, child))
            signal.pause()
        finally:
            os._exit(1)
    theirs.close()
    life, handle, orphan = map(int, ours.recv(100).split())
    shm = scene.buf.domain.shm
    assert shm.life_current(life)
    os.kill(middle, signal.SIGKILL)
    reap(middle)
    shm.fence_wait(handle, -1, False)
    scene.buf.domain.reap_dead()
    assert not shm.life_current(life)
    with scene.other.resv.locked():
        pass
    if inside:
        assert errno_of(lambda: scene.buf.read().__enter__()) == errno.EOWNERDEAD
    with scene.buf.write():
        pass
    ours.send(b"x")  # it lived until here
    assert reap(orphan) == 0  # the test run is a subreaper
    ours.close()


# ---- normal ends of the interpreter, subprocess, multiprocessing ----

_SCRIPT = """
import gc, os, sys
import dmabuf
from dmabuf import Usage, _native
how = sys.argv[1]
buf = dmabuf.allocate(4096)
timeline = dmabuf.Timeline("parent")
fence = timeline.fence()
with buf.resv.locked():
    buf.resv.reserve(1)
    buf.resv.add(fence, Usage.BOOKKEEP)
life = buf.domain.shm.life
with buf.write() as view:
    pid = os.fork()
    if not pid:
        if how == "sys.exit":
            sys.exit(0)
        if how == "os._exit":
            os._exit(0)
        if how == "exception":
            sys.excepthook = lambda *_: None
            raise KeyError
        if how == "del":
            del fence, timeline, buf
            gc.collect()
    else:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code == (1 if how == "exception" else 0), code
        shm = buf.domain.shm
        assert shm.life == life and shm.life_current(life)
        assert fence.status == 0
        assert len(buf.resv.fences(Usage.BOOKKEEP)) == 2
        view[0] = 1
if pid:
    with buf.read() as view:
        assert view[0] == 1
    fence.signal()
    print("whole")
"""


@pytest.mark.parametrize("how", ["sys.exit", "os._exit", "exception", "del", "end of the script"])
def test_a_forked_interpreter_that_ends_changes_nothing(how: str) -> None:
    done = subprocess.run([sys.executable, "-W", "error", "-c", _SCRIPT, how], check=False, capture_output=True, text=True)
    assert done.stdout == "whole\n", done.stderr
    assert done.returncode == 0
    assert done.stderr == ""


@pytest.mark.parametrize("close_fds", [True, False])
@pytest.mark.parametrize("block", BLOCKS)
def test_a_subprocess_inherits_nothing(block: Callable[[Scene], AbstractContextManager[None]], close_fds: bool, scene: Scene) -> None:
    look = "import os,sys; print([l for f in os.listdir('/proc/self/fd') if 'dmabuf' in (l := os.path.realpath(f'/proc/self/fd/{f}'))])"
    with block(scene):
        before = state(scene)
        done = subprocess.run([sys.executable, "-S", "-c", look], check=True, capture_output=True, text=True, close_fds=close_fds)
        assert done.stdout == "[]\n"
        assert state(scene) == before


def _nothing() -> None:
    gc.collect()


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
@pytest.mark.parametrize("block", BLOCKS)
def test_a_multiprocessing_child_changes_nothing(block: Callable[[Scene], AbstractContextManager[None]], method: str, scene: Scene) -> None:
    context = multiprocessing.get_context(method)
    with block(scene), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        before = state(scene)
        process = context.Process(target=_nothing)
        process.start()
        process.join()
        assert process.exitcode == 0
        process.close()
        assert state(scene) == before


def test_a_thread_goes_on_waiting_in_the_parent_after_many_forks(scene: Scene) -> None:
    with waiting_in_a_thread(scene):
        for _ in range(20):
            assert in_child(python_fork, collect) == 0


def test_a_child_of_a_child_is_inert_too(scene: Scene) -> None:
    with scene.buf.write():
        before = state(scene)
        assert in_child(python_fork, lambda: sys.exit(in_child(python_fork, lambda: use_inherited(scene)))) == 0
        assert state(scene) == before


def test_a_child_that_joined_dies_alone(scene: Scene) -> None:
    def join_and_die() -> None:
        scene.buf.domain.join()
        attach(scene.buf.resv, dmabuf.Timeline("child").fence(), Usage.WRITE)
        os.kill(os.getpid(), signal.SIGKILL)

    before = state(scene)
    assert in_child(python_fork, join_and_die) == -signal.SIGKILL
    scene.buf.resv.wait(Usage.BOOKKEEP)
    scene.buf.domain.sweep()
    assert state(scene) == before


def test_child_that_leaves_before_it_joins_serves_for_itself(scene: Scene) -> None:
    """The child's first use forgets what the parent has for its own life, whether the child has left before or not."""
    exporter = Bare()

    def leave_and_export() -> None:
        dmabuf.Domain.default().leave()
        with dmabuf.export(exporter, 4096):
            assert len(EXPORTS.of(dmabuf.Domain.default()).buffers) == 1

    with dmabuf.export(exporter, 4096):
        assert in_child(python_fork, leave_and_export) == 0
    exporter.close()
