"""Buffers as arguments and results of pools: they arrive, or their first use says what happened."""

from __future__ import annotations

import concurrent.futures
import errno
import multiprocessing
import os
import pickle
import signal
import types
from collections.abc import Callable
from typing import Any

import pytest

import dmabuf
from tests.support.errnos import raises_errno
from tests.support.queues import ANEW, METHODS, asks_sender, hoard, leave_room, stamp, stamped, without_answers
from tests.support.waiting import until, until_asleep

pytestmark = pytest.mark.usefixtures("keepers_are_reaped")


@pytest.fixture(params=METHODS)
def context(request: pytest.FixtureRequest) -> Any:
    return multiprocessing.get_context(request.param)


def _made(i: int) -> dmabuf.DmaBuf:
    return stamped(i).give()


def test_results_of_pool_workers_that_have_ended_arrive(context: Any) -> None:
    with context.Pool(2, maxtasksperchild=1) as pool:
        assert list(map(stamp, pool.map(_made, range(6), chunksize=1))) == list(range(6))
        pool.close()
        pool.join()


def test_results_of_executor_workers_that_have_ended_arrive() -> None:
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=ANEW) as pool:
        futures = [pool.submit(_made, i) for i in range(6)]
    assert [stamp(future.result()) for future in futures] == list(range(6))


def _late(i: int) -> dmabuf.DmaBuf:
    return stamped(i, "late")


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_result_of_a_killed_pool_worker_names_it_when_it_is_used(method: str) -> None:
    # A worker that is killed while it waits for a task would keep the pool's lock, and the pool could not end.
    with multiprocessing.get_context(method).Pool(1, without_answers, maxtasksperchild=1) as pool:
        result = pool.apply_async(_late, (1,))
        until(asks_sender)
        worker = pool._pool[0].pid  # type: ignore[attr-defined]
        until_asleep(worker)  # it may still have the lock of the results, with which the pool could not end either
        os.kill(worker, signal.SIGKILL)
        got = result.get()
        uses: list[Callable[[], Any]] = [got.read().__enter__, got.fileno, lambda: got.size, got.ref, got.mmap, got.give]
        for use in uses:
            with raises_errno(errno.EOWNERDEAD) as caught:
                use()
            assert "PoolWorker-" in str(caught.value)
            assert "), which sent it, ended before it was received" in str(caught.value)
        got.close()
        with raises_errno(errno.EBADF):
            got.read().__enter__()


def _hoard(_: int) -> int:
    return hoard()  # not hoard itself: the worker has imported this file before it has no descriptor left


def _use_with_room(buf: dmabuf.DmaBuf) -> tuple[int | None, int]:
    try:
        buf.fileno()
    except OSError as e:
        first = e.errno
    else:
        first = None
    leave_room()
    return first, stamp(buf)


def test_argument_of_a_pool_worker_without_descriptors_is_received_when_there_is_room(buf: dmabuf.DmaBuf) -> None:
    with buf.write() as view:
        view[0] = 4
    with ANEW.Pool(1) as pool:
        assert pool.apply(_hoard, (0,))
        assert pool.apply(_use_with_room, (buf,)) == (errno.EMFILE, 4)
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=ANEW) as executor:
        assert executor.submit(_hoard, 0).result()
        assert executor.submit(_use_with_room, buf).result() == (errno.EMFILE, 4)


def loky_dump(thing: Any) -> bytes:
    return pickle.dumps(thing)


def test_pickler_of_loky_is_one_of_ours(buf: dmabuf.DmaBuf) -> None:
    """loky is known by the name of the module that calls the pickler."""
    known = {"pickle": pickle, "__builtins__": __builtins__}
    call = types.FunctionType(loky_dump.__code__, {"__name__": "joblib.externals.loky.backend.reduction", **known})
    with pickle.loads(call(buf)) as got:
        assert got == buf
    call = types.FunctionType(loky_dump.__code__, {"__name__": "elsewhere", **known})
    with pytest.raises(TypeError, match=r"pickle buf\.ref\(\)"):
        call(buf)
