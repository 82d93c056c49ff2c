"""DMA_BUF_IOCTL_SYNC, and ioctls that there are not."""

import ctypes
import os
import signal

from tests.kernel.questions.asking import BAD, U32, Bufs, Fences, asleep, blocked, fact, record
from tests.kernel.questions.raw import (
    _IO,
    _IOR,
    _IOW,
    _IOWR,
    DMA_BUF_IOCTL_SYNC,
    PAGE,
    SYNC_IOC_FILE_INFO,
    SYNC_IOC_MERGE,
    import_sync_file,
    ioctl_raw,
    memfd,
    sync,
)


def interrupted(fd, end, restart):
    """A signal comes to a process that sleeps in SYNC; then `end` ends the wait, if it still goes on."""
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    pid = os.fork()
    if pid == 0:
        status = 126
        try:
            signal.signal(signal.SIGALRM, lambda *_: None)
            signal.siginterrupt(signal.SIGALRM, not restart)
            signal.set_wakeup_fd(wake)
            sync(fd, 3)
            status = 0
        except OSError as e:
            status = (e.errno or 0) & 0x7F
        finally:
            os._exit(status)
    assert asleep(pid)
    os.kill(pid, signal.SIGALRM)
    os.read(woken, 1)  # the handler of C has run
    again = asleep(pid)
    end()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code:
        raise OSError(code, "in the child")
    return [0, "until the fence" if again else "interrupted early"]


def ask():
    bs = Bufs()
    for n, fd in bs.fds.items():
        p = n + "-"
        fact(p + "end-first", f"{n}: SYNC END|READ without a START", lambda: sync(fd, 4 | 1))
        fact(p + "start-r", f"{n}: SYNC START|READ", lambda: sync(fd, 1))
        fact(p + "end-r", f"{n}: SYNC END|READ", lambda: sync(fd, 5))
        fact(p + "end-r-again", f"{n}: SYNC END|READ again (double end)", lambda: sync(fd, 5))
        fact(p + "start-w", f"{n}: SYNC START|WRITE", lambda: sync(fd, 2))
        fact(p + "start-w-again", f"{n}: SYNC START|WRITE again (double start)", lambda: sync(fd, 2))
        fact(p + "end-rw-mismatch", f"{n}: SYNC END|RW after START|WRITE", lambda: sync(fd, 7))
        fact(p + "start-rw", f"{n}: SYNC START|RW", lambda: sync(fd, 3))
        fact(p + "end-w", f"{n}: SYNC END|WRITE", lambda: sync(fd, 6))
        for fl in (0, 4, 8, 9, 0x10, 1 << 32 | 1, 1 << 63 | 1, (1 << 64) - 1):
            fact(p + f"flags-{fl:#x}", f"{n}: SYNC flags={fl:#x}", lambda: sync(fd, fl))
        fact(p + "null", f"{n}: SYNC arg=NULL", lambda: ioctl_raw(fd, DMA_BUF_IOCTL_SYNC, None))
        fact(p + "badptr", f"{n}: SYNC arg=bad pointer", lambda: ioctl_raw(fd, DMA_BUF_IOCTL_SYNC, BAD))
    n, fd = bs.any()
    for slug, req in (
        ("size-4", _IOW("b", 0, 4)),
        ("size-16", _IOW("b", 0, 16)),
        ("dir-WR", _IOWR("b", 0, 8)),
        ("dir-R", _IOR("b", 0, 8)),
        ("dir-none", _IO("b", 0)),
        ("nr-4", _IOW("b", 4, 8)),
        ("nr-255", _IOW("b", 255, 8)),
        ("type-c", _IOW("c", 0, 8)),
        ("zero", 0),
        ("ones", U32),
        ("name-noarg", _IO("b", 1)),
        ("export-W", _IOW("b", 2, 8)),
        ("import-WR", _IOWR("b", 3, 8)),
        ("sync-file-info", SYNC_IOC_FILE_INFO),
        ("merge", SYNC_IOC_MERGE),
    ):
        fact(
            "ioctl-" + slug,
            f"ioctl {req:#010x} on a dma-buf",
            lambda: ioctl_raw(fd, req, ctypes.create_string_buffer(b"\1" + bytes(79), 80)),
        )
    for slug, req in (
        ("FIONREAD", 0x541B),
        ("FIOCLEX", 0x5451),
        ("FIONCLEX", 0x5450),
        ("FIONBIO", 0x5421),
        ("FIOASYNC", 0x5452),
        ("TCGETS", 0x5401),
        ("FIGETBSZ", 2),
        ("FS_IOC_GETFLAGS", 0x80086601),
        ("FIOQSIZE", 0x5460),
    ):
        buf = ctypes.create_string_buffer(80)
        fact("ioctl-" + slug, f"generic ioctl {slug} on a dma-buf", lambda: [ioctl_raw(fd, req, buf), buf.raw[:8].hex()])
    fact("closed", "SYNC on a closed fd", lambda: sync(999, 1))
    fact("opath", "SYNC on an O_PATH reopen", lambda: sync(os.open(f"/proc/self/fd/{fd}", os.O_PATH), 1))
    dn = os.open("/dev/null", os.O_RDWR)
    fact("devnull", "SYNC on /dev/null", lambda: sync(dn, 1))
    r, _w = os.pipe()
    fact("pipe", "SYNC on a pipe", lambda: sync(r, 1))
    fact("memfd", "SYNC on a memfd", lambda: sync(memfd(PAGE), 1))
    # blocking on fences
    fs = Fences()
    if fs.kind:
        for bn in [x for x in bs.fds if x in ("heap:system", "udmabuf", "vgem")]:
            fd = bs.fds[bn]
            for use, uf in (("write", 2), ("read", 1)):
                for dirn, df in (("READ", 1), ("WRITE", 2), ("RW", 3)):
                    s, sig = fs.new()
                    import_sync_file(fd, uf, s)
                    call = f"{bn}: SYNC START|{dirn} with a pending {use} fence signalled after 400 ms"
                    record(f"{bn}-block-{use}-{dirn}", call, ret=blocked(lambda: sync(fd, df), sig))
                    os.close(s)
            s, sig = fs.new()
            import_sync_file(fd, 2, s)
            fact(f"{bn}-end-noblock", f"{bn}: SYNC END|RW with a pending write fence", lambda: blocked(lambda: sync(fd, 7), lambda: None))
            call = f"{bn}: SYNC START|RW on a pending fence, SIGALRM (SA_RESTART off) at 300 ms, fence signalled at 1 s"
            fact(f"{bn}-eintr", call, lambda: interrupted(fd, sig, restart=False))
            s, sig = fs.new()
            import_sync_file(fd, 2, s)
            fact(f"{bn}-restart", f"{bn}: the same with SA_RESTART on", lambda: interrupted(fd, sig, restart=True))
