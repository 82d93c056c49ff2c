"""Buffers in the queues and pipes of multiprocessing: each arrives, or its receiver is told what happened."""

import array
import concurrent.futures
import contextlib
import errno
import io
import multiprocessing
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import dmabuf
from dmabuf.sharing import fetching, keeping, kept
from dmabuf.sharing.fetching import fetch
from tests.sharing.conftest import SIZE
from tests.support.errnos import raises_errno
from tests.support.waiting import until

METHODS = ["fork", "forkserver", "spawn"]


@pytest.fixture(autouse=True)
def keepers_are_reaped() -> Iterator[None]:
    """A keeper is a child of whoever looks after orphans, in a test run the run itself."""
    yield
    until(lambda: not _keepers())


def _keepers() -> list[str]:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    children = subprocess.run(["/bin/ps", "-o", "args=", "--ppid", str(os.getpid())], capture_output=True, text=True, check=False).stdout
    return [line for line in children.splitlines() if "kept.py" in line or "defunct" in line]


class Got:
    """What is made of a descriptor that was received."""

    def __init__(self, fd: Any) -> None:
        self.close = fd.close


@pytest.fixture(params=METHODS)
def context(request: pytest.FixtureRequest) -> Any:
    return multiprocessing.get_context(request.param)


@pytest.fixture
def queue() -> Iterator[Any]:
    made = multiprocessing.Queue()
    yield made
    made.close()
    made.join_thread()
    keeping.TABLE.drop()


@contextlib.contextmanager
def running(process: Any) -> Iterator[Any]:
    process.start()
    yield process
    process.join()
    process.close()


def _stamped(stamp: int, name: str | None = None) -> dmabuf.DmaBuf:
    buf = dmabuf.allocate(SIZE, name=name)
    with buf.write() as view:
        view[0] = stamp
    return buf


def _stamp(buf: dmabuf.DmaBuf) -> int:
    with buf, buf.read() as view:
        return int(view[0])


# ---- closed before it is pickled ----


def _put_and_close(queue: Any, count: int, end: Any) -> None:
    for i in range(count):
        with _stamped(i) as buf:
            queue.put(buf)
    end.wait()


def _got(queue: Any) -> int | OSError:
    try:
        return _stamp(queue.get())
    except OSError as e:
        return e


def test_put_then_close_arrives_or_is_told_for_each(context: Any) -> None:
    queue, end = context.Queue(), context.Event()
    with running(context.Process(target=_put_and_close, args=(queue, 5, end))):
        for i in range(5):
            got = _got(queue)
            assert got == i or "put buf.give() into the queue instead of buf" in str(got)
        end.set()
    queue.close()


@pytest.mark.parametrize("wrapped", [False, True])
def test_closed_buffer_in_a_queue_raises_in_get(queue: Any, wrapped: bool) -> None:
    buf = dmabuf.allocate(SIZE)
    ino = buf.ino
    buf.close()
    queue.put((1, {"buf": buf}) if wrapped else buf)
    with raises_errno(errno.EBADF) as caught:
        queue.get()
    assert f"inode {ino} " in str(caught.value)
    assert f"process {os.getpid()} (MainProcess) closed it before the thread of its queue had pickled it" in str(caught.value)


def test_closed_buffer_that_another_handle_has_open_arrives(queue: Any, buf: dmabuf.DmaBuf) -> None:
    closed = dmabuf.get(buf.fileno())
    closed.close()
    queue.put(closed)
    with queue.get() as got:
        assert got == buf


def test_closed_timeline_in_a_queue_raises_in_get(queue: Any) -> None:
    tl = dmabuf.Timeline()
    tl.close()
    queue.put(tl)
    with raises_errno(errno.EBADF) as caught:
        queue.get()
    assert "could not pickle it: the timeline is closed" in str(caught.value)


def test_closed_buffer_for_an_executor_raises_in_its_caller() -> None:
    buf = dmabuf.allocate(SIZE)
    buf.close()
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        with raises_errno(errno.EBADF):
            pool.submit(_stamp, buf).result()
        assert pool.submit(_stamp, _stamped(3).give()).result() == 3


# ---- given away ----


def _give(queue: Any) -> None:
    for i in range(3):
        with _stamped(i, f"given {i}") as buf:
            queue.put(buf.give())


def test_given_buffers_arrive_when_their_producer_has_ended(context: Any) -> None:
    queue = context.Queue()
    with running(context.Process(target=_give, args=(queue,))):
        pass
    for i in range(3):
        buf = queue.get()
        assert (buf.name, _stamp(buf)) == (f"given {i}", i)
    queue.close()


def test_give_closes_the_handle_and_pickling_closes_the_given_one(queue: Any) -> None:
    buf = _stamped(7, "given")
    given = buf.give()
    assert buf.closed
    assert not given.closed
    queue.put(given)
    got = queue.get()
    assert given.closed
    assert (got.name, _stamp(got)) == ("given", 7)


def test_given_buffer_that_is_dropped_goes(queue: Any) -> None:
    given = dmabuf.allocate(SIZE).give()
    ref = given.ref()
    del given
    with raises_errno(errno.ENOENT):
        dmabuf.open(ref)


def test_given_buffer_in_two_queues_is_told_to_the_second(queue: Any) -> None:
    given = dmabuf.allocate(SIZE).give()
    queue.put(given)
    queue.put(given)
    queue.get().close()
    with raises_errno(errno.EBADF):
        queue.get()


def test_give_in_a_block_is_busy_and_changes_nothing(buf: dmabuf.DmaBuf) -> None:
    with buf.read(), raises_errno(errno.EBUSY):
        buf.give()
    assert not buf.closed
    closed = dmabuf.get(buf.fileno())
    closed.close()
    with raises_errno(errno.EBADF):
        closed.give()


def test_given_buffer_as_an_argument_arrives(context: Any) -> None:
    answers = context.SimpleQueue()
    with running(context.Process(target=_answer, args=(_stamped(5).give(), answers))):
        assert answers.get() == 5
    answers.close()


def _answer(buf: dmabuf.DmaBuf, answers: Any) -> None:
    answers.put(_stamp(buf))


# ---- killed, interrupted, without an end ----


def _put_and_wait(queue: Any, end: Any) -> None:
    buf = _stamped(9, "late")
    queue.put(buf)
    end.wait()


def test_killed_producer_is_named_to_the_consumer(context: Any) -> None:
    queue, end = context.SimpleQueue(), context.Event()
    with running(context.Process(target=_put_and_wait, args=(queue, end), name="camera")) as process:
        until(lambda: not queue.empty())
        process.kill()
        process.join()
        with raises_errno(errno.EOWNERDEAD) as caught:
            queue.get()
        assert f"process {process.pid} (camera), which sent it, ended before it was received" in str(caught.value)
        assert "'late'" in str(caught.value)
    queue.close()


class _Interrupted(Exception):
    pass


def _interrupt(_: int, __: FrameType | None) -> None:
    raise _Interrupted


@pytest.mark.parametrize("kind", ["Queue", "SimpleQueue", "Pipe"])
def test_get_that_a_handler_interrupts_loses_nothing(kind: str) -> None:
    context = multiprocessing.get_context("spawn")
    end = context.Event()
    if kind == "Pipe":
        here, there = context.Pipe()
        get, put, ready = here.recv, there, here.poll
    else:
        queue: Any = getattr(context, kind)()
        get, put, ready = queue.get, queue, lambda: not queue.empty()
    with running(context.Process(target=_put_or_send, args=(put, end))) as process:
        until(ready)
        os.kill(process.pid, signal.SIGSTOP)
        until(
            lambda: all(stat.read_text().rpartition(")")[2].split()[0] == "T" for stat in Path(f"/proc/{process.pid}/task").glob("*/stat"))
        )
        before = signal.signal(signal.SIGALRM, _interrupt)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            with pytest.raises(_Interrupted):
                get()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            os.kill(process.pid, signal.SIGCONT)
        assert ready()
        assert _stamp(get()) == 9
        end.set()
    if kind == "Pipe":
        here.close()
        there.close()
    else:
        queue.close()


def _put_or_send(queue: Any, end: Any) -> None:
    buf = _stamped(9)
    (queue.send if hasattr(queue, "send") else queue.put)(buf)
    end.wait()


# ---- out of descriptors ----


def _produce(queue: Any, count: int, limit: int, end: Any) -> None:
    if limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    for i in range(count):
        queue.put(_stamped(i % 256))
    queue.put(None)
    end.wait()


def _consume(queue: Any, limit: int, answers: Any) -> None:
    """Keep what is received until no descriptor is left, then close that and go on."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    got: list[int] = []
    held: list[dmabuf.DmaBuf] = []
    errors: list[tuple[int, str]] = []
    while True:
        try:
            buf = queue.get()
        except OSError as e:
            errors.append((e.errno or 0, str(e)))
            got += map(_stamp, held)
            held.clear()
            continue
        if buf is None:
            break
        held.append(buf)
    got += map(_stamp, held)
    answers.put((got, errors))


@pytest.mark.parametrize(("kind", "arguments"), [("Queue", ()), ("Queue", (3,)), ("JoinableQueue", ()), ("SimpleQueue", ())])
def test_consumer_without_descriptors_is_told_and_loses_nothing(kind: str, arguments: tuple[int, ...]) -> None:
    context = multiprocessing.get_context("spawn")
    queue, answers, end = getattr(context, kind)(*arguments), context.Queue(), context.Event()
    with (
        running(context.Process(target=_consume, args=(queue, 32, answers))),
        running(context.Process(target=_produce, args=(queue, 40, 0, end))),
    ):
        got, errors = answers.get()
        assert got == list(range(40))
        assert errors
        for number, text in errors:
            assert number == errno.EMFILE
            assert "RLIMIT_NOFILE" in text
            assert "the next get() or recv() gives it again" in text
        end.set()
    queue.close()
    answers.close()


def _consume_pairs(queue: Any, answers: Any, opened: bool) -> None:
    if opened:
        dmabuf.allocate(SIZE).close()
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    for room in (2, 20) if opened else (0, 30):
        taken = []
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY))
        for fd in taken[len(taken) - room :]:
            os.close(fd)
        try:
            pair = queue.get()
        except OSError as e:
            answers.put(e.errno)
        else:
            answers.put(list(map(_stamp, pair)))
        for fd in taken[: len(taken) - room]:
            os.close(fd)


@pytest.mark.parametrize("opened", [True, False])
def test_message_with_several_buffers_is_received_whole_after_emfile(opened: bool) -> None:
    context = multiprocessing.get_context("spawn")
    queue, answers = context.SimpleQueue(), context.SimpleQueue()
    bufs = [_stamped(i) for i in range(2)]
    with running(context.Process(target=_consume_pairs, args=(queue, answers, opened))):
        queue.put(bufs)
        assert answers.get() == errno.EMFILE
        assert answers.get() == [0, 1]
    for made in (*bufs, queue, answers):
        made.close()


def _produce_without_room(queue: Any, count: int, end: Any) -> None:
    bufs = [_stamped(i) for i in range(count)]
    limit = max(map(int, os.listdir("/proc/self/fd"))) + 4  # one for the socket, and two or three to keep
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    for buf in bufs:
        queue.put(buf)
    end.wait()


def test_producer_without_descriptors_waits_for_the_consumer_and_loses_nothing() -> None:
    context = multiprocessing.get_context("spawn")
    queue, end = context.Queue(), context.Event()
    with running(context.Process(target=_produce_without_room, args=(queue, 20, end))):
        assert [_stamp(queue.get()) for _ in range(20)] == list(range(20))
        end.set()
    queue.close()


def _produce_with_no_room(queue: Any, end: Any) -> None:
    keeping.ROOM_S = 0.1  # type: ignore[misc]
    buf = _stamped(1)
    number = os.open("/dev/null", os.O_RDONLY)
    os.close(number)
    resource.setrlimit(resource.RLIMIT_NOFILE, (number, number))
    queue.put(buf)
    end.wait()


def test_producer_that_stays_without_descriptors_tells_the_consumer() -> None:
    context = multiprocessing.get_context("spawn")
    queue, end = context.Queue(), context.Event()
    with running(context.Process(target=_produce_with_no_room, args=(queue, end))) as process:
        with raises_errno(errno.EMFILE) as caught:
            _stamp(_without_proc(queue))
        assert f"process {process.pid} (" in str(caught.value)
        assert "RLIMIT_NOFILE" in str(caught.value)
        end.set()
    queue.close()


def _without_proc(queue: Any) -> Any:
    """What is in the queue, without the way through /proc/PID/fd of its producer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dmabuf.sharing.opening.reopen", _no_way)
        return queue.get()


def _no_way(_: object) -> Any:
    raise dmabuf.DmaBufError(errno.ENOENT, "not this way")


# ---- pools ----


def _made(i: int) -> dmabuf.DmaBuf:
    return _stamped(i).give()


def test_results_of_pool_workers_that_have_ended_arrive(context: Any) -> None:
    with context.Pool(2, maxtasksperchild=1) as pool:
        assert list(map(_stamp, pool.map(_made, range(6), chunksize=1))) == list(range(6))
        pool.close()
        pool.join()


def test_results_of_executor_workers_that_have_ended_arrive() -> None:
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=spawn) as pool:
        futures = [pool.submit(_made, i) for i in range(6)]
    assert [_stamp(future.result()) for future in futures] == list(range(6))


def _late(i: int) -> dmabuf.DmaBuf:
    return _stamped(i, "late")


def _asks() -> bool:
    """Whether a thread of this process asks a sender for a descriptor."""
    for frame in sys._current_frames().values():
        while frame is not None:
            if frame.f_code is fetching._asked.__code__:
                return True
            frame = frame.f_back  # type: ignore[assignment]
    return False


def _without_answers() -> None:
    """In a worker: what is kept is never handed out."""
    kept.answer = lambda *_: threading.Event().wait()  # type: ignore[assignment]


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_result_of_a_killed_pool_worker_names_it_when_it_is_used(method: str) -> None:
    # A worker that is killed while it waits for a task would keep the pool's lock, and the pool could not end.
    with multiprocessing.get_context(method).Pool(1, _without_answers, maxtasksperchild=1) as pool:
        result = pool.apply_async(_late, (1,))
        until(_asks)
        os.kill(pool._pool[0].pid, signal.SIGKILL)  # type: ignore[attr-defined]
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
    """Take all descriptors of a worker but some, for its next task."""
    _hoarded.clear()
    dmabuf.allocate(SIZE).close()
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    with contextlib.suppress(OSError):
        while True:
            _hoarded.append(os.open("/dev/null", os.O_RDONLY))
    return len(_hoarded)


_hoarded: list[int] = []


def _use_with_room(buf: dmabuf.DmaBuf) -> tuple[int | None, int]:
    try:
        buf.fileno()
    except OSError as e:
        first = e.errno
    else:
        first = None
    while _hoarded:
        os.close(_hoarded.pop())
    return first, _stamp(buf)


def test_argument_of_a_pool_worker_without_descriptors_is_received_when_there_is_room(buf: dmabuf.DmaBuf) -> None:
    with buf.write() as view:
        view[0] = 4
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_hoard, (0,))
        assert pool.apply(_use_with_room, (buf,)) == (errno.EMFILE, 4)
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        assert executor.submit(_hoard, 0).result()
        assert executor.submit(_use_with_room, buf).result() == (errno.EMFILE, 4)


# ---- two programs ----

_PROGRAM = """
import sys, dmabuf
from multiprocessing.connection import Client, Listener
if sys.argv[1] == "listen":
    with Listener(authkey=b"both know it") as listener:
        print(listener.address, flush=True)
        with listener.accept() as connection, connection.recv() as buf:
            with buf.read() as view:
                print(bytes(view[:5]).decode(), buf.name, flush=True)
            connection.send(None)
else:
    with Client(sys.argv[2], authkey=b"both know it") as connection, dmabuf.allocate(4096, name="sent") as buf:
        with buf.write() as view:
            view[:5] = b"hello"
        connection.send(buf)
        connection.recv()
"""


def test_listener_and_client_of_two_programs_pass_buffers() -> None:
    command = [sys.executable, "-c", _PROGRAM]
    with subprocess.Popen([*command, "listen"], stdout=subprocess.PIPE, text=True) as listener:
        assert listener.stdout is not None
        address = listener.stdout.readline().strip()
        subprocess.run([*command, "connect", address], check=True)
        assert listener.stdout.read() == "hello sent\n"
    assert not listener.returncode


# ---- other libraries ----


def test_forking_pickler_that_another_library_drives(buf: dmabuf.DmaBuf) -> None:
    file = io.BytesIO()
    ForkingPickler(file, pickle.HIGHEST_PROTOCOL).dump([buf, buf])  # as torch.multiprocessing does it
    one, two = pickle.loads(file.getvalue())
    assert one is two
    assert one == buf
    one.close()


# ---- peers that are not to be believed ----


@pytest.fixture
def place(buf: dmabuf.DmaBuf) -> Iterator[Any]:
    """Where a descriptor of a buffer is kept."""
    yield keeping.TABLE.add(buf._handle.dup_owned)
    keeping.TABLE.drop()


def _count() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_messages_that_make_no_sense_are_ignored(place: Any) -> None:
    name, key, _, _ = place
    before = _count()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("")
        for data in (b"", b"x", bytes(kept.MESSAGE.size), kept.MESSAGE.pack(kept.MAGIC, 99, key), kept.MESSAGE.pack(b"other", 1, key)):
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", (sock.fileno(), 0)))]
            sock.sendmsg([data], rights, 0, name)
            sock.sendto(data, name)
        sock.sendto(kept.MESSAGE.pack(kept.MAGIC, kept.FETCH, bytes(16)), name)
        assert kept.MESSAGE.unpack(sock.recv(100))[1] == kept.GONE
        assert _count() == before + 1
    made = fetch(place, "it", Got)
    made.close()
    until(lambda: len(keeping.TABLE) == 0)


def test_question_without_an_address_is_ignored(place: Any) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.sendto(kept.MESSAGE.pack(kept.MAGIC, kept.FETCH, place[1]), place[0])
    fetch(place, "it", Got).close()
    until(lambda: len(keeping.TABLE) == 0)


def test_descriptor_is_received_once(place: Any, buf: dmabuf.DmaBuf) -> None:
    other = keeping.TABLE.add(buf._handle.dup_owned)  # so that the socket stays
    fetch(place, "it", Got).close()
    with raises_errno(errno.ENOENT) as caught:
        fetch(place, "it", Got)
    assert "it was received already" in str(caught.value)
    fetch(other, "it", Got).close()
    until(lambda: len(keeping.TABLE) == 0)


@pytest.mark.parametrize(
    "place",
    [(), None, (b"\0dmabuf-kept-x", b"short", 1, "x"), (b"/tmp/x", bytes(16), 1, "x"), ("\0dmabuf-kept-x", bytes(16), 1, "x"),
     (b"\0dmabuf-kept-" + b"x" * 200, bytes(16), 1, "x"), (b"\0dmabuf-kept-x", bytes(16), None, "x")],
)  # fmt: skip
def test_token_that_makes_no_sense_is_a_bad_message(place: Any) -> None:
    with raises_errno(errno.EBADMSG):
        fetch(place, "it", Got)


def test_descriptor_of_something_else_is_refused(place: Any, buf: dmabuf.DmaBuf) -> None:
    """A sender of this user that says one thing and sends another."""
    pickled = ForkingPickler.dumps(buf)
    entries = keeping.TABLE._entries
    (key,) = entries.keys() - {place[1]}
    entries[key].close()
    entries[key] = keeping.owned(os.open, "/dev/null", os.O_RDONLY)
    with raises_errno(errno.EINVAL):
        pickle.loads(pickled)
    keeping.TABLE.drop()


def test_forked_child_has_nothing_of_the_table(place: Any) -> None:
    pid = os.fork()
    if not pid:
        os._exit(len(keeping.TABLE) + sum("dmabuf-kept" in line for line in os.listdir("/proc/self/fd")))
    assert not os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    fetch(place, "it", Got).close()
    until(lambda: len(keeping.TABLE) == 0)


def test_keeper_ends_when_the_parent_has_ended_and_the_time_is_over() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("")
        child = subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE)
        table = {bytes(16): os.open("/dev/null", os.O_RDONLY)}
        parent = os.pidfd_open(child.pid)
        thread = threading.Thread(target=kept.keep, args=(sock, table, parent, 0.0))
        thread.start()
        child.communicate()
        thread.join()
        os.close(parent)
        os.close(table.pop(bytes(16)))
