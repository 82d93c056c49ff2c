"""Fences in event loops, merged and in chains: each function returns µs.

"Pending" is how many awaits there are at any time, of which one is signalled: a row that grows with it would mean that somebody looks
through all of them.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import socket
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import dmabuf
from bench import floor
from bench.measures import _recv_all, _send_all
from bench.peers import cpus, median_us, peer, pinned
from bench.table import Spec

ROUNDS = 1000
MERGED = 1000
POINTS = 100_000


def _fences(count: int) -> list[dmabuf.DmaFence]:
    line = dmabuf.Timeline("bench")
    return [line.fence() for _ in range(count)]


def across(pending: int) -> float:
    """signal here → the other process's task goes on and signals → we wake; one CPU."""
    here, there = cpus(False)

    def body(sock: socket.socket) -> None:
        answers = _fences(ROUNDS)
        theirs, others = _recv_all(sock, ROUNDS), _recv_all(sock, pending - 1)

        async def main() -> None:
            waiting = [asyncio.ensure_future(_of(fence)) for fence in others]
            await asyncio.sleep(0)
            _send_all(sock, answers)
            ready = asyncio.get_running_loop().call_soon
            for wait, answer in zip(theirs, answers, strict=True):
                ready(sock.send, b"r")  # said when this task sleeps: a signal before that would find nobody to wake
                await wait
                answer.signal()
            for task in waiting:
                task.cancel()

        asyncio.run(main())
        sock.recv(1)

    clock, samples = time.perf_counter_ns, []
    with peer(body, there) as sock, pinned(here):
        own, others = _fences(ROUNDS), _fences(pending - 1)
        _send_all(sock, own)
        _send_all(sock, others)
        answers = _recv_all(sock, ROUNDS)
        for signal, wait in zip(own, answers, strict=True):
            sock.recv(1)
            start = clock()
            signal.signal()
            wait.wait()
            samples.append(clock() - start)
        for fence in others:
            fence.signal()
    return median_us(samples[ROUNDS // 10 :])


async def _of(awaitable: Any) -> Any:
    return await awaitable


def by_eventfd(pending: int) -> float:
    """The same in C: one epoll waits for so many eventfds."""
    return floor.run("epoll", "--pin", "same", "--n", str(ROUNDS), "--warm", "100", "--fds", str(pending))


def by_multiprocessing(kind: str, pending: int) -> float:
    """The same with multiprocessing's Event or Condition, whose waits block a thread of the loop's executor each."""
    here, there = cpus(False)
    context = multiprocessing.get_context("fork")
    make: Callable[[], Any] = context.Event if kind == "Event" else context.Condition
    question, answer = make(), context.Event()
    others = [make() for _ in range(pending - 1)]
    rounds = ROUNDS // 2

    def wait(event: Any) -> None:
        if kind == "Event":
            event.wait()
            event.clear()
        else:
            with event:
                event.wait()

    def body(sock: socket.socket) -> None:
        from concurrent.futures import ThreadPoolExecutor

        async def main() -> None:
            loop = asyncio.get_running_loop()
            loop.set_default_executor(ThreadPoolExecutor(pending + 1))
            waiting = [loop.run_in_executor(None, wait, event) for event in others]
            for _ in range(rounds):
                going = loop.run_in_executor(None, wait, question)
                await asyncio.sleep(0.0005)  # until the thread waits: a Condition does not hear who notified before
                sock.send(b"r")
                await going
                answer.set()
            for event in others:
                if kind == "Event":
                    event.set()
                else:
                    with event:
                        event.notify_all()
            await asyncio.gather(*waiting)

        asyncio.run(main())
        sock.recv(1)

    clock, samples = time.perf_counter_ns, []
    with peer(body, there) as sock, pinned(here):
        for _ in range(rounds):
            sock.recv(1)
            start = clock()
            if kind == "Event":
                question.set()
            else:
                with question:
                    question.notify()
            answer.wait()
            samples.append(clock() - start)
            answer.clear()
    return median_us(samples[rounds // 10 :])


def in_one_loop(pending: int) -> float:
    """Two tasks that await each other's fence in turn, a round trip, while so many others wait."""
    pings, pongs, others = _fences(ROUNDS), _fences(ROUNDS), _fences(pending - 1)
    return _two_tasks(pings, pongs, others, lambda fence: fence.signal(), _of)


def in_one_loop_by_asyncio(pending: int) -> float:
    """The same with ``asyncio.Event``."""
    pings, pongs, others = ([asyncio.Event() for _ in range(n)] for n in (ROUNDS, ROUNDS, pending - 1))
    return _two_tasks(pings, pongs, others, lambda event: event.set(), lambda event: event.wait())


def _two_tasks(pings: list[Any], pongs: list[Any], others: list[Any], end: Callable[[Any], object], wait: Callable[[Any], Any]) -> float:
    clock, samples = time.perf_counter_ns, []

    async def first() -> None:
        for ping, pong in zip(pings, pongs, strict=True):
            start = clock()
            end(ping)
            await wait(pong)
            samples.append(clock() - start)

    async def second() -> None:
        for ping, pong in zip(pings, pongs, strict=True):
            await wait(ping)
            end(pong)

    async def main() -> None:
        waiting = [asyncio.ensure_future(wait(other)) for other in others]
        await asyncio.sleep(0)
        await asyncio.gather(second(), first())
        for other in others:
            end(other)
        await asyncio.gather(*waiting)

    with pinned(cpus(False)[0]):
        asyncio.run(main())
    return median_us(samples[ROUNDS // 10 :])


def burst(count: int = 10_000) -> float:
    """So many awaits of another process's fences, signalled one after the other: per await, until the last task has gone on."""

    def body(sock: socket.socket) -> None:
        theirs = _recv_all(sock, count)

        async def main() -> None:
            waiting = [asyncio.ensure_future(_of(fence)) for fence in theirs]
            await asyncio.sleep(0)
            sock.send(b"r")
            await asyncio.gather(*waiting)
            sock.send(b"d")

        asyncio.run(main())
        sock.recv(1)

    own = _fences(count)
    with peer(body) as sock:
        _send_all(sock, own)
        sock.recv(1)
        start = time.perf_counter_ns()
        for fence in own:
            fence.signal()
        sock.recv(1)
        return (time.perf_counter_ns() - start) / count / 1000


def burst_by_asyncio(count: int = 10_000) -> float:
    """``asyncio.Event`` in one process, set in one go: per await."""
    events = [asyncio.Event() for _ in range(count)]

    async def main() -> float:
        waiting = [asyncio.ensure_future(event.wait()) for event in events]
        await asyncio.sleep(0)
        start = time.perf_counter_ns()
        for event in events:
            event.set()
        await asyncio.gather(*waiting)
        return (time.perf_counter_ns() - start) / count / 1000

    return asyncio.run(main())


def merge(count: int = MERGED) -> float:
    """merge() of so many fences of as many timelines, until its callback has run after the last signal: in all."""
    lines = [dmabuf.Timeline(str(i)) for i in range(count)]
    fences = [line.fence() for line in lines]
    merge_fences = dmabuf.merge  # the first use of a name imports its module
    start = time.perf_counter_ns()
    merged = merge_fences(*fences)
    merged.enable_signaling()
    for fence in fences:
        fence.signal()
    took = (time.perf_counter_ns() - start) / 1000
    if merged.status != 1:
        raise RuntimeError("the merged fence did not end")
    return took


def merge_by_asyncio(count: int = MERGED) -> float:
    """``asyncio.gather`` of as many futures, which are then done: in all."""

    async def main() -> float:
        futures = [asyncio.get_running_loop().create_future() for _ in range(count)]
        start = time.perf_counter_ns()
        gathered = asyncio.gather(*futures)
        for future in futures:
            future.set_result(None)
        await gathered
        return (time.perf_counter_ns() - start) / 1000

    return asyncio.run(main())


class _Node:
    """A point of a chain without anything in it."""

    __slots__ = ("fence", "prev", "prev_seqno", "seqno")

    def __init__(self, prev: Any, fence: Any, seqno: int) -> None:
        self.prev, self.fence, self.seqno = prev, fence, seqno
        self.prev_seqno = prev.seqno if prev is not None else 0


def chain(what: str, count: int = POINTS) -> float:
    """Of a chain: to "build" it, to "end" its fences in order with its newest point enabled, to "drop" it; per point."""
    fences = _fences(count) if what == "end" else [dmabuf.Timeline("bench").fence()] * count
    clock = time.perf_counter_ns
    start = clock()
    tail: Any = None
    for i, fence in enumerate(fences):
        tail = dmabuf.DmaFenceChain(tail, fence, i + 1)
    if what == "build":
        return (clock() - start) / count / 1000
    start = clock()
    if what == "end":
        tail.enable_signaling()
        for fence in fences:
            fence.signal()
        if tail.status != 1:
            raise RuntimeError("the chain did not end")
    else:
        del tail
    return (clock() - start) / count / 1000


def chain_by_python(what: str, count: int = POINTS) -> float:
    """The same of a linked list of plain Python objects; "end" walks it once."""
    clock = time.perf_counter_ns
    start = clock()
    tail: Any = None
    for i in range(count):
        tail = _Node(tail, None, i + 1)
    if what == "build":
        return (clock() - start) / count / 1000
    start = clock()
    if what == "end":
        here = tail
        while here is not None:
            here = here.prev
        return (clock() - start) / count / 1000
    del tail
    return (clock() - start) / count / 1000


def rows(quick: bool) -> list[Spec]:
    """The rows of the table; of multiprocessing's ways, which are here to compare, a quick run takes one."""
    found: list[Spec] = []

    def row(name: str, limit: str, ours: Callable[..., float], theirs: Callable[..., float], *arguments: Any) -> None:
        found.append(Spec(name, partial(ours, *arguments), partial(theirs, *arguments), limit))

    for pending in (1, 100, 10_000):
        row(f"signal → await resumed → answer, {pending:,} pending", "epoll in C", across, by_eventfd, pending)
        row(f"await round trip in one loop, {pending:,} pending", "asyncio.Event", in_one_loop, in_one_loop_by_asyncio, pending)
    for pending in (1,) if quick else (1, 100):
        for kind in ("Event",) if quick else ("Event", "Condition"):
            name = f"  multiprocessing.{kind} in an executor, {pending} pending"
            row(name, "epoll in C", partial(by_multiprocessing, kind), by_eventfd, pending)
    row("10,000 awaits of another process, in a burst, each", "asyncio.Event in one process", burst, burst_by_asyncio)
    row("merge of 1,000 fences, to its end", "asyncio.gather of 1,000 futures", merge, merge_by_asyncio)
    for what in ("build", "end", "drop"):
        row(f"chain of 100,000 points: {what}, a point", "a linked list of plain objects", chain, chain_by_python, what)
    return found
