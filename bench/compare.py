"""``python -m bench.compare BUILD_A BUILD_B``: is the second build slower than the first?

A build is a checkout whose extension is built in place (``python setup.py build_ext --inplace``). Each row is measured in turn, A and then
B, or B and then A, each time in a fresh process that runs that checkout's own ``bench`` and ``src``. Of each row the table shows the median
of the pairs' ratios, B to A: above 1, B is slower. Rows above the bound are measured again; a row that is above it twice is a regression.

``--rows`` chooses rows by a regular expression. The rounds go through all rows, so that with ``--minutes``
each row has as many pairs as the others when the time is over. Exit status: 1 with a regression, 2 when a measurement failed.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
BOUND = 1.05
PAIRS = 15
TRIES = 3


@dataclass(frozen=True)
class Subject:
    """A row: an expression for µs in terms of a build's own bench modules, and what surrounds it. Both builds must know all of it."""

    what: str
    call: str
    around: str = "nullcontext()"


SUBJECTS = [
    Subject("fence signal → wake round trip, one CPU", "measures.fence_round_trip(False)"),
    Subject("fence signal → wake round trip, two CPUs", "measures.fence_round_trip(True)"),
    Subject("write() enter + exit, uncontended", "measures.write_uncontended()"),
    Subject("read() enter + exit, uncontended", "measures.read_uncontended()"),
    Subject("write() of a 1 GiB buffer", f"measures.write_uncontended({GIB})"),
    Subject("attach + map + unmap + detach, static", "measures.attach_cycle()"),
    Subject("map + unmap of 1 GiB", f"measures.map_cycle({GIB})"),
    Subject("begin + end of another process's exporter, one CPU", "measures.carried_access()"),
    Subject("hand-over of 4 KiB, one CPU", f"measures.hand_over({4 * KIB}, False)"),
    Subject("hand-over of 1 MiB, one CPU", f"measures.hand_over({MIB}, False)"),
    Subject("hand-over of 256 MiB, one CPU", f"measures.hand_over({256 * MIB}, False)"),
    Subject("hand-over of 1 MiB, two CPUs", f"measures.hand_over({MIB}, True)"),
    Subject("fence round trip, among 10,000 buffers", "measures.fence_round_trip(False)", "measures.many_buffers(10_000)"),
    Subject("write() enter + exit, among 10,000 buffers", "measures.write_uncontended()", "measures.many_buffers(10_000)"),
    Subject("hand-over of 1 MiB, among 10,000 buffers", f"measures.hand_over({MIB}, False)", "measures.many_buffers(10_000)"),
    Subject("write() enter + exit, among 20,000 pending fences", "measures.write_uncontended()", "measures.many_fences(20_000)"),
    Subject("signal → await resumed → answer, 1 pending", "awaits.across(1)"),
    Subject("signal → await resumed → answer, 10,000 pending", "awaits.across(10_000)"),
    Subject("await round trip in one loop, 1 pending", "awaits.in_one_loop(1)"),
    Subject("await round trip in one loop, 10,000 pending", "awaits.in_one_loop(10_000)"),
    Subject("10,000 awaits of another process, in a burst, each", "awaits.burst()"),
    Subject("merge of 1,000 fences, to its end", "awaits.merge()"),
    Subject("chain of 100,000 points: build, a point", "awaits.chain('build')"),
    Subject("chain of 100,000 points: end, a point", "awaits.chain('end')"),
    Subject("chain of 100,000 points: drop, a point", "awaits.chain('drop')"),
    Subject("import dmabuf; dmabuf.allocate, CPU", "cpu_us('import dmabuf; dmabuf.allocate')"),
]

# Run in a checkout, with the row's text on the command line; it prints the µs.
DRIVER = """
import gc, os, sys
from contextlib import nullcontext

def cpu_us(code):
    for _ in range(2):  # the first writes the bytecode
        pid = os.posix_spawn(sys.executable, [sys.executable, "-c", code], os.environ)
        _, status, usage = os.wait4(pid, 0)
        if status:
            raise RuntimeError(f"it ended with {status}")
    return (usage.ru_utime + usage.ru_stime) * 1e6

from bench import awaits, floor, measures
if not measures.dmabuf.__file__.startswith(os.getcwd()):
    raise RuntimeError(f"measures {measures.dmabuf.__file__}")
gc.collect()  # else what the imports left decides in which part of the row the next collection falls
try:
    with eval(sys.argv[2]):
        took = eval(sys.argv[1])
finally:
    floor.clean()
print("us", took)
"""


class Failed(RuntimeError):
    """A build could not measure a row."""


def measured(build: Path, subject: Subject) -> float:
    """The µs of one row in one build. A measurement that fails is repeated: an old build may have a rare fault of its own."""
    for _ in range(TRIES - 1):
        try:
            return once(build, subject)
        except Failed as e:
            print(f"{e}again", file=sys.stderr)
    return once(build, subject)


def once(build: Path, subject: Subject) -> float:
    """The µs of one row in one build, in a fresh process with a domain of its own."""
    with tempfile.TemporaryDirectory(prefix="dmabuf-bench-", dir="/dev/shm") as directory:
        done = subprocess.run(
            [sys.executable, "-c", DRIVER, subject.call, subject.around],
            cwd=build,
            env={**os.environ, "PYTHONPATH": f"{build / 'src'}:{build}", "DMABUF_DOMAIN": directory + "/domain"},
            capture_output=True,
            text=True,
            check=False,
        )
    found = re.search(r"^us (\S+)$", done.stdout, re.MULTILINE)
    if done.returncode or found is None:
        raise Failed(f"{build}: {subject.what}: exit status {done.returncode}\n{done.stderr}")
    return float(found[1])


@dataclass
class Pairs:
    """What was measured of one row."""

    subject: Subject
    pairs: list[tuple[float, float]] = field(default_factory=list)

    def measure(self, a: Path, b: Path) -> None:
        """One more pair; which of the two comes first takes turns."""
        if len(self.pairs) % 2:
            second = measured(b, self.subject)
            self.pairs.append((measured(a, self.subject), second))
        else:
            first = measured(a, self.subject)
            self.pairs.append((first, measured(b, self.subject)))

    @property
    def ratio(self) -> float:
        return statistics.median(b / a for a, b in self.pairs)

    def line(self, mark: str) -> str:
        first, second = (statistics.median(pair[i] for pair in self.pairs) for i in (0, 1))
        return f"| {self.subject.what:<52} | {first:>10.2f} | {second:>10.2f} | {self.ratio:>5.3f} | {len(self.pairs):>5} | {mark} |"


HEAD = f"| {'what':<52} | {'A, µs':>10} | {'B, µs':>10} | ratio | pairs | |\n| --- | ---: | ---: | ---: | ---: | --- |"


def rounds(a: Path, b: Path, subjects: list[Subject], pairs: int, until: float) -> list[Pairs]:
    """So many pairs of each row, or as many as there is time for, but one at least."""
    found = [Pairs(subject) for subject in subjects]
    for number in range(pairs):
        for row in found:
            if number and time.monotonic() > until:
                return found
            row.measure(a, b)
        print(f"\rround {number + 1} of {pairs}", end="", file=sys.stderr, flush=True)
    return found


def build(path: str) -> Path:
    """A directory with a checkout whose extension is built."""
    where = Path(path).resolve()
    if not list(where.glob("src/dmabuf/_native*.so")):
        raise argparse.ArgumentTypeError(f"{where}: no src/dmabuf/_native*.so; run `python setup.py build_ext --inplace` there")
    if not (where / "bench/measures.py").exists():
        raise argparse.ArgumentTypeError(f"{where}: no bench/measures.py; give the root of a checkout")
    return where


def compare(a: Path, b: Path, subjects: list[Subject], pairs: int, minutes: float) -> int:
    """Print the table; the exit status."""
    print(f"A: {a}\nB: {b}\n\n{HEAD}", flush=True)
    until = time.monotonic() + minutes * 60
    slower = []
    for row in rounds(a, b, subjects, pairs, until):
        above = row.ratio > BOUND
        slower += [row.subject] if above else []
        print(row.line(f"> {BOUND}" if above else ""))
    if not slower:
        return 0
    print(f"\nthe rows above {BOUND} again:\n\n{HEAD}", flush=True)
    again = rounds(a, b, slower, pairs, time.monotonic() + minutes * 60)
    for row in again:
        print(row.line("REGRESSION" if row.ratio > BOUND else ""))
    return int(any(row.ratio > BOUND for row in again))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compare")
    parser.add_argument("a", type=build, help="the checkout before")
    parser.add_argument("b", type=build, help="the checkout after")
    parser.add_argument("--pairs", type=int, default=PAIRS, help=f"measurements of each row in each build ({PAIRS})")
    parser.add_argument("--rows", default="", metavar="REGEX", help="only the rows whose name matches")
    parser.add_argument("--minutes", type=float, default=60, help="begin no pair after this time; again for the rows above")
    given = parser.parse_args()
    wanted = re.compile(given.rows, re.IGNORECASE)
    subjects = [subject for subject in SUBJECTS if wanted.search(subject.what)]
    if not subjects:
        parser.error(f"no row matches {given.rows!r}; the rows are:\n" + "\n".join(subject.what for subject in SUBJECTS))
    try:
        return compare(given.a, given.b, subjects, given.pairs, given.minutes)
    except Failed as e:
        print(e, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
