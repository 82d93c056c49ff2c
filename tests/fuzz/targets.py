"""What is fuzzed. Each target takes random numbers, makes one input, and raises if the library did anything but accept or refuse it.

To refuse is to raise a ``DmaBufError`` (or ``EOFError``, ``ContractError`` and ``ValueError`` where the contract says so). A target leaves
nothing behind: the runner counts descriptors, and the domain's lives, records and chunks.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import os
import random
import socket
import struct
from collections.abc import Callable, Iterator
from typing import Any

import dmabuf
from dmabuf import DmaFenceArray, DmaFenceChain, SwSync, SyncFile, Timeline, TimelineSemaphore
from dmabuf._native import OwnedFd
from dmabuf.core.buffer.handle import handle_of
from dmabuf.core.fence import travel
from dmabuf.core.get import from_fd
from dmabuf.core.sync import semaphore_state
from dmabuf.domain import place
from dmabuf.domain.domain import Domain
from dmabuf.domain.sync_files import Leaf, SyncFileRecord
from dmabuf.errors import ContractError, DmaBufError
from dmabuf.layout.stored import unpack as unpack_layout
from dmabuf.sharing import items, keeping, kept, messages, server, serving
from dmabuf.sharing.fetching import fetch
from dmabuf.sharing.remote_exporter import RemoteExporter
from dmabuf.sharing.sealed import sealed
from tests.fuzz import mutate
from tests.support.drivers import Dynamic

F_ADD_SEALS, SHRINK = 1033, fcntl.F_SEAL_SHRINK
Target = Callable[[random.Random], None]
REFUSED = (DmaBufError, EOFError, ContractError)


def closed(one: Any) -> None:
    """Close an object that was received."""
    if isinstance(one, dmabuf.BufferRange):
        one.buf.close()
    elif hasattr(one, "close") and not isinstance(one, Domain):
        with contextlib.suppress(ValueError):
            one.close()


class World:
    """Objects of every kind, which the samples are made of."""

    def __init__(self) -> None:
        self.domain = Domain.default()
        self.buf = dmabuf.allocate(8192, name="fuzzed")
        self.timeline = Timeline("fuzzed", driver="fuzz")
        self.fences = [self.timeline.fence() for _ in range(4)]
        for fence in self.fences[:3]:
            fence.signal()
        self.array = DmaFenceArray(self.fences[1:])
        chain = DmaFenceChain(None, self.fences[1], 3)
        self.chain = DmaFenceChain(chain, self.array, 5)
        self.sync_file = SyncFile(self.fences[1], "fuzzed")
        self.sw = SwSync("fuzzed")
        self.semaphore = TimelineSemaphore()
        self.semaphore.signal(3)
        self.private = Domain.private()
        self.exporter = Dynamic()
        self.exported = dmabuf.export(self.exporter, 16384, name="exported")
        self.readers = [os.pipe()]

    def close(self) -> None:
        gc.collect()  # mappings in circles keep the exporter's buffer
        self.fences[3].signal()
        for one in (self.exported, self.buf, self.sync_file, self.sw, self.semaphore, self.timeline):
            one.close()
        self.exporter.close()
        for pair in self.readers:
            for fd in pair:
                os.close(fd)

    def descriptor(self, rng: random.Random) -> int:
        """Return a descriptor of some kind, which the caller owns."""
        return rng.choice(self._kinds())(rng)

    def _kinds(self) -> list[Callable[[random.Random], int]]:
        return [
            lambda _: self.buf.dup(),
            lambda _: self.buf.dup(),
            lambda _: self.exported.dup(),
            lambda _: os.dup(self.sync_file.fileno()),
            lambda _: os.dup(self.sw.fileno()),
            lambda _: os.dup(self.semaphore.fileno()),
            lambda _: os.dup(self.private.fileno()),
            lambda _: os.open(self.domain.path or "/", os.O_PATH | os.O_DIRECTORY),
            lambda _: os.open("/", os.O_PATH | os.O_DIRECTORY),
            lambda _: os.dup(self.readers[0][0]),
            lambda _: os.eventfd(0),
            lambda _: os.open("/dev/null", os.O_RDWR),
            lambda _: os.open("/dev/zero", os.O_RDONLY),
            lambda _: os.memfd_create("unsealed"),
            lambda rng: structure(rng, self),
        ]


def structure(rng: random.Random, world: World) -> int:
    """Return a sealed memfd with a container of fences, or something like it."""
    samples = [travel.pack(world.array) or b"", travel.pack(world.chain) or b""]
    return sealed("fuzz", mutate.changed(rng, rng.choice(samples), samples)).take()


def file_of(name: str, content: bytes, seals: int = SHRINK) -> int:
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, content)
    fcntl.fcntl(fd, F_ADD_SEALS, seals)
    return fd


# ---- the targets ----


def receive(world: World) -> Target:
    """A message of ``send``, with other bytes and other descriptors, on each kind of socket."""
    samples: list[tuple[bytes, list[int]]] = []
    things: list[tuple[Any, ...]] = [
        (world.buf,),
        (world.buf.export_range(4096, 4096),),
        (world.fences[3],),
        (world.fences[1], world.buf, world.timeline),
        (world.array,),
        (world.chain, world.sync_file),
        (world.sync_file,),
        (world.sw, world.semaphore),
        (world.private,),
        (world.domain,),
        (world.exported,),
    ]
    metas: list[Any] = [None, {"seq": [1, 2.5, None]}, b"x" * 100, "y" * 2000]
    for one, meta in [*((one, None) for one in things), *(((world.buf,), meta) for meta in metas[1:]), ((), metas[1])]:
        data, fds, _, opened = items.pack_objects(one, meta)
        samples.append((data, [os.dup(fd) for fd in fds]))
        for own in opened:
            own.close()
    others = [data for data, _ in samples]

    def one(rng: random.Random) -> None:
        data, fds = rng.choice(samples)
        sent = mutate.changed(rng, data, others)
        given = [os.dup(fd) for fd in fds]
        for _ in range(rng.choice((0, 0, 0, 1, 2))):
            if given and rng.random() < 0.7:
                at = rng.randrange(len(given))
                os.close(given[at])
                given[at] = world.descriptor(rng)
            else:
                given.append(world.descriptor(rng))
        if given and rng.random() < 0.1:
            os.close(given.pop())
        a, b = socket.socketpair(socket.AF_UNIX, rng.choice((socket.SOCK_SEQPACKET, socket.SOCK_STREAM, socket.SOCK_DGRAM)))
        with a, b:
            b.settimeout(30 if rng.random() < 0.5 else None)
            control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"={len(given)}i", *given))] if given else []
            if not sent and a.type == socket.SOCK_STREAM:
                control = []
            a.sendmsg([sent], control)
            for fd in given:
                os.close(fd)
            a.shutdown(socket.SHUT_WR)
            if a.type == socket.SOCK_DGRAM and not sent and not control:
                return
            with contextlib.suppress(*REFUSED):
                for got in dmabuf.recv(b):
                    closed(got)

    one.close = lambda: [os.close(fd) for _, fds in samples for fd in fds]  # type: ignore[attr-defined]
    return one


def container(world: World) -> Target:
    """The structure of an array or a chain."""
    samples = [travel.pack(world.array) or b"", travel.pack(world.chain) or b""]

    def one(rng: random.Random) -> None:
        with contextlib.suppress(ValueError, DmaBufError):
            travel.unpack(world.domain, mutate.changed(rng, rng.choice(samples), samples))

    return one


def record(_: World) -> Target:
    """The record of a sync file."""
    leaves = tuple(Leaf(n, n, n, n, n % 2, n, b"driver", b"name") for n in range(3))
    samples = [SyncFileRecord(b"name", leaves).pack(), SyncFileRecord(b"", leaves[:1]).pack()]

    def one(rng: random.Random) -> None:
        with contextlib.suppress(DmaBufError):
            SyncFileRecord.unpack(mutate.changed(rng, rng.choice(samples), samples))

    return one


def state(_: World) -> Target:
    """The state of a semaphore."""
    leaves = [semaphore_state.Leaf(n, n, n, n) for n in range(2)]
    nodes = [semaphore_state.Node(0, leaves), semaphore_state.Node(4, leaves[:1])]
    samples = [semaphore_state.packed(semaphore_state.State(2, 1, 4, nodes))]

    def one(rng: random.Random) -> None:
        with contextlib.suppress(struct.error, IndexError):
            semaphore_state.unpacked(mutate.changed(rng, samples[0], samples))

    return one


def layout(_: World) -> Target:
    """The bytes of a layout."""
    planes = tuple(dmabuf.Plane(n % 2, 4096 * n, 64, 4096) for n in range(4))
    picture = dmabuf.ImageLayout(0x3231564E, 64, 64, planes, modifier=1, crop_x=2, coded_width=128)
    samples = [picture.pack(), dmabuf.TensorLayout("float32", (2, 3, 4), offset=64).pack(), dmabuf.TensorLayout("bool", ()).pack()]

    def one(rng: random.Random) -> None:
        with contextlib.suppress(DmaBufError):
            found = unpack_layout(mutate.changed(rng, rng.choice(samples), samples))
            assert all(0 <= size < 1 << 63 for size in found.sizes)
            assert unpack_layout(found.pack()) == found
            found.check(found.sizes)

    return one


def ref(world: World) -> Target:
    """The bytes of a token, and what it opens."""
    samples = [bytes(buf.ref()) for buf in (world.buf, world.exported)]

    def one(rng: random.Random) -> None:
        data = mutate.changed(rng, rng.choice(samples), samples)
        with contextlib.suppress(DmaBufError):
            found = dmabuf.BufferRef.from_bytes(data)
            assert bytes(found) == data
            str(found)
            with contextlib.suppress(DmaBufError), dmabuf.open(found) as got:
                assert bytes(got.ref())[8:16] == data[8:16]
                assert (got.ino, got.ref().nonce) == (found.ino, found.nonce)

    return one


def kept_descriptors(world: World) -> Target:
    """Messages to the socket of descriptors that wait for receivers, and what a pickle says of where one is."""

    def one(rng: random.Random) -> None:
        name, key, _, label = place = keeping.TABLE.add(handle_of(world.buf).dup_owned)
        samples = [kept.MESSAGE.pack(kept.MAGIC, kind, key) for kind in (kept.FETCH, kept.WAKE, kept.HERE)]
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            if rng.random() < 0.5:
                sock.bind("")
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("=i", sock.fileno()))] if rng.random() < 0.3 else []
            sock.sendmsg([mutate.changed(rng, rng.choice(samples), samples)], rights, 0, name)
        lies = [mutate.changed(rng, name), mutate.changed(rng, key), mutate.value(rng), label]
        with contextlib.suppress(DmaBufError):
            fetch(
                tuple(lie if rng.random() < 0.3 else true for lie, true in zip(lies, place, strict=True)),
                "it",
                lambda fd: from_fd(fd, world.domain),
            ).close()
        keeping.TABLE.drop()

    return one


def semaphore(world: World) -> Target:
    """The file of a semaphore."""
    content = os.pread(world.semaphore.fileno(), 8192, 0)

    def one(rng: random.Random) -> None:
        fd = file_of(f"dmabuf-semaphore:{world.domain.id}:{rng.getrandbits(64):016x}", mutate.changed(rng, content))
        try:
            with contextlib.suppress(DmaBufError), TimelineSemaphore.from_fd(fd) as made:
                made.statistics()
                with contextlib.suppress(DmaBufError):
                    made.wait(mutate.number(rng), timeout=0)
                made.signal(mutate.number(rng))
        finally:
            os.close(fd)

    return one


def sw_sync(world: World) -> Target:
    """The file of a software timeline."""
    with SwSync("sample") as sample:
        kept = [sample.create_fence(n) for n in (1, 2)]
        content = os.pread(sample.fileno(), 8192, 0)
        for one_kept in kept:
            one_kept.close()

    def one(rng: random.Random) -> None:
        fd = file_of(f"dmabuf-sw_sync:{world.domain.id}:{rng.getrandbits(64):016x}", mutate.changed(rng, content))
        try:
            with contextlib.suppress(DmaBufError), SwSync.from_fd(fd) as made:
                _ = made.value, made.statistics(), made.name
                made.inc(rng.choice((1, 2, 0xFFFF)))
        finally:
            os.close(fd)

    return one


def domain_file(world: World) -> Target:
    """The header of a private domain."""
    size = os.fstat(world.private.fileno()).st_size
    header = os.pread(world.private.fileno(), 256, 0)

    def one(rng: random.Random) -> None:
        changed = mutate.changed(rng, header)
        fd = file_of("dmabuf-domain:fuzz", changed, SHRINK if rng.random() < 0.9 else 0)
        os.ftruncate(fd, max(size if rng.random() < 0.9 else 0, len(changed)))
        with contextlib.suppress(DmaBufError):
            place.read_header(fd)
            Domain.adopt(OwnedFd(os.dup(fd)))
        os.close(fd)

    return one


def descriptor(world: World) -> Target:
    """A bare descriptor, said to be each kind of object."""
    makers: list[Callable[[int], Any]] = [dmabuf.get, SyncFile.from_fd, SwSync.from_fd, TimelineSemaphore.from_fd]

    def one(rng: random.Random) -> None:
        fd = world.descriptor(rng)
        try:
            with contextlib.suppress(DmaBufError):
                closed(rng.choice(makers)(fd))
        finally:
            os.close(fd)

    return one


def sync_name(world: World) -> Target:
    """The name of a sync file's socket, which leads to a slot in the domain."""
    sample = b"\0dmabuf/sync-%s-%016x" % (world.domain.id.encode(), 0)
    real = world.sync_file.fileno()
    with socket.socket(fileno=os.dup(real)) as found:
        name = found.getsockname()
    samples = [sample, name if isinstance(name, bytes) else sample]

    def one(rng: random.Random) -> None:
        name = rng.choice(samples)
        if rng.random() < 0.7:
            name = name[:-16] + b"%08x%08x" % (mutate.number(rng) & 0xFFFFFFFF, mutate.number(rng) & 0xFFFFFFFF)
        if rng.random() < 0.5:
            name = b"\0" + mutate.changed(rng, name[1:])[:106]
        with socket.socket(socket.AF_UNIX, rng.choice((socket.SOCK_STREAM, socket.SOCK_STREAM, socket.SOCK_SEQPACKET))) as made:
            with contextlib.suppress(OSError):  # the name is in use
                made.bind(name)
                if rng.random() < 0.9:
                    made.listen(1)
            with contextlib.suppress(DmaBufError), SyncFile.from_fd(made.fileno(), domain=world.domain) as sync_file:
                _ = sync_file.status, sync_file.info(), sync_file.name
                with contextlib.suppress(DmaBufError):
                    sync_file.wait(0)

    return one


def message(world: World) -> Target:
    """The bytes of a message between clients and servers."""
    samples = [
        json.dumps(one).encode() for one in ({"kind": "begin", "dev": 1, "ino": 2}, {"long": 100}, {"posts": [{"kind": "unmapped"}]})
    ]

    def one(rng: random.Random) -> None:
        sample = rng.choice([*samples, json.dumps(mutate.value(rng)).encode(), b"[" * rng.choice((10, 5000)), b"9" * 5000])
        given = [world.descriptor(rng) for _ in range(rng.choice((0, 0, 1, 2, 9, 17)))]
        if rng.random() < 0.2:
            text = mutate.changed(rng, json.dumps({"kind": "x" * 40000}).encode())
            given.insert(0, sealed("fuzz", text).take())
            sample = b'{"long":%d}' % (len(text) if rng.random() < 0.8 else mutate.number(rng))
        a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with a, b:
            control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"={len(given)}i", *given))] if given else []
            a.sendmsg([mutate.changed(rng, sample, samples)], control)
            a.close()
            for fd in given:
                os.close(fd)
            with contextlib.suppress(DmaBufError):
                got = messages.receive(b)
                if got is not None:
                    with contextlib.suppress(DmaBufError):
                        messages.decode_error(got[0])
                    messages.close_all(got[1])

    return one


def requests(world: World) -> Target:
    """The calls that an exporter's process answers."""
    shared = handle_of(world.exported).shared
    base = {"dev": shared.dev, "ino": shared.ino}
    numbers = {"offset": 0, "length": 4096, "direction": 0, "holder": 0, "mapping": 1, "attachment": 1, "table": 1, "nonce": 1}
    about = {"device": "dev", "dma_mask": (1 << 64) - 1, "max_segment": 65536, "dynamic": False, "peer2peer": False}
    kinds = [kind for kind in server._handlers if kind not in ("moved", "revoked")] + ["moved", "revoked"]

    def one(rng: random.Random) -> None:
        session = server.Session(world.domain, world.domain.life)
        try:
            for _ in range(rng.randrange(1, 6)):
                kind = rng.choice(kinds)
                body = mutate.body(rng, {"kind": kind, **base, **numbers, **about, messages.LOST: rng.random() < 0.05})
                fds = [OwnedFd(world.exported.dup() if rng.random() < 0.8 else world.descriptor(rng))]
                answer = server.Answer()
                try:
                    answer = server._handlers[kind](session, body, fds)
                    messages._encode(answer.body)
                    if rng.random() < 0.3 and answer.undo is not None:
                        answer.undo(mutate.body(rng, body))
                except REFUSED:
                    pass
                finally:
                    messages.close_all(answer.fds)
                    messages.close_all(fds)
        finally:
            session.finish(over=True)

    return one


def posts(world: World) -> Target:
    """Messages without an answer, whose errors are only reported; and what a connection begins with."""
    served = server.serve(world.domain)
    hello = {"version": messages.VERSION, "domain": world.domain.id, "to": world.domain.life, "life": world.domain.life}

    def one(rng: random.Random) -> None:
        a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with a, b:
            for _ in range(rng.randrange(3)):
                a.send(json.dumps(mutate.body(rng, {"posts": [{"kind": "unmapped", "mapping": 3}], "kind": "x"})).encode())
            a.shutdown(socket.SHUT_WR)
            with contextlib.suppress(DmaBufError):
                served._greeted(b, mutate.body(rng, hello | ({"session": "x"} if rng.random() < 0.3 else {})))

    return one


class Answers:
    """Calls whose answers come from a peer that does what it likes."""

    in_file = False

    def __init__(self, world: World) -> None:
        self.world, self.rng = world, random.Random(0)
        shared = handle_of(world.exported).shared
        self.record = shared

    def call(self, *_: object, **__: object) -> tuple[dict[str, Any], list[OwnedFd]]:
        sample: dict[str, Any] = {"mapping": 1, "offset": 0, "length": 4096, "writable": True, "iomem": False, "table": 1}
        sample |= {"cpu": [0, 0, 4096], "dma": [4096, 4096, 0] if self.rng.random() < 0.5 else [], "attachment": 1, "peer2peer": False}
        fds = [self.world.buf.dup()] if self.rng.random() < 0.7 else []
        if self.rng.random() < 0.3:
            fds.append(self.world.descriptor(self.rng))
        return mutate.body(self.rng, sample), [OwnedFd(fd) for fd in fds]

    call_locked = call

    def count_mapping(self, mapping: int) -> None: ...
    def unmapped(self, mapping: int) -> None: ...
    def give_back(self, *_: object, **__: object) -> None: ...


class _Attachment:
    importer = None
    is_dynamic = peer2peer = False

    def __init__(self, buf: dmabuf.DmaBuf) -> None:
        self.dmabuf, self.dev = buf, dmabuf.Device("fuzz")


def answers(world: World) -> Target:
    """The answers that an exporter's process gives."""
    calls = Answers(world)

    def one(rng: random.Random) -> None:
        calls.rng = rng
        exporter = RemoteExporter(calls)  # type: ignore[arg-type]
        attachment: Any = _Attachment(world.exported)
        made: Any = None
        with contextlib.suppress(*REFUSED):
            way = rng.randrange(3)
            if way == 0:
                made = exporter.mmap(world.exported, 0, 4096)
                bytes(made[:16])
            elif way == 1:
                made = exporter.vmap(world.exported)
                made.is_null()
            else:
                exporter.attach(attachment)
                made = exporter.map(attachment, dmabuf.Direction.BIDIRECTIONAL)
                if made is not None:
                    list(made)
                    exporter.unmap(attachment, made, dmabuf.Direction.BIDIRECTIONAL)
        del made

    return one


TARGETS: dict[str, Callable[[World], Target]] = {
    "receive": receive,
    "container": container,
    "record": record,
    "state": state,
    "layout": layout,
    "ref": ref,
    "kept": kept_descriptors,
    "semaphore": semaphore,
    "sw_sync": sw_sync,
    "domain_file": domain_file,
    "descriptor": descriptor,
    "sync_name": sync_name,
    "message": message,
    "requests": requests,
    "posts": posts,
    "answers": answers,
}


@contextlib.contextmanager
def opened(name: str) -> Iterator[tuple[World, Target]]:
    """Yield the world and the target of that name."""
    assert serving is not None  # it registers what is called
    world = World()
    target = TARGETS[name](world)
    try:
        yield world, target
    finally:
        getattr(target, "close", lambda: None)()
        world.close()
