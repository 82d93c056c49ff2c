"""A camera whose frames two programs use. One of them takes the newest only, and either may crash and come back.

    python examples/camera_service.py [--frames 60] [--video FILE] [--kill fast|slow]

The service writes frames, of a video (PyAV) or made up, into four buffers. Its workers are programs of their own. They open the buffers by
name, and ask for one frame after the other on stdout. `fast` is quicker than the camera. `slow` isn't, and misses frames. The camera waits
for neither. With `--kill` a worker dies while it reads a frame. The service notices that, starts it again, and goes on.

Written by hand here:
- the ring of slots: which one is the newest, which are in use, which one to write next, and how many there must be;
- giving a frame back by a message, and taking it back from a worker that died by the end of its pipe;
- newest wins: which frame each worker had, and which worker waits;
- the number of a frame, which goes beside the buffer in a message;
- names that no other run of this program has;
- starting workers again. Nothing limits how often.
"""

import argparse
import contextlib
import itertools
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

import dmabuf

LAYOUT = dmabuf.ImageLayout.linear("R8", 640, 360)
SLOTS = 4  # one to write, the newest, and one in use by each worker
RATE = 60  # frames a second
WORK = {"fast": 0.0, "slow": 0.05}  # seconds for a frame


def pictures(video: str | None) -> Iterator[NDArray[np.uint8]]:
    if video:
        import av

        yield from (frame.reformat(LAYOUT.width, LAYOUT.height, "gray").to_ndarray() for frame in av.open(video).decode(video=0))
    for number in itertools.count():
        yield np.broadcast_to(np.arange(number, number + LAYOUT.width).astype(np.uint8), (LAYOUT.height, LAYOUT.width))


def work(name: str, ring: str, crash_at: int) -> None:
    dmabuf.label(name)
    slots = [dmabuf.open(f"{ring} {slot}") for slot in range(SLOTS)]
    print("next", flush=True)
    for message in sys.stdin:
        slot, number = map(int, message.split())
        with slots[slot].read() as view:
            view.array().mean()
            select.select([], [], [], WORK[name])  # the slow one does more
            if number >= crash_at > 0:
                signal.raise_signal(signal.SIGKILL)
        print("next", flush=True)


class Worker:
    def __init__(self, name: str, ring: str) -> None:
        self.name, self.ring, self.frames, self.number, self.starts = name, ring, 0, 0, 0

    def start(self, crash_at: int = 0) -> None:
        command = [sys.executable, __file__, "--worker", self.name, self.ring, str(crash_at)]
        self.program = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        self.slot, self.asks, self.starts = -1, False, self.starts + 1  # the slot that it uses

    def fileno(self) -> int:
        return self.program.stdout.fileno()

    def listen(self) -> None:
        self.asks = self.program.stdout.readline() != ""
        self.frames, self.slot = self.frames + (self.asks and self.slot >= 0), -1
        if not self.asks:
            self.program.communicate()
            self.start()

    def give(self, slot: int, number: int) -> None:
        self.asks, self.slot, self.number = False, slot, number
        with contextlib.suppress(BrokenPipeError):  # listen() notices
            self.program.stdin.write(f"{slot} {number}\n")


def serve(options: argparse.Namespace, ring: str) -> None:
    dmabuf.label("camera")
    slots = [dmabuf.allocate(layout=LAYOUT, name=f"{ring} {slot}") for slot in range(SLOTS)]
    workers = [Worker(name, ring) for name in WORK]
    for worker in workers:
        worker.start(options.frames // 2 if worker.name == options.kill else 0)
    source, newest, number, due = pictures(options.video), 0, 0, float("inf")
    while number < options.frames or any(worker.number < number or worker.slot >= 0 for worker in workers):
        if time.monotonic() >= due or (number == 0 and all(worker.asks for worker in workers)):
            newest = next(slot for slot in range(SLOTS) if slot != newest and all(worker.slot != slot for worker in workers))
            with slots[newest].write() as view:
                view.array()[:] = next(source)
            number += 1
            due = time.monotonic() + 1 / RATE if number < options.frames else float("inf")
        for worker in workers:
            if worker.asks and worker.number < number:
                worker.give(newest, number)
        for worker in select.select(workers, [], [], None if due == float("inf") else max(0.0, due - time.monotonic()))[0]:
            worker.listen()
    for worker in workers:
        worker.program.communicate()
        print(f"{worker.name}: {worker.frames} of {number} frames, started {worker.starts} time{'s' * (worker.starts > 1)}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        parser = argparse.ArgumentParser()
        parser.add_argument("--frames", type=int, default=60)
        parser.add_argument("--video")
        parser.add_argument("--kill", choices=WORK)
        serve(parser.parse_args(), f"camera {os.getpid()}")
