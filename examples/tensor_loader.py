"""A data loader: worker processes decode samples into a pool of batches, and a trainer learns from them where they lie.

    python examples/tensor_loader.py [--batches 40] [--broken SAMPLE]

The trainer uses torch if there is torch, and NumPy otherwise. The samples are made up: a pattern of their class, and noise. With `--broken`
the decoder crashes at that sample, as decoders do on a damaged file. That costs its batch, and the worker is started again.

Written by hand here:
- the pool: which batches are free, which are being filled and by whom, which are ready;
- the pipes to the workers, and waiting for the first one that is ready or dead;
- starting a worker again. Nothing limits how often;
- a batch as two buffers, one for the images and one for the labels, since a buffer has one layout;
- a write() block for a trainer that only reads, because torch has no read-only tensors, and a copy is what we want to avoid.
"""

import argparse
import contextlib
import importlib.util
import multiprocessing
import signal
from collections import deque
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait

import numpy as np
from numpy.typing import NDArray

import dmabuf

WORKERS, BATCH, SHAPE, CLASSES = 2, 32, (3, 16, 16), 10
SPAWN = multiprocessing.get_context("spawn")
Batch = tuple[dmabuf.DmaBuf, dmabuf.DmaBuf]  # the images, the labels


def decode(sample: int) -> tuple[NDArray[np.float32], int]:
    label = sample % CLASSES
    pattern = np.random.default_rng(label).standard_normal(SHAPE, np.float32)
    return pattern + np.random.default_rng(CLASSES + sample).standard_normal(SHAPE, np.float32), label


def work(pipe: Connection, pool: list[Batch], broken: int | None) -> None:
    dmabuf.label("decoder")
    with contextlib.suppress(EOFError):
        while True:
            slot, first = pipe.recv()
            with dmabuf.access(write=pool[slot]) as (images, labels):
                for row in range(BATCH):
                    if first + row == broken:
                        signal.raise_signal(signal.SIGKILL)
                    images.array()[row], labels.array()[row] = decode(first + row)
            pipe.send(slot)


def start(pool: list[Batch], broken: int | None) -> Connection:
    """Start a worker, which ends when the pipe is closed."""
    ours, theirs = SPAWN.Pipe()
    SPAWN.Process(target=work, args=(theirs, pool, broken), daemon=True).start()
    theirs.close()
    return ours


def load(batches: int, broken: int | None) -> Iterator[Batch]:
    """Yield one batch after the other. Each is valid until the next one is asked for."""
    sizes = ((BATCH, *SHAPE), "float32"), ((BATCH,), "int64")
    pool = [tuple(dmabuf.allocate(shape=shape, dtype=dtype) for shape, dtype in sizes) for _ in range(2 * WORKERS)]
    idle, free, ready, busy = [start(pool, broken) for _ in range(WORKERS)], [*range(len(pool))], deque[int](), dict[Connection, int]()
    todo = deque(range(0, batches * BATCH, BATCH))
    while todo or busy or ready:
        while todo and idle and free:
            pipe, slot = idle.pop(), free.pop()
            busy[pipe] = slot
            with contextlib.suppress(BrokenPipeError):  # wait() notices
                pipe.send((slot, todo.popleft()))
        for pipe in wait(list(busy), 0 if ready else None):
            slot = busy.pop(pipe)
            try:
                ready.append(pipe.recv())
                idle.append(pipe)
            except (EOFError, ConnectionResetError):
                print("a worker died; one batch is lost")
                free.append(slot)
                idle.append(start(pool, broken))
        if ready:
            yield pool[ready[0]]
            free.append(ready.popleft())


def learn_with_numpy(weights: NDArray[np.float32], images: dmabuf.View, labels: dmabuf.View) -> float:
    """Take one step of softmax regression, and return the loss."""
    flat, truth = images.array().reshape(BATCH, -1), np.eye(CLASSES, dtype=np.float32)[labels.array()]
    powers = np.exp(flat @ weights)
    chances = powers / powers.sum(1, keepdims=True)
    weights -= flat.T @ (chances - truth) / BATCH * 0.01
    return -float(np.log((chances * truth).sum(1)).mean())


def learn_with_torch(weights: NDArray[np.float32], images: dmabuf.View, labels: dmabuf.View) -> float:
    import torch

    parameters = torch.from_numpy(weights).requires_grad_()
    loss = torch.nn.functional.cross_entropy(images.tensor().flatten(1) @ parameters, labels.tensor())
    loss.backward()
    parameters.data -= parameters.grad * 0.01
    return loss.item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--broken", type=int)
    options = parser.parse_args()
    learn = learn_with_torch if importlib.util.find_spec("torch") else learn_with_numpy
    weights, losses = np.zeros((int(np.prod(SHAPE)), CLASSES), np.float32), []
    for batch in load(options.batches, options.broken):
        with dmabuf.access(write=batch) as views:
            losses.append(learn(weights, *views))
    print(f"{len(losses)} of {options.batches} batches, loss {losses[0]:.2f} to {losses[-1]:.2f}")
