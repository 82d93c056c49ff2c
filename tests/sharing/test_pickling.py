"""Buffers through multiprocessing: every start method, every way; and no other pickle."""

from __future__ import annotations

import concurrent.futures
import copy
import errno
import multiprocessing
import multiprocessing.reduction
import os
import pickle
import subprocess
import sys
from multiprocessing.context import BaseContext
from typing import Any

import pytest

import dmabuf
from tests.sharing.conftest import SIZE
from tests.support.errnos import raises_errno

METHODS = ["fork", "forkserver", "spawn"]
KINDS = ["buffer", "private buffer", "fence", "timeline", "private domain", "default domain"]


@pytest.fixture(params=METHODS)
def context(request: pytest.FixtureRequest) -> Any:
    return multiprocessing.get_context(request.param)


def _stamp(buf: dmabuf.DmaBuf) -> tuple[str | None, int]:
    with buf.write() as view:
        view[:4] = b"seen"
    return buf.name, os.getpid()


def _seen(buf: dmabuf.DmaBuf) -> bool:
    with buf.read() as view:
        return bytes(view[:4]) == b"seen"


def _argument(buf: dmabuf.DmaBuf, answers: Any) -> None:
    answers.send(_stamp(buf))
    answers.close()


def test_as_an_argument_of_a_process(context: BaseContext, buf: dmabuf.DmaBuf) -> None:
    here, there = context.Pipe()
    process = context.Process(target=_argument, args=(buf, there))  # type: ignore[attr-defined]
    process.start()
    there.close()
    assert here.recv() == ("shared", process.pid)
    here.close()
    process.join()
    process.close()
    assert _seen(buf)


def _from_queue(queue: Any, answers: Any) -> None:
    with queue.get() as buf:
        answers.put(_stamp(buf))


def test_through_a_queue_both_ways(context: BaseContext, buf: dmabuf.DmaBuf) -> None:
    queue, answers = context.SimpleQueue(), context.SimpleQueue()
    process = context.Process(target=_from_queue, args=(queue, answers))  # type: ignore[attr-defined]
    process.start()
    queue.put(buf)
    assert answers.get() == ("shared", process.pid)
    process.join()
    process.close()
    queue.close()
    answers.close()
    assert _seen(buf)


def test_through_a_queue_with_a_feeder_thread(context: BaseContext) -> None:
    queue, answers = context.Queue(), context.SimpleQueue()
    process = context.Process(target=_from_queue, args=(queue, answers))  # type: ignore[attr-defined]
    process.start()
    buf = dmabuf.allocate(SIZE, name="queued")
    queue.put(buf)
    assert answers.get() == ("queued", process.pid)
    buf.close()
    process.join()
    process.close()
    queue.close()
    queue.join_thread()
    answers.close()


def _through_pipe(pipe: Any) -> None:
    with pipe.recv() as buf:
        pipe.send(_stamp(buf))
    with dmabuf.allocate(SIZE, name="from the child") as mine:
        _stamp(mine)
        pipe.send(mine)
        pipe.recv()
    pipe.close()


def test_through_a_pipe_both_ways(context: BaseContext, buf: dmabuf.DmaBuf) -> None:
    here, there = context.Pipe()
    process = context.Process(target=_through_pipe, args=(there,))  # type: ignore[attr-defined]
    process.start()
    there.close()
    here.send(buf)
    assert here.recv() == ("shared", process.pid)
    with here.recv() as got:
        assert (got.name, _seen(got)) == ("from the child", True)
    here.send(None)
    here.close()
    process.join()
    process.close()


def _in_pool(buf: dmabuf.DmaBuf) -> dmabuf.DmaBuf:
    _stamp(buf)
    return buf


def test_through_a_pool_both_ways(context: BaseContext) -> None:
    bufs = [dmabuf.allocate(SIZE, name=str(i)) for i in range(4)]
    with context.Pool(2) as pool:
        got = pool.map(_in_pool, bufs, chunksize=1)
        assert got == bufs
        assert all(map(_seen, bufs))
        pool.close()
        pool.join()
    for b in bufs + got:
        b.close()


def test_through_a_process_pool_executor(buf: dmabuf.DmaBuf) -> None:
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        name, pid = pool.submit(_stamp, buf).result()
    assert (name, pid != os.getpid(), _seen(buf)) == ("shared", True, True)


def _all_kinds(things: list[Any], answers: Any) -> None:
    buf, secret, fence, tl, domain, default = things
    same = secret.domain is domain, default is dmabuf.Domain.default()
    answers.send((buf.name, secret.name, *same, fence.status, fence.context, tl.name, tl.context))
    fence.wait()
    answers.send(fence.status)
    answers.close()


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_every_kind_of_thing_travels_with_its_private_domain(method: str, buf: dmabuf.DmaBuf, tl: dmabuf.Timeline) -> None:
    context = multiprocessing.get_context(method)
    domain = dmabuf.Domain.private()
    here, there = context.Pipe()
    fence = tl.fence()
    with dmabuf.allocate(SIZE, name="secret", domain=domain) as secret:
        things = [buf, secret, fence, tl, domain, dmabuf.Domain.default()]
        process = context.Process(target=_all_kinds, args=(things, there))  # type: ignore[attr-defined]
        process.start()
        there.close()
        assert here.recv() == ("shared", "secret", True, True, 0, tl.context, "frames", tl.context)
        fence.signal(-errno.EIO)
        assert here.recv() == -errno.EIO
        here.close()
        process.join()
        process.close()


def _thing(kind: str, buf: dmabuf.DmaBuf, tl: dmabuf.Timeline) -> Any:
    domain = dmabuf.Domain.private()
    return {
        "buffer": lambda: buf,
        "private buffer": lambda: dmabuf.allocate(SIZE, domain=domain),
        "fence": tl.fence,
        "timeline": lambda: tl,
        "private domain": lambda: domain,
        "default domain": dmabuf.Domain.default,
    }[kind]()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_pickle_is_refused_with_a_sentence(kind: str, protocol: int, buf: dmabuf.DmaBuf, tl: dmabuf.Timeline) -> None:
    thing = _thing(kind, buf, tl)
    for dumps in (pickle.dumps, pickle._dumps):  # type: ignore[attr-defined]
        with pytest.raises(TypeError, match=r"can't be pickled to bytes: .* dmabuf\.send"):
            dumps(thing, protocol)


@pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy])
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_is_refused(kind: str, copier: Any, buf: dmabuf.DmaBuf, tl: dmabuf.Timeline) -> None:
    with pytest.raises(TypeError):
        copier(_thing(kind, buf, tl))


def test_a_closed_buffer_is_refused() -> None:
    buf = dmabuf.allocate(SIZE)
    buf.close()
    with raises_errno(errno.EBADF):
        multiprocessing.reduction.ForkingPickler.dumps(buf)


def test_a_closed_timeline_is_refused() -> None:
    tl = dmabuf.Timeline()
    tl.close()
    with raises_errno(errno.EBADF):
        multiprocessing.reduction.ForkingPickler.dumps(tl)


_PROGRAM = """
import sys
{imports}
assert {before} == ("multiprocessing" in sys.modules)
import pickle
with dmabuf.allocate(4096) as buf:
    if not {before}:
        try:
            pickle.dumps(buf)
        except TypeError as e:
            assert "multiprocessing" in str(e)
        else:
            raise AssertionError
    import multiprocessing.reduction
    if {spawned}:
        with open("/dev/null", "wb") as f:
            multiprocessing.reduction.dump(buf, f)
        from dmabuf.sharing import keeping
        keeping.TABLE.drop()
    else:
        blob = multiprocessing.reduction.ForkingPickler.dumps([buf, buf])
        one, two = pickle.loads(blob)
        assert one is two and one == buf
        one.close()
    try:
        pickle.dumps(buf)
    except TypeError:
        pass
    else:
        raise AssertionError
"""


@pytest.mark.parametrize("spawned", [False, True])
@pytest.mark.parametrize("imports", ["import dmabuf", "import multiprocessing.reduction, dmabuf", "import multiprocessing, dmabuf"])
def test_the_order_of_imports_does_not_matter(imports: str, spawned: bool) -> None:
    program = _PROGRAM.format(imports=imports, before="multiprocessing" in imports, spawned=spawned)
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
