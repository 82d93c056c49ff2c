"""OwnedFd: a descriptor with one owner, closed in C."""

import gc
import os
import sys
import threading

import pytest

from dmabuf import _native
from dmabuf._native import OwnedFd, owned


def is_open(fd: int) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


@pytest.fixture
def number() -> int:
    return os.memfd_create("owned")


def test_it_lends_its_number(number: int) -> None:
    fd = OwnedFd(number)
    assert (fd.number, fd.fileno(), os.fstat(fd.fileno()).st_size) == (number, number, 0)
    assert str(number) in repr(fd)
    fd.close()


@pytest.mark.parametrize("how", ["close", "with", "last reference", "garbage"])
def test_it_is_closed_once_however_it_ends(number: int, how: str) -> None:
    fd = OwnedFd(number)
    if how == "close":
        fd.close()
        again = os.memfd_create("another")
        assert again == number
        fd.close()
        assert is_open(again)
        os.close(again)
    elif how == "with":
        with fd:
            assert is_open(number)
        assert fd.number == -1
    elif how == "last reference":
        del fd
    else:
        ring: list[object] = [fd]
        ring.append(ring)
        del fd, ring
        gc.collect()
    assert not is_open(number)


def test_what_is_taken_is_the_takers(number: int) -> None:
    fd = OwnedFd(number)
    assert fd.take() == number
    assert (fd.take(), fd.number, fd.fileno()) == (-1, -1, -1)
    fd.close()
    del fd
    assert is_open(number)
    os.close(number)


def test_a_block_that_raises_closes_it_and_raises_the_same(number: int) -> None:
    with pytest.raises(ZeroDivisionError), OwnedFd(number):
        raise ZeroDivisionError
    assert not is_open(number)


def test_an_error_under_way_is_not_lost_in_the_closing(number: int) -> None:
    def fails() -> None:
        fd = OwnedFd(number)
        raise LookupError(fd.number)

    with pytest.raises(LookupError, match=str(number)) as caught:
        fails()
    del caught
    gc.collect()
    assert not is_open(number)


@pytest.mark.parametrize("wrong", [-1, -5, 1 << 40, "3", None])
def test_what_is_no_descriptor_is_refused(wrong: object) -> None:
    with pytest.raises((ValueError, TypeError, OverflowError)):
        OwnedFd(wrong)  # type: ignore[arg-type]


def test_it_has_no_way_to_be_changed(number: int) -> None:
    with OwnedFd(number) as fd, pytest.raises(AttributeError):
        fd.number = 0  # type: ignore[misc]


def test_threads_that_close_the_same_one_close_it_once() -> None:
    for _ in range(50):
        fd = OwnedFd(os.memfd_create("raced"))
        start = threading.Barrier(4)

        def close(fd: OwnedFd = fd, start: threading.Barrier = start) -> None:
            start.wait()
            fd.close()

        threads = [threading.Thread(target=close) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert fd.number == -1


def test_references_are_counted_right() -> None:
    before = sys.getrefcount(OwnedFd)
    for _ in range(100):
        OwnedFd(os.memfd_create("counted"))
    assert sys.getrefcount(OwnedFd) == before


def test_another_processs_descriptor_that_is_not_there_is_an_error() -> None:
    with OwnedFd(os.pidfd_open(os.getpid())) as me:
        with pytest.raises(OSError):
            _native.fd_of(me.number, 99999)
        with pytest.raises(OSError):
            _native.fd_of(-1, 0)


@pytest.mark.parametrize("name", ["fd", "task", "."])
def test_directory_of_a_process_that_has_ended_is_closed(name: str) -> None:
    """The kernel answers no fstat(2) for it any more: ENOENT, where it counts the descriptors."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(theirs)
        os.read(ours, 1)
        os._exit(0)
    os.close(ours)
    own = owned(os.open, f"/proc/{pid}/{name}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    number = own.number
    os.close(theirs)
    os.waitpid(pid, 0)
    own.close()
    assert not is_open(number)
