"""vgem: PRIME, and fences."""

import os
import time

from tests.kernel.questions.asking import U32, fact, getfl, norm_info, pollmask, pollrw
from tests.kernel.questions.raw import (
    PAGE,
    create_dumb,
    export_sync_file,
    file_info,
    memfd,
    open_drm,
    prime_export,
    prime_import,
    vgem_attach,
    vgem_signal,
)


def ask():
    d = open_drm("vgem")
    fact("present", "vgem card", lambda: d is not None)
    if d is None:
        return
    h, size = create_dumb(d, 64, 64)
    fact("dumb", "CREATE_DUMB 64x64x32: size", lambda: size)
    b = prime_export(d, h)
    fact("fl-3", "PRIME export CLOEXEC|RDWR: F_GETFL", lambda: getfl(b))
    for nm, fl in (("0", 0), ("CLOEXEC", os.O_CLOEXEC), ("RDWR", 2), ("RDONLY|4", 4), ("NONBLOCK", os.O_NONBLOCK), ("all", U32)):
        fact(
            "export-" + nm,
            f"PRIME_HANDLE_TO_FD of a fresh handle, flags={nm}: F_GETFL",
            lambda: getfl(prime_export(d, create_dumb(d)[0], fl)),
        )
    fact("export-0-again", "PRIME_HANDLE_TO_FD flags=0 of a handle first exported RDWR: F_GETFL", lambda: getfl(prime_export(d, h, 0)))

    def ro_first():
        hh = create_dumb(d)[0]
        a = prime_export(d, hh, 0)
        return [getfl(a), getfl(prime_export(d, hh, 2))]

    fact("export-ro-then-rw", "fresh handle exported flags=0, then RDWR: F_GETFL of both", ro_first)
    fact(
        "export-again-same",
        "exporting the handle twice gives the same dma-buf (st_ino)",
        lambda: os.fstat(prime_export(d, h)).st_ino == os.fstat(b).st_ino,
    )
    fact("export-bad", "PRIME_HANDLE_TO_FD bad handle", lambda: prime_export(d, 9999))
    fact("import-self", "PRIME_FD_TO_HANDLE of own buffer gives the same handle", lambda: prime_import(d, b) == h)
    d2 = open_drm("vgem")
    fact("import-other", "PRIME_FD_TO_HANDLE in another open file: ok", lambda: prime_import(d2, b) > 0)
    fact("import-memfd", "PRIME_FD_TO_HANDLE of a memfd", lambda: prime_import(d, memfd(PAGE)))
    fact("import-1", "PRIME_FD_TO_HANDLE of -1", lambda: prime_import(d, -1))
    fact("attach-bad", "FENCE_ATTACH bad handle", lambda: vgem_attach(d, 9999))
    fact("attach-flags", "FENCE_ATTACH flags=2", lambda: vgem_attach(d, h, flags=2))
    fact("attach-pad", "FENCE_ATTACH pad=1", lambda: vgem_attach(d, h, pad=1))
    fact("signal-bad", "FENCE_SIGNAL of an unknown fence", lambda: vgem_signal(d, 77))
    f = vgem_attach(d, h, True)
    fact("w-poll", "write fence attached: poll", lambda: pollrw(b))
    fact("w-attach-w", "  second write attach", lambda: vgem_attach(d, h, True))
    fact("w-attach-r", "  read attach", lambda: vgem_attach(d, h, False))
    fact("w-info", "  export RW: info", lambda: norm_info(file_info(export_sync_file(b, 3))))
    fact("w-signal-flags", "  FENCE_SIGNAL flags=1", lambda: vgem_signal(d, f, 1))
    fact("w-signal", "  FENCE_SIGNAL", lambda: vgem_signal(d, f))
    fact("w-signal-again", "  FENCE_SIGNAL again", lambda: vgem_signal(d, f))
    f = vgem_attach(d, h, False)
    fact("r-poll", "read fence attached: poll", lambda: pollrw(b))
    fact("r-attach-r", "  second read attach", lambda: vgem_attach(d, h, False) > 0)
    fact("r-attach-w", "  write attach", lambda: vgem_attach(d, h, True))
    vgem_signal(d, f)
    fact("r-poll-2", "  one of two read fences signalled: poll", lambda: pollrw(b))
    dd = open_drm("vgem")
    hh = prime_import(dd, b)
    for i in (f, f + 1, f + 2):
        try:
            vgem_signal(d, i)
        except OSError:
            pass
    vgem_attach(dd, hh, True)
    fact("close-file", "write fence pending, DRM file closed: poll before, after", lambda: [pollrw(b), os.close(dd), pollrw(b)])
    f = vgem_attach(d, h, True)
    time.monotonic()
    fact("timeout-wait", "unsignalled vgem fence: poll OUT (expires at 10 s)", lambda: pollmask(b, 4, 15000))
    fact("timeout-signal", "FENCE_SIGNAL after it expired", lambda: vgem_signal(d, f))
    fact("timeout-info", "  status of the export", lambda: file_info(export_sync_file(b, 3))["status"])
