"""/dev/dma_heap/system."""

import ctypes
import mmap as pymmap
import os
import struct

from tests.kernel.questions.asking import BAD, PR, PROT_R, PROT_W, SH, U32, fact, fdinfo, getfl, oom_child, peek, poke, pollrw
from tests.kernel.questions.raw import (
    _IOC,
    DMA_HEAP_IOCTL_ALLOC,
    PAGE,
    ck,
    export_sync_file,
    heap_alloc,
    ioctl_raw,
    libc,
    mmap,
    set_name,
    sync,
)


def ask():
    if not os.path.exists("/dev/dma_heap/system"):
        return fact("open", "open(/dev/dma_heap/system)", lambda: os.open("/dev/dma_heap/system", os.O_RDONLY))
    d = os.open("/dev/dma_heap/system", os.O_RDONLY)
    al = lambda length=PAGE, **k: heap_alloc(length, dev=d, **k)
    fact("alloc", "ALLOC 4096, O_RDWR|O_CLOEXEC", lambda: al(), fd=True)
    fact("fl", "F_GETFL of it", lambda: getfl(al()))
    for nm, fl in (("0", 0), ("O_RDONLY|CLOEXEC", os.O_CLOEXEC), ("O_WRONLY", os.O_WRONLY), ("O_RDWR", os.O_RDWR), ("O_ACCMODE", 3)):
        fact("fdflags-" + nm, f"ALLOC fd_flags={nm}", lambda fl=fl: al(fd_flags=fl), fd=True)
        fact("getfl-" + nm, f"F_GETFL after fd_flags={nm}", lambda fl=fl: getfl(al(fd_flags=fl)))
    for nm, fl in (("O_NONBLOCK", os.O_NONBLOCK | 2), ("O_CREAT", os.O_CREAT | 2), ("1<<31", 1 << 31), ("O_SYNC", os.O_SYNC | 2)):
        fact("fdflags-" + nm, f"ALLOC fd_flags={nm}", lambda fl=fl: al(fd_flags=fl), fd=True)
    fact("heapflags-1", "ALLOC heap_flags=1", lambda: al(heap_flags=1), fd=True)
    fact("heapflags-high", "ALLOC heap_flags=1<<63", lambda: al(heap_flags=1 << 63), fd=True)
    fact("fd-nonzero", "ALLOC in.fd=3", lambda: al(fd=3), fd=True)
    fact("fd-minus1", "ALLOC in.fd=-1", lambda: al(fd=U32), fd=True)
    fact("len-0", "ALLOC len=0", lambda: al(0), fd=True)
    fact("len-1-size", "ALLOC len=1: lseek END", lambda: os.lseek(al(1), 0, 2))
    fact("len-4097-size", "ALLOC len=4097: lseek END", lambda: os.lseek(al(4097), 0, 2))
    fact("len-1M", "ALLOC 1 MiB", lambda: al(1 << 20), fd=True)
    fact("len-64G", "ALLOC 64 GiB (more than memory)" + " (in a child)", lambda: oom_child(lambda: al(64 << 30)))
    fact("len-2^63", "ALLOC len=2^63" + " (in a child)", lambda: oom_child(lambda: al(1 << 63)))
    fact("len-max", "ALLOC len=2^64-1" + " (in a child)", lambda: oom_child(lambda: al((1 << 64) - 1)))
    fact("len-max-page", "ALLOC len=2^64-4096" + " (in a child)", lambda: oom_child(lambda: al((1 << 64) - PAGE)))
    fact("order-heapflags-len0", "ALLOC bad flags and len 0", lambda: al(0, heap_flags=1), fd=True)
    fact("ptr-null", "ALLOC arg=NULL", lambda: ioctl_raw(d, DMA_HEAP_IOCTL_ALLOC, None))
    fact("ptr-bad", "ALLOC arg=bad pointer", lambda: ioctl_raw(d, DMA_HEAP_IOCTL_ALLOC, BAD))
    ro = mmap(PAGE, PROT_R | PROT_W, PR | pymmap.MAP_ANONYMOUS, -1)
    poke(ro, struct.pack("QIIQ", PAGE, 0, 2, 0))
    libc.mprotect(ro, PAGE, PROT_R)
    n0 = len(os.listdir("/proc/self/fd"))
    fact("ptr-readonly", "ALLOC arg in read-only memory", lambda: ioctl_raw(d, DMA_HEAP_IOCTL_ALLOC, ro))
    fact("ptr-readonly-leak", "fds leaked by that", lambda: len(os.listdir("/proc/self/fd")) - n0)

    def sized(size, dirn=3, fill=0, nr=0, t="H"):
        raw = struct.pack("QIIQ", PAGE, 0, 2, 0) + bytes([fill]) * max(0, size - 24)
        buf = ctypes.create_string_buffer(raw, max(len(raw), size))
        r = ioctl_raw(d, _IOC(dirn, t, nr, size), buf)
        return [r, "fd" if struct.unpack_from("I", buf.raw, 8)[0] > 2 else struct.unpack_from("I", buf.raw, 8)[0]]

    fact("ioctl-size-32", "ALLOC with size 32 in the number, zero tail", lambda: sized(32))
    fact("ioctl-size-32-dirty", "ALLOC with size 32, non-zero tail", lambda: sized(32, fill=1))
    fact("ioctl-size-16", "ALLOC with size 16", lambda: sized(16))
    fact("ioctl-size-0", "ALLOC with size 0", lambda: sized(0))
    fact("ioctl-size-128", "ALLOC with size 128", lambda: sized(128))
    fact("ioctl-size-1024", "ALLOC with size 1024", lambda: sized(1024))
    fact("ioctl-dir-W", "ALLOC as _IOW", lambda: sized(24, 1))
    fact("ioctl-dir-R", "ALLOC as _IOR", lambda: sized(24, 2))
    fact("ioctl-dir-none", "ALLOC as _IO|size", lambda: sized(24, 0))
    fact("ioctl-nr-1", "_IOWR('H',1,24)", lambda: sized(24, nr=1))
    fact("ioctl-nr-255", "_IOWR('H',255,24)", lambda: sized(24, nr=255))
    fact("ioctl-type-x", "_IOWR('x',0,24)", lambda: sized(24, t="x"))
    fact("dev-open-rw", "open(/dev/dma_heap/system, O_RDWR)", lambda: os.open("/dev/dma_heap/system", os.O_RDWR), fd=True)
    fact("dev-open-wo", "open(O_WRONLY)", lambda: os.open("/dev/dma_heap/system", os.O_WRONLY), fd=True)
    fact("dev-read", "read(heap)", lambda: os.read(d, 1))
    fact("dev-mmap", "mmap(heap)", lambda: mmap(PAGE, 1, SH, d))
    fact("dev-poll", "poll(heap)", lambda: pollrw(d))
    fact("dev-missing", "open(/dev/dma_heap/nosuch)", lambda: os.open("/dev/dma_heap/nosuch", os.O_RDONLY))
    b = al(2 * PAGE)
    a = mmap(2 * PAGE, 3, SH, b)
    fact("zeroed", "new memory is zero", lambda: peek(a, 2 * PAGE) == bytes(2 * PAGE))
    fact("fdinfo", "fdinfo", lambda: fdinfo(b))
    for nm, fl in (("rdonly", 0), ("wronly", 1), ("rdwr", 2)):
        x = al(fd_flags=fl)
        for pn, p in (("none", 0), ("r", 1), ("w", 2), ("rw", 3), ("rx", 5)):
            fact(f"mmap-{nm}-shared-{pn}", f"mmap SHARED prot={pn} of a heap dma-buf opened {nm}", lambda: (mmap(PAGE, p, SH, x), "ok")[1])
            fact(
                f"mmap-{nm}-private-{pn}", f"mmap PRIVATE prot={pn} of a heap dma-buf opened {nm}", lambda: (mmap(PAGE, p, PR, x), "ok")[1]
            )
        fact(f"sync-{nm}-w", f"SYNC START|WRITE on a dma-buf opened {nm}", lambda: sync(x, 2))
        fact(f"sync-{nm}-r", f"SYNC START|READ on a dma-buf opened {nm}", lambda: sync(x, 1))
        fact(f"setname-{nm}", f"SET_NAME on a dma-buf opened {nm}", lambda: set_name(x, b"n"))
        fact(f"export-{nm}", f"EXPORT_SYNC_FILE on a dma-buf opened {nm}", lambda: export_sync_file(x, 3), fd=True)
    x = al(fd_flags=0)
    fact(
        "mprotect-upgrade",
        "mprotect RW of a SHARED R mapping of an O_RDONLY dma-buf",
        lambda: ck(libc.mprotect(mmap(PAGE, 1, SH, x), PAGE, 3)),
    )
