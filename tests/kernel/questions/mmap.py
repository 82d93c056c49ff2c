"""mmap of a dma-buf, and what the mapping can do."""

import ctypes
import os
import struct

from tests.kernel.questions.asking import PR, SH, Bufs, fact, mmap_try, peek, poke, sig_of
from tests.kernel.questions.raw import PAGE, ck, libc, mmap


def vmsplice(w, a):
    iov = struct.pack("QQ", a, 4)
    b = ctypes.create_string_buffer(iov, 16)
    return ck(libc.vmsplice(w, b, 1, 0))


def two_maps(fd, S):
    a, b = mmap(S, 3, SH, fd), mmap(S, 3, SH, fd)
    poke(a + S - 4, b"tail")
    r = peek(b + S - 4, 4).decode()
    libc.munmap(a, S)
    libc.munmap(b, S)
    return r


def ask():
    bs = Bufs(4)
    for n, fd in bs.fds.items():
        p, S = n + "-", os.lseek(fd, 0, 2)
        M = lambda *a: (mmap(*a), "ok")[1]
        fact(p + "full", f"{n}: mmap whole, RW SHARED", lambda: M(S, 3, SH, fd))
        fact(p + "private", f"{n}: mmap PRIVATE R", lambda: M(S, 1, PR, fd))
        fact(p + "private-w", f"{n}: mmap PRIVATE RW", lambda: M(S, 3, PR, fd))
        fact(p + "validate", f"{n}: MAP_SHARED_VALIDATE", lambda: M(S, 3, 3, fd))
        fact(p + "exec", f"{n}: mmap PROT_EXEC|READ", lambda: M(S, 5, SH, fd))
        fact(p + "wonly", f"{n}: mmap PROT_WRITE only", lambda: M(S, 2, SH, fd))
        fact(p + "none", f"{n}: mmap PROT_NONE", lambda: M(S, 0, SH, fd))
        fact(p + "len+1", f"{n}: mmap len=size+1", lambda: M(S + 1, 1, SH, fd))
        fact(p + "len+page", f"{n}: mmap len=size+page", lambda: M(S + PAGE, 1, SH, fd))
        fact(p + "len-100", f"{n}: mmap len=100", lambda: M(100, 1, SH, fd))
        fact(p + "len-0", f"{n}: mmap len=0", lambda: M(0, 1, SH, fd))
        fact(p + "off-page", f"{n}: mmap off=page len=size-page", lambda: M(S - PAGE, 1, SH, fd, PAGE))
        fact(p + "off-over", f"{n}: mmap off=page len=size", lambda: M(S, 1, SH, fd, PAGE))
        fact(p + "off-end", f"{n}: mmap off=size len=page", lambda: M(PAGE, 1, SH, fd, S))
        fact(p + "off-past", f"{n}: mmap off=size+page", lambda: M(PAGE, 1, SH, fd, S + PAGE))
        fact(p + "off-unaligned", f"{n}: mmap off=1", lambda: M(PAGE, 1, SH, fd, 1))
        fact(p + "off-huge", f"{n}: mmap off=2^62", lambda: M(PAGE, 1, SH, fd, 1 << 62))
        fact(p + "off-neg", f"{n}: mmap off=-page", lambda: M(PAGE, 1, SH, fd, -PAGE))
        fact(p + "populate", f"{n}: mmap MAP_POPULATE", lambda: M(S, 3, SH | 0x8000, fd))
        fact(p + "locked", f"{n}: mmap MAP_LOCKED", lambda: M(S, 3, SH | 0x2000, fd))
        fact(p + "rw", f"{n}: write then read back through two mappings", lambda: two_maps(fd, S))
        a = mmap_try(S, 3, SH, fd)
        if not a:
            continue
        fact(
            p + "mprotect-none",
            f"{n}: mprotect NONE then touch",
            lambda: (ck(libc.mprotect(a, S, 0)), sig_of(lambda: peek(a, 1)), ck(libc.mprotect(a, S, 3)))[1],
        )
        fact(p + "mprotect-exec", f"{n}: mprotect RX", lambda: ck(libc.mprotect(a, S, 5)))
        ck(libc.mprotect(a, S, 3))
        fact(p + "msync", f"{n}: msync MS_SYNC", lambda: ck(libc.msync(a, S, 4)))
        fact(p + "mlock", f"{n}: mlock", lambda: ck(libc.mlock(a, S)))
        fact(p + "madv-dontneed", f"{n}: madvise DONTNEED", lambda: sig_of(lambda: ck(libc.madvise(a, S, 4))))
        fact(
            p + "madv-dontneed-touch",
            f"{n}: madvise DONTNEED then read (content 'keep' kept?)",
            lambda: sig_of(lambda: (poke(a, b"keep"), ck(libc.madvise(a, S, 4)), os._exit(0 if peek(a, 4) == b"keep" else 61))),
        )
        fact(p + "madv-dontfork", f"{n}: madvise DONTFORK (in a child)", lambda: sig_of(lambda: ck(libc.madvise(a, S, 10))))
        fact(
            p + "madv-dofork",
            f"{n}: madvise DONTFORK then DOFORK (in a child)",
            lambda: sig_of(lambda: (ck(libc.madvise(a, S, 10)), ck(libc.madvise(a, S, 11)))),
        )
        fact(p + "madv-remove", f"{n}: madvise REMOVE", lambda: ck(libc.madvise(a, S, 9)))
        fact(p + "mremap-grow", f"{n}: mremap to size+page (MAYMOVE)", lambda: (ck(libc.mremap(a, S, S + PAGE, 1)), "ok")[1])
        b = mmap_try(S, 3, SH, fd)
        fact(p + "mremap-shrink", f"{n}: mremap to 1 page", lambda: (ck(libc.mremap(b, S, PAGE, 1)), "ok")[1])
        c = mmap_try(PAGE, 3, SH, fd)
        fact(
            p + "mremap-grow-in",
            f"{n}: map 1 page, mremap to 2 pages (within the buffer)",
            lambda: (ck(libc.mremap(c, PAGE, 2 * PAGE, 1)), "ok")[1],
        )
        fact(
            p + "proc-mem", f"{n}: /proc/self/mem read of the mapping", lambda: len(os.pread(os.open("/proc/self/mem", os.O_RDONLY), 4, a))
        )
        _rr, ww = os.pipe()

        def wr():
            return ck(libc.write(ww, ctypes.c_void_p(a), 4))

        fact(p + "write-from", f"{n}: write(pipe, mapping) as user buffer", wr)

        def odirect():
            f = os.open("/dev/shm/x", os.O_RDWR | os.O_CREAT)
            r = ck(libc.pwrite(f, ctypes.c_void_p(a), PAGE, ctypes.c_long(0)))
            os.unlink("/dev/shm/x")
            return r

        fact(p + "pwrite-from", f"{n}: pwrite(tmpfs file, mapping)", odirect)
        fact(p + "vmsplice", f"{n}: vmsplice (get_user_pages) of the mapping", lambda: vmsplice(ww, a))
        fact(p + "fork-inherit", f"{n}: mapping inherited over fork", lambda: sig_of(lambda: poke(a, b"zz")))
    n, fd = bs.any()
    a = mmap(4 * PAGE, 3, SH, fd)
    os.close(fd)
    poke(a, b"still")
    fact("after-close", "mapping usable after close(fd)", lambda: peek(a, 5).decode())
    fact(
        "munmap-partial",
        "munmap middle page then touch it",
        lambda: (ck(libc.munmap(a + PAGE, PAGE)), sig_of(lambda: peek(a + PAGE, 1)), sig_of(lambda: peek(a + 2 * PAGE, 1)))[1:],
    )
