"""Ways to hand frames from one process to others, all used alike: ours, the limit's, and those of other libraries.

A producer writes the number of a frame into its first bytes, and its last byte. Readers look at both. ``make bench PEERS=1`` installs
the other libraries (bench/peers.txt); one that isn't there is left out. Our queue readers, the limit's and those by a Pipe get every
frame. Those of kickmsg and iceoryx2 lose frames when they are behind, as our latest readers do: their producers never wait for them.
"""

from __future__ import annotations

import ctypes
import datetime
import importlib
import importlib.util
import itertools
import mmap
import multiprocessing
import os
import struct
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from typing import Any, Literal, Protocol

import dmabuf
from bench import floor

SLOTS = 4
_names = itertools.count()
_END = datetime.timedelta(seconds=60)  # for peers that want a number


class Transport(Protocol):
    """Frames from this process to some readers. It is made before they are forked."""

    def put(self, number: int) -> None:
        """Make a frame visible."""

    def back(self, number: int) -> None:
        """Wait until every reader has looked at a frame, and at those before."""

    def frames(self, reader: int) -> Iterator[int]:
        """Yield, in a reader's process, first anything, when it is there, and then the numbers of frames that it has looked at."""

    def close(self) -> None:
        """Close it in the process that made it."""


Make = Callable[[int, int, bool], Transport]  # bytes of a frame, readers, on several CPUs


def put_into(view: Any, number: int) -> None:
    """Write a frame's number at its ends."""
    struct.pack_into("<I", view, 0, number)
    view[-1] = number & 255


def look_at(view: Any) -> int:
    """Return the number at the ends of a frame."""
    number: int = struct.unpack_from("<I", view)[0]
    if view[-1] != number & 255:
        raise RuntimeError("wrong bytes")
    return number


class Ours:
    """A stream whose readers get every frame, or the newest."""

    def __init__(self, policy: Literal["queue", "latest"], size: int, readers: int, split: bool) -> None:
        self._policy, self._name = policy, f"bench {os.getpid()} {next(_names)}"
        more = readers - 1 if policy == "latest" else 0  # each may hold an older frame
        self._stream = dmabuf.Stream.create(self._name, size=size, buffers=SLOTS + more, meta_bytes=0)
        for _ in self._stream.bufs:
            with self._stream.produce() as frame:
                frame.view[::4096] = bytes(len(range(0, len(frame.view), 4096)))

    def put(self, number: int) -> None:
        with self._stream.produce() as frame:
            put_into(frame.view, number)

    def back(self, number: int) -> None:
        self._stream.drain()

    def frames(self, reader: int) -> Iterator[int]:
        with dmabuf.Stream.open(self._name) as stream, stream.reader(self._policy, newest=False) as frames:
            yield -1
            for frame in frames:
                yield look_at(frame.view)

    def close(self) -> None:
        self._stream.close()


class Limit:
    """A ring of memory and a word for each side, by the smallest C extension. Every reader gets every frame."""

    def __init__(self, size: int, readers: int, split: bool) -> None:
        self._c, self._split, self._readers = floor.extension(), split, readers
        self._memory = mmap.mmap(-1, SLOTS * size)
        self._views = [memoryview(self._memory)[i * size : (i + 1) * size] for i in range(SLOTS)]
        for view in self._views:
            view[::4096] = bytes(len(range(0, size, 4096)))
        self._words = mmap.mmap(-1, mmap.PAGESIZE)
        self._head = ctypes.addressof(ctypes.c_char.from_buffer(self._words))

    def _done(self, reader: int) -> int:
        return self._head + 64 * (reader + 1)

    def _wait(self, word: int, value: int) -> None:
        if self._split:
            self._c.wait_smart(word, value, 20)
        else:
            self._c.wait_ge(word, value)

    def put(self, number: int) -> None:
        self.back(number - SLOTS)
        put_into(self._views[number % SLOTS], number)
        self._c.bump(self._head)

    def back(self, number: int) -> None:
        for reader in range(self._readers if number >= 0 else 0):
            self._wait(self._done(reader), number + 1)

    def frames(self, reader: int) -> Iterator[int]:
        yield -1
        for number in itertools.count():
            self._wait(self._head, number + 1)
            look_at(self._views[number % SLOTS])
            self._c.bump(self._done(reader))
            yield number

    def close(self) -> None:
        for view in self._views:
            view.release()
        self._memory.close()


class SharedMemoryAndPipe:
    """What the standard library has: a SharedMemory with frames, and a Pipe to each reader for their numbers and for answers."""

    def __init__(self, size: int, readers: int, split: bool) -> None:
        self._size, self._memory = size, SharedMemory(create=True, size=SLOTS * size)
        buf = self._memory.buf
        assert buf is not None
        self._views = [buf[i * size : (i + 1) * size] for i in range(SLOTS)]
        for view in self._views:
            view[::4096] = bytes(len(range(0, size, 4096)))
        self._pipes: list[tuple[Connection[Any, Any], Connection[Any, Any]]] = [multiprocessing.Pipe() for _ in range(readers)]
        self._backs = [-1] * readers

    def put(self, number: int) -> None:
        self.back(number - SLOTS)
        put_into(self._views[number % SLOTS], number)
        for here, _ in self._pipes:
            here.send_bytes(number.to_bytes(4, "little"))

    def back(self, number: int) -> None:
        for reader, (here, _) in enumerate(self._pipes):
            while self._backs[reader] < number:
                self._backs[reader] = int.from_bytes(here.recv_bytes(), "little")

    def frames(self, reader: int) -> Iterator[int]:
        there = self._pipes[reader][1]
        yield -1
        while True:
            told = there.recv_bytes()
            number = look_at(self._views[int.from_bytes(told, "little") % SLOTS])
            there.send_bytes(told)
            yield number

    def close(self) -> None:
        for view in self._views:
            view.release()
        self._memory.close()
        self._memory.unlink()
        for pair in self._pipes:
            for end in pair:
                end.close()


class Kickmsg:
    """kickmsg: its publisher doesn't wait, and readers that are behind lose frames. Answers are messages of a region of their own."""

    def __init__(self, size: int, readers: int, split: bool) -> None:
        self._k, self._size, self._readers = importlib.import_module("kickmsg"), size, readers
        self._name = f"/dmabuf-bench-{os.getpid()}-{next(_names)}"
        self._forth = self._region("f", size, readers)
        self._back = self._region("b", 64, readers)
        self._publisher, self._answers, self._seen = self._k.Publisher(self._forth), self._k.Subscriber(self._back), -1

    def _region(self, what: str, size: int, readers: int) -> Any:
        config = self._k.Config()
        config.max_payload_size, config.max_subscribers = size, readers + 1
        config.sub_ring_capacity, config.pool_size = SLOTS, SLOTS * (readers + 2)
        return self._k.SharedRegion.create(self._name + what, self._k.ChannelType.PubSub, config)

    def put(self, number: int) -> None:
        while (slot := self._publisher.allocate()) is None:
            os.sched_yield()
        put_into(memoryview(slot).cast("B"), number)
        slot.publish(self._size)

    def back(self, number: int) -> None:
        while self._seen < number:
            answer = self._answers.receive(_END)
            if answer is None:
                raise RuntimeError("kickmsg: no answer came")
            self._seen = int.from_bytes(answer, "little")

    def frames(self, reader: int) -> Iterator[int]:
        frames = self._k.Subscriber(self._k.SharedRegion.open(self._name + "f"))
        answers = self._k.Publisher(self._k.SharedRegion.open(self._name + "b"))
        yield -1
        while True:
            view = frames.receive_view(_END)
            if view is None:
                raise RuntimeError("kickmsg: no frame came")
            number = look_at(memoryview(view).cast("B"))
            view.release()
            if reader == 0:
                answers.send(number.to_bytes(4, "little"))
            yield number

    def close(self) -> None:
        self._forth.unlink()
        self._back.unlink()


class Iceoryx2:
    """iceoryx2: a publisher whose subscribers' buffers overflow, with an event for each side, because a subscriber itself can't wait."""

    def __init__(self, size: int, readers: int, split: bool) -> None:
        self._x, self._size, self._readers = importlib.import_module("iceoryx2"), size, readers
        self._x.set_log_level(self._x.LogLevel.Fatal)
        self._name = f"dmabuf-bench-{os.getpid()}-{next(_names)}"
        self._node, self._frames, self._news, self._spaces = self._open()
        self._publisher = self._frames.publisher_builder().initial_max_slice_len(size).create()
        self._bell, self._answers = self._news.notifier_builder().create(), self._spaces.listener_builder().create()
        self._seen = -1

    def _open(self) -> tuple[Any, Any, Any, Any]:
        x = self._x
        node = x.NodeBuilder.new().create(x.ServiceType.Ipc)

        def service(what: str) -> Any:
            return node.service_builder(x.ServiceName.new(self._name + what))

        frames = service("frames").publish_subscribe(x.Slice[ctypes.c_uint8])
        frames = frames.subscriber_max_buffer_size(SLOTS).max_subscribers(self._readers + 1).open_or_create()
        return node, frames, service("news").event().open_or_create(), service("space").event().open_or_create()

    def _view(self, sample: Any) -> memoryview:
        return memoryview((ctypes.c_uint8 * self._size).from_address(sample.payload_ptr)).cast("B")

    def put(self, number: int) -> None:
        sample = self._publisher.loan_slice_uninit(self._size)
        put_into(self._view(sample), number)
        sample.assume_init().send()
        self._bell.notify()

    def back(self, number: int) -> None:
        while self._seen < number:  # an answer says how many there were, and not of whom; it is used with one reader
            self._answers.blocking_wait()
            self._seen += 1

    def frames(self, reader: int) -> Iterator[int]:
        _node, frames, news, spaces = self._open()
        subscriber, bell = frames.subscriber_builder().create(), news.listener_builder().create()
        answers = spaces.notifier_builder().create()
        yield -1
        while True:
            sample = subscriber.receive()
            if sample is None:
                bell.blocking_wait()
                continue
            number = look_at(self._view(sample))
            sample.delete()
            if reader == 0:
                answers.notify()
            yield number

    def close(self) -> None:
        for port in (self._publisher, self._bell, self._answers):
            port.delete()


def peers() -> list[tuple[str, Make]]:
    """Return the names of the others, and what makes each. Those that aren't installed are left out."""
    found: list[tuple[str, Make]] = [("shared_memory and a Pipe", SharedMemoryAndPipe)]
    for name, make in (("kickmsg", Kickmsg), ("iceoryx2", Iceoryx2)):
        if importlib.util.find_spec(name) is not None:
            found.append((name, make))
    return found


def missing() -> list[str]:
    """Return the names of the libraries that aren't installed."""
    return [name for name in ("kickmsg", "iceoryx2") if importlib.util.find_spec(name) is None]
