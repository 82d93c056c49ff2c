"""mmap (semantics 2.17, 5.2): `buf.mmap(offset, length)`, always shared."""

import os
import tempfile
from typing import Any

import dmabuf
from tests.conformance.cases.bench import PAGE, SIZE, Bench, add, case, pipe

RANGES = {
    "full": (0, SIZE),
    "len+1": (0, SIZE + 1),
    "len+page": (0, SIZE + PAGE),
    "len-100": (0, 100),
    "len-0": (0, 0),
    "off-page": (PAGE, SIZE - PAGE),
    "off-over": (PAGE, SIZE),
    "off-end": (SIZE, PAGE),
    "off-past": (SIZE + PAGE, PAGE),
    "off-unaligned": (1, PAGE),
    "off-huge": (1 << 62, PAGE),
    "off-neg": (-PAGE, PAGE),
}


def _mapped(bench: Bench, offset: int, length: int) -> Any:
    bench.keep(bench.buffer().mmap(offset, length).close)
    return "ok"


for _name, _range in RANGES.items():
    add(f"mmap/*-{_name}", lambda bench, given=_range: _mapped(bench, *given))


@case("mmap/*-rw")
def _(bench: Bench) -> Any:
    buf = bench.buffer()
    one, two = buf.mmap(), buf.mmap()
    bench.keep(one.close)
    bench.keep(two.close)
    with memoryview(one) as written, memoryview(two) as read:
        written[-4:] = b"tail"
        return bytes(read[-4:]).decode()


@case("mmap/*-write-from")
def _(bench: Bench) -> Any:
    mapping = bench.buffer().mmap()
    bench.keep(mapping.close)
    with pipe() as (_, into), memoryview(mapping) as view:
        return os.write(into, view[:4])


@case("mmap/*-pwrite-from")
def _(bench: Bench) -> Any:
    mapping = bench.buffer().mmap()
    bench.keep(mapping.close)
    with tempfile.TemporaryFile() as file, memoryview(mapping) as view:
        return os.pwrite(file.fileno(), view[:PAGE], 0)


@case("mmap/*-fork-inherit")
def _(bench: Bench) -> Any:
    return "ok" if bench.written_by_a_child(b"zz") == (0, b"zz") else "died"


@case("mmap/after-close")
def _(bench: Bench) -> Any:
    buf = dmabuf.allocate(SIZE, heap=bench.heap)
    mapping = buf.mmap()
    bench.keep(mapping.close)
    buf.close()
    with memoryview(mapping) as view:
        view[:5] = b"still"
        return bytes(view[:5]).decode()
