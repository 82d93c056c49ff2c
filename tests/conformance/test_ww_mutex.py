"""The lock of reservations, between threads: wait-die, its errnos, and the misuse it names (semantics 4.8, 4.10)."""

import errno
import os
import threading
from collections.abc import Callable

import pytest

from dmabuf import ContractError, ContractWarning, DmaResv, WwAcquireContext
from tests.support.errnos import raises_errno
from tests.support.holder import Holder
from tests.support.waiting import Background, until_asleep

# -- one thread


def test_locked_without_a_context_has_no_locking_ctx(resv: DmaResv) -> None:
    assert not resv.is_locked()
    resv.lock()
    assert resv.is_locked()
    assert resv.locking_ctx() is None
    resv.unlock()
    assert not resv.is_locked()


def test_locked_with_a_context_tells_it(resv: DmaResv) -> None:
    ctx = WwAcquireContext()
    resv.lock(ctx)
    assert resv.locking_ctx() is ctx
    resv.unlock()
    assert resv.locking_ctx() is None
    ctx.fini()


def test_the_context_manager_unlocks_when_the_block_raises(resv: DmaResv) -> None:
    def block() -> None:
        with resv.locked():
            assert resv.is_locked()
            raise KeyError

    with pytest.raises(KeyError):
        block()
    assert not resv.is_locked()


def test_the_context_manager_takes_a_context(resv: DmaResv) -> None:
    ctx = WwAcquireContext()
    with resv.locked(ctx):
        assert resv.locking_ctx() is ctx
    ctx.fini()


def test_trylock_of_a_free_lock_takes_it(resv: DmaResv) -> None:
    assert resv.trylock() is True
    assert resv.is_locked()
    resv.unlock()


def test_aa_lock(resv: DmaResv) -> None:
    ctx = WwAcquireContext()
    resv.lock(ctx)
    assert resv.trylock() is False
    assert resv.trylock(ctx) is False
    with raises_errno(errno.EALREADY):
        resv.lock(ctx)
    resv.unlock()
    assert not resv.is_locked()
    ctx.fini()


def test_aa_trylock(resv: DmaResv) -> None:
    ctx = WwAcquireContext()
    assert resv.trylock(ctx) is True
    assert resv.trylock() is False
    assert resv.trylock(ctx) is False
    with raises_errno(errno.EALREADY):
        resv.lock(ctx)
    resv.unlock()
    assert not resv.is_locked()
    ctx.fini()


def test_aa_without_a_context(resv: DmaResv) -> None:
    assert resv.trylock()
    assert resv.trylock() is False
    with pytest.warns(ContractWarning), raises_errno(errno.EDEADLK):
        resv.lock()
    resv.unlock()
    assert not resv.is_locked()


@pytest.mark.parametrize("how", ["lock", "lock_interruptible"])
@pytest.mark.parametrize("with_context", [False, True], ids=["plain", "ctx"])
def test_locking_again_what_was_locked_without_a_context_is_edeadlk(resv: DmaResv, how: str, with_context: bool) -> None:
    resv.lock()
    ctx = WwAcquireContext() if with_context else None
    with pytest.warns(ContractWarning), raises_errno(errno.EDEADLK):
        getattr(resv, how)(ctx)
    assert resv.is_locked()
    resv.unlock()
    assert not resv.is_locked()
    if ctx is not None:
        ctx.fini()


def test_the_warning_of_a_second_lock_comes_before_any_effect(resv: DmaResv) -> None:
    with resv.locked():
        with pytest.raises(ContractWarning):
            resv.lock()
        assert resv.is_locked()
    assert not resv.is_locked()


def test_unlocking_a_free_lock_is_a_contract_error(resv: DmaResv) -> None:
    with pytest.raises(ContractError):
        resv.unlock()
    assert resv.trylock()
    resv.unlock()


def test_unlocking_the_lock_of_another_thread_is_a_contract_error(resv: DmaResv) -> None:
    with Holder(resv) as holder:
        with pytest.raises(ContractError):
            resv.unlock()
        assert resv.is_locked()
        holder.let_go()
        holder.result()
    assert not resv.is_locked()


@pytest.mark.parametrize("with_context", [False, True], ids=["plain", "ctx"])
def test_trylock_of_another_threads_lock_is_false(resv: DmaResv, with_context: bool) -> None:
    ctx = WwAcquireContext()
    with Holder(resv, with_context=with_context):
        assert resv.trylock() is False
        assert resv.trylock(ctx) is False
        assert resv.locking_ctx() is None
    ctx.fini()


# -- misuse of a context


def test_a_second_context_in_one_thread_is_a_contract_warning() -> None:
    ctx = WwAcquireContext()
    with pytest.raises(ContractWarning):
        WwAcquireContext()
    ctx.fini()
    WwAcquireContext().fini()


def test_a_context_of_another_thread_may_be_open_at_the_same_time() -> None:
    ctx = WwAcquireContext()
    with Background(lambda: WwAcquireContext().fini()) as job:
        job.result()
    ctx.fini()


def test_locking_after_done_is_a_contract_warning(resv: DmaResv) -> None:
    ctx = WwAcquireContext()
    ctx.done()
    with pytest.raises(ContractWarning):
        resv.lock(ctx)
    assert not resv.is_locked()
    ctx.fini()


def test_fini_with_a_lock_held_is_a_contract_warning(resv: DmaResv) -> None:
    ctx = WwAcquireContext()
    resv.lock(ctx)
    with pytest.raises(ContractWarning):
        ctx.fini()
    resv.unlock()
    ctx.fini()


def test_unlocking_after_done_is_in_order(resv: DmaResv) -> None:
    ctx = WwAcquireContext()
    resv.lock(ctx)
    ctx.done()
    resv.unlock()
    ctx.fini()


def test_lock_slow_without_a_preceding_edeadlk_is_a_contract_warning(resv: DmaResv) -> None:
    ctx = WwAcquireContext()
    with pytest.raises(ContractWarning):
        resv.lock_slow(ctx)
    assert not resv.is_locked()
    ctx.fini()


# -- wait-die between two contexts; the first made is the older


@pytest.mark.parametrize("how", ["lock", "lock_interruptible"])
def test_a_younger_context_with_locks_dies_when_an_older_holds_the_lock(how: str) -> None:
    wanted, own = DmaResv(), DmaResv()
    with Holder(wanted, with_context=True):
        younger = WwAcquireContext()
        own.lock(younger)
        with raises_errno(errno.EDEADLK):
            getattr(wanted, how)(younger)
        assert own.is_locked()
        own.unlock()
        younger.fini()


def test_a_younger_context_without_locks_waits_for_an_older(resv: DmaResv) -> None:
    older = WwAcquireContext()
    resv.lock(older)

    def take() -> None:
        younger = WwAcquireContext()
        resv.lock(younger)
        resv.unlock()
        younger.fini()

    with Background(take) as job:
        job.until_blocked()
        assert not job.done
        resv.unlock()
        job.result()
    older.fini()


def test_an_older_context_with_locks_waits_for_a_younger() -> None:
    own, wanted = DmaResv(), DmaResv()
    older = WwAcquireContext()
    own.lock(older)
    main = threading.main_thread().native_id
    with Holder(wanted, with_context=True) as younger:

        def let_go() -> None:
            until_asleep(os.getpid(), main)
            younger.let_go()

        with Background(let_go):
            wanted.lock(older)
    wanted.unlock()
    own.unlock()
    older.fini()


def test_a_younger_context_with_locks_waits_for_a_holder_without_a_context() -> None:
    own, wanted = DmaResv(), DmaResv()

    def take() -> None:
        ctx = WwAcquireContext()
        own.lock(ctx)
        wanted.lock(ctx)
        wanted.unlock()
        own.unlock()
        ctx.fini()

    wanted.lock()
    with Background(take) as job:
        job.until_blocked()
        assert not job.done
        wanted.unlock()
        job.result()


def test_after_edeadlk_lock_slow_waits_and_the_rest_can_be_locked_again() -> None:
    wanted, own = DmaResv(), DmaResv()

    def back_off() -> str:
        younger = WwAcquireContext()
        own.lock(younger)
        with raises_errno(errno.EDEADLK):
            wanted.lock(younger)
        own.unlock()
        wanted.lock_slow(younger)
        own.lock(younger)
        with raises_errno(errno.EALREADY):
            wanted.lock(younger)
        own.unlock()
        wanted.unlock()
        younger.fini()
        return "both"

    with Holder(wanted, with_context=True) as holder, Background(back_off) as job:
        job.until_blocked()
        assert not job.done
        holder.let_go()
        assert job.result() == "both"


def after_edeadlk(misuse: Callable[[DmaResv, DmaResv, WwAcquireContext], None]) -> None:
    """Do it with a context that was just told EDEADLK: (the lock it wanted, the lock it holds, the context)."""
    wanted, own = DmaResv(), DmaResv()
    with Holder(wanted, with_context=True):
        younger = WwAcquireContext()
        own.lock(younger)
        with raises_errno(errno.EDEADLK):
            wanted.lock(younger)
        misuse(wanted, own, younger)
        younger.fini()


def test_locking_another_one_after_edeadlk_is_a_contract_warning() -> None:
    third = DmaResv()

    def misuse(wanted: DmaResv, own: DmaResv, ctx: WwAcquireContext) -> None:
        own.unlock()
        with pytest.raises(ContractWarning):
            third.lock(ctx)
        assert not third.is_locked()

    after_edeadlk(misuse)


def test_lock_slow_with_locks_still_held_is_a_contract_warning() -> None:
    def misuse(wanted: DmaResv, own: DmaResv, ctx: WwAcquireContext) -> None:
        with pytest.raises(ContractWarning):
            wanted.lock_slow(ctx)
        own.unlock()

    after_edeadlk(misuse)


def test_giving_up_after_edeadlk_is_in_order() -> None:
    def give_up(wanted: DmaResv, own: DmaResv, ctx: WwAcquireContext) -> None:
        own.unlock()

    after_edeadlk(give_up)


def test_the_oldest_waiter_is_served_first(resv: DmaResv) -> None:
    order: list[str] = []

    def take(name: str, made: threading.Event, go: threading.Event) -> None:
        ctx = WwAcquireContext()
        made.set()
        go.wait()
        resv.lock(ctx)
        order.append(name)
        resv.unlock()
        ctx.fini()

    old, young, go_old, go_young = (threading.Event() for _ in range(4))
    resv.lock()
    with Background(lambda: take("old", old, go_old)) as first:
        old.wait()
        with Background(lambda: take("young", young, go_young)) as second:
            young.wait()
            go_young.set()
            second.until_blocked()
            go_old.set()
            first.until_blocked()
            resv.unlock()
            first.result()
            second.result()
    assert order == ["old", "young"]


def test_a_waiter_with_locks_dies_when_an_older_context_gets_the_lock() -> None:
    """The younger waits for a holder without a context; an older one comes, and is served before it."""
    wanted, own = DmaResv(), DmaResv()
    old_made, old_go, old_has, old_release = (threading.Event() for _ in range(4))

    def older() -> None:
        ctx = WwAcquireContext()
        old_made.set()
        old_go.wait()
        wanted.lock(ctx)
        old_has.set()
        old_release.wait()
        wanted.unlock()
        ctx.fini()

    def younger() -> int | None:
        ctx = WwAcquireContext()
        own.lock(ctx)
        try:
            wanted.lock(ctx)
        except OSError as error:
            number = error.errno
        else:
            wanted.unlock()
            number = None
        own.unlock()
        ctx.fini()
        return number

    wanted.lock()
    with Background(older) as old:
        old_made.wait()
        with Background(younger) as young:
            young.until_blocked()
            assert not young.done
            old_go.set()
            old.until_blocked()
            wanted.unlock()
            old_has.wait()
            assert young.result() == errno.EDEADLK
        old_release.set()
        old.result()
