"""DMA_BUF_SET_NAME (semantics 5.4): `buf.name`, and where it shows."""

import os
from typing import Any

import dmabuf
from dmabuf import Device
from tests.conformance.cases.bench import Bench, add, case

# In the order in which they were given to one buffer.
NAMES = {
    "short": b"abc",
    "31": b"x" * 31,
    "32": b"y" * 32,
    "33": b"z" * 33,
    "4096": b"q" * 4096,
    "empty": b"",
    "newline": b"a\nb",
    "utf8": "é".encode(),
    "bytes": b"\xff\xfe",
    "slash": b"a/b",
    "space": b"a b",
}


def link(buf: dmabuf.DmaBuf) -> str:
    """The name as the kernel's link in /proc shows it."""
    return "/dmabuf:" + os.fsencode(buf.name or "").decode("utf-8", "backslashreplace")


def _named(bench: Bench, last: str, what: str) -> Any:
    buf = bench.buffer()
    for slug, name in NAMES.items():
        try:
            buf.name = name
        except OSError:
            if slug == last and what == "set":
                raise
        if slug == last:
            break
    if what == "set":
        return 0
    if what == "link":
        return link(buf)
    return os.fsencode(buf.fdinfo()).decode("latin1").split("\n")[7:]


for _slug in NAMES:
    for _what in ("set", "link", "fdinfo"):
        add(f"name/{_what}-{_slug}", lambda bench, slug=_slug, what=_what: _named(bench, slug, what))


@case("name/link-unnamed")
def _(bench: Bench) -> Any:
    return link(bench.buffer())


@case("name/fdinfo-unnamed")
def _(bench: Bench) -> Any:
    return bench.buffer().fdinfo()


@case("name/dup-shares")
def _(bench: Bench) -> Any:
    buf = bench.buffer()
    with dmabuf.get(buf.fileno()) as again:
        again.name = b"dupname"
    return link(buf)


def _attached(bench: Bench, what: str) -> Any:
    buf = bench.buffer()
    attachment = buf.attach(Device("gpu"))
    bench.keep(attachment.detach)
    if what == "import":
        return True
    buf.name = "late"
    return 0 if what == "set" else link(buf)


@case("name/import-vgem")
def _(bench: Bench) -> Any:
    return _attached(bench, "import")


@case("name/set-attached")
def _(bench: Bench) -> Any:
    return _attached(bench, "set")


@case("name/link-attached")
def _(bench: Bench) -> Any:
    return _attached(bench, "link")
