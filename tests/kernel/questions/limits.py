"""Out of descriptors, out of memory."""

import os
import resource

from tests.kernel.questions.asking import Fences, fact, new_buf, sig_of
from tests.kernel.questions.raw import PAGE, export_sync_file, heap_alloc, memfd, merge, udmabuf


def ask():
    """no fd left, no memory left"""

    def al(length):
        open("/proc/self/oom_score_adj", "w").write("1000")
        return heap_alloc(length)

    if os.path.exists("/dev/dma_heap/system"):
        ram = os.sysconf("SC_PHYS_PAGES")
        fact("heap-1.01-ram", "heap ALLOC of 1.01 of all memory", lambda: sig_of(lambda: al(int(ram * 1.01) * PAGE)))
        fact(
            "heap-0.99-ram",
            "heap ALLOC of 0.99 of all memory, in a child with oom_score_adj 1000",
            lambda: sig_of(lambda: al(int(ram * 0.99) * PAGE)),
        )
    fs = Fences()
    if not fs.kind:
        return
    # fds exhausted

    b = new_buf()
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    len(os.listdir("/proc/self/fd"))
    keep = []
    d = os.open("/dev/dma_heap/system", os.O_RDONLY) if os.path.exists("/dev/dma_heap/system") else None
    u = os.open("/dev/udmabuf", os.O_RDWR) if os.path.exists("/dev/udmabuf") else None
    m = memfd(PAGE)
    s, _g = fs.new()
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    try:
        while True:
            keep.append(os.dup(b))
    except OSError:
        pass
    fact("emfile-export", "EXPORT_SYNC_FILE with no fd left", lambda: export_sync_file(b, 3))
    fact("emfile-merge", "MERGE with no fd left", lambda: merge(s, s))
    if d is not None:
        fact("emfile-heap", "heap ALLOC with no fd left", lambda: heap_alloc(PAGE, dev=d))
    if u is not None:
        fact("emfile-udmabuf", "UDMABUF_CREATE with no fd left", lambda: udmabuf(m, dev=u))
    for f in keep:
        os.close(f)
