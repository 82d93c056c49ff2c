"""`make bench`: every figure beside its C limit, in one run.

`ARGS='--quick'` measures each row once, among few buffers and fences: a test that everything here runs, not a measurement.
`ARGS='--rows REGEX'` measures the rows whose name matches (`--rows 'write|read'`); `--list` shows the names; `--json` is for programs.

Other libraries are measured beside streams where they are installed (bench/transports.py).

A change that claims speed writes the row, with the machine and the command, into RESULTS.md. `python -m bench.compare` compares two builds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from functools import partial

# A domain of its own, so that what else runs on the machine is neither measured nor disturbed.
_DIRECTORY = tempfile.TemporaryDirectory(prefix="dmabuf-bench-", dir="/dev/shm")
os.environ["DMABUF_DOMAIN"] = _DIRECTORY.name + "/domain"

from bench import awaits, floor, frames, measures, starting, streams, sync, transports  # noqa: E402
from bench.table import HEAD, HEAD_OF_TAILS, Group, Measure, Spec, as_json, run  # noqa: E402

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
REPEATS = 5
PING = "futex ping-pong in C, one CPU"
SPINNING = "futex, spinning, in C, two CPUs"
THE_SAME = "the same in C"
IMPORT_BOUND_MS = 40.0  # of `import dmabuf`, above the bare interpreter
KILL = "SIGKILL of a fence's owner → its waiter is awake"
IDLE = "wake-ups a second of a process that waits while nothing happens"
IMPORT = "import dmabuf"


def _futex() -> float:
    return floor.run("futex", "--pin", "same")


def _smart() -> float:
    return floor.run("futexsmart", "--pin", "split", "--spin", "20")


def _scm(size: int, pin: str) -> Measure:
    return lambda: floor.run("scm", "--pin", pin, "--size", str(size), "--n", str(measures.HAND_OVERS))


def _plain() -> list[Spec]:
    rows = [
        Spec("fence signal → wake round trip, one CPU", partial(measures.fence_round_trip, False), _futex, PING, 1.5),
        Spec(
            "fence signal → wake round trip, two CPUs", partial(measures.fence_round_trip, True), _smart, "futex, spinning, in C, two CPUs"
        ),
        Spec("  the same, by the smallest C extension", floor.extension_round_trip, _futex, PING),
        Spec("write() enter + exit, uncontended", measures.write_uncontended, _futex, PING, 0.15),
        Spec("read() enter + exit, uncontended", measures.read_uncontended, _futex, PING, 0.15),
        Spec("view.array() in a read() block, above the block", measures.array_of_read, _futex, PING, 0.1),
        Spec("write() of a 1 GiB buffer", partial(measures.write_uncontended, GIB), _futex, PING, 0.15),
        Spec("a fence made, signaled and dropped", measures.fence_made, _futex, PING, 0.3),
        Spec("a fence received in a message of many, and dropped", measures.fence_received, _futex, PING, 0.6),
        Spec("attach + map + unmap + detach, static", measures.attach_cycle, _futex, PING, 10.0),
        Spec("map + unmap of 1 GiB", partial(measures.map_cycle, GIB), partial(measures.map_cycle, MIB), "the same of 1 MiB", 1.2),
        Spec(
            "begin + end of another process's exporter, one CPU",
            measures.carried_access,
            partial(floor.run, "seqpacket", "--pin", "same"),
            "a socket round trip in C",
        ),
    ]
    for size, text in ((4 * KIB, "4 KiB"), (MIB, "1 MiB"), (256 * MIB, "256 MiB")):
        rows.append(Spec(f"hand-over of {text}, one CPU", partial(measures.hand_over, size, False), _scm(size, "same"), THE_SAME, 2.0))
    rows += [
        Spec("  the same, by Python's socket and mmap modules", partial(floor.bare_hand_over, MIB), _scm(MIB, "same"), THE_SAME),
        Spec("hand-over of 1 MiB, two CPUs", partial(measures.hand_over, MIB, True), _scm(MIB, "split"), THE_SAME, 2.0),
    ]
    return rows


def _among(where: str) -> list[Spec]:
    return [
        Spec(f"fence round trip, one CPU, among {where}", partial(measures.fence_round_trip, False), _futex, PING, 1.5),
        Spec(f"write() enter + exit, among {where}", measures.write_uncontended, _futex, PING, 0.25),
        Spec(f"hand-over of 1 MiB, one CPU, among {where}", partial(measures.hand_over, MIB, False), _scm(MIB, "same"), THE_SAME, 2.0),
    ]


def _starting(joins: int) -> list[Spec]:
    """What begins. In a quick run with many joins, because it is a test too."""
    bare = "the bare interpreter, its start and end"
    return [
        Spec(
            "join of a process, while two others make the domain grow", partial(starting.join, 2, joins), partial(starting.join, 0), "alone"
        ),
        Spec("import dmabuf, CPU above the bare interpreter", starting.import_cost, starting.bare_interpreter, bare),
        Spec("import dmabuf; dmabuf.allocate", partial(starting.import_cost, starting.ALLOCATE), starting.bare_interpreter, bare),
    ]


def groups(quick: bool) -> list[Group]:
    """All rows, in the order of the table."""
    buffers, fences = (2_000, 4_000) if quick else (50_000, 100_000)
    return [
        Group(_plain()),
        Group(_among(f"{buffers:,} buffers in 4 processes"), partial(measures.many_buffers, buffers)),
        Group(_among(f"{fences:,} pending fences"), partial(measures.many_fences, fences)),
        Group(awaits.rows(quick)),
        Group(sync.rows(quick)),
        Group(streams.rows(quick)),
        Group(frames.rows(quick)),
        Group(_starting(600 if quick else starting.JOINS)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench")
    parser.add_argument("--quick", action="store_true", help="each row once, among few buffers and fences: does everything run?")
    parser.add_argument("--rows", default="", metavar="REGEX", help="only the rows whose name matches")
    parser.add_argument("--list", action="store_true", help="show the names of the rows")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    table, repeats, missing = groups(given.quick), 1 if given.quick else REPEATS, transports.missing()
    if given.list:
        print("\n".join(spec.what for group in table for spec in group.rows))
        return
    machine = {"cpus": os.cpu_count(), "machine": platform.machine(), "kernel": platform.release(), "python": platform.python_version()}
    kill = idle = None
    try:
        if not given.json:
            print(f"{machine['cpus']} CPUs {machine['machine']}, Linux {machine['kernel']}, Python {machine['python']}; ", end="")
            print(f"medians of {repeats} runs, µs\n\n{HEAD}", flush=True)
        rows = []
        for row in run(table, given.rows, repeats):
            rows.append(row)
            if not given.json:
                print(row.line(), flush=True)
        if not given.rows:
            killed = measures.wake_after_kill(10 if given.quick else 100)
            kill = {"p50_ms": round(killed[len(killed) // 2], 1), "p99_ms": round(killed[int(len(killed) * 0.99)], 1)}
            idle = round(measures.idle_wakes(1 if given.quick else 10), 1)
    finally:
        floor.clean()
    if given.json:
        print(json.dumps({"machine": machine, "rows": as_json(rows), "wake_after_kill": kill, "idle_wakes": idle}, indent=1))
        return
    if missing and not given.rows:
        print(f"\nNot installed, so without rows: {', '.join(missing)}; use `make bench PEERS=1`")
    tails = [row.line_of_tails() for row in rows if row.tails is not None]
    if tails:
        print("", HEAD_OF_TAILS, *tails, sep="\n")
    for row in rows:
        if row.what.startswith(IMPORT + ","):
            print(f"\n{IMPORT}: {row.us / 1000:.1f} ms of CPU above the bare interpreter (bound: {IMPORT_BOUND_MS:.0f} ms)")
    if kill is not None:
        print(f"\n{KILL}: median {kill['p50_ms']} ms, p99 {kill['p99_ms']} ms (promise: 100 ms)")
        print(f"{IDLE}: {idle} (bound: 5)")


if __name__ == "__main__":
    main()
