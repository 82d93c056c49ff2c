"""A dma-buf as a file."""

import ctypes
import fcntl
import os
import socket
import struct

from tests.kernel.questions.asking import SH, Bufs, cnt, fact, fdinfo, getfl, new_buf, peek, poke
from tests.kernel.questions.raw import F_ADD_SEALS, F_GET_SEALS, PAGE, ck, libc, memfd, mmap


def shared_fork():
    fd = new_buf()
    a = mmap(PAGE, 3, SH, fd)
    if os.fork() == 0:
        poke(a, b"child")
        os._exit(0)
    os.wait()
    return peek(a, 5).decode()


def ask():
    bs = Bufs()
    for n, fd in bs.fds.items():
        p = n + "-"
        fact(p + "size", f"{n}: lseek END 0", lambda: os.lseek(fd, 0, 2))
        fact(
            p + "fstat",
            f"{n}: fstat mode,nlink,uid,size,blksize,blocks",
            lambda: (lambda s: [oct(s.st_mode), s.st_nlink, s.st_uid, s.st_size, s.st_blksize, s.st_blocks])(os.fstat(fd)),
        )
        fact(p + "fl", f"{n}: F_GETFL/F_GETFD", lambda: getfl(fd))
        fact(p + "fdinfo", f"{n}: fdinfo", lambda: fdinfo(fd))
    n, fd = bs.any()
    for w, nm in ((0, "SET"), (1, "CUR"), (2, "END"), (3, "DATA"), (4, "HOLE"), (5, "5"), (-1, "-1")):
        for off in (0, 1, -1, PAGE, 1 << 40):
            fact(f"lseek-{nm}-{off}", f"lseek(fd, {off}, SEEK_{nm})", lambda: os.lseek(fd, off, w))
    fact(
        "pos",
        "fdinfo pos after SEEK_END",
        lambda: (os.lseek(fd, 0, 2), [line for line in fdinfo(fd).split("\n") if line.startswith("pos")])[1],
    )
    buf = bytearray(8)
    fact("read", "read", lambda: os.read(fd, 1))
    fact("read-0", "read 0 bytes", lambda: os.read(fd, 0).decode())
    fact("pread", "pread", lambda: os.pread(fd, 1, 0))
    fact("write", "write", lambda: os.write(fd, b"x"))
    fact("pwrite", "pwrite", lambda: os.pwrite(fd, b"x", 0))
    fact("readv", "readv", lambda: os.readv(fd, [buf]))
    fact("ftruncate", "ftruncate(fd, 0)", lambda: os.ftruncate(fd, 0))
    fact("ftruncate-same", "ftruncate(fd, size)", lambda: os.ftruncate(fd, 4 * PAGE))
    fact("fallocate", "posix fallocate(2) mode 0", lambda: ck(libc.fallocate(fd, 0, ctypes.c_long(0), ctypes.c_long(PAGE))))
    fact("fsync", "fsync", lambda: os.fsync(fd))
    fact("fdatasync", "fdatasync", lambda: os.fdatasync(fd))
    fact("fchmod", "fchmod 0600", lambda: os.fchmod(fd, 0o600))
    fact("mode-after-fchmod", "st_mode after it", lambda: oct(os.fstat(fd).st_mode))
    fact("fchown", "fchown 0:0", lambda: os.fchown(fd, 0, 0))
    fact("futimens", "futimens", lambda: os.utime(fd))
    fact("flock", "flock EX", lambda: fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB))
    fact("setlk", "fcntl F_SETLK write lock", lambda: fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB))
    fact("get-seals", "F_GET_SEALS", lambda: fcntl.fcntl(fd, F_GET_SEALS))
    fact("add-seals", "F_ADD_SEALS SHRINK", lambda: fcntl.fcntl(fd, F_ADD_SEALS, 2))
    fact("setfl-nonblock", "F_SETFL O_NONBLOCK", lambda: fcntl.fcntl(fd, fcntl.F_SETFL, os.O_NONBLOCK))
    fact("setfl-append", "F_SETFL O_APPEND", lambda: fcntl.fcntl(fd, fcntl.F_SETFL, os.O_APPEND))
    fact("setfl-async", "F_SETFL O_ASYNC", lambda: fcntl.fcntl(fd, fcntl.F_SETFL, os.O_ASYNC))
    fact("setfl-direct", "F_SETFL O_DIRECT", lambda: fcntl.fcntl(fd, fcntl.F_SETFL, os.O_DIRECT))
    fact("getfl-after", "F_GETFL after those", lambda: getfl(fd))
    fcntl.fcntl(fd, fcntl.F_SETFL, 0)
    fact("reopen", "open(/proc/self/fd/N, O_RDWR)", lambda: os.open(f"/proc/self/fd/{fd}", os.O_RDWR), fd=True)
    fact("reopen-path", "open(/proc/self/fd/N, O_PATH)", lambda: os.open(f"/proc/self/fd/{fd}", os.O_PATH), fd=True)
    fact(
        "fstatfs",
        "fstatfs bsize, frsize, blocks, namemax",
        lambda: (lambda s: [s.f_bsize, s.f_frsize, s.f_blocks, s.f_namemax])(os.fstatvfs(fd)),
    )

    def ftype():
        b = ctypes.create_string_buffer(256)
        ck(libc.fstatfs(fd, b))
        return hex(struct.unpack_from("q", b.raw)[0])

    fact("f_type", "fstatfs f_type (DMA_BUF_MAGIC)", ftype)
    _r, w = os.pipe()
    fact("sendfile", "sendfile(pipe, dmabuf)", lambda: os.sendfile(w, fd, 0, 10))
    fact("splice", "splice(dmabuf -> pipe)", lambda: os.splice(fd, w, 10))
    fact("getxattr", "fgetxattr user.x", lambda: os.getxattr(fd, "user.x"))
    fact("listxattr", "flistxattr", lambda: os.listxattr(fd))
    fact("fchdir", "fchdir", lambda: os.fchdir(fd))
    fact("getdents", "listdir(fd)", lambda: os.listdir(fd))
    fact("copy_file_range", "copy_file_range", lambda: os.copy_file_range(fd, memfd(PAGE), 10))
    fact("posix_fadvise", "posix_fadvise", lambda: os.posix_fadvise(fd, 0, 0, 0))
    fact(
        "ino-unique",
        "two buffers have different st_ino, same st_dev",
        lambda: (lambda s: [s[0].st_ino != s[1].st_ino, s[0].st_dev == s[1].st_dev])([os.fstat(f) for f in list(bs.fds.values())[:2]]),
    )
    fact(
        "ino-sequence",
        "st_ino of 3 new buffers: steps",
        lambda: (lambda i: [i[1] - i[0], i[2] - i[1]])([os.fstat(f).st_ino for f in [new_buf() for _ in range(3)]]),
    )
    fact("count-1", "fdinfo count with 1 fd", lambda: cnt(fd))
    d2 = os.dup(fd)
    fact("count-dup", "count with a dup", lambda: cnt(fd))
    a = mmap(PAGE, 1, SH, fd)
    fact("count-mmap", "count with dup + 1 mmap", lambda: cnt(fd))
    libc.munmap(a, PAGE)
    os.close(d2)
    wait, let = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(let)
        os.read(wait, 1)
        os._exit(0)
    fact("count-fork", "count with a forked child holding it", lambda: cnt(fd))
    os.close(let)
    os.waitpid(pid, 0)
    os.close(wait)
    s1, s2 = socket.socketpair()
    socket.send_fds(s1, [b"x"], [fd])
    fact("count-inflight", "count with the fd in flight in SCM_RIGHTS", lambda: cnt(fd))
    _, got, _, _ = socket.recv_fds(s2, 1, 1)
    fact("scm-ino", "received fd is the same buffer (st_ino)", lambda: os.fstat(got[0]).st_ino == os.fstat(fd).st_ino)
    fact("scm-fl", "received fd F_GETFL/F_GETFD (python adds CLOEXEC)", lambda: getfl(got[0]).split("|")[0])
    os.close(got[0])
    fact("kcmp", "kcmp FILE of dup", lambda: ck(libc.syscall(312, os.getpid(), os.getpid(), 0, fd, os.dup(fd))))
    fact("execve-inherit", "dma-buf over fork shared memory (child writes, parent reads)", shared_fork)
