"""The dispatcher: deferred work, rings that name a slot, slots that are used again while they are watched."""

import contextlib
import gc
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest

import dmabuf
from dmabuf import _native
from dmabuf.domain.dispatcher import Dispatcher, defer, dispatcher, in_callback
from tests.support.interrupts import Interrupt
from tests.support.waiting import until_asleep


@contextmanager
def private() -> Iterator[Dispatcher]:
    """That of a domain of its own, whose slots nobody else uses."""
    domain = dmabuf.Domain.private()
    made = dispatcher(domain)
    yield made
    made.stop()


def ended_without_a_ring(here: Dispatcher, handle: int) -> None:
    """As somebody ends a fence who dies before ringing."""
    call, here.shm.on_local = here.shm.on_local, lambda _: None
    here.shm.fence_signal(handle, 0, True)
    here.shm.on_local = call


def fence(here: Dispatcher) -> int:
    return here.shm.fence_alloc(0, 1, 1, 0, 0, 0)


def test_a_ring_that_got_lost_is_made_up_for_at_a_tick() -> None:
    with private() as here:
        seen = threading.Event()
        handle = fence(here)
        here.watch(handle, lambda _: seen.set(), foreign=True)
        ended_without_a_ring(here, handle)
        seen.wait()
        assert here.watching == 0


def test_a_slot_that_is_used_again_while_it_is_watched_calls_both() -> None:
    with private() as here:
        order: list[int] = []
        last = threading.Event()
        first = fence(here)
        slot = first & _native.SLOT_MASK
        with here._lock:  # the thread looks at nothing meanwhile
            here._watched[first] = {0: order.append}
            here._foreign[slot] = first
        here.shm.fence_watch(first)
        ended_without_a_ring(here, first)
        again = next(handle for handle in iter(lambda: _freed(here), None) if handle & _native.SLOT_MASK == slot)
        assert again != first
        here.watch(again, lambda _: last.set(), foreign=True)
        here.shm.fence_signal(again, 0, True)
        last.wait()
        third = fence(here)
        done = threading.Event()
        here.watch(third, lambda _: done.set(), foreign=True)
        ended_without_a_ring(here, third)
        done.wait()
        assert order == [first]
        assert here.watching == 0


def _freed(here: Dispatcher) -> int:
    handle = fence(here)
    if handle >> 24 == 1:
        here.shm.fence_signal(handle, 0, True)
    return handle


def test_rings_count_and_name_the_slot() -> None:
    with private() as here:
        bell = here._doorbell
        here.shm.store32(bell - _native.LIFE_DOORBELL + _native.LIFE_SERVED, 0)
        before = here.shm.load32(bell)
        here._wake()
        after = here.shm.load32(bell)
        assert (after - before) & 0xFFFFFFFF == _native.SLOT_MASK + 1
        here.shm.store32(bell, 0xFFFFFFFF)
        here._wake()  # comes round
        assert here.shm.load32(bell) == _native.SLOT_MASK


def test_deferred_work_runs_in_order_after_the_callbacks() -> None:
    with private() as here:
        order: list[str] = []
        handle = fence(here)

        def more(depth: int) -> None:
            if depth < 5000:
                defer(lambda: more(depth + 1))
            else:
                order.append("deep")

        def first(_: int) -> None:
            defer(lambda: order.append("deferred"))
            defer(lambda: more(0))
            order.append("first")

        here.watch(handle, first, foreign=False)
        here.watch(handle, lambda _: order.append("second"), foreign=False)
        here.shm.fence_signal(handle, 0, True)
        assert order == ["first", "second", "deferred", "deep"]
        defer(lambda: order.append("at once"))
        assert order[-1] == "at once"


def test_deferred_work_that_raises_is_told_and_the_rest_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    with private() as here:
        told: list[type[BaseException] | None] = []
        monkeypatch.setattr("sys.unraisablehook", lambda each: told.append(each.exc_type))
        done: list[int] = []
        handle = fence(here)

        def call(_: int) -> None:
            defer(lambda: 1 // 0)
            defer(lambda: done.append(1))

        here.watch(handle, call, foreign=False)
        here.shm.fence_signal(handle, 0, True)
        assert told == [ZeroDivisionError]
        assert done == [1]


def test_a_domain_that_the_garbage_collector_takes_leaves_in_order() -> None:
    """A dispatcher and its domain refer to each other; the domain's descriptor must outlast the leaving, whichever is taken first."""
    domain = dmabuf.Domain.private()
    ended: list[int] = []
    with dmabuf.Timeline("short", domain=domain) as line:
        made = line.fence()
        made.add_callback(lambda _: ended.append(1))
    link = os.readlink(f"/proc/self/fd/{domain.fileno()}")
    dispatcher(domain).stop()
    del domain, line, made
    gc.collect()
    assert link not in links()
    assert ended == [1]


def links() -> list[str]:
    """What this process has open."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # of the listing itself
            found.append(os.readlink(f"/proc/self/fd/{name}"))
    return found


def test_finalizer_or_handler_may_signal_amid_dispatchers_work() -> None:
    """Both run wherever the thread happens to be; so where it holds the dispatcher's lock."""
    with private() as here:
        seen: list[int] = []
        handle = fence(here)
        here.watch(handle, seen.append, foreign=False)
        with here._lock:
            here.shm.fence_signal(handle, 0, True)
        assert seen == [handle]


def test_handler_that_raises_before_callbacks_loses_none_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda what: told.append(what.exc_type))
    with private() as here:
        seen: list[int] = []
        handle, run, tries = fence(here), here.shm.on_local, iter((True, False))

        def interrupted(handle: int) -> None:
            if next(tries):
                raise Interrupt
            run(handle)

        here.shm.on_local = interrupted
        here.watch(handle, seen.append, foreign=False)
        with pytest.raises(Interrupt):
            here.shm.fence_signal(handle, 0, True)
        here.shm.on_local = run
        assert (seen, told) == ([handle], [])


def test_handler_that_raises_between_callbacks_loses_none_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def handler(*_: object) -> None:
        raise Interrupt

    monkeypatch.setattr("dmabuf.domain.dispatcher.report", handler)
    with private() as here:
        seen: list[int] = []
        handle = fence(here)
        here.watch(handle, lambda _: 1 // 0, foreign=False)
        here.watch(handle, seen.append, foreign=False)
        with pytest.raises(Interrupt):
            here.shm.fence_signal(handle, 0, True)
        assert seen == [handle]
        assert not in_callback()


def test_what_can_not_be_rung_yet_keeps_nobody_else_waiting() -> None:
    domain = dmabuf.Domain.private()
    domain.join()
    one, two = threading.Event(), threading.Event()

    def first() -> bool:
        if two.is_set():
            one.set()
        return two.is_set()

    def second() -> bool:
        two.set()
        return True

    domain.retries.later(first)
    domain.retries.later(second)
    one.wait()


def broken(_: object) -> None:
    raise KeyError("in the hook")


@pytest.mark.parametrize("hook", [sys.__unraisablehook__, broken], ids=["the interpreter's own", "one that raises"])
def test_callback_that_raises_is_reported_and_dispatcher_goes_on(
    hook: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "unraisablehook", hook)
    with private() as here:
        for _ in range(2):
            seen = threading.Event()
            handle = fence(here)
            here.watch(handle, lambda _: 1 // 0, foreign=True)
            here.watch(handle, lambda _, seen=seen: seen.set(), foreign=True)
            ended_without_a_ring(here, handle)
            seen.wait()
    said = capsys.readouterr().err
    assert said.count("KeyError: " if hook is broken else "ZeroDivisionError: ") == 2


def test_only_an_exception_is_told() -> None:
    wrong: Any = "no exception"
    with pytest.raises(TypeError):
        _native.unraisable(wrong, None)


class Held:
    """A stand-in for a dispatcher's Shm: a thread that comes to ``fence_watch`` runs ``call`` before it."""

    def __init__(self, shm: _native.Shm, call: Callable[[], object]) -> None:
        self._shm, self._call = shm, call

    def fence_watch(self, handle: int) -> bool:
        self._call()
        return self._shm.fence_watch(handle)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._shm, name)


def asleep_without_ticks(here: Dispatcher) -> None:
    """Have the thread watch something and then nothing, until it sleeps without a limit."""
    handle = fence(here)
    token = here.watch(handle, lambda _: None, foreign=True)
    assert token is not None
    here.unwatch(handle, token)
    thread = here._thread
    assert thread is not None
    while not here._tickless:
        pass
    until_asleep(os.getpid(), thread.native_id or 0)
    here.shm.fence_signal(handle, 0, True)


def test_dispatcher_ticks_for_a_watcher_beside_an_unfinished_one() -> None:
    """The first watcher has found the thread asleep, and has not come to its end when the second one comes."""
    with private() as here:
        asleep_without_ticks(here)
        first, second, seen = fence(here), fence(here), threading.Event()

        def another() -> None:
            here.shm = shm
            here.watch(second, lambda _: seen.set(), foreign=True)

        shm = here.shm
        here.shm = cast(_native.Shm, Held(shm, another))
        here.watch(first, lambda _: None, foreign=True)
        ended_without_a_ring(here, second)
        seen.wait()


def test_dispatcher_ticks_for_a_watcher_after_an_interrupted_one() -> None:
    with private() as here:
        asleep_without_ticks(here)
        first, second, seen = fence(here), fence(here), threading.Event()

        def interrupt() -> None:
            here.shm = shm
            raise Interrupt

        shm = here.shm
        here.shm = cast(_native.Shm, Held(shm, interrupt))
        with pytest.raises(Interrupt):
            here.watch(first, lambda _: None, foreign=True)
        assert here.watching == 0  # the caller got no token, so it could remove nothing
        here.watch(second, lambda _: seen.set(), foreign=True)
        ended_without_a_ring(here, second)
        seen.wait()


def test_stop_ends_a_thread_that_was_about_to_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread has seen that it goes on, and reads the doorbell after stop() has rung."""
    with private() as here:
        domain, load, stopping, arm = here.domain, here.shm.load32, threading.Event(), threading.Event()

        class Shm:
            def load32(self, offset: int) -> int:
                if arm.is_set() and not stopping.is_set():
                    stopping.set()
                    while here.shm.life and not rung.is_set():
                        rung.wait()
                return load(offset)

            def __getattr__(self, name: str) -> Any:
                return getattr(domain.shm, name)

        rung = threading.Event()
        wake = here._wake

        def rings() -> None:
            wake()
            rung.set()

        here.shm = cast(_native.Shm, Shm())
        asleep_without_ticks(here)
        arm.set()
        wake()
        stopping.wait()
        monkeypatch.setattr(here, "_wake", rings)
        here.stop()
        here.shm = domain.shm


def test_local_callbacks_survive_a_handler_that_uses_the_dispatcher_amid_its_making() -> None:
    domain = dmabuf.Domain.private()
    domain.join()
    made: list[Dispatcher] = []

    class Interrupted(Dispatcher):
        def __init__(self, of: dmabuf.Domain) -> None:
            made.append(dispatcher(of))  # as a signal handler that comes here
            super().__init__(of)

    with domain.lock:
        made.append(Interrupted(domain))
    here, seen = made[0], list[int]()
    handle = fence(here)
    here.watch(handle, seen.append, foreign=False)
    here.shm.fence_signal(handle, 0, True)
    assert seen == [handle]
    assert dispatcher(domain) is here


def test_keyboard_interrupt_in_a_callback_arrives_and_no_callback_is_lost() -> None:
    with private() as here:
        seen: list[int] = []
        handle = fence(here)

        def interrupted(_: int) -> None:
            if not seen:
                seen.append(0)
                raise KeyboardInterrupt

        here.watch(handle, interrupted, foreign=False)
        here.watch(handle, seen.append, foreign=False)
        with pytest.raises(KeyboardInterrupt):
            here.shm.fence_signal(handle, 0, True)
        assert seen == [0, handle]
        assert not in_callback()
