"""What outlives its block: of a read it lasts until a writer has waited, of a write it is a private copy (docs/views.md)."""

import errno
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest

import dmabuf
from dmabuf import DmaBuf
from tests.support.children import Parent, Spawn
from tests.support.errnos import raises_errno
from tests.support.fences import keys
from tests.support.waiting import Background, until

LONG = 3600.0


class Mishap(Exception):
    """What goes wrong inside a block."""


def use(buf: DmaBuf, mode: str, timeout: float | None = None) -> str:
    with getattr(buf, mode)(timeout=timeout):
        return "in"


def with_numpy(view: dmabuf.View) -> Any:
    return pytest.importorskip("numpy").asarray(view)


KEEP: dict[str, Callable[[dmabuf.View], Any]] = {
    "cast": lambda view: view.cast("Q"),
    "memoryview": memoryview,
    "slice of a memoryview": lambda view: memoryview(view)[2:10],
    "memoryview of a slice": lambda view: memoryview(view[2:10]),
    "pickle buffer": pickle.PickleBuffer,
    "numpy": with_numpy,
}
KEPT = pytest.mark.parametrize("keep", list(KEEP.values()), ids=list(KEEP))


@KEPT
def test_what_a_read_leaves_lasts_until_it_is_gone_or_a_writer_has_waited(buf: DmaBuf, keep: Callable[[dmabuf.View], Any]) -> None:
    with buf.read() as view:
        kept = keep(view)
    assert len(keys(buf.resv)) == 1
    with Background(lambda: use(buf, "write", 0)) as job, raises_errno(errno.ETIMEDOUT, TimeoutError):
        job.result()
    del kept
    assert keys(buf.resv) == []
    with buf.read() as view:
        kept = keep(view)
    with Background(lambda: use(buf, "write")) as job:
        assert job.result() == "in"
    assert bytes(memoryview(kept).cast("B")[:2]) == b"\0\0"  # and not what was written since
    del kept


@KEPT
def test_what_a_write_leaves_is_a_copy_and_the_write_is_complete(buf: DmaBuf, keep: Callable[[dmabuf.View], Any]) -> None:
    kept: list[Any] = []

    def block() -> None:
        with buf.write() as view:
            view[0:16] = bytes([7] * 16)
            kept.append(keep(view))

    with pytest.warns(dmabuf.KeptWarning, match=r"^write: .* outlived the block: .* private copy"):
        block()
    assert keys(buf.resv) == []
    with buf.write(timeout=0) as view:
        assert view[0] == 7
        view[0:16] = bytes([8] * 16)
    assert bytes(memoryview(kept[0]).cast("B")[:2]) == bytes([7, 7])


@pytest.mark.parametrize("mode", ["read", "write"])
@KEPT
def test_what_an_exception_leaves_is_a_copy_and_nobody_waits(buf: DmaBuf, keep: Callable[[dmabuf.View], Any], mode: str) -> None:
    with buf.write() as view:
        view[0:16] = bytes([5] * 16)
    kept: list[Any] = []

    def block() -> None:
        with getattr(buf, mode)() as view:
            kept.append(keep(view))
            raise Mishap

    with pytest.raises(Mishap):
        block()
    assert keys(buf.resv) == []
    with buf.write(timeout=0) as view:
        view[0:16] = bytes([6] * 16)
    assert bytes(memoryview(kept[0]).cast("B")[:2]) == bytes([5, 5])


def test_the_warning_names_who_keeps_memory(buf: DmaBuf) -> None:
    with pytest.warns(dmabuf.KeptWarning, match=r"crop \(memoryview\) outlived") as caught, buf.write() as view:
        crop = memoryview(view)[4:8]
    assert caught[0].filename == __file__
    crop.release()


def test_where_the_warning_is_an_error_the_write_is_complete_all_the_same(buf: DmaBuf) -> None:
    kept: list[memoryview] = []

    def block() -> None:
        with buf.write() as view:
            view[0] = 3
            kept.append(memoryview(view))

    with warnings.catch_warnings():
        warnings.simplefilter("error", dmabuf.KeptWarning)
        with pytest.raises(dmabuf.KeptWarning):
            block()
    assert kept[0][0] == 3
    with buf.read(timeout=0) as view:
        assert view[0] == 3


def test_a_second_reader_of_the_handle_goes_on_when_what_the_first_left_is_detached(buf: DmaBuf) -> None:
    with buf.write() as view:
        view[0] = 4
    with buf.read() as view:
        kept = memoryview(view)
    reader = buf.read()
    open_view = reader.__enter__()
    with Background(lambda: use(buf, "write", LONG)) as job:
        until(lambda: len(keys(buf.resv)) == 2)  # the first reader's fence has ended
        assert open_view[0] == kept[0] == 4
        assert not job.done
        reader.__exit__(None, None, None)
        assert job.result() == "in"
    assert kept[0] == 4


def test_arrays_that_are_gone_inside_the_block_hold_nothing_up(buf: DmaBuf) -> None:
    with buf.write() as view:
        part = view[:4]
        part[0] = 1
        del part
    with buf.read(timeout=0) as view:
        assert view[0] == 1


def test_what_a_read_leaves_gives_way_at_once_to_a_write_of_the_same_thread(buf: DmaBuf) -> None:
    with buf.read() as view:
        part = memoryview(view)
    with buf.write(timeout=0) as view:
        view[0] = 1
    assert part[0] == 0


def test_a_slice_that_is_kept_keeps_nothing(buf: DmaBuf) -> None:
    with buf.write() as view:
        part = view[2:10]
    with pytest.raises(ValueError, match="released"):
        part[0]
    assert keys(buf.resv) == []


def test_reader_that_keeps_something_and_comes_again_is_in_no_circle(buf: DmaBuf) -> None:
    """The writer waits for what the reader kept, and the reader for the writer: what is kept gives way, and nobody fails."""
    for _ in range(3):
        with buf.read() as view:
            kept = memoryview(view)
        with Background(lambda: use(buf, "write", LONG)) as job:
            until(lambda: len(keys(buf.resv)) == 2)
            with buf.read(timeout=LONG) as view:
                assert view[0] == kept[0]
            assert job.result() == "in"
        del kept


def keeps_and_comes_again(parent: Parent, rounds: int) -> None:
    (buf,) = dmabuf.recv(parent.sock)
    kept = None
    with buf:
        for _ in range(rounds):
            with buf.read(timeout=LONG) as view:
                kept = memoryview(view)
        del kept


def test_reader_of_another_process_keeps_its_last_frame_and_never_fails(buf: DmaBuf, child: Spawn) -> None:
    other = child(keeps_and_comes_again, 12)
    dmabuf.send(other.sock, buf)
    for _ in range(12):
        with buf.write(timeout=LONG) as view:
            view[0] = 1
    other.result()


def test_reader_that_a_writer_asked_before_it_left_gives_way(buf: DmaBuf) -> None:
    block = buf.read()
    view = block.__enter__()
    shm = buf.domain.shm
    with Background(lambda: use(buf, "write", LONG)) as job:
        until(lambda: (info := shm.fence_info(block.fence)) is not None and info["deadline"])
        kept = memoryview(view)
        block.__exit__(None, None, None)
        assert job.result() == "in"
    assert kept[0] == 0


def test_what_a_read_left_is_a_copy_once_its_process_left_the_domain() -> None:
    domain = dmabuf.Domain.private()
    with dmabuf.allocate(4096, domain=domain) as buf:
        with buf.read() as view:
            kept = memoryview(view)
        domain.leave()
        with buf.write(timeout=0) as view:
            view[0] = 7
        assert kept[0] == 0
        del kept
    domain.leave()
