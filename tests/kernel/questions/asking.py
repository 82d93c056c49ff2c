"""How the running kernel is asked, and its answers kept.

A fact is ``{"id": "area/slug", "call": text}`` with one of ``"ret"``, ``"errno"`` and ``"signal"``. Each area of questions runs in a forked
child of its own, so that a crash or a hang loses that area only, and no descriptor or mapping stays behind.
"""

import ctypes
import errno
import faulthandler
import fcntl
import json
import mmap as pymmap
import os
import re
import select
import signal
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.kernel.questions.raw import (
    _IOR,
    _IOWR,
    DMA_BUF_SYNC_RW,
    PAGE,
    SW_SYNC,
    create_dumb,
    export_sync_file,
    heap_alloc,
    ioctl,
    ioctl_raw,
    memfd,
    mmap,
    open_drm,
    prime_export,
    sw_fence,
    sw_inc,
    sw_sync,
    udmabuf,
    vgem_attach,
    vgem_signal,
)

PROT_R, PROT_W, PROT_X = 1, 2, 4
SH, PR = pymmap.MAP_SHARED, pymmap.MAP_PRIVATE
BAD = 0x10  # an unmapped user address
U32 = 0xFFFFFFFF
_PR_SET_NAME = 15  # linux/prctl.h
# The kernel names a sw_sync timeline by the process that opened it.
COMM = b"python3"
# Where the child of an area sends its facts: its end of a pipe.
_pipe = -1
_area = ""


def record(slug: str, call: str, **answer: Any) -> None:
    """Keep a fact, sent on at once so that a crash loses none."""
    os.write(_pipe, json.dumps({"id": f"{_area}/{slug}", "call": call, **answer}).encode() + b"\n")


def fact(slug: str, call: str, ask: Callable[[], Any], fd: bool = False) -> Any:
    """Keep what `ask` returns. ``fd``: that is a new descriptor, kept as "fd" and closed."""
    try:
        value = ask()
    except OSError as e:
        record(slug, call, errno=errno.errorcode.get(e.errno or 0, str(e.errno)))
        return None
    if fd:
        os.close(value)
        value = "fd"
    record(slug, call, ret=value)
    return value


def blocked(call: Callable[[], Any], end: Callable[[], None]) -> list[Any]:
    """What a call returns (0, an errno's name) and whether it slept until `end` was called."""
    ready, about = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(about, b"r")
            call()
            os._exit(0)
        except OSError as e:
            os._exit((e.errno or 0) & 0x7F)
        except BaseException:
            os._exit(126)
    os.read(ready, 1)
    os.close(ready)
    os.close(about)
    slept = asleep(pid)
    end()
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    return [errno.errorcode.get(code, code) if code else 0, "blocked" if slept else "did not block"]


def asleep(pid: int) -> bool:
    """Is a child asleep, or has it ended? It does nothing that sleeps but the call in question; three looks tell it from a page fault."""
    looks, poller = 0, select.poll()
    pidfd = os.pidfd_open(pid)
    poller.register(pidfd, select.POLLIN)
    try:
        while looks < 3:
            if poller.poll(10):
                return False
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
            looks = looks + 1 if state == "S" else 0
        return True
    finally:
        os.close(pidfd)


def run(area: str, ask: Callable[[], None], timeout: float = 100) -> list[dict[str, Any]]:
    """The facts of one area, and how it ended, if it did not end well."""
    global _pipe, _area
    into, out = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(into)
            _pipe, _area = out, area
            faulthandler.disable()  # some questions are whether a touch ends in SIGSEGV
            ctypes.CDLL(None).prctl(_PR_SET_NAME, COMM)
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            ask()
            status = 0
        except BaseException:
            import traceback

            record("ABORTED", "the questions stopped here", ret=traceback.format_exc()[-1500:])
        finally:
            os._exit(status)
    os.close(out)
    data, end = b"", time.monotonic() + timeout
    while True:
        if not select.select([into], [], [], max(0, end - time.monotonic()))[0]:
            os.kill(pid, signal.SIGKILL)
            break
        chunk = os.read(into, 65536)
        if not chunk:
            break
        data += chunk
    os.close(into)
    _, status = os.waitpid(pid, 0)
    got = [json.loads(line) for line in data.decode().splitlines()]
    if os.WIFSIGNALED(status):
        got.append(
            {"id": f"{area}/KILLED", "call": "the questions were ended by a signal", "signal": signal.Signals(os.WTERMSIG(status)).name}
        )
    return got


def sig_of(fn):
    """run fn in a child; 'ok' or the signal that killed it"""
    pid = os.fork()
    if pid == 0:
        try:
            fn()
            os._exit(0)
        except OSError as e:
            os._exit(e.errno & 0x7F)
        except BaseException:
            os._exit(126)
    _, st = os.waitpid(pid, 0)
    if os.WIFSIGNALED(st):
        return signal.Signals(os.WTERMSIG(st)).name
    c = os.WEXITSTATUS(st)
    return "ok" if c == 0 else errno.errorcode.get(c, str(c))


def oom_child(fn):
    """fn in a child that the OOM killer prefers; 'ok', errno name or the signal"""

    def go():
        open("/proc/self/oom_score_adj", "w").write("1000")
        fn()

    return sig_of(go)


def pollmask(fd, mask, timeout_ms=0):
    p = select.poll()
    p.register(fd, mask)
    r = p.poll(timeout_ms)
    names = {
        "POLLIN": 1,
        "POLLPRI": 2,
        "POLLOUT": 4,
        "POLLERR": 8,
        "POLLHUP": 16,
        "POLLNVAL": 32,
        "POLLRDNORM": 64,
        "POLLRDBAND": 128,
        "POLLWRNORM": 256,
        "POLLWRBAND": 512,
    }
    return "|".join(n for n, b in names.items() if r and r[0][1] & b) or "0"


def pollrw(fd):
    return pollmask(fd, select.POLLIN | select.POLLOUT)


def fdinfo(fd, norm=True):
    t = open(f"/proc/self/fdinfo/{fd}").read()
    if norm:
        t = re.sub(r"(?m)^(mnt_id|ino):\t\d+$", r"\1:\tN", t)
    return t


def link(fd):
    return os.readlink(f"/proc/self/fd/{fd}")


def getfl(fd):
    v = fcntl.fcntl(fd, fcntl.F_GETFL)
    n = {0: "O_RDONLY", 1: "O_WRONLY", 2: "O_RDWR", 3: "O_ACCMODE(3)"}[v & 3]
    rest = v & ~3 & ~0o100000
    return n + (f"|{rest:#o}" if rest else "") + ("|FD_CLOEXEC" if fcntl.fcntl(fd, fcntl.F_GETFD) & 1 else "")


def poke(addr, data):
    ctypes.memmove(addr, data, len(data))


def peek(addr, n):
    return ctypes.string_at(addr, n)


class Bufs:
    """one dma-buf of each exporter present: name -> (fd, size)"""

    def __init__(self, npages=4):
        self.fds, self.keep = {}, []
        if os.path.exists("/dev/udmabuf"):
            m = memfd(npages * PAGE)
            self.keep.append(m)
            try:
                self.fds["udmabuf"] = udmabuf(m, 0, npages * PAGE)
            except OSError as e:
                record("udmabuf", "UDMABUF_CREATE", errno=errno.errorcode[e.errno or 0])
        for h in sorted(os.listdir("/dev/dma_heap")) if os.path.isdir("/dev/dma_heap") else []:
            try:
                self.fds["heap:" + h] = heap_alloc(npages * PAGE, heap=h)
            except OSError as e:
                record(f"alloc-{h}", f"alloc from heap {h}", errno=errno.errorcode[e.errno or 0])
        for drv in ("vgem", "vkms"):
            d = open_drm(drv)
            if d is not None:
                h, _size = create_dumb(d, 64, 16 * npages)  # 64*4 B/line * 16 = 1 page
                self.fds[drv] = prime_export(d, h)
                self.keep += [d, h]
                setattr(self, drv, (d, h))
        v = vivid_export()
        if v:
            self.keep.append(v)
            self.fds["vivid"] = v[1]

    def any(self):
        for n in ("heap:system", "udmabuf", "vgem"):
            if n in self.fds:
                return n, self.fds[n]


def vivid_export():
    """VIDIOC_REQBUFS + EXPBUF on the first vivid capture node; None if there is none"""
    VIDIOC_REQBUFS, VIDIOC_EXPBUF, VIDIOC_QUERYCAP = _IOWR("V", 8, 20), _IOWR("V", 16, 64), _IOR("V", 0, 104)
    for i in range(8):
        p = f"/dev/video{i}"
        if not os.path.exists(p):
            continue
        fd = os.open(p, os.O_RDWR | os.O_CLOEXEC)
        cap = ctypes.create_string_buffer(104)
        ioctl_raw(fd, VIDIOC_QUERYCAP, cap)
        if not cap.raw.startswith(b"vivid") or not struct.unpack_from("I", cap.raw, 88)[0] & 1:
            os.close(fd)
            continue
        try:
            ioctl(fd, VIDIOC_REQBUFS, "IIIIB3x", 2, 1, 1, 0, 0)
            raw = struct.pack("IIIIi11I", 1, 0, 0, os.O_RDWR | os.O_CLOEXEC, -1, *[0] * 11)
            buf = ctypes.create_string_buffer(raw, 64)
            ioctl_raw(fd, VIDIOC_EXPBUF, buf)
            return fd, struct.unpack_from("i", buf.raw, 16)[0]
        except OSError as e:
            record("vivid", f"EXPBUF on {p}", errno=errno.errorcode[e.errno or 0])
            os.close(fd)
    return None


class Fences:
    """pending fences from user space: sw_sync where present, else vgem"""

    def __init__(self):
        self.kind = None
        if os.path.exists(SW_SYNC):
            self.kind, self.tl, self.n = "sw_sync", sw_sync(), 0
        else:
            self.d = open_drm("vgem")
            if self.d is not None:
                self.kind = "vgem"

    def new(self):
        """-> (sync_file fd of a pending fence, function that signals it)"""
        if self.kind == "sw_sync":
            tl = sw_sync()
            return sw_fence(tl, 1), lambda: sw_inc(tl, 1)
        h, _ = create_dumb(self.d)
        b = prime_export(self.d, h)
        f = vgem_attach(self.d, h, True)
        s = export_sync_file(b, DMA_BUF_SYNC_RW)
        os.close(b)
        return s, lambda: vgem_signal(self.d, f)


def new_buf(np=1):
    if os.path.exists("/dev/dma_heap/system"):
        return heap_alloc(np * PAGE)
    if os.path.exists("/dev/udmabuf"):
        return udmabuf(memfd(np * PAGE), 0, np * PAGE)
    d = open_drm("vgem")
    h, _ = create_dumb(d, 64, 16 * np)
    return prime_export(d, h)


def cnt(fd):
    return int(re.search(r"count:\t(-?\d+)", fdinfo(fd))[1])


def mmap_try(*a):
    try:
        return mmap(*a)
    except OSError:
        return None


def norm_info(i):
    for f in i["fences"]:
        f["timestamp_ns"] = (
            "0"
            if f["timestamp_ns"] == 0
            else "monotonic"
            if f["timestamp_ns"] <= time.monotonic_ns()  # the stub's is as old as the machine
            else "realtime"
            if abs(time.time_ns() - f["timestamp_ns"]) < 30e9
            else "other"
        )
        f["obj_name"] = re.sub(r"-?\d+-python3", "N-python3", f["obj_name"])
    i["name"] = re.sub(r"\d+", "N", i["name"])
    return i
