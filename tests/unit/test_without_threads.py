"""Where no thread can be started: who asks is told, nothing is left half done, and when there are threads again all works."""

import errno
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

import dmabuf
from dmabuf import Domain
from dmabuf.domain.dispatcher import dispatcher
from dmabuf.sharing.server import serve
from tests.sharing.test_service import answer, connected, hello
from tests.support.drivers import PAGE, Static

NoThreads = Callable[[], None]


@contextmanager
def no_threads() -> Iterator[None]:
    """Of this thread: those that the process has already may start others."""
    me, start = threading.current_thread(), threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if threading.current_thread() is me or threading.current_thread().name == "dmabuf-service":
            raise RuntimeError("can't start new thread")
        start(thread)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        yield


def test_caller_without_a_server_thread_gets_error_and_next_is_served() -> None:
    serve(Domain.default())
    with no_threads(), connected() as sock:
        assert answer(sock)["errno"] == errno.EAGAIN
        assert sock.recv(1) == b""
    with connected() as sock:
        sock.send(hello())
        assert "session" in answer(sock)


@pytest.fixture
def domain() -> Iterator[Domain]:
    made = Domain.private()
    made.join()
    yield made
    made.leave()


def test_what_can_not_be_watched_is_not_and_what_comes_later_is(domain: Domain) -> None:
    watching = dispatcher(domain)
    handle = watching.shm.fence_alloc(0, 1, 1, 0, 0, 0)
    called = threading.Event()
    with no_threads(), pytest.raises(RuntimeError):
        watching.watch(handle, lambda _: called.set(), foreign=True)
    assert watching.watching == 0
    watching.watch(handle, lambda _: called.set(), foreign=True)
    watching.shm.fence_signal(handle, 0, True)
    called.wait()
    watching.stop()


def test_a_service_that_can_not_begin_begins_the_next_time(domain: Domain) -> None:
    for _ in range(2):
        with no_threads(), pytest.raises(RuntimeError):
            serve(domain)
    serve(domain)


def test_export_without_a_releaser_is_refused_and_the_next_is_not(domain: Domain) -> None:
    exporter = Static(PAGE)
    serve(domain)
    with no_threads(), pytest.raises(RuntimeError):
        dmabuf.export(exporter, PAGE, domain=domain)
    with dmabuf.export(exporter, PAGE, domain=domain):
        pass
    assert exporter.count("release") == 1
    exporter.close()


def test_what_can_not_be_rung_yet_is_rung_at_a_tick(domain: Domain) -> None:
    rung = threading.Event()

    def ring() -> bool:
        rung.set()
        return True

    with no_threads():
        domain.retries.later(ring)
    with dmabuf.Timeline("never", domain=domain) as line:
        fence = line.fence()
        while not rung.is_set():
            fence.wait(0.001)
        fence.signal()
