"""``Stream``: a ring of buffers that a producer hands to readers in other processes (docs/streams.md)."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, Literal, Self

from dmabuf._native import SD_ALIVE, SP_DROP, SP_WAIT, STREAM_SLOTS, Frame, WeakValues
from dmabuf.core.buffer.handle import PAGE, handle_of
from dmabuf.core.buffer.identity import checked_name
from dmabuf.core.dma_buf import DmaBuf
from dmabuf.core.fence.fence import DmaFence
from dmabuf.domain.domain import Domain
from dmabuf.domain.place import name_lock
from dmabuf.errors import fail, needing_descriptors
from dmabuf.heap.recommended import allocate
from dmabuf.heap.wanted import wanted
from dmabuf.layout.stored import Layout
from dmabuf.sharing.items import COMPOSED, Composed
from dmabuf.stream import parts
from dmabuf.stream.parts import META_HEAD, Part, Ring
from dmabuf.stream.reader import StreamReader
from dmabuf.stream.refusals import failed
from dmabuf.stream.statistics import StreamStatistics, statistics

if TYPE_CHECKING:
    from types import TracebackType

    from dmabuf._native import FrameMaking

WhenFull = Literal["wait", "drop"]
Policy = Literal["queue", "latest"]

META_MOST: Final = 4096  # bytes of a frame's metadata
_POLICIES: Final = {"wait": SP_WAIT, "drop": SP_DROP}


class Stream(Part, Composed):
    """A ring of buffers: a producer puts frames into them, and readers in any process get them, without a copy.

        with dmabuf.Stream.create("camera", shape=(1080, 1920, 3), dtype="uint8") as stream:
            with stream.produce() as frame:
                camera.read_into(frame.array())         published at the end of the block

        for frame in dmabuf.Stream.open("camera", wait=5):
            print(frame.seq, frame.array().mean())      the frame is over at the next turn

    A stream lives as long as a process has it open. One producer at a time makes frames; after its end or its death another one may. A
    ``Stream`` is used by one thread at a time, and each of its readers too.
    """

    def __init__(self) -> None:
        raise TypeError("a Stream is made by Stream.create(), open() or open_or_create()")

    # ---- made and found ----

    @classmethod
    def create(
        cls,
        name: str | None = None,
        *,
        layout: Layout | None = None,
        size: int | None = None,
        shape: Sequence[int] | int | None = None,
        dtype: Any = None,
        buffers: int | Sequence[DmaBuf] = 4,
        when_full: WhenFull = "wait",
        meta_bytes: int = 256,
        domain: Domain | None = None,
    ) -> Self:
        """Make a stream.

        Args:
            name: At most 31 bytes, by which other processes open it; None for one that is passed on otherwise.
            layout: What a frame is, an ``ImageLayout`` or a ``TensorLayout``.
            size: Bytes of a frame, if there is no layout.
            shape: The shape of a frame that is a tensor, instead of a layout.
            dtype: Its type.
            buffers: How many, 2 to 64. The newest frame is never overwritten, and each frame that a reader keeps needs one. Or buffers
                that exist, such as a camera's, of one size: the stream has handles of its own, and nothing else says how large a frame is.
            when_full: What the producer does when readers of all frames are behind: "wait" for them, or "drop": it goes on, and they miss
                some.
            meta_bytes: Room for ``frame.meta``, at most 4,096 bytes.
            domain: The domain; None for the user's default domain.

        Raises:
            ExistsError: There is a stream with this name (EEXIST). ``open_or_create`` joins it.
            InvalidError: A number is out of range, or nothing says how large a frame is (EINVAL).
            DmaBufError: As ``dmabuf.allocate``.
        """
        raw = None if name is None else _named(name, "create")
        _check("create", buffers, when_full, meta_bytes, layout, size, shape)
        domain = domain or Domain.default()
        domain.join()
        making = (layout, size, shape, dtype, buffers, when_full, meta_bytes)
        with needing_descriptors("create", f"stream {name!r}"):
            if raw is None:
                return cls._made(domain, None, *making)
            with name_lock(domain.shm.fd, raw):
                if parts.found(domain, raw):
                    remedy = "open it, use open_or_create(), or unlink() the old one's name"
                    raise fail(errno.EEXIST, "create", f"stream {name!r}", remedy, what="there is a stream with this name")
                return cls._made(domain, raw, *making)

    @classmethod
    def open(cls, name: str, *, wait: float | None = None, domain: Domain | None = None) -> Self:
        """Open a stream by its name; of several the newest.

        Args:
            name: Its name.
            wait: Seconds to wait until there is one; None to look once.
            domain: The domain; None for the user's default domain.

        Raises:
            NotFoundError: There is none (ENOENT).
            InvalidError: The name is too long (EINVAL).
        """
        raw = _named(name, "open")
        if wait is not None and not wait >= 0:
            raise fail(errno.EINVAL, "open", f"stream {name!r}", "pass seconds >= 0, or None to look once", what=f"wait is {wait}")
        domain = domain or Domain.default()
        domain.join()
        with needing_descriptors("open", f"stream {name!r}"):
            return cls._opened(parts.open_named(domain, raw, wait))

    @classmethod
    def open_or_create(
        cls,
        name: str,
        *,
        layout: Layout | None = None,
        size: int | None = None,
        shape: Sequence[int] | int | None = None,
        dtype: Any = None,
        buffers: int | Sequence[DmaBuf] = 4,
        when_full: WhenFull = "wait",
        meta_bytes: int = 256,
        domain: Domain | None = None,
    ) -> Self:
        """Open the stream with this name, or make it: of several processes that come at once, one makes it. See :meth:`create`.

        So a program that restarts goes on in the stream that its readers still have.

        Raises:
            ExistsError: The stream with this name is of another size, layout, number of buffers or kind (EEXIST).
        """
        raw = _named(name, "open_or_create")
        _check("open_or_create", buffers, when_full, meta_bytes, layout, size, shape)
        domain = domain or Domain.default()
        domain.join()
        with needing_descriptors("open_or_create", f"stream {name!r}"), name_lock(domain.shm.fd, raw):
            ring = parts.newest_ring(domain, raw, name)
            if ring is None:
                return cls._made(domain, raw, layout, size, shape, dtype, buffers, when_full, meta_bytes)
        made = cls._opened(ring)
        try:
            made._check_same(layout, size, shape, dtype, buffers, when_full, meta_bytes)
        except BaseException:
            made.close()
            raise
        return made

    @classmethod
    def _opened(cls, ring: Ring) -> Self:
        made = cls.__new__(cls)
        made._readers = WeakValues()
        made._default = {}
        try:
            made.attach(ring)
        except BaseException:
            ring.close()
            raise
        return made

    @classmethod
    def _made(
        cls,
        domain: Domain,
        name: bytes | None,
        layout: Layout | None,
        size: int | None,
        shape: Sequence[int] | int | None,
        dtype: Any,
        buffers: int | Sequence[DmaBuf],
        when_full: str,
        meta_bytes: int,
    ) -> Self:
        text = None if name is None else os.fsdecode(name)
        with parts.closing_if_failed() as made:
            count = buffers if isinstance(buffers, int) else len(buffers)
            own = allocate(count * (meta_bytes + META_HEAD), domain=domain)
            made.append(own)
            if isinstance(buffers, int):
                for _ in range(count):
                    made.append(allocate(size, layout=layout, shape=shape, dtype=dtype, domain=domain))
            else:
                for buf in buffers:
                    made.append(buf.get_dma_buf())
            bufs = tuple(made[1:])
            shm, index = handle_of(own).shared.at()
            gen = handle_of(own).shared.gen
            stream, stream_gen = shm.stream_create(index, gen, count, _POLICIES[when_full], bufs[0].size, meta_bytes)
            for k, buf in enumerate(bufs):
                put_in(domain, stream, stream_gen, k, buf)
            if name is not None:
                own.name = name  # last: whoever finds the name finds a whole stream
            return cls._opened(parts.ring_of(domain, stream, stream_gen, text, own, bufs, meta_bytes))

    def _check_same(
        self,
        layout: Layout | None,
        size: int | None,
        shape: Sequence[int] | int | None,
        dtype: Any,
        buffers: int | Sequence[DmaBuf],
        when_full: str,
        meta_bytes: int,
    ) -> None:
        asked_size, asked_layout = what_was_asked(layout, size, shape, dtype)
        here = self.info()
        pairs: dict[str, tuple[object, object]] = {
            "size": (here["size"], asked_size),
            "layout": (self.layout, asked_layout),
            "buffers": (len(self.bufs), buffers if isinstance(buffers, int) else len(buffers)),
            "when_full": (self.when_full, when_full),
            "meta_bytes": (here["meta_bytes"], meta_bytes),
        }
        for what, (has, asked) in pairs.items():
            if has != asked:
                raise fail(
                    errno.EEXIST,
                    "open_or_create",
                    self,
                    "open it with Stream.open(), or unlink() its name and create a new one",
                    what=f"its {what} is {has}, and {asked} was asked for",
                )

    # ---- what it is ----

    _readers: WeakValues[int, StreamReader]  # a WeakSet loses what a signal handler raises in its callback
    _default: dict[str, StreamReader]

    @property
    def name(self) -> str | None:
        """Its name; None if it was made without one."""
        return self.ring.name

    @property
    def bufs(self) -> tuple[DmaBuf, ...]:
        """The buffers of its slots."""
        return self.ring.bufs

    @property
    def layout(self) -> Layout | None:
        """What a frame is; None for bytes."""
        return self.ring.bufs[0].layout

    @property
    def size(self) -> int:
        """Bytes of a frame at most."""
        return self.info()["size"]

    @property
    def when_full(self) -> WhenFull:
        """What its producer does when readers are behind."""
        return "drop" if self.info()["policy"] == SP_DROP else "wait"

    def statistics(self) -> StreamStatistics:
        """Return who produces and who reads, and how far each is."""
        return statistics(self)

    # ---- passed on ----

    def sent_as(self) -> tuple[DmaBuf, ...]:
        """Return its own memory and its buffers, which ``send`` and multiprocessing pass on."""
        if self.closed:
            failed(self, "send", errno.EBADF)
        return (self.ring.own, *self.ring.bufs)

    @classmethod
    def of_buffers(cls, bufs: tuple[DmaBuf, ...]) -> Self:
        """Return the stream of buffers that were received, and own them. Nothing is believed: their records must say what they are."""
        with parts.closing_if_failed() as made:
            made.extend(bufs)
            own, slots = bufs[0], bufs[1:]
            domain = own.domain
            part = part_of(own)
            if part is None or part[2] != -1:
                raise fail(
                    errno.ESTALE, "recv", own, "keep the stream open in some process until it was received", what="its stream is over"
                )
            stream, gen, _ = part
            if any(part_of(buf) != (stream, gen, k) for k, buf in enumerate(slots)):
                raise fail(errno.EBADMSG, "recv", own, "pass the whole stream on", what="these are not the buffers of its slots")
            info = domain.shm.stream_info(stream, gen)
            if len(info["slots"]) != len(slots):
                raise fail(errno.EBADMSG, "recv", own, "pass the whole stream on", what="these are not all buffers of the stream")
            return cls._opened(parts.ring_of(domain, stream, gen, own.name or None, own, slots, info["meta_bytes"]))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).of_buffers, (self.sent_as(),)

    # ---- producing ----

    if TYPE_CHECKING:

        def produce(self, timeout: float | None = None) -> FrameMaking: ...

    def publish(self, buf: DmaBuf, *, fence: DmaFence | None = None, meta: object = None, timeout: float | None = None) -> int:
        """Publish a buffer whose content exists already, or will once a fence has ended; see ``create(buffers=[…])``.

        Args:
            buf: A buffer of one of the stream's slots.
            fence: For which readers wait before the frame is theirs. If it ends with an error, they never see the frame.
            meta: What ``frame.meta`` gives them.
            timeout: Seconds to wait until nobody reads the buffer's frame before; None without limit.

        Returns:
            The frame's number.

        Raises:
            InvalidError: The buffer is none of the stream's, or it has the newest frame, which stays until there is another (EINVAL).
            DmaBufTimeout: A reader did not give it back in time (ETIMEDOUT).
        """
        slot = next((k for k, one in enumerate(self.ring.bufs) if one == buf), -1)
        if slot < 0:
            raise fail(errno.EINVAL, "publish", buf, "pass one of stream.bufs", what="it is not a buffer of this stream")
        info = self.info()
        if info["published"] and info["slots"][slot]["seq"] == info["published"]:
            raise fail(errno.EINVAL, "publish", buf, "publish another one first", what="it has the newest frame of the stream")
        if self._making:
            failed(self, "publish", errno.EINPROGRESS)
        try:
            frame = self._take(timeout, slot)
            if meta is not None:
                frame.meta = meta
            frame.fence = fence
            seq = frame.seq
            self._finish()
        except BaseException:
            self._end_turn()  # if there is one: a signal handler may raise when _take() has returned
            raise
        return seq

    @property
    def producing(self) -> bool:
        """Whether this object is the stream's producer."""
        info = self.info()
        return info["why"] == SD_ALIVE and info["producer"] == self.domain.shm.life and self._role >= 100

    # ---- reading ----

    def reader(
        self,
        policy: Policy = "queue",
        *,
        group: str | None = None,
        group_redeliver: bool = False,
        history: int = 0,
        newest: bool = True,
        wait_for_producer: bool = False,
    ) -> StreamReader:
        """Return a reader, which has a place in the stream from now on.

        Args:
            policy: "queue" for every frame, in order; "latest" for the newest, without those that it comes too late for.
            group: The name of a group: each frame goes to one of its members.
            group_redeliver: A frame that a member had not given back when it died goes to another member. All members must agree on it.
            history: Of a queue: begin with the oldest of so many frames that is still there.
            newest: Begin with the newest frame that is there; False for the next one.
            wait_for_producer: When the producer closes the stream or dies, wait for another one instead of ending.

        Raises:
            InvalidError: There is no such policy, a group has another one than "queue", the history is negative, or the members of the
                group don't agree on ``group_redeliver`` (EINVAL).
            DmaBufError: The stream has 32 readers (EUSERS), or 8 groups (ENOSPC).
        """
        if policy not in ("queue", "latest"):
            raise fail(errno.EINVAL, "reader", self, "use 'queue' or 'latest'", what=f"there is no policy {policy!r}")
        if group is not None and (policy != "queue" or history or not group):
            raise fail(
                errno.EINVAL,
                "reader",
                self,
                "give a group a name, and neither a policy nor a history",
                what="a group hands out frames in order",
            )
        if group_redeliver and group is None:
            raise fail(errno.EINVAL, "reader", self, "name a group", what="group_redeliver is for groups")
        if history < 0 or (history and policy != "queue"):
            raise fail(errno.EINVAL, "reader", self, "use history=N of a queue", what=f"history is {history}")
        if self.closed:
            failed(self, "reader", errno.EBADF)
        made = StreamReader(self.ring, policy, group, group_redeliver, history, newest, wait_for_producer)
        self._readers[id(made)] = made
        return made

    def _reader(self, policy: Policy) -> StreamReader:
        found = self._default.get(policy)
        if found is None or found.closed:
            found = self._default[policy] = self.reader(policy)
        return found

    def __iter__(self) -> StreamReader:
        return self._reader("queue")

    def __aiter__(self) -> StreamReader:
        return self._reader("queue")

    def next(self, timeout: float | None = None) -> Frame:
        """Return the next frame, of a reader of all frames that is made at the first call.

        Raises:
            DmaBufTimeout: None came in time (ETIMEDOUT).
            DmaBufError: The producer has closed the stream, and all frames were read (ENODATA).
            OwnerDeadError: The producer died, and all frames were read (EOWNERDEAD).
        """
        return self._reader("queue").next(timeout)

    def latest(self, timeout: float | None = None) -> Frame:
        """Return the newest frame, one that wasn't returned before; see :meth:`next`."""
        return self._reader("latest").next(timeout)

    # ---- its end ----

    def unlink(self) -> None:
        """Take the name away: whoever has the stream open goes on with it, and the name is free for another one."""
        if self.closed:
            failed(self, "unlink", errno.EBADF)
        self.ring.own.name = b""

    def close(self) -> None:
        """End producing, close the readers that were made of this object, and close the buffers."""
        for reader in self._readers.values():
            reader.close()
        if not self.closed:
            self._close()
        self.ring.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def part_of(buf: DmaBuf) -> tuple[int, int, int] | None:
    """Return (stream, generation, slot) of the stream that a buffer is part of; slot -1: it is the stream's own memory."""
    shared = handle_of(buf).shared
    shm, index = shared.at()
    return shm.stream_part(index, shared.gen)


def put_in(domain: Domain, stream: int, gen: int, slot: int, buf: DmaBuf) -> None:
    """Make a buffer the slot of a stream. Programs that use only the buffer heed the stream from now on."""
    handle = handle_of(buf)
    shm, index = handle.shared.at()
    with buf.resv.locked():
        write, read = shm.stream_entries(stream, gen, slot)
        error = -shm.resv_reserve(index, 2)
        if not error:
            shm.resv_add(index, write, 1, 1)
            shm.resv_add(index, read, 2, 1)
            error = shm.stream_set_slot(stream, gen, slot, index, handle.shared.gen)
    if error:
        raise fail(error, "create", buf, "use a buffer for one stream at a time")


COMPOSED.register("stream", Stream.of_buffers)


def what_was_asked(layout: Layout | None, size: int | None, shape: Sequence[int] | int | None, dtype: Any) -> tuple[int, Layout | None]:
    """Return the bytes of a buffer, and the layout, that a frame would have."""
    if layout is not None or shape is not None or dtype is not None:
        size, layout = wanted(size, layout, shape, dtype)
    return -(-(size or 0) // PAGE) * PAGE, layout


def _named(name: str, operation: str) -> bytes:
    raw = checked_name(name, operation)
    if not raw:
        raise fail(errno.EINVAL, operation, "a stream", "give it a name of 1 to 31 bytes", what="its name is empty")
    return raw


def _check(
    operation: str,
    buffers: int | Sequence[DmaBuf],
    when_full: str,
    meta_bytes: int,
    layout: Layout | None,
    size: int | None,
    shape: Sequence[int] | int | None,
) -> None:
    count = buffers if isinstance(buffers, int) else len(buffers)
    if not 2 <= count <= STREAM_SLOTS:
        raise fail(errno.EINVAL, operation, "a stream", f"use 2 to {STREAM_SLOTS} buffers", what=f"there are {count}")
    if not isinstance(buffers, int):
        if not all(isinstance(buf, DmaBuf) for buf in buffers):
            raise TypeError(f"{operation}: buffers is a number, or DmaBufs")
        if len({buf.size for buf in buffers}) > 1 or len({buf.domain for buf in buffers}) > 1:
            raise fail(errno.EINVAL, operation, "a stream", "give buffers of one size and one domain", what="its buffers differ")
        for buf in buffers:
            if handle_of(buf).shared.resv:
                what = "it shares a reservation object with others"
                raise fail(errno.EINVAL, operation, buf, "use a buffer with a reservation object of its own", what=what)
    if when_full not in _POLICIES:
        raise fail(errno.EINVAL, operation, "a stream", "use when_full='wait' or 'drop'", what=f"when_full is {when_full!r}")
    if not 0 <= meta_bytes <= META_MOST:
        raise fail(errno.EINVAL, operation, "a stream", f"use 0 to {META_MOST} bytes", what=f"meta_bytes is {meta_bytes}")
    if isinstance(buffers, int) and layout is None and size is None and shape is None:
        raise fail(
            errno.EINVAL, operation, "a stream", "give a layout, a shape and a dtype, or a size", what="nothing says what a frame is"
        )
