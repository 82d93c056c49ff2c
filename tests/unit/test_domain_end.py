"""What is left of a domain when every process has gone, and what becomes of it when memory can't be had."""

from __future__ import annotations

import errno
import gc
import itertools
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import dmabuf
from dmabuf import _native
from dmabuf.domain import lives, place
from tests.support.apart import Apart
from tests.support.budget import some_of
from tests.support.places import FILE, MIB, die_inside, in_process, inhabitant, left, make, refused, visit
from tests.support.steps import Held, fork, killed_at, reap, trace


def test_the_last_one_out_leaves_one_empty_file(where: Path) -> None:
    in_process(lambda: visit(where))
    assert left(where) == [FILE]
    assert (where / FILE).read_bytes()[:8] == _native.MAGIC.encode()
    assert (where / FILE).stat().st_size <= MIB
    assert (where / FILE).stat().st_blocks * 512 <= MIB


ENDS = {
    "closed": "buf.close()",
    "open": "",
    "mapped": "v = buf.mmap()",
    "read": "view = buf.read().__enter__()",
    "many": "bufs = [dmabuf.allocate(4096) for _ in range(300)]",
    "a finalizer that still reads": (
        "class F:\n  def __del__(self): assert bytes(self.v[:1]) == b'x'\nf = F(); f.v = buf.mmap(); f.v[0] = 120"
    ),
    "an earlier exit handler that still writes": "",
    "a fork": "import os\npid = os.fork()\nif pid: os.waitpid(pid, 0)",
}


@pytest.mark.parametrize("how", ENDS)
def test_interpreter_that_just_ends_leaves_one_empty_file(where: Path, how: str) -> None:
    early = "import atexit\natexit.register(lambda: buf.write().__enter__())" if how.startswith("an earlier") else ""
    script = f"""{early}
import dmabuf
buf = dmabuf.allocate(4096)
t = dmabuf.Timeline()
f = [t.fence() for _ in range(3000)]
{ENDS[how]}
"""
    env = {**os.environ, "DMABUF_DOMAIN": str(where), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], check=True, env=env, capture_output=True, text=True)
    assert done.stderr == ""
    assert left(where) == [FILE]
    if how.startswith("an earlier"):  # it joined again after it had left, and its life ended with it
        in_process(lambda: come_and_go(where))
    assert (where / FILE).stat().st_size == _native.HEADER_BYTES


@pytest.mark.crash
@pytest.mark.parametrize("step", ["reset_begun", "reset_judged", "reset_rebuilt", "reset_chunk", "reset_counted", "reset_cut"])
def test_death_after_the_end_of_the_interpreter_is_repaired(where: Path, step: str) -> None:
    """The handler that is registered first runs last, when the process has left. Its buffers are closed after that."""
    script = f"""
import atexit
atexit.register(lambda: dmabuf._native.step_arm("kill", "{step}", 1))
import dmabuf
bufs = [dmabuf.allocate(4096) for _ in range(100)]
views = [buf.mmap() for buf in bufs]
"""
    env = {**os.environ, "DMABUF_DOMAIN": str(where), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", script], check=False, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (-signal.SIGKILL, "")
    in_process(lambda: visit(where))
    assert (where / FILE).stat().st_size == _native.HEADER_BYTES


def test_a_killed_last_process_is_cleaned_up_after_by_the_next_opener(where: Path) -> None:
    assert reap(fork(lambda: die_inside(where))) == -signal.SIGKILL
    assert (where / FILE).stat().st_size > _native.HEADER_BYTES

    def look() -> None:  # the file is the same one, and what the dead process left in it goes when this process leaves
        domain = dmabuf.Domain.open(where)
        assert lives.alive_slots(domain.shm) == [lives.index_of(domain.shm.life)]
        domain.leave()

    before = (where / FILE).stat().st_ino
    in_process(look)
    assert (where / FILE).stat().st_ino == before
    assert left(where) == [FILE]
    assert (where / FILE).stat().st_size == _native.HEADER_BYTES


def test_a_domain_keeps_its_identity_when_it_is_emptied(where: Path) -> None:
    seen = set()
    for _ in range(3):
        in_process(lambda: visit(where))
        with open(where / FILE, "rb") as f:
            seen.add(place.read_header(f.fileno()))
    assert len(seen) == 1


def test_read_header_accepts_a_file_that_grows_before_each_of_its_reads(where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_process(lambda: visit(where))
    with open(where / FILE, "r+b") as f:
        fd, chunks = f.fileno(), itertools.count(1)
        real = {"pread": os.pread, "fstat": os.fstat}

        def grown(name: str) -> Callable[..., object]:
            def call(*arguments: object) -> object:
                count = next(chunks)  # as growth does: the memory first, the count after it
                os.ftruncate(fd, _native.HEADER_BYTES + count * _native.CHUNK_BYTES)
                os.pwrite(fd, struct.pack("<I", count), _native.OFF_NCHUNKS)
                return real[name](*arguments)

            return call

        for name in real:
            monkeypatch.setattr(place.os, name, grown(name))
        identity, wrong = place.read_header(fd)
        monkeypatch.undo()
        assert next(chunks) > 3
    assert (len(identity), wrong) == (16, "")


def come_and_go(path: Path) -> None:
    domain = dmabuf.Domain.open(path)
    domain.leave()


def die_at_every_step(where: Path) -> None:
    for prepare in (lambda: None, lambda: make(where, b""), lambda: reap(fork(lambda: die_inside(where)))):
        prepare()
        steps = trace(lambda: come_and_go(where))
        assert {"domain_filled", "reset_cut"} & set(steps)
        for nth in some_of(len(steps), quick=5):
            prepare()
            killed_at(lambda: come_and_go(where), nth)
            in_process(lambda: visit(where))
            assert [name for name in left(where) if name != FILE + ".new"] == [FILE]
            assert (where / FILE).stat().st_size == _native.HEADER_BYTES, steps[nth - 1]
            in_process(lambda: visit(where))
            assert (where / FILE).stat().st_size == _native.HEADER_BYTES


@pytest.mark.crash
def test_domain_opens_after_death_at_every_step_of_join_and_leave(apart: Apart, where: Path) -> None:
    apart(die_at_every_step, where)


@pytest.mark.crash
def test_whoever_stands_at_the_door_sees_a_whole_domain(where: Path) -> None:
    """Held at each step of coming and going, and another one comes and goes meanwhile (once it may)."""
    for nth in itertools.count(1):
        with Held(lambda: come_and_go(where)) as first:
            if first.run_to_nth(nth) is None:
                break  # it has come and gone before
            other = fork(lambda: visit(where))
            first.go_on()
            first.release()
            assert first.code == 0
            assert reap(other) == 0
        assert left(where) == [FILE]
    assert nth > 5


@pytest.mark.crash
def test_many_who_come_and_go_at_once_find_one_domain(where: Path) -> None:
    def crowd() -> None:
        for _ in range(20):
            visit(where)
            gc.collect()

    for pid in [fork(crowd) for _ in range(6)]:
        assert reap(pid) == 0
    assert left(where) == [FILE]
    assert (where / FILE).stat().st_size <= MIB


@pytest.mark.crash
def test_an_opener_waits_for_nobody_but_who_is_at_the_door(where: Path) -> None:
    with inhabitant(where) as pid:
        os.kill(pid, signal.SIGSTOP)
        os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)
        in_process(lambda: visit(where))
        os.kill(pid, signal.SIGCONT)


# ---- memory that can't be had ----


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
def test_a_full_file_system_is_enospc_with_a_remedy(where: Path) -> None:
    where.mkdir(mode=0o700)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1100k,mode=0700", "none", where], check=False, capture_output=True).returncode:
        pytest.skip("mounts are not allowed here")
    try:

        def fill() -> None:
            domain = dmabuf.Domain.open(where)
            buf = dmabuf.allocate(4096, domain=domain)
            timeline = dmabuf.Timeline("full", domain=domain)
            made: list[dmabuf.DmaFence] = []
            try:
                while True:
                    made.append(timeline.fence())
            except OSError as e:
                if e.errno != errno.ENOSPC or "room" not in str(e):
                    raise
            with buf.resv.locked():
                pass
            count = len(made)
            for fence in made:
                fence.signal()
            made.clear()
            del fence
            made = [timeline.fence() for _ in range(count)]
            for fence in made:
                fence.signal()
            buf.close()
            domain.leave()

        in_process(fill)
        in_process(lambda: visit(where))
        assert left(where) == [FILE]
    finally:
        subprocess.run(["umount", where], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
def test_a_file_system_without_room_for_a_domain_is_enospc_with_a_remedy(where: Path) -> None:
    where.mkdir(mode=0o700)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k,mode=0700", "none", where], check=False, capture_output=True).returncode:
        pytest.skip("mounts are not allowed here")
    try:
        error = refused(where)
        assert error.errno == errno.ENOSPC
        assert "DMABUF_DOMAIN" in str(error)
    finally:
        subprocess.run(["umount", where], check=True)
