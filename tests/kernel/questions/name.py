"""DMA_BUF_SET_NAME, and where the name shows."""

import mmap as pymmap
import os
import re

from tests.kernel.questions.asking import BAD, PR, SH, Bufs, fact, fdinfo, link, mmap_try, poke
from tests.kernel.questions.raw import (
    DMA_BUF_SET_NAME_A,
    DMA_BUF_SET_NAME_B,
    PAGE,
    ioctl_raw,
    libc,
    memfd,
    mmap,
    prime_import,
    set_name,
    udmabuf,
)


def smaps_flags(addr):
    cur = None
    for line in open("/proc/self/smaps"):
        m = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if m:
            cur = int(m[1], 16) <= addr < int(m[2], 16)
        elif cur and line.startswith("VmFlags"):
            return line.split(":")[1].strip()


def ask():
    bs = Bufs()
    _n, fd = bs.any()
    fact("link-unnamed", "readlink /proc/self/fd/N, no name", lambda: link(fd))
    fact("fdinfo-unnamed", "fdinfo, no name", lambda: fdinfo(fd))
    for nm, b in (
        ("short", b"abc"),
        ("31", b"x" * 31),
        ("32", b"y" * 32),
        ("33", b"z" * 33),
        ("4096", b"q" * 4096),
        ("empty", b""),
        ("newline", b"a\nb"),
        ("utf8", "é".encode()),
        ("bytes", b"\xff\xfe"),
        ("slash", b"a/b"),
        ("space", b"a b"),
    ):
        fact("set-" + nm, f"SET_NAME_B {b[:34]!r}{'...' if len(b) > 34 else ''} ({len(b)} bytes + NUL)", lambda: set_name(fd, b))
        fact("link-" + nm, "  then readlink /proc/self/fd/N", lambda: os.fsencode(link(fd)).decode("utf-8", "backslashreplace"))
        fact(
            "fdinfo-" + nm,
            "  then fdinfo name line",
            lambda: list(open(f"/proc/self/fdinfo/{fd}", "rb").read().decode("latin1").split("\n")[7:]),
        )
    fact("set-A", "SET_NAME_A (_IOW('b',1,u32))", lambda: set_name(fd, b"viaA", DMA_BUF_SET_NAME_A))
    fact("link-A", "  then readlink", lambda: link(fd))
    fact("set-null", "SET_NAME_B NULL", lambda: ioctl_raw(fd, DMA_BUF_SET_NAME_B, None))
    fact("set-bad", "SET_NAME_B bad pointer", lambda: ioctl_raw(fd, DMA_BUF_SET_NAME_B, BAD))
    fact("link-after-bad", "  name kept after a failed SET_NAME?", lambda: link(fd))
    pg = mmap(2 * PAGE, 3, PR | pymmap.MAP_ANONYMOUS, -1)
    libc.mprotect(pg + PAGE, PAGE, 0)
    poke(pg + PAGE - 4, b"abc\0")
    fact("set-page-end", "SET_NAME_B NUL as the last mapped byte", lambda: ioctl_raw(fd, DMA_BUF_SET_NAME_B, pg + PAGE - 4))
    poke(pg + PAGE - 4, b"abcd")
    fact("set-page-end-nonul", "SET_NAME_B runs off mapped memory", lambda: ioctl_raw(fd, DMA_BUF_SET_NAME_B, pg + PAGE - 4))
    fact("dup-shares", "name through a dup", lambda: (set_name(os.dup(fd), b"dupname"), link(fd))[1])
    a = mmap(PAGE, 1, SH, fd)
    fact(
        "maps",
        "/proc/self/maps line of a mapping",
        lambda: [re.sub(r"^\S+ (\S+) (\S+) \S+ \d+ +", r"\1 \2 ", line.strip()) for line in open("/proc/self/maps") if "/dmabuf:" in line],
    )
    fact("maps-vmflags", "smaps VmFlags of the mapping", lambda: smaps_flags(a))
    for n2, f2 in bs.fds.items():
        a2 = mmap_try(PAGE, 3, SH, f2)
        if a2:
            fact("vmflags-" + n2, f"smaps VmFlags of a {n2} mapping", lambda: smaps_flags(a2))
    if hasattr(bs, "vgem") and "udmabuf" in bs.fds:
        d, _h = bs.vgem
        b = memfd(PAGE)
        u = udmabuf(b)
        fact("import-vgem", "PRIME_FD_TO_HANDLE of a udmabuf into vgem", lambda: prime_import(d, u) > 0)
        fact("set-attached", "SET_NAME while attached to a device", lambda: set_name(u, b"late"))
        fact("link-attached", "  then readlink", lambda: link(u))
