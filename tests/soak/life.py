"""The beginning and the end of the processes of a soak, and the one that looks when all have gone."""

from __future__ import annotations

import atexit
import json
import os
import random
import select
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import dmabuf
from tests.soak.board import Board
from tests.soak.operations import grow, outcomes, step
from tests.soak.worker import Worker, fail, prepare

for _name in dmabuf.__all__:  # which are imported when they are first used: before the forks, not in each
    getattr(dmabuf, _name)

ROUNDS = 150  # of a worker that nobody kills, on average
_LOOKS = 100  # a tenth of a second apart


def live(where: Path, seed: str, board: Board, number: int) -> None:
    """Work until it is time to go, or somebody says so."""
    prepare(f"soak {number}")
    worker = Worker(where, seed, board.line(number))
    chance = random.Random(seed)
    rounds = int(chance.expovariate(1 / ROUNDS)) if chance.random() < 0.6 else chance.randint(1, 3)
    for _ in range(chance.randrange(4)):
        grow(worker)  # at once, while others are still coming
    while rounds > 0 and not (where / "stop").exists():
        step(worker)
        rounds -= 1
        if rounds % 16 == 0:
            worker.reap()
    worker.go()


def in_fork(where: Path, seed: str, board: Board, number: int, log: int) -> NoReturn:
    """Live in a forked child of the supervisor."""
    end_with(log, lambda: live(where, seed, board, number))


def anchor(told: int, log: int) -> NoReturn:
    """Be in the domain until the supervisor closes the other end of ``told``."""

    def stay() -> None:
        prepare("soak anchor")
        dmabuf.Domain.default().join()
        os.read(told, 1)

    end_with(log, stay)


def visit(log: int) -> NoReturn:
    """Be in the domain for the time that one buffer takes."""

    def come_and_go() -> None:
        prepare("soak visitor")
        with dmabuf.allocate(4096) as buf, buf.write() as view:
            view[0] = 1

    end_with(log, come_and_go)


def end_with(log: int, action: Callable[[], None]) -> NoReturn:
    """Do something in a forked child of the supervisor, and end as an interpreter ends."""
    try:
        os.setpgid(0, 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        action()
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    except BaseException as e:
        fail(e)
    os._exit(0)


def inspect(answer: int) -> NoReturn:
    """Look at the domain as the only one in it; what is left, as JSON."""
    try:
        prepare("soak inspector")
        domain = dmabuf.Domain.default()
        names: list[str] = []
        for _ in range(_LOOKS):
            # What a killed process has left is judged after a few sweeps (domain/records.py).
            names = [f"ino {buf.ino} {buf.name!r}" for buf in dmabuf.buffers()]
            if not names:
                break
            select.select([], [], [], 0.1)
        with dmabuf.allocate(4096) as buf, buf.write() as view:
            view[0] = 1
        domain.leave()
        os.write(answer, json.dumps({"buffers": names}).encode())
    except BaseException as e:
        fail(e)
    os._exit(0)


def _main(where: str, seed: str, number: str, board: str) -> None:
    lines = Board(int(number) + 1, outcomes(), int(board))
    try:
        live(Path(where), seed, lines, int(number))
    except BaseException as e:
        fail(e)


if __name__ == "__main__":
    _main(*sys.argv[1:])
