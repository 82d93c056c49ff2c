"""sw_sync."""

import ctypes
import os
import re

from tests.kernel.questions.asking import U32, fact, getfl, new_buf, norm_info, pollrw
from tests.kernel.questions.raw import (
    _IOW,
    SW_SYNC,
    SW_SYNC_GET_DEADLINE,
    SW_SYNC_IOC_CREATE_FENCE,
    SW_SYNC_IOC_INC,
    SYNC_IOC_SET_DEADLINE,
    export_sync_file,
    file_info,
    import_sync_file,
    ioctl,
    ioctl_raw,
    merge,
    sw_fence,
    sw_inc,
    sw_sync,
    sync,
)


def deadline_merge(t8):
    tl = sw_sync()
    f, g = sw_fence(tl, 1), sw_fence(sw_sync(), 1)
    m = merge(f, g)
    ioctl(m, SYNC_IOC_SET_DEADLINE, "QQ", 7777, 0)
    return ioctl(t8, SW_SYNC_GET_DEADLINE, "QIi", 0, 0, f)[1][0]


def ask():
    fact("open", "open sw_sync", lambda: sw_sync(), fd=True)
    if not os.path.exists(SW_SYNC):
        return
    tl = sw_sync()
    fact("fl", "F_GETFL of a timeline", lambda: getfl(tl))
    fact("read", "read", lambda: os.read(tl, 1))
    fact("poll", "poll a timeline", lambda: pollrw(tl))
    fact("fence-0", "CREATE_FENCE value=0 on a new timeline: status", lambda: file_info(sw_fence(tl, 0))["status"])
    fact("fence-1", "CREATE_FENCE value=1: info", lambda: norm_info(file_info(sw_fence(tl, 1, b"f1"))))
    fact("fence-fl", "fence fd F_GETFL/F_GETFD", lambda: getfl(sw_fence(tl, 1)))
    fact("fence-noname", "CREATE_FENCE empty name: sync_file name", lambda: file_info(sw_fence(tl, 1, b""))["name"])
    fact("fence-name32", "CREATE_FENCE name of 32 bytes: sync_file name", lambda: file_info(sw_fence(tl, 1, b"n" * 32))["name"])
    fact("create-null", "CREATE_FENCE NULL", lambda: ioctl_raw(tl, SW_SYNC_IOC_CREATE_FENCE, None))
    fact("inc-null", "INC NULL", lambda: ioctl_raw(tl, SW_SYNC_IOC_INC, None))
    fact("ioctl-bad", "_IOW('W',9,4)", lambda: ioctl_raw(tl, _IOW("W", 9, 4), ctypes.create_string_buffer(8)))
    fact("inc-0", "INC 0", lambda: sw_inc(tl, 0))
    a, b, c = sw_fence(tl, 1), sw_fence(tl, 2), sw_fence(tl, 5)
    st = lambda *f: [file_info(x)["status"] for x in f]
    fact("st-0", "fences at 1,2,5 on timeline 0", lambda: st(a, b, c))
    sw_inc(tl, 1)
    fact("st-1", "after INC 1", lambda: st(a, b, c))
    sw_inc(tl, 4)
    fact("st-5", "after INC 4 more", lambda: st(a, b, c))
    fact("late", "CREATE_FENCE value=3 on timeline at 5", lambda: st(sw_fence(tl, 3)))
    fact(
        "merge-same-tl",
        "merge of fences 6 and 9 of one timeline: info",
        lambda: norm_info(file_info(merge(sw_fence(tl, 6), sw_fence(tl, 9), b"st"))),
    )
    fact(
        "same-value",
        "two fences with the same value: merge num_fences",
        lambda: file_info(merge(sw_fence(tl, 7), sw_fence(tl, 7)))["num_fences"],
    )
    t2 = sw_sync()
    x = sw_fence(t2, 1)
    y = sw_fence(t2, 3)
    fact("unordered", "INC 2 signals 1 not 3", lambda: (sw_inc(t2, 2), st(x, y))[1])
    os.close(t2)
    fact("close-tl", "close timeline with a pending fence: status", lambda: norm_info(file_info(y)))
    fact("close-poll", "  poll", lambda: pollrw(y))
    bb = new_buf()
    t3 = sw_sync()
    z = sw_fence(t3, 1)
    import_sync_file(bb, 2, z)
    os.close(t3)
    fact("err-dmabuf-poll", "dma-buf with an errored write fence: poll", lambda: pollrw(bb))
    fact("err-sync", "  SYNC START|RW returns", lambda: sync(bb, 3))
    fact("err-export", "  EXPORT info", lambda: norm_info(file_info(export_sync_file(bb, 3))))
    t4, t5 = sw_sync(), sw_sync()
    p, q = sw_fence(t4, 1), sw_fence(t5, 1)
    mg = merge(p, q, b"err")
    os.close(t4)
    fact("err-merge-half", "merge: one errored, one pending: info", lambda: norm_info(file_info(mg)))
    sw_inc(t5, 1)
    fact("err-merge-done", "  then the other signalled: info", lambda: norm_info(file_info(mg)))
    fact("err-merge-poll", "  poll", lambda: pollrw(mg))
    fact("err-remerge", "merge errored + fresh pending: info", lambda: norm_info(file_info(merge(p, sw_fence(t5, 5), b"rm"))))
    t6 = sw_sync()
    w = sw_fence(t6, 0x7FFFFFFF)
    fact("wrap-far", "fence at INT_MAX on timeline 0: status", lambda: st(w))
    fact("wrap-far+1", "fence at 0x80000000 on timeline 0: status", lambda: st(sw_fence(t6, 0x80000000)))
    fact("wrap-ffff", "fence at 0xffffffff on timeline 0: status", lambda: st(sw_fence(t6, U32)))
    fact("inc-over", "INC 0x80000000", lambda: sw_inc(t6, 0x80000000))
    fact("inc-max", "INC 0xffffffff", lambda: sw_inc(sw_sync(), U32))
    t7 = sw_sync()
    w1, w2 = sw_fence(t7, 10), sw_fence(t7, 0x7FFFFFF0)
    fact("inc-big", "INC 0x7fffffff: statuses of 10, 0x7ffffff0", lambda: (sw_inc(t7, 0x7FFFFFFF), st(w1, w2))[1])
    fd7 = sw_fence(t7, 0x80000005)
    fact("wrap-next", "then fence at 0x80000005: status, after INC 6", lambda: [st(fd7), sw_inc(t7, 6), st(fd7)])
    t8 = sw_sync()
    f8 = sw_fence(t8, 1)
    fact("deadline-none", "GET_DEADLINE with none set", lambda: ioctl(t8, SW_SYNC_GET_DEADLINE, "QIi", 0, 0, f8)[0])
    fact("deadline-pad", "GET_DEADLINE pad=1", lambda: ioctl(t8, SW_SYNC_GET_DEADLINE, "QIi", 0, 1, f8)[0])
    fact("deadline-fd", "GET_DEADLINE fence_fd=-1", lambda: ioctl(t8, SW_SYNC_GET_DEADLINE, "QIi", 0, 0, -1)[0])

    def dl():
        ioctl(f8, SYNC_IOC_SET_DEADLINE, "QQ", 5000, 0)
        ioctl(f8, SYNC_IOC_SET_DEADLINE, "QQ", 9000, 0)
        a = ioctl(t8, SW_SYNC_GET_DEADLINE, "QIi", 0, 0, f8)[1][0]
        ioctl(f8, SYNC_IOC_SET_DEADLINE, "QQ", 3000, 0)
        return [a, ioctl(t8, SW_SYNC_GET_DEADLINE, "QIi", 0, 0, f8)[1][0]]

    fact("deadline-min", "SET_DEADLINE 5000, 9000 -> GET; then 3000 -> GET (earliest kept)", dl)
    fact("deadline-deep", "SET_DEADLINE on a merge reaches its fences", lambda: deadline_merge(t8))
    fact(
        "sync-info",
        "/sys/kernel/debug/sync/info with timelines and fences",
        lambda: re.sub(r"0x[0-9a-f]+|[0-9a-f]{16}", "PTR", open("/sys/kernel/debug/sync/info").read())[:3000],
    )
    fact(
        "fence-outlives",
        "timeline fd closed after signal: status stays",
        lambda: (lambda t: (lambda f: (sw_inc(t, 1), os.close(t), st(f))[2])(sw_fence(t, 1)))(sw_sync()),
    )
    # no need for the fence fd: imported fence survives its sync_file
    b = new_buf()
    t9 = sw_sync()
    f9 = sw_fence(t9, 1)
    import_sync_file(b, 2, f9)
    os.close(f9)
    fact("import-survives", "sync_file closed after import: poll pending, then INC, poll", lambda: [pollrw(b), sw_inc(t9, 1), pollrw(b)])
