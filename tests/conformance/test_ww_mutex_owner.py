"""Who waits for the lock of a reservation and who holds it: signals, asyncio tasks, and `lock_all`."""

import asyncio
import errno
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

import dmabuf
from dmabuf import ContractError, ContractWarning, DmaResv, WwAcquireContext
from tests.support.errnos import raises_errno
from tests.support.holder import Holder
from tests.support.interrupts import ended_by_a_signal
from tests.support.waiting import Background, until_asleep

# -- signals


def poke_main_when_asleep(after: Callable[[], object] = lambda: None) -> None:
    main = threading.main_thread()
    assert main.ident is not None
    until_asleep(os.getpid(), main.native_id)
    signal.pthread_kill(main.ident, signal.SIGUSR1)
    until_asleep(os.getpid(), main.native_id)
    after()


def test_lock_interruptible_is_eintr_on_a_signal(resv: DmaResv) -> None:
    with Holder(resv):
        ended_by_a_signal(resv.lock_interruptible)
        assert resv.trylock() is False


def test_lock_slow_interruptible_is_eintr_and_keeps_lock_contended() -> None:
    wanted, own = DmaResv(), DmaResv()
    with Holder(wanted, with_context=True) as holder, WwAcquireContext() as younger:
        own.lock(younger)
        with raises_errno(errno.EDEADLK):
            wanted.lock(younger)
        own.unlock()
        ended_by_a_signal(lambda: wanted.lock_slow(younger, interruptible=True))
        assert (younger.contended, younger.acquired) == (wanted, 0)
        holder.let_go()
        wanted.lock_slow(younger, interruptible=True)
        wanted.unlock()


def test_lock_goes_on_after_a_signal(resv: DmaResv) -> None:
    handled: list[int] = []
    old = signal.signal(signal.SIGUSR1, lambda number, _: handled.append(number))
    try:
        with Holder(resv) as holder, Background(lambda: poke_main_when_asleep(after=holder.let_go)):
            resv.lock()
    finally:
        signal.signal(signal.SIGUSR1, old)
    assert handled
    resv.unlock()


def test_lock_ends_when_the_signal_handler_raises(resv: DmaResv) -> None:
    def handler(*_: object) -> None:
        raise KeyError

    old = signal.signal(signal.SIGUSR1, handler)
    try:
        with Holder(resv), Background(poke_main_when_asleep), pytest.raises(KeyError):
            resv.lock()
    finally:
        signal.signal(signal.SIGUSR1, old)
    # Nothing was taken.
    assert resv.trylock()
    resv.unlock()


# -- asyncio tasks are owners of their own


def test_task_cannot_use_or_unlock_the_lock_of_another(resv: DmaResv) -> None:
    async def main() -> None:
        locked, over = asyncio.Event(), asyncio.Event()

        async def owner() -> None:
            resv.lock()
            locked.set()
            await over.wait()
            resv.unlock()

        task = asyncio.create_task(owner())
        await locked.wait()
        assert resv.trylock() is False
        with pytest.raises(ContractError):
            resv.unlock()
        with pytest.raises(ContractError):
            resv.reserve(1)
        over.set()
        await task
        assert resv.trylock()
        resv.unlock()

    asyncio.run(main())


# -- lock_all


def test_lock_all_holds_all_and_frees_all() -> None:
    resvs = [DmaResv() for _ in range(5)]
    with dmabuf.lock_all(resvs):
        assert all(resv.is_locked() for resv in resvs)
        for resv in resvs:
            resv.reserve(1)
    assert not any(resv.is_locked() for resv in resvs)


def test_lock_all_frees_all_when_the_block_raises() -> None:
    resvs = [DmaResv() for _ in range(3)]

    def block() -> None:
        with dmabuf.lock_all(resvs):
            raise KeyError

    with pytest.raises(KeyError):
        block()
    assert not any(resv.is_locked() for resv in resvs)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_lock_all_takes_the_same_one_several_times(resv: DmaResv, count: int) -> None:
    with dmabuf.lock_all([resv] * count):
        assert resv.is_locked() is (count > 0)
    assert not resv.is_locked()


def test_lock_all_waits_for_one_that_is_held() -> None:
    resvs = [DmaResv() for _ in range(3)]

    def take() -> bool:
        with dmabuf.lock_all(resvs):
            return all(resv.is_locked() for resv in resvs)

    resvs[1].lock()
    with Background(take) as job:
        job.until_blocked()
        assert not job.done
        resvs[1].unlock()
        assert job.result()


def test_signal_handler_that_raises_before_the_block_leaves_no_lock(resv: DmaResv, monkeypatch: pytest.MonkeyPatch) -> None:
    def lock(self: DmaResv, *args: Any, **options: Any) -> None:
        taken(self, *args, **options)
        raise KeyboardInterrupt  # as a handler does that runs when the lock is just taken

    taken = DmaResv._lock
    monkeypatch.setattr(DmaResv, "_lock", lock)
    with pytest.raises(KeyboardInterrupt) as kept, resv.locked():
        pass
    assert kept.value is not None
    assert not resv.is_locked()
    with pytest.raises(KeyboardInterrupt) as kept:
        resv.lock()
    assert kept.value is not None
    assert not resv.is_locked()
    monkeypatch.undo()
    with resv.locked(), pytest.warns(ContractWarning), raises_errno(errno.EDEADLK), resv.locked():
        pass
    assert not resv.is_locked()


# -- a lock belongs to the block that took it, and not to what runs when the block ends

BLOCKS = {
    "locked": lambda resv: resv.locked(),
    "lock_all": lambda resv: dmabuf.lock_all([resv, DmaResv()]),
}


@pytest.fixture(params=BLOCKS)
def block(request: pytest.FixtureRequest) -> Callable[[DmaResv], Any]:
    return BLOCKS[request.param]


def test_block_of_generator_ends_in_another_thread(resv: DmaResv, block: Callable[[DmaResv], Any]) -> None:
    def holding() -> Iterator[None]:
        with block(resv):
            yield

    generator = holding()
    next(generator)
    assert resv.held_here()
    with Background(generator.close):  # type: ignore[attr-defined]
        pass
    assert not resv.is_locked()
    assert not resv.held_here()
    # Nothing of it is left with the thread that took it: it takes more locks, and opens a context, without a warning.
    with block(resv):
        pass
    with WwAcquireContext() as ctx:
        assert resv.trylock(ctx)
        resv.unlock()


def test_block_of_generator_ends_when_it_is_dropped(resv: DmaResv, block: Callable[[DmaResv], Any]) -> None:
    def holding() -> Iterator[None]:
        with block(resv):
            yield

    generator = holding()
    next(generator)
    del generator
    assert not resv.is_locked()


def test_block_of_async_generator_ends_in_another_task(resv: DmaResv, block: Callable[[DmaResv], Any]) -> None:
    async def holding() -> AsyncIterator[None]:
        with block(resv):
            yield

    async def main() -> None:
        generator = holding()
        await anext(generator)
        assert resv.held_here()
        await asyncio.create_task(generator.aclose())  # type: ignore[attr-defined]
        assert not resv.is_locked()

    asyncio.run(main())


def test_block_ends_in_another_thread_with_locks_of_it_unlocked(resv: DmaResv) -> None:
    other = DmaResv()
    with dmabuf.lock_all([resv, other]) as ctx:
        resv.unlock()
        resv.lock()  # of its own, without the context
    assert not other.is_locked()
    assert ctx is not None
    assert (ctx.closed, ctx.acquired) == (True, 0)
    assert resv.held_here()
    resv.unlock()


def test_unlock_by_another_thread_is_refused_and_loses_nothing(resv: DmaResv) -> None:
    resv.lock()

    def unlock() -> None:
        with pytest.raises(ContractError):
            resv.unlock()

    with Background(unlock):
        pass
    assert resv.held_here()
    resv.unlock()
    assert not resv.is_locked()


def test_context_closed_by_another_thread_is_closed() -> None:
    ctx = WwAcquireContext()
    with Background(ctx.fini):
        pass
    assert ctx.closed
    with WwAcquireContext():
        pass
