"""Calls of ioctls: restarts, signals, descriptors that nobody loses, and errors in our words."""

import errno
import fcntl
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dmabuf.errors import DmaBufError
from dmabuf.uapi import call, dma_buf, drm, heap, structures, sw_sync, sync_file, syncobj, table, v4l2
from dmabuf.uapi.call import OwnedFd
from tests.support.errnos import raises_errno
from tests.support.leaks import descriptors


class Script:
    """An ioctl that answers with these errnos in turn, then as `answer` says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *errnos: int, answer: Callable[[int, int, Any], Any] | None = None) -> None:
        self.left, self.calls, self.answer = list(errnos), [], answer
        monkeypatch.setattr(call, "system", self)

    def __call__(self, fd: int, number: int, argument: Any) -> Any:
        self.calls.append(number)
        if self.left:
            error = self.left.pop(0)
            raise OSError(error, os.strerror(error))
        return self.answer(fd, number, argument) if self.answer else argument


def gives(field: str, fd: int) -> Callable[[int, int, Any], bytes]:
    """The kernel's answer with a descriptor in a field of the structure."""

    def answer(_: int, number: int, argument: Any) -> bytes:
        layout = table.BY_NUMBER[number].layout
        return layout.pack(layout.unpack(argument)._replace(**{field: fd}))

    return answer


def is_open(fd: int) -> bool:
    try:
        fcntl.fcntl(fd, fcntl.F_GETFD)
    except OSError:
        return False
    return True


@pytest.fixture
def spare() -> Iterator[int]:
    """An open descriptor that the test's kernel gives away; closed here if nobody closed it."""
    fd = os.memfd_create("given by the kernel")
    here = os.fstat(fd).st_ino
    yield fd
    if is_open(fd) and os.fstat(fd).st_ino == here:
        os.close(fd)


# Every call whose result carries a descriptor.
GIVES: dict[str, tuple[str, Callable[[], OwnedFd]]] = {
    "export_sync_file": ("fd", lambda: dma_buf.export_sync_file(0, 1)),
    "merge": ("fence", lambda: sync_file.merge(0, 0)),
    "heap": ("fd", lambda: heap.allocate(0, 4096)),
    "sw_sync": ("fence", lambda: sw_sync.create_fence(0, 1)),
    "prime": ("fd", lambda: drm.handle_to_fd(0, 1)),
    "syncobj": ("fd", lambda: syncobj.handle_to_fd(0, 1)),
    "expbuf": ("fd", lambda: v4l2.export_buffer(0, 0)),
    "udmabuf": ("", lambda: heap.create(0, 0, 0, 4096)),
    "udmabuf list": ("", lambda: heap.create_list(0, [(0, 0, 4096)])),
}


def kernel_gives(monkeypatch: pytest.MonkeyPatch, which: str, fd: int, *errnos: int) -> Callable[[], OwnedFd]:
    field, operation = GIVES[which]
    Script(monkeypatch, *errnos, answer=gives(field, fd) if field else lambda *_: fd)
    return operation


@pytest.mark.parametrize("which", GIVES)
def test_a_descriptor_in_a_result_has_one_owner(monkeypatch: pytest.MonkeyPatch, which: str, spare: int) -> None:
    owner = kernel_gives(monkeypatch, which, spare)()
    assert owner.fileno() == spare
    assert owner.take() == spare
    assert owner.take() == -1
    del owner
    assert is_open(spare)


@pytest.mark.parametrize("which", GIVES)
def test_a_descriptor_that_nobody_takes_is_closed_once(monkeypatch: pytest.MonkeyPatch, which: str, spare: int) -> None:
    owner = kernel_gives(monkeypatch, which, spare)()
    del owner
    assert not is_open(spare)


@pytest.mark.parametrize("which", GIVES)
@pytest.mark.parametrize("error", [errno.EINTR, errno.EAGAIN])
def test_an_interrupted_call_is_made_again(monkeypatch: pytest.MonkeyPatch, which: str, error: int, spare: int) -> None:
    assert kernel_gives(monkeypatch, which, spare, error, error)().fileno() == spare


@pytest.mark.parametrize("which", GIVES)
@pytest.mark.parametrize("error", [errno.EMFILE, errno.ENOMEM, errno.ENFILE, errno.EINVAL, errno.EBADF, errno.ENOTTY])
def test_an_error_is_the_kernels_with_operation_and_remedy(monkeypatch: pytest.MonkeyPatch, which: str, error: int, spare: int) -> None:
    with raises_errno(error, DmaBufError) as caught:
        kernel_gives(monkeypatch, which, spare, error)()
    assert errno.errorcode[error] in str(caught.value)
    assert is_open(spare)


class Stop(Exception):
    """Raised by a signal handler."""


@pytest.fixture
def stops() -> Iterator[None]:
    """SIGUSR1 raises."""

    def stop(*_: object) -> None:
        raise Stop

    before = signal.signal(signal.SIGUSR1, stop)
    yield
    signal.signal(signal.SIGUSR1, before)


NS_GET_USERNS = 0xB701  # linux/nsfs.h: gives a descriptor as its result, to anybody


@pytest.mark.usefixtures("stops")
def test_handler_that_raises_as_the_call_returns_loses_no_descriptor() -> None:
    namespace = os.open("/proc/self/ns/uts", os.O_RDONLY | os.O_CLOEXEC)
    before, stopped = descriptors(), 0
    alarm = signal.signal(signal.SIGALRM, signal.getsignal(signal.SIGUSR1))

    def some(seconds: float) -> None:
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds)
            for _ in range(20):
                assert call.obtain_result(namespace, NS_GET_USERNS, bytearray(8)).number >= 0
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    for microseconds in list(range(2, 62)) * 20:
        try:
            some(microseconds * 1e-6)
        except Stop:
            stopped += 1
    signal.signal(signal.SIGALRM, alarm)
    left = descriptors() - before
    os.close(namespace)
    assert not left
    assert stopped


@pytest.mark.usefixtures("stops")
def test_a_handler_that_raises_ends_an_interrupted_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> Any:
        signal.raise_signal(signal.SIGUSR1)
        raise AssertionError("not reached")

    monkeypatch.setattr(call, "system", interrupted)
    with pytest.raises(Stop):
        dma_buf.sync(0, 1)


def test_handlers_run_between_the_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: seen.append(number))
    try:
        script = Script(monkeypatch, errno.EINTR)

        def once(*arguments: Any) -> Any:
            if not seen:
                signal.raise_signal(signal.SIGUSR1)
            return script(*arguments)

        monkeypatch.setattr(call, "system", once)
        dma_buf.sync(0, 1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert seen == [signal.SIGUSR1]
    assert len(script.calls) == 2


def test_eagain_of_a_camera_without_a_frame_is_not_restarted(monkeypatch: pytest.MonkeyPatch) -> None:
    Script(monkeypatch, errno.EAGAIN)
    with raises_errno(errno.EAGAIN) as caught:
        v4l2.dequeue(0)
    assert "POLLIN" in str(caught.value)


@pytest.mark.parametrize("fd", [-1, 1 << 31, 1 << 70])
def test_a_number_that_no_descriptor_can_have_is_ebadf(fd: int) -> None:
    with raises_errno(errno.EBADF):
        dma_buf.sync(fd, 1)


def test_a_closed_descriptor_is_ebadf(spare: int) -> None:
    os.close(spare)
    with raises_errno(errno.EBADF):
        dma_buf.sync(spare, 1)


def test_what_is_no_dma_buf_is_enotty(spare: int) -> None:
    with raises_errno(errno.ENOTTY):
        dma_buf.sync(spare, 1)


@pytest.mark.parametrize("name", [b"x" * 32, b"a\0b", b"x" * 2000])
def test_a_name_that_the_kernel_would_refuse_or_cut_is_einval(monkeypatch: pytest.MonkeyPatch, name: bytes) -> None:
    Script(monkeypatch)
    with raises_errno(errno.EINVAL):
        dma_buf.set_name(0, name)


def test_fences_of_a_sync_file_are_asked_for_with_room_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[structures.FileInfo] = []

    def answer(_: int, __: int, argument: Any) -> bytes:
        layout = table.SYNC_FILE_INFO.layout
        asked.append(layout.unpack(argument))
        return layout.pack(asked[-1]._replace(name=b"both", status=1, num_fences=2))

    Script(monkeypatch, answer=answer)
    info = sync_file.file_info(0)
    assert [one.num_fences for one in asked] == [0, 2]
    assert asked[1].sync_fence_info
    assert (info.name, info.status, len(info.fences)) == (b"both", 1, 2)


# ---- fdinfo, semantics 5.7 ----

FDINFO = b"pos:\t0\nflags:\t02000002\nmnt_id:\t15\nino:\t7\nsize:\t4096\ncount:\t2\nexp_name:\tudmabuf\n"


@pytest.mark.parametrize(
    ("tail", "name"),
    [(b"", None), (b"name:\t\n", b""), (b"name:\tcamera\n", b"camera"), (b"name:\ta\nsize:\t1\nb\n", b"a\nsize:\t1\nb")],
    ids=["never", "empty", "named", "line feeds"],
)
def test_fdinfo_tells_size_references_exporter_and_name(tail: bytes, name: bytes | None) -> None:
    info = dma_buf.parse_fdinfo(FDINFO + tail)
    assert (info.size, info.references, info.exp_name, info.name) == (4096, 2, b"udmabuf", name)


@pytest.mark.parametrize("text", [b"", b"pos:\t0\nflags:\t02\nmnt_id:\t1\nino:\t9\n", FDINFO.replace(b"size", b"sise")])
def test_the_fdinfo_of_something_else_is_einval(text: bytes) -> None:
    with raises_errno(errno.EINVAL):
        dma_buf.parse_fdinfo(text)


def test_opening_a_node_that_is_not_there_says_what_would_help() -> None:
    with raises_errno(errno.ENOENT, DmaBufError) as caught:
        sw_sync.open_timeline("/nowhere/sw_sync")
    assert "CONFIG_SW_SYNC" in str(caught.value)
