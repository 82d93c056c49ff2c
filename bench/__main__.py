"""`make bench`: every figure beside its C limit, in one run. `ARGS='--quick'` leaves the large domains out, `--fences` all
but the rows of fences, `--calls` all but that of calls between processes; `--json` for programs.

Whoever claims speed writes the row, with the machine and the command, into RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
from collections.abc import Callable
from typing import Any

# A domain of its own, so that what else runs on the machine is neither measured nor disturbed.
_DIRECTORY = tempfile.TemporaryDirectory(prefix="dmabuf-bench-", dir="/dev/shm")
os.environ["DMABUF_DOMAIN"] = _DIRECTORY.name + "/domain"

from bench import awaits, floor, measures  # noqa: E402

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
REPEATS = 5
Row = dict[str, Any]


def ratio(name: str, ours: Callable[[], float], limit: Callable[[], float], bound: float | None, unit: str) -> Row:
    """Both measured in turn, several times; the median of the pairs' ratios."""
    pairs = [(ours(), limit()) for _ in range(REPEATS)]
    return {
        "what": name,
        "us": round(statistics.median(a for a, _ in pairs), 2),
        "limit_us": round(statistics.median(b for _, b in pairs), 2),
        "limit": unit,
        "ratio": round(statistics.median(a / b for a, b in pairs), 2),
        "bound": bound,
    }


def rows(quick: bool) -> list[Row]:
    """Every row of the table."""

    def futex() -> float:
        return floor.run("futex", "--pin", "same")

    def smart() -> float:
        return floor.run("futexsmart", "--pin", "split", "--spin", "20")

    def scm(size: int, pin: str) -> Callable[[], float]:
        return lambda: floor.run("scm", "--pin", pin, "--size", str(size), "--n", str(measures.HAND_OVERS))

    ping = "futex ping-pong in C, one CPU"
    found = [
        ratio("fence signal → wake round trip, one CPU", lambda: measures.fence_round_trip(False), futex, 1.5, ping),
        ratio(
            "fence signal → wake round trip, two CPUs",
            lambda: measures.fence_round_trip(True),
            smart,
            None,
            "futex, spinning, in C, two CPUs",
        ),
        ratio("  the same, by the smallest C extension", floor.extension_round_trip, futex, None, ping),
        ratio("write() enter + exit, uncontended", measures.write_uncontended, futex, 4.0, ping),
        ratio("read() enter + exit, uncontended", measures.read_uncontended, futex, None, ping),
        ratio("write() of a 1 GiB buffer", lambda: measures.write_uncontended(GIB), futex, 4.0, ping),
        ratio("attach + map + unmap + detach, static", measures.attach_cycle, futex, 10.0, ping),
        ratio("map + unmap of 1 GiB", lambda: measures.map_cycle(GIB), lambda: measures.map_cycle(MIB), 1.2, "the same of 1 MiB"),
    ]
    found += calls()
    for size, text in ((4 * KIB, "4 KiB"), (MIB, "1 MiB"), (256 * MIB, "256 MiB")):
        found.append(
            ratio(f"hand-over of {text}, one CPU", lambda s=size: measures.hand_over(s, False), scm(size, "same"), 2.0, "the same in C")
        )
    found.append(
        ratio("  the same, by Python's socket and mmap modules", lambda: floor.bare_hand_over(MIB), scm(MIB, "same"), None, "the same in C")
    )
    found.append(ratio("hand-over of 1 MiB, two CPUs", lambda: measures.hand_over(MIB, True), scm(MIB, "split"), 2.0, "the same in C"))
    if not quick:
        for count in (50_000,):
            with measures.many_buffers(count):
                found += _in(f"{count:,} buffers in 4 processes", futex, scm(MIB, "same"), ping)
        for count in (100_000,):
            with measures.many_fences(count):
                found += _in(f"{count:,} pending fences", futex, scm(MIB, "same"), ping)
    return found


def calls() -> list[Row]:
    """The row of calls that are carried to an exporter in another process."""

    def limit() -> float:
        return floor.run("seqpacket", "--pin", "same")

    return [ratio("begin + end of another process's exporter, one CPU", measures.carried_access, limit, None, "a socket round trip in C")]


def _in(where: str, futex: Callable[[], float], scm: Callable[[], float], ping: str) -> list[Row]:
    return [
        ratio(f"fence round trip, one CPU, among {where}", lambda: measures.fence_round_trip(False), futex, 1.5, ping),
        ratio(f"write() enter + exit, among {where}", measures.write_uncontended, futex, 4.0, ping),
        ratio(f"hand-over of 1 MiB, one CPU, among {where}", lambda: measures.hand_over(MIB, False), scm, 2.0, "the same in C"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench")
    parser.add_argument("--quick", action="store_true", help="leave the domains with many buffers and fences out")
    parser.add_argument("--fences", action="store_true", help="only the rows of fences in event loops, merged and in chains")
    parser.add_argument("--calls", action="store_true", help="only the row of calls to an exporter in another process")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    try:
        if given.calls:
            table = calls()
        else:
            table = awaits.rows(ratio) if given.fences else rows(given.quick) + awaits.rows(ratio)
        killed = measures.wake_after_kill()
    finally:
        floor.clean()
    machine = {"cpus": os.cpu_count(), "machine": platform.machine(), "kernel": platform.release(), "python": platform.python_version()}
    kill = {"p50_ms": round(killed[len(killed) // 2], 1), "p99_ms": round(killed[int(len(killed) * 0.99)], 1)}
    if given.json:
        print(json.dumps({"machine": machine, "rows": table, "wake_after_kill": kill}, indent=1))
        return
    where = f"{machine['cpus']} CPUs {machine['machine']}, Linux {machine['kernel']}, Python {machine['python']}"
    print(f"{where}; medians of {REPEATS} runs, µs\n")
    print(f"| {'what':<75} | {'ours':>8} | {'limit':>8} | ratio | bound |\n| --- | ---: | ---: | ---: | ---: |")
    for row in table:
        bound = "" if row["bound"] is None else f"≤ {row['bound']}"
        print(f"| {row['what']:<75} | {row['us']:>8} | {row['limit_us']:>8} | {row['ratio']:>5} | {bound:>5} |")
    print(f"\nSIGKILL of a fence's owner → its waiter is awake: median {kill['p50_ms']} ms, p99 {kill['p99_ms']} ms (promise: 100 ms)")


if __name__ == "__main__":
    main()
