"""sw_sync (semantics 5.11): `SwSync`."""

import re
import select
from typing import Any

from dmabuf import SyncFile, Usage, sync_info
from tests.conformance.cases.bench import PAGE, Bench, NotHere, add, case
from tests.conformance.cases.poll import text
from tests.conformance.cases.syncfile import export, info, merged, polled

INT_MAX, U32 = 0x7FFFFFFF, 0xFFFFFFFF
IN, OUT = select.POLLIN, select.POLLOUT


def _status(*files: SyncFile) -> list[int]:
    return [file.status for file in files]


def _at(bench: Bench, value: int) -> Any:
    return _status(bench.fence(bench.timeline(), value))


add("swsync/open", lambda bench: bench.timeline() and "fd")
add("swsync/fence-0", lambda bench: _at(bench, 0)[0])
add("swsync/fence-1", lambda bench: info(bench.fence(bench.timeline(), 1)))
add("swsync/wrap-far", lambda bench: _at(bench, INT_MAX))
add("swsync/wrap-far+1", lambda bench: _at(bench, 0x80000000))
add("swsync/wrap-ffff", lambda bench: _at(bench, U32))
add("swsync/inc-0", lambda bench: bench.timeline().inc(0) or 0)
add("swsync/inc-over", lambda bench: bench.timeline().inc(0x80000000) or 0)
add("swsync/inc-max", lambda bench: bench.timeline().inc(U32) or 0)


@case("swsync/fence-noname")
def _(bench: Bench) -> Any:
    return bench.fence(bench.timeline(), 1).name


def _three(bench: Bench, *steps: int) -> Any:
    timeline = bench.timeline()
    files = [bench.fence(timeline, value) for value in (1, 2, 5)]
    for step in steps:
        timeline.inc(step)
    return _status(*files)


add("swsync/st-0", lambda bench: _three(bench))
add("swsync/st-1", lambda bench: _three(bench, 1))
add("swsync/st-5", lambda bench: _three(bench, 1, 4))


@case("swsync/late")
def _(bench: Bench) -> Any:
    timeline = bench.timeline()
    timeline.inc(5)
    return _status(bench.fence(timeline, 3))


@case("swsync/merge-same-tl")
def _(bench: Bench) -> Any:
    timeline = bench.timeline()
    return info(merged(bench, bench.fence(timeline, 6), bench.fence(timeline, 9), "st"))


@case("swsync/same-value")
def _(bench: Bench) -> Any:
    timeline = bench.timeline()
    return merged(bench, bench.fence(timeline, 7), bench.fence(timeline, 7)).info().num_fences


@case("swsync/unordered")
def _(bench: Bench) -> Any:
    timeline = bench.timeline()
    one, three = bench.fence(timeline, 1), bench.fence(timeline, 3)
    timeline.inc(2)
    return _status(one, three)


def _closed(bench: Bench) -> SyncFile:
    timeline = bench.timeline()
    file = bench.fence(timeline, 3)
    timeline.inc(2)
    timeline.close()
    return file


add("swsync/close-tl", lambda bench: info(_closed(bench)))
add("swsync/close-poll", lambda bench: polled(_closed(bench), IN | OUT))


def _failed(bench: Bench, what: str) -> Any:
    buf, timeline = bench.buffer(PAGE), bench.timeline()
    buf.import_sync_file(bench.fence(timeline, 1), write=True)
    timeline.close()
    if what == "poll":
        return text(buf.poll(IN | OUT))
    return buf.sync(3) or 0 if what == "sync" else info(export(bench, buf, 3))


add("swsync/err-dmabuf-poll", lambda bench: _failed(bench, "poll"))
add("swsync/err-sync", lambda bench: _failed(bench, "sync"))
add("swsync/err-export", lambda bench: _failed(bench, "export"))


def _half_failed(bench: Bench, what: str) -> Any:
    fails, goes = bench.timeline(), bench.timeline()
    one, two = bench.fence(fails, 1), bench.fence(goes, 1)
    both = merged(bench, one, two, "err")
    fails.close()
    if what == "half":
        return info(both)
    goes.inc(1)
    if what == "remerge":
        return info(merged(bench, one, bench.fence(goes, 5), "rm"))
    return polled(both, IN | OUT) if what == "poll" else info(both)


add("swsync/err-merge-half", lambda bench: _half_failed(bench, "half"))
add("swsync/err-merge-done", lambda bench: _half_failed(bench, "done"))
add("swsync/err-merge-poll", lambda bench: _half_failed(bench, "poll"))
add("swsync/err-remerge", lambda bench: _half_failed(bench, "remerge"))


def _far(bench: Bench) -> tuple[Any, list[int]]:
    timeline = bench.timeline()
    files = bench.fence(timeline, 10), bench.fence(timeline, 0x7FFFFFF0)
    timeline.inc(INT_MAX)
    return timeline, _status(*files)


add("swsync/inc-big", lambda bench: _far(bench)[1])


@case("swsync/wrap-next")
def _(bench: Bench) -> Any:
    timeline, _ = _far(bench)
    file = bench.fence(timeline, 0x80000005)
    return [_status(file), timeline.inc(6) or 0, _status(file)]


add("swsync/deadline-none", lambda bench: (lambda timeline: timeline.get_deadline(bench.fence(timeline, 1)))(bench.timeline()))
add("swsync/deadline-fd", lambda bench: bench.timeline().get_deadline(-1))


@case("swsync/deadline-min")
def _(bench: Bench) -> Any:
    timeline = bench.timeline()
    file = bench.fence(timeline, 1)
    file.set_deadline(5000)
    file.set_deadline(9000)
    first = timeline.get_deadline(file)
    file.set_deadline(3000)
    return [first, timeline.get_deadline(file)]


@case("swsync/deadline-deep")
def _(bench: Bench) -> Any:
    timeline = bench.timeline()
    file = bench.fence(timeline, 1)
    merged(bench, file, bench.fence(bench.timeline(), 1)).set_deadline(7777)
    return timeline.get_deadline(file)


@case("swsync/fence-outlives")
def _(bench: Bench) -> Any:
    timeline = bench.timeline()
    file = bench.fence(timeline, 1)
    timeline.inc(1)
    timeline.close()
    return _status(file)


@case("swsync/import-survives")
def _(bench: Bench) -> Any:
    buf, timeline = bench.buffer(PAGE), bench.timeline()
    file = bench.fence(timeline, 1)
    buf.import_sync_file(file, write=True)
    file.close()
    return [text(buf.poll(IN | OUT)), timeline.inc(1) or 0, text(buf.poll(IN | OUT))]


@case("debugfs/sync-info")
def _(bench: Bench) -> Any:
    if bench.heap != "memfd":
        raise NotHere
    bench.timeline()
    for _ in range(2):
        bench.busy(bench.buffer(PAGE), Usage.WRITE)
    return re.sub(r"@\d+\.\d{9}", "@T", sync_info())
