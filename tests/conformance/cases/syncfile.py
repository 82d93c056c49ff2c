"""sync_file (semantics 5.5, 5.10): `SyncFile`, `buf.export_sync_file()`, `buf.import_sync_file()`."""

import os
import re
import select
import time
from typing import Any

from dmabuf import DmaBuf, SyncFile, Usage
from tests.conformance.cases.bench import PAGE, Bench, add, case, no_descriptor_left, pipe
from tests.conformance.cases.heap import through
from tests.conformance.cases.poll import text
from tests.support.waiting import Background

IN, OUT = select.POLLIN, select.POLLOUT
U32 = 0xFFFFFFFF
READ, WRITE, RW = 1, 2, 3


def info(file: SyncFile, num_fences: int | None = None) -> dict[str, Any]:
    """FILE_INFO as the questions show it: numbers in the name as N, times by their clock."""
    told = file.info(num_fences)

    def clock(ns: int) -> str:
        return "0" if ns == 0 else "monotonic" if abs(time.monotonic_ns() - ns) < 86_400e9 else "other"

    return {
        "ret": 0,
        "name": re.sub(r"\d+", "N", told.name),
        "status": told.status,
        "flags": told.flags,
        "num_fences": told.num_fences,
        "pad": 0,
        "fences": [
            {
                "obj_name": one.obj_name,
                "driver_name": one.driver_name,
                "status": one.status,
                "flags": one.flags,
                "timestamp_ns": clock(one.timestamp_ns),
            }
            for one in told.fences
        ],
    }


def export(bench: Bench, buf: DmaBuf, flags: int) -> SyncFile:
    """A sync file of the buffer, closed at the end."""
    made = buf.export_sync_file(flags=flags)
    bench.keep(made.close)
    return made


def merged(bench: Bench, one: SyncFile, other: SyncFile | int, name: str | bytes = "merged") -> SyncFile:
    """A merge, closed at the end."""
    made = one.merge(other, name)
    bench.keep(made.close)
    return made


def idle(bench: Bench) -> SyncFile:
    """The export of an idle buffer."""
    return export(bench, bench.buffer(PAGE), RW)


def polled(file: SyncFile, events: int, timeout: int | None = 0) -> str:
    """poll(2) on the descriptor."""
    waiting = select.poll()
    waiting.register(file, events)
    return text(next((found for _, found in waiting.poll(timeout)), 0))


# -- good and bad arguments

for _flags in (0, 1, 2, 3, 4, 5, 8, 0x80000000, U32):
    add(f"syncfile/export-{_flags:#x}", lambda bench, flags=_flags: export(bench, bench.buffer(PAGE), flags) and "fd")
for _flags in (0, 1, 2, 3, 4, 8, U32):
    add(f"syncfile/import-{_flags:#x}", lambda bench, flags=_flags: bench.buffer(PAGE).import_sync_file(idle(bench), flags=flags) or 0)


def _imported(bench: Bench, what: Any, flags: int = RW) -> Any:
    bench.buffer(PAGE).import_sync_file(what, flags=flags)
    return 0


add("syncfile/import-fd-1", lambda bench: _imported(bench, -1))
add("syncfile/import-closed", lambda bench: _imported(bench, 999))
add("syncfile/import-order", lambda bench: _imported(bench, -1, 0))
add("syncfile/import-dmabuf", lambda bench: _imported(bench, bench.buffer(PAGE).fileno()))
add("syncfile/merge-self", lambda bench: (lambda file: merged(bench, file, file) and "fd")(idle(bench)))
add("syncfile/merge-fd-1", lambda bench: merged(bench, idle(bench), -1) and "fd")
add("syncfile/merge-closed", lambda bench: merged(bench, idle(bench), 999) and "fd")
add("syncfile/merge-dmabuf", lambda bench: merged(bench, idle(bench), bench.buffer(PAGE).fileno()) and "fd")
add("syncfile/merge-name32", lambda bench: (lambda file: merged(bench, file, file, b"n" * 32).name)(idle(bench)))
add("syncfile/merge-name0", lambda bench: (lambda file: re.sub(r"\d+", "N", merged(bench, file, file, b"").name))(idle(bench)))
add("syncfile/empty-info", lambda bench: info(idle(bench)))
add("syncfile/empty-poll", lambda bench: polled(idle(bench), IN | OUT))
add("syncfile/info-n0", lambda bench: info(idle(bench), 0))
add("syncfile/info-n5", lambda bench: info(idle(bench), 5))
add("syncfile/deadline", lambda bench: idle(bench).set_deadline(time.monotonic_ns()) or 0)
add("syncfile/deadline-past", lambda bench: idle(bench).set_deadline(0) or 0)


@case("syncfile/import-memfd")
def _(bench: Bench) -> Any:
    fd = os.memfd_create("other")
    bench.keep(lambda: os.close(fd))
    return _imported(bench, fd)


@case("syncfile/import-pipe")
def _(bench: Bench) -> Any:
    with pipe() as (end, _):
        return _imported(bench, end)


for _mode, _flag in (("rdonly", os.O_RDONLY), ("wronly", os.O_WRONLY), ("rdwr", os.O_RDWR)):
    add(f"heap/export-{_mode}", lambda bench, mode=_flag: through(bench, mode, lambda buf: export(bench, buf, RW) and "fd"))


@case("limits/emfile-export")
def _(bench: Bench) -> Any:
    buf = bench.buffer(PAGE)
    with no_descriptor_left():
        return export(bench, buf, RW).fileno() and "fd"


@case("limits/emfile-merge")
def _(bench: Bench) -> Any:
    file = bench.pending().file
    file.fileno()
    with no_descriptor_left():
        return merged(bench, file, file).fileno() and "fd"


# -- fences


@case("syncfile/pending-info")
def _(bench: Bench) -> Any:
    return info(bench.pending().file)


@case("syncfile/n-too-small")
def _(bench: Bench) -> Any:
    return info(merged(bench, bench.pending().file, bench.pending().file), 1)


@case("syncfile/done-info")
def _(bench: Bench) -> Any:
    pending = bench.pending()
    pending.signal()
    return info(pending.file)


def _two(bench: Bench, signalled: int, *, poll: bool = False) -> Any:
    one, two = bench.pending(), bench.pending()
    both = merged(bench, one.file, two.file, "m12")
    for pending in (one, two)[:signalled]:
        pending.signal()
    return polled(both, IN | OUT) if poll else info(both)


add("syncfile/m-0", lambda bench: _two(bench, 0))
add("syncfile/m-1", lambda bench: _two(bench, 1, poll=True))
add("syncfile/m-1-info", lambda bench: _two(bench, 1))
add("syncfile/m-2", lambda bench: _two(bench, 2, poll=True))
add("syncfile/m-2-info", lambda bench: _two(bench, 2))


def _more(bench: Bench, what: str) -> Any:
    done, other, third = bench.pending(), bench.pending(), bench.pending()
    done.signal()
    if what == "sig":
        return info(merged(bench, done.file, done.file, "sig"))
    if what == "nest":
        inner = merged(bench, other.file, third.file)
        return merged(bench, inner, bench.pending().file, "nest").info().num_fences
    half = merged(bench, other.file, done.file, "half")
    return info(half if what == "half" else merged(bench, half, other.file, "dup"))


add("syncfile/m-sig-info", lambda bench: _more(bench, "sig"))
add("syncfile/m-half-info", lambda bench: _more(bench, "half"))
add("syncfile/m-dup-info", lambda bench: _more(bench, "dup"))
add("syncfile/m-nest", lambda bench: _more(bench, "nest"))


def _seen(bench: Bench, usage: Usage, flags: int) -> Any:
    buf = bench.buffer(PAGE)
    bench.busy(buf, usage)
    return "signalled" if export(bench, buf, flags).is_signaled() else "pending"


for _name, _usage in (("READ", Usage.READ), ("WRITE", Usage.WRITE)):
    for _flags in (READ, WRITE, RW):
        add(f"syncfile/imp-{_name}-exp-{_flags}", lambda bench, usage=_usage, flags=_flags: _seen(bench, usage, flags))


def _exports(bench: Bench, what: str) -> Any:
    buf = bench.buffer(PAGE)
    made = [bench.pending() for _ in range(3)]
    for pending, usage in zip(made, (Usage.READ, Usage.READ, Usage.WRITE), strict=True):
        bench.add(buf, pending, usage)
    if what == "counts":
        return [export(bench, buf, flags).info().num_fences for flags in (READ, WRITE, RW)]
    before = export(bench, buf, RW)
    if what == "rw-info":
        return info(before)
    late = bench.pending()
    bench.add(buf, late, Usage.WRITE)
    if what == "snapshot":
        return [before.info().num_fences, export(bench, buf, RW).info().num_fences]
    for pending in made:
        pending.signal()
    if what == "pruned":
        return export(bench, buf, RW).info().num_fences
    late.signal()
    return info(export(bench, buf, RW))


for _name in ("counts", "rw-info", "snapshot", "pruned", "all-done"):
    add(f"syncfile/exp-{_name}", lambda bench, what=_name: _exports(bench, what))


def _twice(bench: Bench, first: Usage, second: Usage, *, poll: bool) -> Any:
    buf, pending = bench.buffer(PAGE), bench.pending()
    bench.add(buf, pending, first)
    bench.add(buf, pending, second)
    if poll:
        return text(buf.poll(IN | OUT))
    return [export(bench, buf, flags).info().num_fences for flags in (READ, RW)]


add("syncfile/imp-same-twice", lambda bench: _twice(bench, Usage.READ, Usage.WRITE, poll=False))
add("syncfile/imp-same-poll", lambda bench: _twice(bench, Usage.READ, Usage.WRITE, poll=True))
add("syncfile/imp-same-twice-b", lambda bench: _twice(bench, Usage.WRITE, Usage.READ, poll=True))


@case("syncfile/imp-merged")
def _(bench: Bench) -> Any:
    buf = bench.buffer(PAGE)
    buf.import_sync_file(merged(bench, bench.pending().file, bench.pending().file), write=True)
    return export(bench, buf, RW).info().num_fences


@case("syncfile/imp-100")
def _(bench: Bench) -> Any:
    buf = bench.buffer(PAGE)
    for _ in range(100):
        bench.busy(buf, Usage.READ)
    return export(bench, buf, WRITE).info().num_fences


# -- poll on the descriptor

for _name, _events in (("rw", IN | OUT), ("out", OUT), ("0", 0), ("all", 0x3FF)):

    def _done(bench: Bench, events: int = _events) -> Any:
        pending = bench.pending()
        pending.signal()
        return polled(pending.file, events)

    add(f"poll/sf-done-{_name}", _done)
add("poll/sf-pending", lambda bench: polled(bench.pending().file, IN | OUT))
add("poll/sf-pending-all", lambda bench: polled(bench.pending().file, 0x3FF))
add("poll/sf-timeout", lambda bench: polled(bench.pending().file, IN, 2))


@case("poll/sf-wake")
def _(bench: Bench) -> Any:
    pending = bench.pending()
    pending.file.fileno()
    with Background(lambda: polled(pending.file, IN, None)) as job:
        job.until_blocked()
        pending.signal()
        return job.result()
