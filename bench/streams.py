"""Streams: a frame made, read and given back, and frames in a row, beside what a ring of memory and two words can do.

The limit is `limit_round_trip`: a memfd with four frames, and two words that the smallest C extension counts up and waits for. On two CPUs
it spins at most 20 µs. Both sides touch the first and the last byte of each frame.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import time
from functools import partial

import dmabuf
from bench import floor
from bench.peers import cpus, peer, pinned, timed
from bench.table import Spec, Timing

ROUNDS, WARM, SLOTS = 3000, 300, 4
MANY = 8_294_400  # bytes of 1920 × 1080 in 4 bytes
MOST = 4 * MANY  # of 3840 × 2160
SIZES = ((4096, "4 KiB"), (1 << 20, "1 MiB"), (MANY, "8.3 MB"), (MOST, "33 MB"))
BOUND, LATEST_BOUND = 1.1, 1.3
LIMIT = "a ring of memory and two words, by the smallest C extension"


class Ring:
    """Memory for frames, and two words."""

    def __init__(self, size: int) -> None:
        self.size, self.extension = size, floor.extension()
        self.fd = os.memfd_create("ring")
        os.ftruncate(self.fd, SLOTS * size)
        self.memory = mmap.mmap(self.fd, SLOTS * size)
        self.views = [memoryview(self.memory)[i * size : (i + 1) * size] for i in range(SLOTS)]
        for view in self.views:
            view[::4096] = bytes(len(range(0, size, 4096)))
        self.words = mmap.mmap(-1, mmap.PAGESIZE)
        self.head = ctypes.addressof(ctypes.c_char.from_buffer(self.words))
        self.done = self.head + 64

    def close(self) -> None:
        for view in self.views:
            view.release()
        self.memory.close()
        os.close(self.fd)

    def wait(self, split: bool, word: int, value: int) -> None:
        if split:
            self.extension.wait_smart(word, value, 20)
        else:
            self.extension.wait_ge(word, value)

    def read(self, split: bool, count: int, sock: socket.socket) -> None:
        """Look at both ends of so many frames, and give each back."""
        views, bump, head, done, last = self.views, self.extension.bump, self.head, self.done, self.size - 1
        sock.send(b"r")
        for i in range(count):
            self.wait(split, head, i + 1)
            view = views[i % SLOTS]
            if view[0] != i & 255 or view[last] != i & 255:
                raise RuntimeError("wrong bytes")
            bump(done)
        sock.recv(1)


def limit_round_trip(size: int, split: bool) -> float:
    """A frame through the limit's ring and back, in µs."""
    ring = Ring(size)
    here, there = cpus(split)
    views, bump, head, done = ring.views, ring.extension.bump, ring.head, ring.done
    last = size - 1

    samples = []
    clock = time.perf_counter_ns
    with peer(partial(ring.read, split, ROUNDS), there) as sock, pinned(here):
        sock.recv(1)
        for i in range(ROUNDS):
            start = clock()
            view = views[i % SLOTS]
            view[0] = view[last] = i & 255
            bump(head)
            ring.wait(split, done, i + 1)
            samples.append(clock() - start)
    ring.close()
    return Timing.of(samples[WARM:])


def touch_all(stream: dmabuf.Stream) -> None:
    """Have the pages of all slots there, and mapped."""
    for _ in stream.bufs:
        with stream.produce() as frame:
            frame.view[::4096] = bytes(len(range(0, len(frame.view), 4096)))


def _read(stream: dmabuf.Stream, array: bool, sock: socket.socket, count: int) -> None:
    """Read so many frames, and look at both ends of each."""
    with stream, stream.reader(newest=False) as reader:
        sock.send(b"r")
        last, i = stream.bufs[0].size - 1, 0
        for frame in reader:
            if array:
                shown = frame.array()
                whole = shown[0] == i & 255 and shown[last] == i & 255
                del shown
            else:
                view = frame.view
                whole = view[0] == i & 255 and view[last] == i & 255
            if not whole:
                raise RuntimeError("wrong bytes")
            i += 1
            if i == count:
                break
        del frame


def round_trip(size: int, split: bool, array: bool = False) -> float:
    """A frame made, read by another process and given back, in µs."""
    here, there = cpus(split)
    stream = dmabuf.Stream.create(size=size, buffers=SLOTS, meta_bytes=0)
    touch_all(stream)

    def body(sock: socket.socket) -> None:
        (theirs,) = dmabuf.recv(sock)
        _read(theirs, array, sock, ROUNDS)
        sock.recv(1)

    samples = []
    clock = time.perf_counter_ns
    produce, drain, last = stream.produce, stream.drain, stream.bufs[0].size - 1
    with peer(body, there) as sock, pinned(here):
        dmabuf.send(sock, stream)
        sock.recv(1)
        for i in range(ROUNDS):
            start = clock()
            with produce() as frame:
                if array:
                    shown = frame.array()
                    shown[0] = shown[last] = i & 255
                    del shown
                else:
                    view = frame.view
                    view[0] = view[last] = i & 255
            drain()
            samples.append(clock() - start)
    stream.close()
    return Timing.of(samples[WARM:])


def latest_round_trip(size: int, split: bool) -> float:
    """A frame to a "latest" reader, which answers with a frame of a stream of its own, in µs."""
    here, there = cpus(split)
    forth = dmabuf.Stream.create(size=size, buffers=SLOTS, meta_bytes=0)
    back = dmabuf.Stream.create(size=4096, buffers=SLOTS, meta_bytes=0)
    touch_all(forth)
    last = forth.bufs[0].size - 1

    def body(sock: socket.socket) -> None:
        theirs, answers = dmabuf.recv(sock)
        with theirs, answers, theirs.reader("latest", newest=False) as reader:
            sock.send(b"r")
            take, answer = reader.next, answers.produce
            for i in range(ROUNDS):
                with take() as frame:
                    view = frame.view
                    if view[0] != i & 255 or view[last] != i & 255:
                        raise RuntimeError("wrong bytes")
                with answer():
                    pass
            sock.recv(1)

    samples = []
    clock = time.perf_counter_ns
    with peer(body, there) as sock, pinned(here), back.reader("latest") as reader:
        dmabuf.send(sock, forth, back)
        sock.recv(1)
        produce, take = forth.produce, reader.next
        for i in range(ROUNDS):
            start = clock()
            with produce() as frame:
                view = frame.view
                view[0] = view[last] = i & 255
            with take():
                pass
            samples.append(clock() - start)
    forth.close()
    back.close()
    return Timing.of(samples[WARM:])


def _shared(sock: socket.socket, there: socket.socket, buf: dmabuf.DmaBuf) -> None:
    """Fill both ends of a buffer, pass it on, and have the receiver look at them and close it."""
    with buf.write() as view:
        view[0] = view[-1] = 1
    dmabuf.send(sock, buf)
    (received,) = dmabuf.recv(there)
    with received.read() as view:
        if view[0] + view[-1] != 2:
            raise RuntimeError("wrong bytes")
    received.close()


def fresh_buffer() -> float:
    """A new buffer allocated, filled at its ends, shared and released, in µs."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def once() -> None:
        with dmabuf.allocate(MANY) as buf:
            _shared(here, there, buf)

    with here, there, pinned(cpus(False)[0]):
        return timed(once, batches=40, batch=5)


def pooled_buffer() -> float:
    """The same of a buffer that a pool gives, in µs."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with here, there, dmabuf.Pool(MANY, 2) as pool, pinned(cpus(False)[0]):

        def once() -> None:
            with pool.take() as buf:
                _shared(here, there, buf)

        return timed(once, batches=40, batch=5)


def rows(quick: bool) -> list[Spec]:
    """The rows of round trips, and of pools. A quick run takes the largest and the smallest frame."""
    found = []
    for size, text in SIZES[:: len(SIZES) - 1] if quick else SIZES:
        for split, where in ((False, "one CPU"), (True, "two CPUs")):
            limit = partial(limit_round_trip, size, split)
            found.append(Spec(f"frame round trip of {text}, {where}", partial(round_trip, size, split), limit, LIMIT, BOUND))
            if size == MANY or quick:
                bound = 2.2 if split else 1.25
                what = f"  the same with frame.array(), {where}"
                found.append(Spec(what, partial(round_trip, size, split, True), limit, LIMIT, bound))
            what = f"  the same to a latest reader, and a frame back, {where}"
            found.append(Spec(what, partial(latest_round_trip, size, split), limit, LIMIT, LATEST_BOUND))
    what = "buffer of 8.3 MB from a Pool, filled at its ends, shared and released"
    found.append(Spec(what, pooled_buffer, fresh_buffer, "the same of a fresh one", 0.05))
    return found
