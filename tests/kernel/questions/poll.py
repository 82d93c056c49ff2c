"""poll, select and epoll."""

import ctypes
import os
import re
import select
import struct
import threading

from tests.kernel.questions.asking import Fences, cnt, fact, new_buf, pollmask, pollrw
from tests.kernel.questions.raw import ck, import_sync_file, libc


def ppoll(fd, sec, nsec):
    b = ctypes.create_string_buffer(struct.pack("ihh", fd, 1, 0), 8)
    ts = ctypes.create_string_buffer(struct.pack("qq", sec, nsec), 16)
    return ck(libc.ppoll(b, ctypes.c_ulong(1), ts, None))


def rawpoll(fd, ev, to):
    b = ctypes.create_string_buffer(struct.pack("ihh", fd, ev, 0), 8)
    n = ck(libc.poll(b, ctypes.c_ulong(1), to))
    return [n, struct.unpack("ihh", b.raw)[2]]


def ask():
    fs = Fences()
    fact("source", "fence source used here", lambda: fs.kind)
    fd = new_buf()
    fact("none-rw", "poll IN|OUT, no fences", lambda: pollrw(fd))
    fact("none-in", "poll IN", lambda: pollmask(fd, 1))
    fact("none-out", "poll OUT", lambda: pollmask(fd, 4))
    fact("none-0", "poll events=0", lambda: pollmask(fd, 0))
    fact("none-pri", "poll PRI", lambda: pollmask(fd, 2))
    fact("none-rdnorm", "poll RDNORM", lambda: pollmask(fd, 0x40))
    fact("none-wrnorm", "poll WRNORM", lambda: pollmask(fd, 0x100))
    fact("none-all", "poll all bits", lambda: pollmask(fd, 0x3FF))
    fact("select", "select r,w,x", lambda: [bool(x) for x in select.select([fd], [fd], [fd], 0)])
    fact("closed", "poll a closed fd", lambda: pollmask(999, 1))
    fact("neg-fd", "poll fd=-1 (ignored)", lambda: rawpoll(-1, 1, 0))
    fact("epoll-add", "epoll add", lambda: select.epoll().register(fd, 5))
    if not fs.kind:
        return
    for use, uf in (("write", 2), ("read", 1), ("rw", 3)):
        b = new_buf()
        s, sig = fs.new()
        import_sync_file(b, uf, s)
        fact(f"{use}-rw", f"pending {use} fence: poll IN|OUT", lambda: pollrw(b))
        fact(f"{use}-in", f"pending {use} fence: poll IN", lambda: pollmask(b, 1))
        fact(f"{use}-out", f"pending {use} fence: poll OUT", lambda: pollmask(b, 4))
        fact(f"{use}-0", f"pending {use} fence: poll 0", lambda: pollmask(b, 0))
        fact(f"{use}-timeout", f"pending {use} fence: poll OUT timeout 200 ms", lambda: pollmask(b, 4, 200))
        t = threading.Thread(target=sig)
        t.start()
        fact(f"{use}-wake", f"pending {use} fence: poll OUT, signalled at 300 ms", lambda: pollmask(b, 4, 60000))
        t.join()
        fact(f"{use}-after", "after signal: poll IN|OUT", lambda: pollrw(b))
        os.close(s)
    b = new_buf()
    s1, g1 = fs.new()
    s2, g2 = fs.new()
    import_sync_file(b, 1, s1)
    import_sync_file(b, 2, s2)
    fact("two-0", "read fence A + write fence B pending", lambda: pollrw(b))
    g1()
    fact("two-1", "A signalled", lambda: pollrw(b))
    g2()
    fact("two-2", "B signalled", lambda: pollrw(b))
    b = new_buf()
    s1, g1 = fs.new()
    s2, g2 = fs.new()
    import_sync_file(b, 1, s1)
    import_sync_file(b, 2, s2)
    g2()
    fact("two-3", "only B (write) signalled, A (read) pending", lambda: pollrw(b))
    g1()
    # edge: close while polled
    ep = select.epoll()
    b = new_buf()
    s, g = fs.new()
    import_sync_file(b, 2, s)
    ep.register(b, select.EPOLLIN | select.EPOLLOUT | select.EPOLLET)
    fact("epollet-0", "EPOLLET IN|OUT, pending", lambda: [e for _, e in ep.poll(0)])
    g()
    fact(
        "epollet-1", "EPOLLET after the signal: events of 5 epoll_waits in a row", lambda: [[e for _, e in ep.poll(0.2)] for _ in range(5)]
    )
    ep3 = select.epoll()
    idle = new_buf()
    ep3.register(idle, select.EPOLLIN | select.EPOLLOUT | select.EPOLLET)
    fact(
        "epollet-idle",
        "EPOLLET on a dma-buf with no fences: events of 5 epoll_waits in a row",
        lambda: [[e for _, e in ep3.poll(0.1)] for _ in range(5)],
    )
    b = new_buf()
    s, g = fs.new()
    import_sync_file(b, 2, s)
    ep2 = select.epoll()
    ep2.register(b, select.EPOLLIN | select.EPOLLONESHOT)
    fact(
        "epolloneshot",
        "EPOLLONESHOT: pending, signalled, again",
        lambda: [[e for _, e in ep2.poll(0)], g(), [e for _, e in ep2.poll(0.2)], [e for _, e in ep2.poll(0.05)]][::1],
    )
    # close while the callback is queued keeps the buffer alive
    b = new_buf()
    ino = os.fstat(b).st_ino
    s, g = fs.new()
    import_sync_file(b, 2, s)
    pollrw(b)
    fact("count-polled", "fdinfo count while a poll callback is queued", lambda: cnt(b))
    os.close(b)
    alive = lambda: any(re.search(rf"\b0*{ino}\b", line) for line in open("/sys/kernel/debug/dma_buf/bufinfo"))
    fact("alive-polled", "buffer in bufinfo after close with a queued poll callback", alive)
    g()
    # The last reference goes by a work of the kernel, a little later.
    select.select([], [], [], 0.1)
    fact("alive-after", "  and after the fence is signalled", alive)
    # signalled before import
    b = new_buf()
    s, g = fs.new()
    g()
    import_sync_file(b, 2, s)
    fact("import-signalled", "import of an already signalled fence, poll", lambda: pollrw(b))
    # sync_file poll
    s, g = fs.new()
    fact("sf-pending", "sync_file pending: poll IN|OUT", lambda: pollrw(s))
    fact("sf-pending-all", "sync_file pending: poll all bits", lambda: pollmask(s, 0x3FF))
    fact("sf-timeout", "sync_file pending: poll IN timeout 200", lambda: pollmask(s, 1, 200))
    t = threading.Thread(target=g)
    t.start()
    fact("sf-wake", "sync_file signalled at 300 ms", lambda: pollmask(s, 1, 60000))
    t.join()
    fact("sf-done-rw", "sync_file signalled: poll IN|OUT", lambda: pollrw(s))
    fact("sf-done-out", "sync_file signalled: poll OUT", lambda: pollmask(s, 4))
    fact("sf-done-0", "sync_file signalled: poll 0", lambda: pollmask(s, 0))
    fact("sf-done-all", "sync_file signalled: poll all bits", lambda: pollmask(s, 0x3FF))
    fact("poll-neg-timeout", "poll timeout -5 (signalled; negative = infinite)", lambda: rawpoll(s, 1, -5))
    fact("ppoll-neg", "ppoll tv_sec=-1", lambda: ppoll(s, -1, 0))
    fact("ppoll-nsec", "ppoll tv_nsec=10^9", lambda: ppoll(s, 0, 10**9))
