"""The kernel's own tests of the ww_mutex (semantics 7.6), bounded by rounds: between threads, and between processes.

Every one is written once, against locks that the workers are given: reservation objects for threads, buffers for processes, which find
the same lock in the buffer's reservation object.
"""

import errno
import queue
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import pytest

import dmabuf
from dmabuf import DmaResv, WwAcquireContext
from tests.support.children import Child, Parent, Spawn
from tests.support.waiting import Background, until_asleep


class Line(Protocol):
    """What a worker hears and says."""

    def send(self, message: Any = None) -> None: ...
    def recv(self) -> Any: ...


class Pipe:
    """The same for a thread: two queues."""

    def __init__(self) -> None:
        self.inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def send(self, message: Any = None) -> None:
        self.outbox.put(message)

    def recv(self) -> Any:
        return self.inbox.get()


Worker = Callable[..., Any]


class Team(Protocol):
    """Starts workers; each gets its line, the locks, and arguments."""

    resvs: list[DmaResv]

    def start(self, worker: Worker, *arguments: Any) -> None: ...
    def send(self, number: int, message: Any = None) -> None: ...
    def recv(self, number: int) -> Any: ...
    def until_blocked(self, number: int) -> None: ...
    def results(self) -> list[Any]: ...


class Threads:
    def __init__(self, stack: ExitStack, count: int) -> None:
        self.resvs = [DmaResv() for _ in range(count)]
        self._stack, self._pipes, self._jobs = stack, list[Pipe](), list[Background[Any]]()

    def start(self, worker: Worker, *arguments: Any) -> None:
        pipe = Pipe()
        self._pipes.append(pipe)
        self._jobs.append(self._stack.enter_context(Background(lambda: worker(pipe, self.resvs, *arguments))))

    def send(self, number: int, message: Any = None) -> None:
        self._pipes[number].inbox.put(message)

    def recv(self, number: int) -> Any:
        return self._pipes[number].outbox.get()

    def until_blocked(self, number: int) -> None:
        self._jobs[number].until_blocked()

    def results(self) -> list[Any]:
        return [job.result() for job in self._jobs]


class Processes:
    def __init__(self, stack: ExitStack, spawn: Spawn, count: int) -> None:
        self._bufs = [stack.enter_context(dmabuf.allocate(4096)) for _ in range(count)]
        self.resvs = [buf.resv for buf in self._bufs]
        self._spawn, self._children = spawn, list[Child]()

    def start(self, worker: Worker, *arguments: Any) -> None:
        child = self._spawn(in_a_process, worker.__name__, *arguments)
        dmabuf.send(child.sock, *self._bufs)
        self._children.append(child)

    def send(self, number: int, message: Any = None) -> None:
        self._children[number].send(message)

    def recv(self, number: int) -> Any:
        return self._children[number].recv()

    def until_blocked(self, number: int) -> None:
        until_asleep(self._children[number].pid)

    def results(self) -> list[Any]:
        return [child.result() for child in self._children]


def in_a_process(parent: Parent, worker: str, *arguments: Any) -> Any:
    bufs = dmabuf.recv(parent.sock)
    return globals()[worker](parent, [buf.resv for buf in bufs], *arguments)


@pytest.fixture(params=["threads", "processes"])
def team(request: pytest.FixtureRequest, child: Spawn) -> Iterator[Callable[[int], Team]]:
    with ExitStack() as stack:

        def make(count: int) -> Team:
            return Threads(stack, count) if request.param == "threads" else Processes(stack, child, count)

        yield make


@contextmanager
def context() -> Iterator[WwAcquireContext]:
    ctx = WwAcquireContext()
    yield ctx
    ctx.fini()


def lock_or_edeadlk(resv: DmaResv, ctx: WwAcquireContext) -> bool:
    try:
        resv.lock(ctx)
    except OSError as error:
        if error.errno != errno.EDEADLK:
            raise
        return False
    return True


# -- test_mutex: who holds the lock is alone


def mutex_worker(line: Line, resvs: list[DmaResv], try_: bool) -> None:
    (resv,) = resvs
    line.send("ready")
    line.recv()
    if try_:
        while not resv.trylock():
            pass
    else:
        resv.lock()
    line.send("done")
    resv.unlock()


@pytest.mark.parametrize("spin", [False, True], ids=["sleep", "spin"])
@pytest.mark.parametrize("try_", [False, True], ids=["lock", "trylock"])
@pytest.mark.parametrize("ctx", [False, True], ids=["plain", "ctx"])
def test_mutex(team: Callable[[int], Team], spin: bool, try_: bool, ctx: bool) -> None:
    crew = team(1)
    (resv,) = crew.resvs
    crew.start(mutex_worker, try_)
    acquire = WwAcquireContext() if ctx else None
    assert crew.recv(0) == "ready"
    resv.lock(acquire)
    crew.send(0, "go")
    if spin or try_:
        for _ in range(2000):
            assert resv.locking_ctx() is acquire
            assert resv.is_locked()
    else:
        crew.until_blocked(0)
    # The lock is still ours, or this is a ContractError.
    resv.unlock()
    assert crew.recv(0) == "done"
    crew.results()
    if acquire is not None:
        acquire.fini()


def random_worker(line: Line, resvs: list[DmaResv], rounds: int, seed: int) -> int:
    order = random.Random(seed)
    inside = 0
    for _ in range(rounds):
        resv = order.choice(resvs)
        if order.random() < 0.3:
            if not resv.trylock():
                continue
        else:
            resv.lock()
        inside += 1
        resv.unlock()
    return inside


def test_random_locking_never_sticks(team: Callable[[int], Team]) -> None:
    crew = team(3)
    for seed in range(3):
        crew.start(random_worker, 1000, seed)
    assert all(inside > 0 for inside in crew.results())
    assert not any(resv.is_locked() for resv in crew.resvs)


def counter(parent: Parent, rounds: int) -> None:
    (buf,) = dmabuf.recv(parent.sock)
    with memoryview(buf.mmap()).cast("Q") as numbers:
        for _ in range(rounds):
            with buf.resv.locked():
                numbers[0] += 1


def test_a_number_that_only_the_lock_protects_is_counted_exactly(child: Spawn, buf: dmabuf.DmaBuf) -> None:
    others = [child(counter, 1000) for _ in range(3)]
    for other in others:
        dmabuf.send(other.sock, buf)
    for other in others:
        other.result()
    with buf.read() as view:
        assert int.from_bytes(view[:8], sys.byteorder) == 3000


# -- test_abba


def abba_worker(line: Line, resvs: list[DmaResv], try_: bool, resolve: bool) -> bool:
    """Locks b, then a; the test does it the other way round, and is older. True: got both."""
    a, b = resvs
    with context() as ctx:
        if try_:
            assert b.trylock(ctx)
        else:
            b.lock(ctx)
        line.send("has b")
        line.recv()
        got = lock_or_edeadlk(a, ctx)
        if not got and resolve:
            b.unlock()
            a.lock_slow(ctx)
            b.lock(ctx)
            got = True
        if got:
            a.unlock()
        b.unlock()
    return got


@pytest.mark.parametrize("try_", [False, True], ids=["lock", "trylock"])
@pytest.mark.parametrize("resolve", [False, True], ids=["give-up", "resolve"])
def test_abba(team: Callable[[int], Team], try_: bool, resolve: bool) -> None:
    crew = team(2)
    a, b = crew.resvs
    with context() as ctx:
        crew.start(abba_worker, try_, resolve)
        if try_:
            assert a.trylock(ctx)
        else:
            a.lock(ctx)
        assert crew.recv(0) == "has b"
        crew.send(0, "go")
        # The older one waits and never dies.
        b.lock(ctx)
        b.unlock()
        a.unlock()
    assert crew.results() == [resolve]


# -- test_cycle


def cycle_worker(line: Line, resvs: list[DmaResv], own: int) -> bool:
    """Own lock, then the next one's; True: had to back off."""
    mine, following = resvs[own], resvs[(own + 1) % len(resvs)]
    with context() as ctx:
        mine.lock(ctx)
        line.send("has one")
        line.recv()
        # Once is not always enough: while this one waits for the next one's, an older neighbour may take what it gave back.
        held, wanted, backed_off = mine, following, False
        while not lock_or_edeadlk(wanted, ctx):
            held.unlock()
            wanted.lock_slow(ctx)
            held, wanted, backed_off = wanted, held, True
        wanted.unlock()
        held.unlock()
    return backed_off


@pytest.mark.parametrize("count", [2, 3, 4, 6])
def test_cycle(team: Callable[[int], Team], count: int) -> None:
    crew = team(count)
    for own in range(count):
        crew.start(cycle_worker, own)
    for number in range(count):
        assert crew.recv(number) == "has one"
    for number in range(count):
        crew.send(number, "go")
    # Nobody can get round without a back-off, and not everybody has to: the oldest never dies.
    assert 0 < sum(crew.results()) < count


# -- stress


def take_all(resvs: list[DmaResv], order: list[int], ctx: WwAcquireContext) -> int:
    """The kernel's stress_inorder_work: lock all in this order; back off as often as it takes."""
    back_offs = 0
    contended: int | None = None
    while True:
        if contended is not None:
            resvs[contended].lock_slow(ctx)
        held = [] if contended is None else [contended]
        for number in order:
            if number == contended:
                continue
            if not lock_or_edeadlk(resvs[number], ctx):
                for taken in held:
                    resvs[taken].unlock()
                contended = number
                back_offs += 1
                break
            held.append(number)
        else:
            for taken in held:
                resvs[taken].unlock()
            return back_offs


def inorder_worker(line: Line, resvs: list[DmaResv], rounds: int, seed: int) -> int:
    order = list(range(len(resvs)))
    random.Random(seed).shuffle(order)
    for _ in range(rounds):
        with context() as ctx:
            take_all(resvs, order, ctx)
    return rounds


def reorder_worker(line: Line, resvs: list[DmaResv], rounds: int, seed: int) -> int:
    """After each EDEADLK the contended lock goes to the front of the order, and stays there."""
    order = list(range(len(resvs)))
    random.Random(seed).shuffle(order)
    for _ in range(rounds):
        with context() as ctx:
            held: list[int] = []
            number = 0
            while number < len(order):
                at = order[number]
                if at in held:
                    number += 1
                elif lock_or_edeadlk(resvs[at], ctx):
                    held.append(at)
                    number += 1
                else:
                    while held:
                        resvs[held.pop()].unlock()
                    resvs[at].lock_slow(ctx)
                    held.append(at)
                    order.remove(at)
                    order.insert(0, at)
                    number = 0
            for taken in held:
                resvs[taken].unlock()
    return rounds


def one_worker(line: Line, resvs: list[DmaResv], rounds: int, seed: int) -> int:
    order = random.Random(seed)
    for _ in range(rounds):
        resv = order.choice(resvs)
        resv.lock()
        resv.unlock()
    return rounds


def all_worker(line: Line, resvs: list[DmaResv], rounds: int, seed: int) -> int:
    """The library's own back-off loop."""
    order = random.Random(seed)
    for _ in range(rounds):
        wanted = order.sample(resvs, order.randrange(1, len(resvs) + 1))
        with dmabuf.lock_all(wanted):
            for resv in wanted:
                # A ContractError unless it is ours.
                resv.reserve(1)
    return rounds


@pytest.mark.parametrize("locks", [2, 16])
@pytest.mark.parametrize("worker", [inorder_worker, reorder_worker, one_worker, all_worker])
def test_stress(team: Callable[[int], Team], worker: Worker, locks: int) -> None:
    crew = team(locks)
    for seed in range(3):
        crew.start(worker, 100, seed)
    assert crew.results() == [100] * 3
    assert not any(resv.is_locked() for resv in crew.resvs)


def test_stress_of_all_kinds_at_once(team: Callable[[int], Team]) -> None:
    crew = team(16)
    for seed, worker in enumerate([inorder_worker, reorder_worker, one_worker, all_worker]):
        crew.start(worker, 60, seed)
    assert crew.results() == [60] * 4
    assert not any(resv.is_locked() for resv in crew.resvs)
