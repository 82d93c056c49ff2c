"""What is known of a buffer lives as long as its memory, however few processes are left: torn content, names, fences.

In each test all processes of the domain are gone while something that hasn't joined holds the buffer: a message in flight, a descriptor, a
forked child.
"""

from __future__ import annotations

import array
import ctypes
import errno
import os
import signal
import socket
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import dmabuf
from dmabuf import _native
from dmabuf.core.buffer.handle import handle_of
from dmabuf.core.get import from_fd
from dmabuf.domain import domain as domain_module
from dmabuf.domain import place
from dmabuf.domain.records import ABSENT_PASSES
from tests.support.budget import some_of
from tests.support.forks import FORKS
from tests.support.mounts import mounted
from tests.support.places import FILE, in_process, inhabitant, left, visit
from tests.support.steps import Held, fork, killed_at, reap, trace

pytestmark = [pytest.mark.crash, pytest.mark.timeout(300)]

NOT_ALLOWED = 77


@pytest.fixture(params=["memory", "overlay"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """Where a mapping keeps a lock, and where it doesn't: there a process is present by a descriptor, and the file only gets holes."""
    if request.param == "overlay":
        with mounted("overlay", tmp_path / "merged", base=tmp_path) as path:
            yield path / "domain"
        return
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="facts-", dir=base) as directory:
        yield Path(directory) / "domain"


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with here, there:
        yield here, there


def size(where: Path) -> int:
    """The bytes of the domain's file; on overlayfs, where it doesn't become shorter, those that it has memory for."""
    file = (where / FILE).stat()
    if where.parent.name != "merged":
        return file.st_size
    chunks = (file.st_blocks * 512 - _native.HEADER_BYTES) // _native.CHUNK_BYTES  # without what a file system needs for the holes
    return _native.HEADER_BYTES + chunks * _native.CHUNK_BYTES


def send_and_die(where: Path, sock: socket.socket, *, inside: bool = True) -> None:
    """Send a buffer, one more with a pending fence, and a fence that ended; die in a write() of the first."""
    domain = dmabuf.Domain.open(where)
    buf = dmabuf.allocate(4096, domain=domain, name="frame")
    timeline = dmabuf.Timeline("camera", domain=domain)
    pending = timeline.fence()
    with buf.write() as view:
        view[:] = b"a" * 4096
    dmabuf.send(sock, buf, pending)
    if not inside:
        os.kill(os.getpid(), signal.SIGKILL)
    with buf.write() as view:
        view[:100] = b"b" * 100
        os.kill(os.getpid(), signal.SIGKILL)


def look_at(buf: dmabuf.DmaBuf, fence: dmabuf.DmaFence | None = None) -> None:
    """What is known of the buffer that send_and_die() made."""
    assert buf.name == "frame"
    with pytest.raises(OSError) as caught, buf.read(timeout=10):
        pass
    assert caught.value.errno == errno.EOWNERDEAD
    if fence is not None:
        assert fence.wait(10) > 0
        assert fence.error == -errno.EOWNERDEAD


def receive(where: Path, sock: socket.socket) -> None:
    domain = dmabuf.Domain.open(where)
    buf, fence = dmabuf.recv(sock)
    look_at(buf, fence)
    with buf.write() as view:  # whole again
        view[:] = bytes(4096)
    with buf.read():
        pass
    buf.close()
    domain.leave()


def come_and_go(where: Path) -> None:
    dmabuf.Domain.open(where).leave()


# ---- who holds it ----


@pytest.mark.parametrize("visitors", [0, 1, 3])
def test_facts_outlive_all_processes_in_a_message(where: Path, pair: tuple[socket.socket, socket.socket], visitors: int) -> None:
    assert reap(fork(lambda: send_and_die(where, pair[0]))) == -signal.SIGKILL
    for _ in range(visitors):
        in_process(lambda: come_and_go(where))
    if visitors:
        file = (where / FILE).stat()
        assert size(where) <= _native.HEADER_BYTES + 2 * _native.CHUNK_BYTES
        assert file.st_blocks * 512 < _native.HEADER_BYTES + 2 * _native.CHUNK_BYTES  # the chunk with the record, behind a hole
    in_process(lambda: receive(where, pair[1]))
    in_process(lambda: come_and_go(where))
    assert left(where) == [FILE]
    assert size(where) == _native.HEADER_BYTES


def hide(path: bytes, by: bytes = b"/dev/null") -> None:
    """Give this process another file, or an empty one, in place of one of /proc, as a sandbox may."""
    libc = ctypes.CDLL(None)
    if libc.unshare(0x20000) or libc.mount(b"none", b"/", None, 0x44000, None):  # CLONE_NEWNS; MS_REC | MS_PRIVATE
        os._exit(NOT_ALLOWED)
    if libc.mount(by, path, None, 0x1000, None):  # MS_BIND
        os._exit(NOT_ALLOWED)


def test_facts_outlive_a_process_that_can_not_see_locks(where: Path, pair: tuple[socket.socket, socket.socket]) -> None:
    assert reap(fork(lambda: send_and_die(where, pair[0]))) == -signal.SIGKILL

    def visit_blind() -> None:
        hide(b"/proc/locks")
        assert _native.locks_seen() is None
        for _ in range(ABSENT_PASSES + 1):
            domain = dmabuf.Domain.open(where)
            domain.sweep()
            domain.leave()

    seen = reap(fork(visit_blind))
    if seen == NOT_ALLOWED:
        pytest.skip("mounts are not allowed here")
    assert seen == 0
    in_process(lambda: receive(where, pair[1]))


def test_facts_outlive_all_processes_in_a_descriptor(where: Path, pair: tuple[socket.socket, socket.socket]) -> None:
    """This process has a descriptor of the buffer, but has never joined its domain."""
    assert reap(fork(lambda: send_and_die(where, pair[0]))) == -signal.SIGKILL
    _, ancillary, _, _ = pair[1].recvmsg(65536, socket.CMSG_SPACE(64))
    fds = array.array("i")
    for _, _, data in ancillary:
        fds.frombytes(data[: len(data) - len(data) % 4])
    for _ in range(2):
        in_process(lambda: come_and_go(where))

    def look() -> None:
        domain = dmabuf.Domain.open(where)
        buf = from_fd(os.dup(fds[0]), domain)
        look_at(buf)
        buf.close()
        domain.leave()

    in_process(look)
    for fd in fds:
        os.close(fd)
    in_process(lambda: come_and_go(where))
    assert size(where) == _native.HEADER_BYTES


@pytest.mark.parametrize("way", FORKS, ids=lambda way: way.__name__)
def test_facts_outlive_all_processes_in_an_unjoined_child(
    where: Path, pair: tuple[socket.socket, socket.socket], way: Callable[[], int]
) -> None:
    here, there = pair

    def parent() -> None:
        domain = dmabuf.Domain.open(where)
        buf = dmabuf.allocate(4096, domain=domain, name="frame")
        fence = dmabuf.Timeline("camera", domain=domain).fence()
        if way() == 0:
            code = 1
            try:
                here.recv(1)  # the parent is dead, and a visitor was here
                assert fence.wait(10) > 0  # before it joins
                look_at(buf, fence)
                code = 0
            finally:
                here.send(bytes([code]))
                os._exit(code)
        with buf.write() as view:
            view[0] = 1
            os.kill(os.getpid(), signal.SIGKILL)

    assert reap(fork(parent)) == -signal.SIGKILL
    in_process(lambda: come_and_go(where))
    assert size(where) > _native.HEADER_BYTES + _native.CHUNK_BYTES  # somebody maps the file, so nothing was given back
    there.send(b"g")
    assert there.recv(1) == b"\0"
    os.wait()  # the child: the test run is a subreaper
    in_process(lambda: come_and_go(where))
    assert size(where) == _native.HEADER_BYTES


def test_reset_is_left_to_the_last_when_a_process_looks_on(where: Path) -> None:
    """A process that left while another one lived still maps the file."""

    def look_on() -> None:
        domain = dmabuf.Domain.open(where)
        with Held(lambda: (dmabuf.Domain.open(where).join(), _native.step("there"))) as other:
            assert other.run_to("there")
            domain.leave()
            assert not domain.shm.copied
            assert domain.shm.locked(_native.LIFE_BYTE, _native.LIVES)
        assert domain.shm.load32(_native.OFF_NCHUNKS) > 0
        domain.leave()  # now it is the last
        assert domain.shm.copied

    in_process(look_on)
    in_process(lambda: come_and_go(where))
    assert size(where) == _native.HEADER_BYTES


# ---- numbers ----


def test_numbers_never_start_again_after_a_reset(where: Path) -> None:
    r, w = os.pipe()

    def numbers() -> None:
        domain = dmabuf.Domain.open(where)
        timeline = dmabuf.Timeline("work", domain=domain)
        fences = [timeline.fence() for _ in range(300)]
        handles = [f.handle for f in fences]
        buf = dmabuf.allocate(4096, domain=domain)
        with buf.resv.locked():
            ctx = domain.shm.resv_owner(handle_of(buf).shared.index)
        text = (min(h >> 24 for h in handles), fences[0].context, handle_of(buf).shared.gen, ctx >> 32, domain.life)
        os.write(w, (" ".join(map(str, text)) + "\n").encode())
        for f in fences:
            f.signal()
        fences.clear()
        timeline.close()
        buf.close()
        domain.leave()
        assert domain.shm.copied

    for _ in range(3):
        in_process(numbers)
        assert size(where) == _native.HEADER_BYTES
    os.close(w)
    with open(r) as f:
        first, second, third = (list(map(int, line.split())) for line in f)
    for before, after in ((first, second), (second, third)):
        assert all(a > b for b, a in zip(before, after, strict=True)), (before, after)


def test_fence_of_before_a_reset_is_eownerdead_to_a_newcomer(where: Path, pair: tuple[socket.socket, socket.socket]) -> None:
    """A fence in flight has no lock that shows it. How it ended went with its slot, and nobody may take it for another one."""

    def send() -> None:
        domain = dmabuf.Domain.open(where)
        timeline = dmabuf.Timeline("work", domain=domain)
        ended, failed = timeline.fence(), timeline.fence()
        dmabuf.send(pair[0], ended, failed)
        ended.signal()
        failed.set_error(-errno.EIO)
        failed.signal()
        domain.leave()
        assert domain.shm.copied
        assert (ended.status, failed.status) == (1, -errno.EIO)  # this process looks at how things stood

    def look() -> None:
        domain = dmabuf.Domain.open(where)
        timeline = dmabuf.Timeline("other", domain=domain)
        mine = timeline.fence()  # in the slot of the first; the second's slot has a new chunk, and is not used
        before = dmabuf.recv(pair[1])
        for fence in before:
            assert fence.wait(0) > 0
            assert fence.error == -errno.EOWNERDEAD
        assert [f.seqno for f in before] == [1, 2]
        assert before[0].context == before[1].context
        assert not mine.is_signaled()
        mine.signal()
        domain.leave()

    in_process(send)
    in_process(look)


@pytest.mark.parametrize("told", [b"a container's id", bytes(16)], ids=["other", "none"])
def test_buffers_stay_when_a_container_is_told_another_boot(where: Path, told: bytes) -> None:
    def visitor() -> None:
        place.boot_id = lambda: told  # type: ignore[assignment]
        visit(where)

    def look() -> None:
        domain = dmabuf.Domain.open(where)
        assert [record.name for record in dmabuf.buffers(domain=domain)] == ["inhabited"]
        domain.leave()

    with inhabitant(where):
        in_process(visitor)
        in_process(look)


def test_facts_outlive_all_processes_when_the_first_knows_no_boot(where: Path, pair: tuple[socket.socket, socket.socket]) -> None:
    def first() -> None:
        place.boot_id = lambda: bytes(16)  # type: ignore[assignment]
        send_and_die(where, pair[0])

    assert reap(fork(first)) == -signal.SIGKILL
    in_process(lambda: receive(where, pair[1]))


def test_id_of_a_boot_is_not_known_where_another_file_is_mounted(tmp_path: Path) -> None:
    other = tmp_path / "boot_id"
    other.write_text("11111111-2222-3333-4444-555555555555\n")

    def look() -> None:
        hide(b"/proc/sys/kernel/random/boot_id", os.fsencode(other))
        place.boot_id.cache_clear()
        assert place.boot_id() == bytes(16)

    seen = reap(fork(look))
    if seen == NOT_ALLOWED:
        pytest.skip("mounts are not allowed here")
    assert seen == 0


def test_buffers_of_another_boot_are_forgotten_and_numbers_go_on(where: Path, pair: tuple[socket.socket, socket.socket]) -> None:
    assert reap(fork(lambda: send_and_die(where, pair[0]))) == -signal.SIGKILL  # the message still holds it
    in_process(lambda: come_and_go(where))
    with open(where / FILE, "r+b") as f:
        f.seek(_native.OFF_BOOT)
        assert f.read(16) == place.boot_id() != bytes(16)
        f.seek(_native.OFF_BOOT)
        f.write(b"an earlier boot!")
        f.seek(_native.OFF_FLOOR + 8 * _native.CH_FENCE)
        floor = int.from_bytes(f.read(8), "little")
    assert floor > 0
    steps = trace(lambda: come_and_go(where))
    assert "boot_begun" in steps

    def look() -> None:
        domain = dmabuf.Domain.open(where)
        assert domain.shm.load64(_native.OFF_FLOOR + 8 * _native.CH_FENCE) >= floor
        assert domain.shm.rec_list() == []
        assert domain.shm.table_audit() == (0, 0, 0, 0)
        domain.leave()

    in_process(look)


# ---- a reset that is killed ----


def test_facts_outlive_death_at_every_step_of_the_last_leave(where: Path, pair: tuple[socket.socket, socket.socket]) -> None:
    """A message is the only holder. Whoever comes next finds the facts, and once the message is gone, nothing is left."""

    def prepare() -> None:
        assert reap(fork(lambda: send_and_die(where, pair[0]))) == -signal.SIGKILL

    prepare()
    steps = trace(lambda: come_and_go(where))
    assert {"left_copied", "left_absent", "reset_begun", "reset_floors", "reset_chunk", "reset_counted", "reset_cut"} <= set(steps)
    in_process(lambda: receive(where, pair[1]))
    for nth in some_of(len(steps), quick=5):
        prepare()
        killed_at(lambda: come_and_go(where), nth)
        in_process(lambda: receive(where, pair[1]))
        in_process(lambda: visit(where))
        assert size(where) == _native.HEADER_BYTES, f"after a death at step {nth} ({steps[nth - 1]})"


def test_raw_fork_at_every_step_of_the_last_leave_has_the_page_or_the_copy(where: Path) -> None:
    """The child of a raw fork lives on. Nobody takes memory away that it maps."""
    for step in ("left_copied", "left_absent", "reset_begun", "reset_cut"):
        ours, theirs = socket.socketpair()

        def leave(step: str = step, theirs: socket.socket = theirs, ours: socket.socket = ours) -> None:
            domain = dmabuf.Domain.open(where)
            shm = domain.shm
            _native.step_arm("fork", step, theirs.fileno())
            domain.leave()
            _native.step_disarm()
            assert shm.copied is (step not in ("left_copied",)), step
            ours.send(b".")
            assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
            domain.leave()

        in_process(leave)
        ours.close()
        theirs.close()
        in_process(lambda: come_and_go(where))
        assert size(where) == _native.HEADER_BYTES


# ---- a file that makes no sense ----


def test_child_of_a_corrupt_domain_is_estale(where: Path, pair: tuple[socket.socket, socket.socket]) -> None:
    here, there = pair

    def parent() -> None:
        domain = dmabuf.Domain.open(where)
        if os.fork() == 0:
            here.recv(1)
            try:
                domain.join()
                here.send(b"joined")
            except OSError as e:
                here.send(f"{e.errno} {e}".encode())
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)

    assert reap(fork(parent)) == -signal.SIGKILL
    with open(where / FILE, "r+b") as f:
        f.write(b"NOTADMBF")
    there.send(b"g")
    said = there.recv(4096).decode()
    assert said.startswith(f"{errno.ESTALE} ")
    assert "makes no sense" in said
    os.wait()


def test_presence_is_seen_only_through_another_description(where: Path) -> None:
    def look() -> None:
        domain = dmabuf.Domain.open(where)
        assert domain.shm.locked(_native.PRESENCE_BYTE)
        with domain.shm.reopen() as own:
            assert place.ofd_locked(own.fileno(), _native.PRESENCE_BYTE)
        domain.leave()
        assert not domain.shm.locked(_native.PRESENCE_BYTE)
        domain.join()
        assert domain.shm.locked(_native.PRESENCE_BYTE)
        domain.leave()

    in_process(look)


def received_of_a_corrupt_domain(there: socket.socket) -> tuple[int, str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dmabuf.Domain.default()
    try:
        dmabuf.recv(there)
    except OSError as e:
        return e.errno or 0, str(e)
    return 0, ""


def test_buffer_in_flight_of_a_corrupt_domain_is_estale(where: Path, pair: tuple[socket.socket, socket.socket]) -> None:
    assert reap(fork(lambda: send_and_die(where, pair[0]))) == -signal.SIGKILL
    with open(where / FILE, "r+b") as f:
        f.seek(_native.OFF_NCHUNKS)
        f.write(b"\xff" * 4)

    def look() -> None:
        os.environ["DMABUF_DOMAIN"] = str(where)
        number, text = received_of_a_corrupt_domain(pair[1])
        assert number == errno.ESTALE
        assert "set aside" in text

    assert reap(fork_fresh(look)) == 0


def fork_fresh(action: Callable[[], None]) -> int:
    """A child in which no default domain was opened."""

    def fresh() -> None:
        domain_module._default = None
        action()

    return fork(fresh)
