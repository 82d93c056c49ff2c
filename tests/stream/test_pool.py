"""Buffers that are used again: when they are free, and what others see."""

import errno
import gc
import os
import queue
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

import dmabuf
from dmabuf import Pool
from dmabuf.stream.pool import PoolStatistics
from tests.support.budget import times
from tests.support.children import Parent, Spawn
from tests.support.errnos import raises_errno
from tests.support.every_stop import at_every_stop
from tests.support.waiting import until_asleep

SIZE = 8192


@pytest.fixture
def pool() -> Iterator[Pool]:
    with Pool(SIZE, 2) as made:
        yield made


def test_buffer_goes_back_at_the_end_of_its_block(pool: Pool) -> None:
    with pool.take() as buf:
        assert buf.size == SIZE
        assert (pool.statistics().leased, pool.statistics().free) == (1, 1)
    assert buf.closed
    assert pool.statistics().free == 2


def test_block_that_raises_gives_the_buffer_back(pool: Pool) -> None:
    with pytest.raises(KeyError), pool.take():
        raise KeyError
    assert pool.statistics().free == 2


def test_layout_is_that_of_the_pool() -> None:
    layout = dmabuf.TensorLayout("float32", (4, 4))
    with Pool(layout, 1) as pool, pool.take() as buf, buf.write() as view:
        assert buf.layout == layout
        assert view.array().shape == (4, 4)


def test_same_memory_comes_again_without_a_new_mapping(pool: Pool) -> None:
    seen = set()
    for _ in range(4):
        with pool.take() as buf, buf.write() as view:
            seen.add((buf.ino, view.array().ctypes.data))
    assert len(seen) == 1


def test_no_buffer_is_free_while_all_are_taken(pool: Pool) -> None:
    with pool.take(), pool.take():
        with raises_errno(errno.ETIMEDOUT, TimeoutError) as caught, pool.take(timeout=0):
            pass
        assert "2 of 2 are taken in this process" in str(caught.value)
    with pool.take(timeout=0):
        pass


def test_waiter_gets_the_buffer_that_another_thread_gives_back() -> None:
    with Pool(SIZE, 1) as pool:
        lease, got = pool.take(), queue.SimpleQueue[int]()
        first = lease.__enter__().ino

        def wait() -> None:
            with pool.take(timeout=30) as buf:
                got.put(buf.ino)

        waiter = threading.Thread(target=wait)
        waiter.start()
        until_asleep(os.getpid(), waiter.native_id)
        lease.give_back()
        assert got.get(timeout=30) == first
        waiter.join()


def test_buffer_in_flight_is_not_free() -> None:
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with here, there, Pool(SIZE, 1) as pool:
        with pool.take() as buf, buf.write() as view:
            view[0] = 7
        with pool.take() as buf:
            dmabuf.send(here, buf)
        assert pool.statistics().in_use == 1
        (received,) = dmabuf.recv(there)
        with raises_errno(errno.ETIMEDOUT, TimeoutError), pool.take(timeout=0):
            pass
        with received.read() as view:
            assert view[0] == 7
        received.close()
        with pool.take(timeout=0):
            pass


def holds(parent: Parent) -> None:
    (buf,) = dmabuf.recv(parent.sock)
    parent.send("there")
    parent.recv()
    buf.close()


@pytest.mark.parametrize("killed", [False, True])
def test_buffer_is_free_when_another_process_has_closed_it_or_died(child: Spawn, killed: bool) -> None:
    other = child(holds)
    with Pool(SIZE, 1) as pool:
        with pool.take() as buf:
            dmabuf.send(other.sock, buf)
        assert other.recv() == "there"
        with raises_errno(errno.ETIMEDOUT) as caught, pool.take(timeout=0):
            pass
        assert str(other.pid) in str(caught.value)
        if killed:
            other.kill()
        else:
            other.send("close")
            other.result()
        with pool.take(timeout=30):
            pass


def test_buffer_with_a_pending_fence_is_not_free(pool: Pool) -> None:
    timeline = dmabuf.Timeline("job")
    fence = timeline.fence()
    with pool.take() as first, pool.take() as buf, buf.resv.locked():
        assert first is not buf
        buf.resv.reserve(1)
        buf.resv.add(fence, dmabuf.Usage.READ)
    assert pool.statistics().in_use == 1
    fence.signal()
    assert pool.statistics().free == 2


def test_zero_hides_what_the_last_owner_wrote() -> None:
    for zero, found in ((True, 0), (False, 9)):
        with Pool(SIZE, 1, zero=zero) as pool:
            with pool.take() as buf, buf.write() as view:
                view[SIZE - 1] = 9
            with pool.take() as buf, buf.read() as view:
                assert view[SIZE - 1] == found


def test_open_block_of_a_buffer_keeps_its_lease(pool: Pool) -> None:
    lease = pool.take()
    buf = lease.__enter__()
    with buf.write(), raises_errno(errno.EBUSY):
        lease.give_back()
    assert pool.statistics().leased == 1
    lease.give_back()
    lease.give_back()
    assert pool.statistics().free == 2


def _take_and_drop(pool: Pool, i: int) -> None:
    lease = pool.take(timeout=0)
    with lease.__enter__().write() as view:
        assert view[0] == i
        view[0] = i + 1


def test_lease_that_is_dropped_gives_back(pool: Pool) -> None:
    for i in range(4):
        _take_and_drop(pool, i)
        assert pool.statistics().free == 2


def take_and_write(pool: Pool) -> None:
    with pool.take(timeout=0) as buf, buf.write() as view:
        view[0] = 1


def test_interrupted_take_leaves_nothing_taken(pool: Pool) -> None:
    def check() -> None:
        gc.collect()  # tracebacks of the interruption
        take_and_write(pool)

    stops, faults = at_every_stop(lambda: take_and_write(pool), check, step=times(quick=7, full=1))
    assert stops > 2
    assert not faults, "\n".join(faults)
    assert pool.statistics() == PoolStatistics(2, 0, 0, 2)


def test_lease_is_entered_once(pool: Pool) -> None:
    lease = pool.take()
    with lease, pytest.raises(ValueError, match="entered already"):
        lease.__enter__()


def _kept(buf: dmabuf.DmaBuf) -> Any:
    with buf.write() as view:
        array = view.array()
        array[0] = 1
    return array


def test_what_is_kept_of_a_write_is_private_when_the_buffer_comes_again() -> None:
    with Pool(SIZE, 1) as pool:
        with pool.take() as buf:
            with pytest.warns(dmabuf.KeptWarning):
                kept = _kept(buf)
        with pool.take() as buf, buf.write() as view:
            view[0] = 2
        assert kept[0] == 1


@pytest.mark.filterwarnings("ignore::dmabuf.KeptWarning")
def test_buffer_whose_lease_lost_its_mapping_or_closed_it_comes_again() -> None:
    with Pool(SIZE, 1) as pool:
        for closes in (False, True, False):
            with pool.take(timeout=0) as buf:
                kept = _kept(buf)
                _kept(buf)  # through a new mapping
                if closes:
                    buf.close()
            assert pool.statistics().free == 1
            assert kept[0] == 1


def test_closed_pool_and_a_parents_are_ebadf(pool: Pool) -> None:
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            with pool.take(timeout=0):
                pass
        except OSError as e:
            os.write(write, str(e.errno).encode())
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    assert int(os.read(read, 10)) == errno.EBADF
    os.close(read)
    os.close(write)
    pool.close()
    pool.close()
    with raises_errno(errno.EBADF), pool.take():
        pass


@pytest.mark.parametrize(("what", "count"), [(SIZE, 0), (0, 1), (-1, 1)])
def test_bad_numbers_are_einval(what: int, count: int) -> None:
    with raises_errno(errno.EINVAL):
        Pool(what, count)


def test_negative_timeout_is_einval(pool: Pool) -> None:
    with raises_errno(errno.EINVAL):
        pool.take(timeout=-1)
