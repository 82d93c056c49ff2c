"""Texts of debugfs and sysfs."""

import errno
import os

from tests.kernel.questions.asking import Bufs, Fences, fact, fdinfo, new_buf, record
from tests.kernel.questions.raw import import_sync_file, prime_import, set_name


def ask():
    bs = Bufs(2)
    fs = Fences()
    _n, fd = bs.any()
    set_name(fd, b"named-buf")
    b = new_buf(3)
    if fs.kind:
        s, _g = fs.new()
        s2, _g2 = fs.new()
        import_sync_file(b, 2, s)
        import_sync_file(b, 1, s2)
    if hasattr(bs, "vgem") and "udmabuf" in bs.fds:
        try:
            prime_import(bs.vgem[0], bs.fds["udmabuf"])
        except OSError:
            pass
    raw = open("/sys/kernel/debug/dma_buf/bufinfo").read()
    record("bufinfo", "cat /sys/kernel/debug/dma_buf/bufinfo (verbatim)", ret=raw)
    try:
        out = {}
        for i in sorted(os.listdir("/sys/kernel/dmabuf/buffers"), key=int):
            p = f"/sys/kernel/dmabuf/buffers/{i}"
            out[i] = {f: open(f"{p}/{f}").read() for f in sorted(os.listdir(p))}
        record("sysfs-stats", "/sys/kernel/dmabuf/buffers/*", ret=out)
        inos = sorted(os.fstat(f).st_ino for f in [*list(bs.fds.values()), b])
        record("sysfs-inos", "st_ino of the same buffers (directory names)", ret=inos)
        record("sysfs-modes", "modes of the files", ret={f: oct(os.stat(f"{p}/{f}").st_mode) for f in sorted(os.listdir(p))})
    except OSError as e:
        record("sysfs-stats", "/sys/kernel/dmabuf/buffers", errno=errno.errorcode[e.errno])
    fact("sync-info", "cat /sys/kernel/debug/sync/info (pointers masked)", lambda: open("/sys/kernel/debug/sync/info").read()[:4000])
    if "udmabuf" in bs.fds:
        fact("fdinfo-attached", "fdinfo of an attached, named udmabuf", lambda: fdinfo(bs.fds["udmabuf"]))
