"""sync_file, EXPORT_SYNC_FILE and IMPORT_SYNC_FILE."""

import ctypes
import mmap as pymmap
import os
import re
import struct
import time

from tests.kernel.questions.asking import BAD, PR, SH, U32, Fences, fact, fdinfo, getfl, link, new_buf, norm_info, poke, pollrw
from tests.kernel.questions.raw import (
    _IOW,
    _IOWR,
    DMA_BUF_IOCTL_EXPORT_SYNC_FILE,
    DMA_BUF_IOCTL_IMPORT_SYNC_FILE,
    DMA_BUF_IOCTL_SYNC,
    PAGE,
    SYNC_IOC_FILE_INFO,
    SYNC_IOC_MERGE,
    SYNC_IOC_SET_DEADLINE,
    export_sync_file,
    file_info,
    import_sync_file,
    ioctl,
    ioctl_raw,
    libc,
    memfd,
    merge,
    mmap,
)


def ask():
    fs = Fences()
    fact("source", "fence source used here", lambda: fs.kind)
    fd = new_buf()
    for fl in (0, 1, 2, 3, 4, 5, 8, 0x80000000, U32):
        fact(f"export-{fl:#x}", f"EXPORT_SYNC_FILE flags={fl:#x}, no fences", lambda: export_sync_file(fd, fl), fd=True)
    fact("export-null", "EXPORT arg=NULL", lambda: ioctl_raw(fd, DMA_BUF_IOCTL_EXPORT_SYNC_FILE, None))
    fact("export-bad", "EXPORT arg=bad pointer", lambda: ioctl_raw(fd, DMA_BUF_IOCTL_EXPORT_SYNC_FILE, BAD))
    ro = mmap(PAGE, 3, PR | pymmap.MAP_ANONYMOUS, -1)
    poke(ro, struct.pack("Ii", 3, -1))
    libc.mprotect(ro, PAGE, 1)
    n0 = len(os.listdir("/proc/self/fd"))
    fact("export-ro", "EXPORT arg in read-only memory", lambda: ioctl_raw(fd, DMA_BUF_IOCTL_EXPORT_SYNC_FILE, ro))
    fact("export-ro-leak", "fds leaked by that", lambda: len(os.listdir("/proc/self/fd")) - n0)
    e = export_sync_file(fd, 3)
    fact("empty-info", "FILE_INFO of the export of an idle buffer", lambda: norm_info(file_info(e)))
    fact("empty-poll", "poll of it", lambda: pollrw(e))
    fact("empty-link", "readlink of it", lambda: link(e))
    fact("empty-fl", "F_GETFL/F_GETFD of it", lambda: getfl(e))
    fact("empty-fdinfo", "fdinfo of it", lambda: fdinfo(e))
    fact("empty-fstat", "fstat of it", lambda: (lambda s: [oct(s.st_mode), s.st_size, s.st_nlink])(os.fstat(e)))
    fact("empty-lseek", "lseek of it", lambda: os.lseek(e, 0, 2))
    fact("empty-read", "read of it", lambda: os.read(e, 1))
    fact("empty-write", "write to it", lambda: os.write(e, b"x"))
    fact("empty-mmap", "mmap of it", lambda: mmap(PAGE, 1, SH, e))
    for slug, req in (
        ("nr0", _IOWR(">", 0, 8)),
        ("nr1", _IOWR(">", 1, 8)),
        ("nr2", _IOWR(">", 2, 8)),
        ("nr6", _IOWR(">", 6, 8)),
        ("info-size", _IOWR(">", 4, 64)),
        ("merge-W", _IOW(">", 3, 48)),
        ("dmabuf-sync", DMA_BUF_IOCTL_SYNC),
        ("dmabuf-export", DMA_BUF_IOCTL_EXPORT_SYNC_FILE),
    ):
        fact("ioctl-" + slug, f"ioctl {req:#010x} on a sync_file", lambda: ioctl_raw(e, req, ctypes.create_string_buffer(128)))
    # import
    for fl in (0, 1, 2, 3, 4, 8, U32):
        fact(f"import-{fl:#x}", f"IMPORT_SYNC_FILE flags={fl:#x} of a signalled sync_file", lambda: import_sync_file(new_buf(), fl, e))
    fact("import-fd-1", "IMPORT fd=-1", lambda: import_sync_file(fd, 3, -1))
    fact("import-closed", "IMPORT fd=closed", lambda: import_sync_file(fd, 3, 999))
    fact("import-dmabuf", "IMPORT fd=a dma-buf", lambda: import_sync_file(fd, 3, fd))
    fact("import-memfd", "IMPORT fd=a memfd", lambda: import_sync_file(fd, 3, memfd(PAGE)))
    fact("import-pipe", "IMPORT fd=a pipe", lambda: import_sync_file(fd, 3, os.pipe()[0]))
    fact("import-order", "IMPORT bad flags and bad fd", lambda: import_sync_file(fd, 0, -1))
    fact("import-null", "IMPORT arg=NULL", lambda: ioctl_raw(fd, DMA_BUF_IOCTL_IMPORT_SYNC_FILE, None))
    fact("import-badptr", "IMPORT arg=bad pointer", lambda: ioctl_raw(fd, DMA_BUF_IOCTL_IMPORT_SYNC_FILE, BAD))
    # info/merge bad input
    fact("info-flags", "FILE_INFO flags=1", lambda: file_info(e, 1, flags=1))
    fact("info-pad", "FILE_INFO pad=1", lambda: file_info(e, 1, pad=1))
    fact("info-null", "FILE_INFO arg=NULL", lambda: ioctl_raw(e, SYNC_IOC_FILE_INFO, None))
    fact("info-n0", "FILE_INFO num_fences=0", lambda: norm_info(file_info(e, 0)))
    fact("info-n5", "FILE_INFO num_fences=5 (more than there are)", lambda: norm_info(file_info(e, 5)))
    fact("info-badptr", "FILE_INFO sync_fence_info=bad pointer", lambda: file_info(e, 1, ptr=BAD))
    fact("info-nullptr", "FILE_INFO num_fences=1, sync_fence_info=NULL", lambda: file_info(e, 1, ptr=0))
    fact("merge-self", "MERGE fd with itself", lambda: merge(e, e), fd=True)
    fact("merge-flags", "MERGE flags=1", lambda: merge(e, e, flags=1), fd=True)
    fact("merge-pad", "MERGE pad=1", lambda: merge(e, e, pad=1), fd=True)
    fact("merge-fd-1", "MERGE fd2=-1", lambda: merge(e, -1), fd=True)
    fact("merge-closed", "MERGE fd2=closed", lambda: merge(e, 999), fd=True)
    fact("merge-dmabuf", "MERGE fd2=a dma-buf", lambda: merge(e, fd), fd=True)
    fact("merge-null", "MERGE arg=NULL", lambda: ioctl_raw(e, SYNC_IOC_MERGE, None))
    fact("merge-order", "MERGE flags=1 and fd2=-1", lambda: merge(e, -1, flags=1), fd=True)
    fact("merge-name32", "MERGE name of 32 bytes without NUL: name reported", lambda: file_info(merge(e, e, b"n" * 32))["name"])
    fact("merge-name0", "MERGE empty name: name reported", lambda: re.sub(r"\d+", "N", file_info(merge(e, e, b""))["name"]))
    fact("merge-fl", "MERGE result F_GETFL/F_GETFD", lambda: getfl(merge(e, e)))
    fact("deadline", "SET_DEADLINE", lambda: ioctl(e, SYNC_IOC_SET_DEADLINE, "QQ", time.monotonic_ns(), 0)[0])
    fact("deadline-pad", "SET_DEADLINE pad=1", lambda: ioctl(e, SYNC_IOC_SET_DEADLINE, "QQ", 0, 1)[0])
    fact("deadline-past", "SET_DEADLINE 0", lambda: ioctl(e, SYNC_IOC_SET_DEADLINE, "QQ", 0, 0)[0])
    fact("deadline-null", "SET_DEADLINE NULL", lambda: ioctl_raw(e, SYNC_IOC_SET_DEADLINE, None))
    if not fs.kind:
        return
    # real fences
    s, g = fs.new()
    fact("pending-info", "FILE_INFO pending", lambda: norm_info(file_info(s)))
    fact("n-too-small", "FILE_INFO num_fences less than present", lambda: file_info(merge(s, fs.new()[0]), 1))
    g()
    fact("done-info", "FILE_INFO signalled", lambda: norm_info(file_info(s)))
    s1, g1 = fs.new()
    s2, g2 = fs.new()
    m = merge(s1, s2, b"m12")
    fact("m-0", "merge of two pending", lambda: norm_info(file_info(m)))
    g1()
    fact("m-1", "  one signalled: poll", lambda: pollrw(m))
    fact("m-1-info", "  info", lambda: norm_info(file_info(m)))
    g2()
    fact("m-2", "  both signalled: poll", lambda: pollrw(m))
    fact("m-2-info", "  info", lambda: norm_info(file_info(m)))
    m2 = merge(m, s1, b"sig")
    fact("m-sig-info", "merge of signalled files: info", lambda: norm_info(file_info(m2)))
    s3, _g3 = fs.new()
    m3 = merge(s3, s1, b"half")
    fact("m-half-info", "merge of pending + signalled: info", lambda: norm_info(file_info(m3)))
    m4 = merge(m3, s3, b"dup")
    fact("m-dup-info", "merge with a fence already in it: info", lambda: norm_info(file_info(m4)))
    s5, _g5 = fs.new()
    s6, _g6 = fs.new()
    nested = merge(merge(s3, s5), s6, b"nest")
    fact("m-nest", "nested merge: num_fences", lambda: file_info(nested)["num_fences"])
    # export sees imports
    for use, uf in (("READ", 1), ("WRITE", 2)):
        for ex in (1, 2, 3):
            b = new_buf()
            s, g = fs.new()
            import_sync_file(b, uf, s)
            x = export_sync_file(b, ex)
            fact(
                f"imp-{use}-exp-{ex}",
                f"import as {use}, export flags={ex}: pending?",
                lambda: "pending" if file_info(x)["status"] == 0 else "signalled",
            )
            g()
    b = new_buf()
    a = [fs.new() for _ in range(3)]
    import_sync_file(b, 1, a[0][0])
    import_sync_file(b, 1, a[1][0])
    import_sync_file(b, 2, a[2][0])
    fact(
        "exp-counts",
        "2 read fences + 1 write fence: num_fences exported with READ, WRITE, RW",
        lambda: [file_info(export_sync_file(b, f))["num_fences"] for f in (1, 2, 3)],
    )
    fact("exp-rw-info", "FILE_INFO of the RW export", lambda: norm_info(file_info(export_sync_file(b, 3))))
    snap = export_sync_file(b, 3)
    late = fs.new()
    import_sync_file(b, 2, late[0])
    fact(
        "exp-snapshot",
        "an export is a snapshot: later import not seen",
        lambda: [file_info(snap)["num_fences"], file_info(export_sync_file(b, 3))["num_fences"]],
    )
    for _, g in a:
        g()
    fact("exp-pruned", "signalled fences left out of a new export", lambda: file_info(export_sync_file(b, 3))["num_fences"])
    late[1]()
    fact("exp-all-done", "FILE_INFO of the export when all are signalled", lambda: norm_info(file_info(export_sync_file(b, 3))))
    b = new_buf()
    s, g = fs.new()
    import_sync_file(b, 1, s)
    import_sync_file(b, 2, s)
    fact(
        "imp-same-twice",
        "same fence imported as READ then WRITE: exported READ, RW counts",
        lambda: [file_info(export_sync_file(b, f))["num_fences"] for f in (1, 3)],
    )
    fact("imp-same-poll", "  poll", lambda: pollrw(b))
    b = new_buf()
    s, g = fs.new()
    import_sync_file(b, 2, s)
    import_sync_file(b, 1, s)
    fact("imp-same-twice-b", "same fence imported as WRITE then READ (cannot weaken?): poll", lambda: pollrw(b))
    mm = merge(fs.new()[0], fs.new()[0])
    b = new_buf()
    import_sync_file(b, 2, mm)
    fact("imp-merged", "import of a 2-fence merge: exported count", lambda: file_info(export_sync_file(b, 3))["num_fences"])
    n = [fs.new() for _ in range(100)]
    b = new_buf()
    for s, _ in n:
        import_sync_file(b, 1, s)
    fact("imp-100", "100 read fences of 100 timelines imported: exported count", lambda: file_info(export_sync_file(b, 2))["num_fences"])
