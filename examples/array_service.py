"""A service that computes on large arrays: tasks of asyncio hand 8 MB each to a pool of processes, without a copy.

    python examples/array_service.py [--clients 4] [--requests 5] [--crash]

Each client fills a buffer, hands it over, and reads the result in the same buffer. When all workers are busy it waits, but not for longer
than its timeout. One client is impatient, and one cancels its request. With `--crash` a worker is killed while it writes a result. The
client that waits for it fills its buffer again, and another worker gets it.

Written by hand here:
- the pool: an executor of one process for each worker, because a death breaks a whole ProcessPoolExecutor, and a queue of the idle ones;
- a worker goes on with a request that nobody waits for any more, and comes back to the queue when it is done;
- asking again after a death, and for how often;
- closing the buffer in the worker;
- a client in another program would need a socket, a protocol, and `send` in a thread.
"""

import argparse
import asyncio
import multiprocessing
import signal
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np

import dmabuf

SHAPE = (1024, 1024)  # of float64: 8 MB


def root(buf: dmabuf.DmaBuf, rounds: int = 1, crash: bool = False) -> None:
    """Take square roots, in a worker."""
    with buf, buf.write() as view:
        for _ in range(rounds):
            np.sqrt(view.array(), out=view.array())
        if crash:
            signal.raise_signal(signal.SIGKILL)


class Pool:
    """Some processes, each with one request at a time."""

    def __init__(self, size: int) -> None:
        self.loop = asyncio.get_running_loop()
        self.size, self.idle, self.deaths = size, asyncio.Queue[ProcessPoolExecutor](), 0
        for _ in range(size):
            self.idle.put_nowait(self.worker())

    def worker(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), dmabuf.label, ("worker",))

    async def run(self, function: Callable[..., None], *arguments: Any) -> None:
        """Run a function in an idle worker. Raise BrokenProcessPool if it dies."""
        worker = await self.idle.get()
        future = worker.submit(function, *arguments)
        future.add_done_callback(lambda done: self.loop.call_soon_threadsafe(self.over, worker, done))
        await asyncio.wrap_future(future)

    def over(self, worker: ProcessPoolExecutor, future: Future[None]) -> None:
        if not future.cancelled() and isinstance(future.exception(), BrokenProcessPool):
            self.deaths += 1
            worker.shutdown()
            worker = self.worker()
        self.idle.put_nowait(worker)

    async def close(self) -> None:
        for _ in range(self.size):
            (await self.idle.get()).shutdown()


async def request(pool: Pool, value: float, timeout: float = 60.0, rounds: int = 1, crash: bool = False) -> float:
    """Have the square roots of an array computed, and return one of them."""
    with dmabuf.allocate(shape=SHAPE, dtype="float64", name="request") as buf:
        async with asyncio.timeout(timeout):
            while True:
                async with buf.write() as view:
                    view.array()[:] = value
                try:
                    await pool.run(root, buf, rounds, crash)
                    break
                except BrokenProcessPool:
                    crash = False
            async with buf.read() as view:
                return float(view.array()[-1, -1])


async def client(pool: Pool, counts: Counter[str], requests: int) -> None:
    for number in range(requests):
        counts["right" if await request(pool, number * number) == number else "wrong"] += 1


async def main(options: argparse.Namespace) -> None:
    pool, counts = Pool(2), Counter[str]()
    canceled = asyncio.create_task(request(pool, 1.0, rounds=50))
    async with asyncio.TaskGroup() as clients:
        for _ in range(options.clients):
            clients.create_task(client(pool, counts, options.requests))
        if options.crash:
            clients.create_task(request(pool, 1.0, crash=True))
        try:
            await request(pool, 1.0, timeout=0.01, rounds=50)
        except TimeoutError:
            counts["timed out"] += 1
        canceled.cancel()
    await asyncio.wait([canceled])
    counts["canceled"] += canceled.cancelled()
    await pool.close()
    print(", ".join(f"{counts[what]} {what}" for what in sorted(counts)), f"{pool.deaths} deaths", sep="; ")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--requests", type=int, default=5)
    parser.add_argument("--crash", action="store_true")
    asyncio.run(main(parser.parse_args()))
