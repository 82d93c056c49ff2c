"""/dev/udmabuf."""

import ctypes
import errno
import fcntl
import mmap as pymmap
import os
import struct

from tests.kernel.questions.asking import BAD, PR, PROT_R, PROT_W, SH, U32, fact, fdinfo, getfl, peek, poke, pollrw, record
from tests.kernel.questions.raw import (
    _IOW,
    _IOWR,
    F_ADD_SEALS,
    F_GET_SEALS,
    F_SEAL_FUTURE_WRITE,
    F_SEAL_GROW,
    F_SEAL_SHRINK,
    F_SEAL_WRITE,
    MFD_ALLOW_SEALING,
    MFD_CLOEXEC,
    MFD_HUGETLB,
    PAGE,
    UDMABUF_CREATE,
    UDMABUF_CREATE_LIST,
    ck,
    ioctl_raw,
    libc,
    memfd,
    mmap,
    udmabuf,
    udmabuf_list,
)


def ask():
    if not os.path.exists("/dev/udmabuf"):
        return fact("open", "open(/dev/udmabuf)", lambda: os.open("/dev/udmabuf", os.O_RDWR))
    d = os.open("/dev/udmabuf", os.O_RDWR)
    m = memfd(4 * PAGE)
    mk = lambda **k: udmabuf(k.pop("m", m), dev=d, **k)
    fact("create", "CREATE 1 page, SHRINK-sealed memfd", lambda: mk(), fd=True)
    fact("create-all", "CREATE whole memfd", lambda: mk(size=4 * PAGE), fd=True)
    fact("create-mid", "CREATE offset 1 page, 2 pages", lambda: mk(off=PAGE, size=2 * PAGE), fd=True)
    b = mk(size=4 * PAGE)
    fact("fl-cloexec", "F_GETFL/F_GETFD with flags=CLOEXEC(1)", lambda: getfl(b))
    b0 = mk(flags=0)
    fact("fl-0", "F_GETFL/F_GETFD with flags=0", lambda: getfl(b0))
    for fl in (2, 0x80000000, U32, 0xFFFFFFFE):
        fact(f"flags-{fl:#x}", f"CREATE flags={fl:#x}", lambda fl=fl: mk(flags=fl), fd=True)
    fact("fl-2", "F_GETFL with flags=2 (unknown)", lambda: getfl(mk(flags=2)))
    fact("size-0", "CREATE size=0", lambda: mk(size=0), fd=True)
    fact("size-1", "CREATE size=1 (unaligned)", lambda: mk(size=1), fd=True)
    fact("size-4095", "CREATE size=4095", lambda: mk(size=4095), fd=True)
    fact("size-unaligned", "CREATE size=6144", lambda: mk(size=6144), fd=True)
    fact("off-1", "CREATE offset=1", lambda: mk(off=1), fd=True)
    fact("off-2048", "CREATE offset=2048", lambda: mk(off=2048), fd=True)
    fact("off-end", "CREATE offset=memfd size, 1 page", lambda: mk(off=4 * PAGE), fd=True)
    fact("off-past", "CREATE offset past the end", lambda: mk(off=64 * PAGE), fd=True)
    fact("past-end", "CREATE 5 pages of a 4-page memfd", lambda: mk(size=5 * PAGE), fd=True)
    fact("straddle", "CREATE offset 3, 2 pages of 4", lambda: mk(off=3 * PAGE, size=2 * PAGE), fd=True)
    fact("off-huge", "CREATE offset=2^63", lambda: mk(off=1 << 63), fd=True)
    fact("off-neg", "CREATE offset=-PAGE as u64", lambda: mk(off=(1 << 64) - PAGE), fd=True)
    fact("size-huge", "CREATE size=2^63", lambda: mk(size=1 << 63), fd=True)
    fact("size-neg", "CREATE size=-PAGE as u64", lambda: mk(size=(1 << 64) - PAGE), fd=True)
    e = memfd(0, 0)
    fcntl.fcntl(e, F_ADD_SEALS, F_SEAL_SHRINK)
    fact("empty-memfd", "CREATE 1 page of an empty memfd", lambda: mk(m=e), fd=True)
    fact("unwritten", "CREATE over never-touched (hole) memfd pages", lambda: mk(m=memfd(PAGE)), fd=True)
    u = memfd(PAGE + 100)
    fact("memfd-partial-page", "CREATE 2 pages of a memfd of 4196 bytes", lambda: mk(m=u, size=2 * PAGE), fd=True)
    fact("memfd-partial-page1", "CREATE 1 page of a memfd of 4196 bytes", lambda: mk(m=u), fd=True)
    sub = memfd(100)
    fact("memfd-sub-page", "CREATE 1 page of a 100-byte memfd", lambda: mk(m=sub), fd=True)
    for nm, s in (
        ("none", 0),
        ("GROW", F_SEAL_GROW),
        ("SHRINK", F_SEAL_SHRINK),
        ("SHRINK|GROW", 6),
        ("SHRINK|WRITE", 2 | 8),
        ("WRITE", 8),
        ("SHRINK|FUTURE_WRITE", 2 | 16),
        ("SHRINK|SEAL", 3),
        ("SHRINK|GROW|SEAL", 7),
        ("SHRINK|EXEC", 2 | 32),
    ):

        def go(s=s):
            return mk(m=memfd(PAGE, s))

        fact("seals-" + nm, f"CREATE, memfd seals={nm}", go, fd=True)
    fact("no-allow-sealing", "CREATE, memfd without MFD_ALLOW_SEALING", lambda: mk(m=memfd(PAGE, 0, MFD_CLOEXEC)), fd=True)
    fact("mfd-noexec-seal", "CREATE, memfd MFD_NOEXEC_SEAL + SHRINK", lambda: mk(m=memfd(PAGE, F_SEAL_SHRINK, 8 | 1)), fd=True)
    r, _w = os.pipe()
    fact("fd-pipe", "CREATE, memfd=a pipe", lambda: mk(m=r), fd=True)
    fact("fd-minus1", "CREATE, memfd=-1", lambda: mk(m=U32), fd=True)
    fact("fd-closed", "CREATE, memfd=a closed fd", lambda: mk(m=999), fd=True)
    fact("fd-devnull", "CREATE, memfd=/dev/null", lambda: mk(m=os.open("/dev/null", os.O_RDWR)), fd=True)
    fact("fd-devzero", "CREATE, memfd=/dev/zero", lambda: mk(m=os.open("/dev/zero", os.O_RDWR)), fd=True)
    fact("fd-opath", "CREATE, memfd opened O_PATH", lambda: mk(m=os.open(f"/proc/self/fd/{m}", os.O_PATH)), fd=True)
    fact("fd-ro-memfd", "CREATE, memfd reopened O_RDONLY", lambda: mk(m=os.open(f"/proc/self/fd/{m}", os.O_RDONLY)), fd=True)

    def shm():
        f = os.open("/dev/shm/probe-f", os.O_RDWR | os.O_CREAT)
        os.ftruncate(f, PAGE)
        os.unlink("/dev/shm/probe-f")
        return f

    fact("fd-tmpfs-file", "CREATE, memfd=a plain tmpfs file", lambda: mk(m=shm()), fd=True)
    fact("fd-tmpfs-seals", "F_GET_SEALS of a plain tmpfs file", lambda: fcntl.fcntl(shm(), F_GET_SEALS))
    fact("fd-dmabuf", "CREATE, memfd=a dma-buf", lambda: mk(m=b), fd=True)
    fact("fd-regular", "CREATE, memfd=a regular (9p/overlay) file", lambda: mk(m=os.open("/etc/passwd", os.O_RDONLY)), fd=True)
    fact("ptr-null", "CREATE arg=NULL", lambda: ioctl_raw(d, UDMABUF_CREATE, None), fd=True)
    fact("ptr-bad", "CREATE arg=bad pointer", lambda: ioctl_raw(d, UDMABUF_CREATE, BAD), fd=True)
    fact("ioctl-unknown-nr", "ioctl _IOW('u',0x44,24)", lambda: ioctl_raw(d, _IOW("u", 0x44, 24), ctypes.create_string_buffer(64)))
    fact("ioctl-wrong-size", "ioctl _IOW('u',0x42,32)", lambda: ioctl_raw(d, _IOW("u", 0x42, 32), ctypes.create_string_buffer(64)))
    fact("ioctl-wrong-dir", "ioctl _IOWR('u',0x42,24)", lambda: ioctl_raw(d, _IOWR("u", 0x42, 24), ctypes.create_string_buffer(64)))
    fact("ioctl-wrong-type", "ioctl _IOW('x',0x42,24)", lambda: ioctl_raw(d, _IOW("x", 0x42, 24), ctypes.create_string_buffer(64)))
    dro = os.open("/dev/udmabuf", os.O_RDONLY)
    fact("dev-rdonly", "CREATE through /dev/udmabuf opened O_RDONLY", lambda: udmabuf(m, dev=dro), fd=True)
    fact("dev-read", "read(/dev/udmabuf)", lambda: os.read(d, 1))
    fact("dev-poll", "poll(/dev/udmabuf)", lambda: pollrw(d))
    # size limit
    par = "/sys/module/udmabuf/parameters/"

    def setp(n, v):
        f = os.open(par + n, os.O_WRONLY)
        try:
            os.write(f, str(v).encode())
        finally:
            os.close(f)

    lim0 = int(open("/sys/module/udmabuf/parameters/size_limit_mb").read())
    lim = 64
    setp("size_limit_mb", lim)
    big = memfd((lim + 1) << 20)
    fact("limit-exact", f"CREATE {lim} MiB (= size_limit_mb)", lambda: mk(m=big, size=lim << 20), fd=True)
    fact("limit-plus1", f"CREATE {lim} MiB + 1 page", lambda: mk(m=big, size=(lim << 20) + PAGE), fd=True)
    half = lim // 2
    if lim0 > lim:
        setp("size_limit_mb", lim0)
        fact("limit-default-65", f"default size_limit_mb={lim0}: CREATE 65 MiB", lambda: mk(m=big, size=65 << 20), fd=True)
        setp("size_limit_mb", lim)
    fact(
        "limit-list-sum",
        f"CREATE_LIST {half} MiB twice + 1 page",
        lambda: udmabuf_list([(big, 0, half << 20), (big, 0, half << 20), (m, 0, PAGE)], dev=d),
        fd=True,
    )
    fact(
        "limit-list-ok", f"CREATE_LIST {half} MiB twice", lambda: udmabuf_list([(big, 0, half << 20), (big, 0, half << 20)], dev=d), fd=True
    )
    try:
        setp("size_limit_mb", 1)
        fact("limit-1-ok", "size_limit_mb=1: CREATE 1 MiB", lambda: mk(m=big, size=1 << 20), fd=True)
        fact("limit-1-over", "size_limit_mb=1: CREATE 1 MiB + page", lambda: mk(m=big, size=(1 << 20) + PAGE), fd=True)
        setp("size_limit_mb", 0)
        fact("limit-0", "size_limit_mb=0: CREATE 1 page", lambda: mk(), fd=True)
        fact("limit-neg-write", "write -1 to size_limit_mb", lambda: setp("size_limit_mb", -1))
        fact("limit-neg", "size_limit_mb=-1: CREATE 1 page", lambda: mk(), fd=True)
        fact("limit-neg-big", "size_limit_mb=-1: CREATE 65 MiB", lambda: mk(m=big, size=65 << 20), fd=True)
        fact("limit-junk-write", "write 'abc' to size_limit_mb", lambda: setp("size_limit_mb", "abc"))
    finally:
        setp("size_limit_mb", lim0)
    # lists
    L = lambda items, **k: udmabuf_list(items, dev=d, **k)
    fact("list-1", "CREATE_LIST 1 item", lambda: L([(m, 0, PAGE)]), fd=True)
    fact("list-2", "CREATE_LIST 2 memfds", lambda: L([(m, 0, PAGE), (memfd(PAGE), 0, PAGE)]), fd=True)
    fact("list-same-twice", "CREATE_LIST same page of same memfd twice", lambda: L([(m, 0, PAGE), (m, 0, PAGE)]), fd=True)
    fact("list-overlap", "CREATE_LIST overlapping ranges", lambda: L([(m, 0, 2 * PAGE), (m, PAGE, 2 * PAGE)]), fd=True)
    fact("list-0", "CREATE_LIST count=0", lambda: L([]), fd=True)
    fact("list-item0-size0", "CREATE_LIST items of size 0 only", lambda: L([(m, 0, 0)]), fd=True)
    fact("list-size0-mixed", "CREATE_LIST (size 0) + (1 page)", lambda: L([(m, 0, 0), (m, 0, PAGE)]), fd=True)
    fact("list-size0-last", "CREATE_LIST (1 page) + (size 0)", lambda: L([(m, 0, PAGE), (m, 0, 0)]), fd=True)
    fact("list-pad", "CREATE_LIST item.__pad != 0", lambda: L([(m, 0, PAGE)], pad=5), fd=True)
    fact("list-bad-second", "CREATE_LIST good + closed fd", lambda: L([(m, 0, PAGE), (999, 0, PAGE)]), fd=True)
    fact("list-unaligned-second", "CREATE_LIST good + unaligned size", lambda: L([(m, 0, PAGE), (m, 0, 100)]), fd=True)
    fact("list-order", "CREATE_LIST closed fd + unaligned size (which error first?)", lambda: L([(999, 0, PAGE), (m, 0, 100)]), fd=True)
    fact("list-flags2", "CREATE_LIST flags=2", lambda: L([(m, 0, PAGE)], flags=2), fd=True)
    fact("list-limit", "CREATE_LIST 1024 items (= list_limit)", lambda: L([(m, 0, PAGE)] * 1024), fd=True)
    fact("list-limit-1", "CREATE_LIST 1025 items", lambda: L([(m, 0, PAGE)] * 1025), fd=True)
    fact("list-count-huge", "CREATE_LIST count=0xffffffff", lambda: L([(m, 0, PAGE)], count=U32), fd=True)
    fact("list-null", "CREATE_LIST arg=NULL", lambda: ioctl_raw(d, UDMABUF_CREATE_LIST, None), fd=True)
    page = mmap(2 * PAGE, PROT_R | PROT_W, PR | pymmap.MAP_ANONYMOUS, -1)
    libc.mprotect(page + PAGE, PAGE, 0)
    poke(page + PAGE - 8, struct.pack("II", 1, 1))
    fact("list-items-unmapped", "CREATE_LIST, item array unmapped", lambda: ioctl_raw(d, UDMABUF_CREATE_LIST, page + PAGE - 8), fd=True)
    setp("list_limit", 1)
    fact("list_limit-1", "list_limit=1: 2 items", lambda: L([(m, 0, PAGE)] * 2), fd=True)
    setp("list_limit", 0)
    fact("list_limit-0", "list_limit=0: CREATE_LIST 1 item", lambda: L([(m, 0, PAGE)]), fd=True)
    fact("list_limit-0-create", "list_limit=0: plain CREATE", lambda: mk(), fd=True)
    setp("list_limit", -1)
    fact("list_limit-neg", "list_limit=-1: CREATE_LIST 1 item", lambda: L([(m, 0, PAGE)]), fd=True)
    setp("list_limit", 1024)
    # content
    os.pwrite(m, b"hello", PAGE)
    a = mmap(4 * PAGE, PROT_R | PROT_W, SH, b)
    fact("coherent-read", "pwrite memfd, read through dma-buf mmap", lambda: peek(a + PAGE, 5).decode())
    poke(a + 2 * PAGE, b"world")
    fact("coherent-write", "write through dma-buf mmap, pread memfd", lambda: os.pread(m, 5, 2 * PAGE).decode())
    lb = L([(m, 2 * PAGE, PAGE), (m, PAGE, PAGE)])
    a2 = mmap(2 * PAGE, PROT_R, SH, lb)
    fact("list-content", "CREATE_LIST order of pages in the mmap", lambda: [peek(a2, 5).decode(), peek(a2 + PAGE, 5).decode()])
    fact("list-size", "lseek END of a list dma-buf", lambda: os.lseek(lb, 0, 2))
    # after creation
    fact("seal-write-after", "F_ADD_SEALS F_SEAL_WRITE while a udmabuf (mapped) exists", lambda: fcntl.fcntl(m, F_ADD_SEALS, F_SEAL_WRITE))
    m2 = memfd(PAGE)
    mk(m=m2)
    fact(
        "seal-write-after-unmapped",
        "F_ADD_SEALS F_SEAL_WRITE while an unmapped udmabuf exists",
        lambda: fcntl.fcntl(m2, F_ADD_SEALS, F_SEAL_WRITE),
    )
    m2f = memfd(PAGE)
    b2f = mk(m=m2f)
    fact(
        "seal-futurewrite-after",
        "F_ADD_SEALS F_SEAL_FUTURE_WRITE while a udmabuf exists",
        lambda: fcntl.fcntl(m2f, F_ADD_SEALS, F_SEAL_FUTURE_WRITE),
    )
    fact("grow-after", "ftruncate memfd larger while a udmabuf exists", lambda: os.ftruncate(m2f, 2 * PAGE))
    fact(
        "punch-after",
        "fallocate PUNCH_HOLE under a udmabuf, then mmap content",
        lambda: (
            poke(mmap(PAGE, 3, SH, b2f), b"AAAA"),
            ck(libc.fallocate(m2f, 3, ctypes.c_long(0), ctypes.c_long(PAGE))),
            peek(mmap(PAGE, 1, SH, b2f), 4).decode(),
            os.pread(m2f, 4, 0).decode("latin1"),
        )[2:],
    )
    m3 = memfd(PAGE)
    os.pwrite(m3, b"xyz", 0)
    b3 = mk(m=m3)
    os.close(m3)
    fact("memfd-closed-after", "close memfd, read through dma-buf", lambda: peek(mmap(PAGE, 1, SH, b3), 3).decode())
    fact("exp_name", "fdinfo", lambda: fdinfo(b3))
    # huge pages
    try:
        # A guest of ours has reserved them as it started: later there may be none in one piece.
        open("/proc/sys/vm/nr_hugepages", "w").write("4")
        H = 2 << 20
        hm = memfd(2 * H, F_SEAL_SHRINK, MFD_ALLOW_SEALING | MFD_CLOEXEC | MFD_HUGETLB)
        fact("hugetlb", "CREATE 2 MiB of a hugetlb memfd", lambda: mk(m=hm, size=H), fd=True)
        fact("hugetlb-4k", "CREATE 4 KiB of a hugetlb memfd", lambda: mk(m=hm, size=PAGE), fd=True)
        fact("hugetlb-off4k", "CREATE 4 KiB at offset 4 KiB of a hugetlb memfd", lambda: mk(m=hm, off=PAGE, size=PAGE), fd=True)
        fact("hugetlb-cross", "CREATE 8 KiB across the 2 MiB boundary", lambda: mk(m=hm, off=H - PAGE, size=2 * PAGE), fd=True)
    except OSError as e:
        record("hugetlb-setup", "hugetlb memfd", errno=errno.errorcode[e.errno or 0])
