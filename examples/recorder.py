"""A recorder: frames go to disk while their producer goes on, and are played again at the times at which they were made.

    python examples/recorder.py [FILE] [--frames 40] [--kill]

The producer makes a frame every 20 ms. The recorder, another process, has `dmabuf.DiskDevice` write the buffers into FILE. Nobody can write
into a buffer before that is done. When the disk has all buffers, the producer drops a frame instead of waiting. With `--kill` the recorder
dies in the middle. The producer goes on, and what is in the index can be played.

Written by hand here:
- the ring of slots, names for it that no other run has, and the number and time of a frame, which go beside the buffer;
- giving a frame back: the disk's fence protects a buffer from its submission on, so the recorder says when that is;
- the index, the format of the file, and adding a frame to the index only when it is on the disk;
- noticing that the recorder is gone, and ending it so that nothing is lost;
- reading ahead.
"""

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import select
import signal
import tempfile
import time
import zlib
from collections import deque
from multiprocessing.connection import Connection, wait
from pathlib import Path

import dmabuf

LAYOUT = dmabuf.ImageLayout.linear("R8", 640, 360)
FRAME = -(-LAYOUT.sizes[0] // 4096) * 4096  # bytes in the file; what is aligned bypasses the page cache
SLOTS, PERIOD = 8, 0.02
SPAWN = multiprocessing.get_context("spawn")


def record(pipe: Connection, ring: str, path: str, kill_at: int) -> None:
    """Run the recorder until the producer says None, or dies."""
    slots, jobs = [dmabuf.open(f"{ring} {slot}") for slot in range(SLOTS)], deque()

    def note(*, rest: bool = False) -> None:
        while jobs and (rest or jobs[0][0].done):
            job, entry = jobs.popleft()
            job.wait()  # raises what went wrong
            index.write(json.dumps(entry) + "\n")

    with dmabuf.DiskDevice() as disk, open(f"{path}.index", "w", buffering=1) as index:
        pipe.send("ready")
        with contextlib.suppress(EOFError):
            for slot, number, *entry in iter(pipe.recv, None):
                jobs.append((disk.submit_write(slots[slot], path, number * FRAME), [number, *entry]))
                pipe.send(slot)
                if number == kill_at:
                    signal.raise_signal(signal.SIGKILL)
                note()
        note(rest=True)


def produce(frames: int, path: str, kill_at: int) -> None:
    """Make a frame at each period, whatever the recorder does."""
    ring = f"recorder {os.getpid()}"
    slots = [dmabuf.allocate(layout=LAYOUT, name=f"{ring} {slot}") for slot in range(SLOTS)]
    pipe, theirs = SPAWN.Pipe()
    recorder = SPAWN.Process(target=record, args=(theirs, ring, path, kill_at), daemon=True)
    recorder.start()
    theirs.close()
    pipe.poll(None)  # until it is ready, or dead
    given, made, due = {"ready"}, 0, time.monotonic()  # what the recorder has to answer
    for number in range(frames):
        while wait([] if pipe.closed else [pipe], max(0.0, due - time.monotonic())):
            try:
                given.remove(pipe.recv())
            except (EOFError, ConnectionResetError):
                pipe.close()
                given.clear()
        due = max(due + PERIOD, time.monotonic())  # a camera doesn't catch up
        free = [slot for slot in range(SLOTS) if slot not in given and slots[slot].poll(select.POLLOUT)]
        if free:
            with slots[free[0]].write() as view:
                view.array()[:] = number
                made, entry = made + 1, (free[0], number, time.monotonic(), zlib.crc32(view))
            if not pipe.closed:
                given.add(free[0])
                with contextlib.suppress(BrokenPipeError):  # wait() notices
                    pipe.send(entry)
    with contextlib.suppress(OSError):
        pipe.send(None)
    recorder.join()
    print(f"{made} of {frames} frames made; the recorder {'died' if recorder.exitcode else 'ended'}")


async def play(path: str) -> None:
    """Show each frame when it is due, and read the next ones meanwhile."""
    index = [json.loads(line) for line in Path(f"{path}.index").read_text().splitlines()]
    bufs, jobs, right, began = [dmabuf.allocate(layout=LAYOUT) for _ in range(3)], deque(), 0, time.monotonic()
    with dmabuf.DiskDevice() as disk:
        for n, (_, at, crc) in enumerate(index):
            for ahead in range(n + len(jobs), min(n + len(bufs), len(index))):
                jobs.append(disk.submit_read(bufs[ahead % len(bufs)], path, index[ahead][0] * FRAME))
            await jobs.popleft()
            await asyncio.sleep(max(0.0, began + at - index[0][1] - time.monotonic()))
            async with bufs[n % len(bufs)].read() as view:
                right += zlib.crc32(view) == crc
    print(f"{right} of {len(index)} recorded frames played in {time.monotonic() - began:.2f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("file", nargs="?")
    parser.add_argument("--frames", type=int, default=40)
    parser.add_argument("--kill", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = options.file or f"{folder}/frames"
        Path(f"{file}.index").write_text("")
        produce(options.frames, file, options.frames // 2 if options.kill else -1)
        asyncio.run(play(file))
