"""poll (semantics 5.6): `buf.poll(events)`, `buf.poll_fd(events)`, and the descriptor of a sync file."""

import os
import select
from collections.abc import Callable
from typing import Any

import dmabuf
from dmabuf import Usage
from tests.conformance.cases.bench import PAGE, Bench, add, case
from tests.conformance.cases.file import count
from tests.support.waiting import Background

IN, OUT = select.POLLIN, select.POLLOUT
BITS = {"rw": IN | OUT, "in": IN, "out": OUT, "0": 0, "pri": select.POLLPRI, "rdnorm": 0x40, "wrnorm": 0x100, "all": 0x3FF}
# What IMPORT_SYNC_FILE adds for its flags (semantics 5.5).
USAGES = {"write": Usage.WRITE, "read": Usage.READ, "rw": Usage.WRITE}


def text(events: int) -> str:
    """As the questions show it."""
    return "|".join(name for name in ("POLLIN", "POLLPRI", "POLLOUT", "POLLERR", "POLLHUP") if events & getattr(select, name)) or "0"


def _busy(bench: Bench, kind: str, events: int, timeout: float = 0) -> Any:
    buf = bench.buffer()
    bench.busy(buf, USAGES[kind])
    return text(buf.poll(events, timeout))


def _woken(bench: Bench, kind: str) -> Any:
    buf = bench.buffer()
    end = bench.busy(buf, USAGES[kind])
    with Background(lambda: buf.poll(OUT, None)) as job:
        job.until_blocked()
        assert not job.done
        end()
        return text(job.result())


def _after(bench: Bench, kind: str) -> Any:
    buf = bench.buffer()
    bench.busy(buf, USAGES[kind])()
    return text(buf.poll(IN | OUT))


for _name, _bits in BITS.items():
    add(f"poll/none-{_name}", lambda bench, bits=_bits: text(bench.buffer().poll(bits)))
for _kind in USAGES:
    for _name in ("rw", "in", "out", "0"):
        add(f"poll/{_kind}-{_name}", lambda bench, kind=_kind, bits=BITS[_name]: _busy(bench, kind, bits))
    add(f"poll/{_kind}-timeout", lambda bench, kind=_kind: _busy(bench, kind, OUT, 0.002))
    add(f"poll/{_kind}-wake", lambda bench, kind=_kind: _woken(bench, kind))
    add(f"poll/{_kind}-after", lambda bench, kind=_kind: _after(bench, kind))


@case("poll/select")
def _(bench: Bench) -> Any:
    buf = bench.buffer()
    return [bool(buf.poll(bits)) for bits in (IN, OUT, select.POLLPRI)]


@case("poll/closed")
def _(bench: Bench) -> Any:
    buf = dmabuf.allocate(PAGE, heap=bench.heap)
    buf.close()
    return text(buf.poll(IN))


@case("poll/poll-neg-timeout", "poll/ppoll-neg")
def _(bench: Bench) -> Any:
    return text(bench.buffer().poll(IN, -1))


def _two(bench: Bench, *signalled: str) -> Any:
    buf = bench.buffer()
    ends: dict[str, Callable[[], object]] = {"read": bench.busy(buf, Usage.READ), "write": bench.busy(buf, Usage.WRITE)}
    for kind in signalled:
        ends[kind]()
    return text(buf.poll(IN | OUT))


add("poll/two-0", lambda bench: _two(bench))
add("poll/two-1", lambda bench: _two(bench, "read"))
add("poll/two-2", lambda bench: _two(bench, "read", "write"))
add("poll/two-3", lambda bench: _two(bench, "write"))


@case("poll/import-signalled")
def _(bench: Bench) -> Any:
    buf, pending = bench.buffer(), bench.pending()
    pending.signal()
    bench.add(buf, pending, Usage.WRITE)
    return text(buf.poll(IN | OUT))


@case("poll/epoll-add")
def _(bench: Bench) -> Any:
    fd = bench.buffer().poll_fd(IN | OUT)
    bench.keep(lambda: os.close(fd))
    with select.epoll() as epoll:
        return epoll.register(fd, select.EPOLLIN)


@case("poll/epolloneshot")
def _(bench: Bench) -> Any:
    buf = bench.buffer()
    end = bench.busy(buf, Usage.WRITE)
    fd = buf.poll_fd(IN)
    bench.keep(lambda: os.close(fd))
    with select.epoll() as epoll:
        epoll.register(fd, select.EPOLLIN | select.EPOLLONESHOT)
        before = [event for _, event in epoll.poll(0)]
        end()
        return [before, 0, [event for _, event in epoll.poll(None)], [event for _, event in epoll.poll(0)]]


@case("poll/count-polled")
def _(bench: Bench) -> Any:
    buf = bench.buffer()
    bench.busy(buf, Usage.WRITE)
    buf.poll(IN | OUT)
    return count(buf)


def _alive(bench: Bench, after: bool) -> Any:
    buf = dmabuf.allocate(PAGE, heap=bench.heap)
    ino = buf.ino
    end = bench.busy(buf, Usage.WRITE)
    buf.poll(IN | OUT)
    buf.close()
    if after:
        end()
    return any(record.ino == ino for record in dmabuf.buffers())


add("poll/alive-polled", lambda bench: _alive(bench, False))
add("poll/alive-after", lambda bench: _alive(bench, True))
