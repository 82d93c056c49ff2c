"""The machine: nodes, modes, parameters."""

import os
import platform
import stat

from tests.kernel.questions.asking import fact
from tests.kernel.questions.raw import drm_driver


def ask():
    fact("uname", "uname -r", lambda: platform.release())
    for p in (
        "/dev/udmabuf",
        "/dev/dma_heap",
        "/dev/dma_heap/system",
        "/sys/kernel/debug/dma_buf/bufinfo",
        "/sys/kernel/debug/sync/info",
        "/sys/kernel/debug/sync/sw_sync",
        "/sys/kernel/dmabuf/buffers",
        "/sys/module/udmabuf/parameters/size_limit_mb",
        "/sys/module/udmabuf/parameters/list_limit",
        "/dev/dri/card0",
        "/dev/dri/renderD128",
        "/dev/video0",
    ):

        def st(p=p):
            s = os.stat(p)
            rd = f" dev {os.major(s.st_rdev)}:{os.minor(s.st_rdev)}" if stat.S_ISCHR(s.st_mode) else ""
            return f"{stat.filemode(s.st_mode)} {s.st_uid}:{s.st_gid}" + (rd if "udmabuf" not in p and "heap" not in p else "")

        fact("stat-" + p.strip("/").replace("/", "-"), f"stat {p}", st)
    fact("heaps", "ls /dev/dma_heap", lambda: sorted(os.listdir("/dev/dma_heap")))
    fact(
        "dri",
        "DRM drivers present",
        lambda: {n: drm_driver(os.open("/dev/dri/" + n, os.O_RDWR)) for n in sorted(os.listdir("/dev/dri")) if n.startswith("card")},
    )
    fact("filesystems", "dmabuf in /proc/filesystems", lambda: [line.strip() for line in open("/proc/filesystems") if "dmabuf" in line])
    for n in ("size_limit_mb", "list_limit"):
        fact(n, f"/sys/module/udmabuf/parameters/{n}", lambda n=n: open(f"/sys/module/udmabuf/parameters/{n}").read().strip())
    fact("sysfs-dmabuf", "ls -R /sys/kernel/dmabuf (empty of buffers)", lambda: sorted(os.listdir("/sys/kernel/dmabuf")))
    fact("debugfs-dma_buf", "ls /sys/kernel/debug/dma_buf", lambda: sorted(os.listdir("/sys/kernel/debug/dma_buf")))
    fact("debugfs-sync", "ls /sys/kernel/debug/sync", lambda: sorted(os.listdir("/sys/kernel/debug/sync")))
    fact("bufinfo-empty", "bufinfo with no buffers", lambda: open("/sys/kernel/debug/dma_buf/bufinfo").read())
    fact("sync-info-empty", "sync/info with nothing", lambda: open("/sys/kernel/debug/sync/info").read())
