"""A dma-buf as a file (semantics 5.2, 5.7): lseek, fdinfo, references, identity."""

import os
import re
import socket
from typing import Any

import dmabuf
from tests.conformance.cases.bench import PAGE, Bench, add, case, flags_of, pipe

WHENCE = {"SET": os.SEEK_SET, "CUR": os.SEEK_CUR, "END": os.SEEK_END, "DATA": os.SEEK_DATA, "HOLE": os.SEEK_HOLE, "5": 5, "-1": -1}

for _name, _whence in WHENCE.items():
    for _offset in (0, 1, -1, PAGE, 1 << 40):
        add(f"file/lseek-{_name}-{_offset}", lambda bench, offset=_offset, whence=_whence: bench.buffer().lseek(offset, whence))


def count(buf: dmabuf.DmaBuf) -> int:
    """The references that fdinfo tells of."""
    found = re.search(r"count:\t(-?\d+)", buf.fdinfo())
    assert found
    return int(found[1])


@case("file/*-size")
def _(bench: Bench) -> Any:
    return bench.buffer().lseek(0, os.SEEK_END)


@case("file/*-fl")
def _(bench: Bench) -> Any:
    return flags_of(bench.buffer().fileno())


@case("file/*-fdinfo")
def _(bench: Bench) -> Any:
    return bench.buffer().fdinfo()


@case("file/pos")
def _(bench: Bench) -> Any:
    buf = bench.buffer()
    buf.lseek(0, os.SEEK_END)
    return [line for line in buf.fdinfo().split("\n") if line.startswith("pos")]


@case("file/ino-unique")
def _(bench: Bench) -> Any:
    one, two = bench.buffer(), bench.buffer()
    return [one.ino != two.ino, os.fstat(one.fileno()).st_dev == os.fstat(two.fileno()).st_dev]


@case("file/count-1")
def _(bench: Bench) -> Any:
    return count(bench.buffer())


@case("file/count-dup")
def _(bench: Bench) -> Any:
    buf = bench.buffer()
    fd = buf.dup()
    bench.keep(lambda: os.close(fd))
    return count(buf)


@case("file/count-mmap")
def _(bench: Bench) -> Any:
    buf = bench.buffer()
    fd = buf.dup()
    bench.keep(lambda: os.close(fd))
    bench.keep(buf.mmap(0, PAGE).close)
    return count(buf)


@case("file/count-fork")
def _(bench: Bench) -> Any:
    buf = bench.buffer()
    with pipe() as (wait, let):
        pid = os.fork()
        if pid == 0:
            os.close(let)
            os.read(wait, 1)
            os._exit(0)
        try:
            return count(buf)
        finally:
            os.write(let, b"x")
            os.waitpid(pid, 0)


def _sent(bench: Bench, what: str) -> Any:
    buf = bench.buffer()
    one, two = socket.socketpair()
    with one, two:
        dmabuf.send(one, buf)
        if what == "count":
            return count(buf)
        (got,) = dmabuf.recv(two)
        with got:
            return got.ino == buf.ino if what == "ino" else flags_of(got.fileno()).split("|")[0]


@case("file/count-inflight")
def _(bench: Bench) -> Any:
    return _sent(bench, "count")


@case("file/scm-ino")
def _(bench: Bench) -> Any:
    return _sent(bench, "ino")


@case("file/scm-fl")
def _(bench: Bench) -> Any:
    return _sent(bench, "flags")


@case("file/execve-inherit")
def _(bench: Bench) -> Any:
    return bench.written_by_a_child(b"child")[1].decode()
