"""The mapped domain under impossible values: bounds, random bytes in living domains.

"Any bytes in the domain file give a clear error, never a crash, a hang or another user's data." These tests run with sanitizers too, so
they fork nothing. What hangs is ended by the test's watchdog.
"""

from __future__ import annotations

import errno
import gc
import os
import random
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

import dmabuf
from dmabuf import DmaBufError, Usage, _native
from dmabuf.core.buffer.handle import handle_of
from dmabuf.domain import records
from tests.support.budget import times
from tests.support.fences import attach

MAPPED = _native.HEADER_BYTES + _native.MAX_CHUNKS * _native.CHUNK_BYTES
EDGE = (1 << 64) - 8


def end_of(shm: _native.Shm) -> int:
    return _native.HEADER_BYTES + shm.load32(_native.OFF_NCHUNKS) * _native.CHUNK_BYTES


# ---- bounds ----

WORD_CALLS: dict[str, tuple[int, Callable[[_native.Shm, int], object]]] = {
    "load32": (4, lambda s, at: s.load32(at)),
    "store32": (4, lambda s, at: s.store32(at, 1)),
    "cas32": (4, lambda s, at: s.cas32(at, 0, 1)),
    "add32": (4, lambda s, at: s.add32(at, 1)),
    "load64": (8, lambda s, at: s.load64(at)),
    "store64": (8, lambda s, at: s.store64(at, 1)),
    "cas64": (8, lambda s, at: s.cas64(at, 0, 1)),
    "add64": (8, lambda s, at: s.add64(at, 1)),
    "wake": (4, lambda s, at: s.wake(at)),
    "wait": (4, lambda s, at: s.wait(at, 0, 0)),
    "idle": (4, lambda s, at: s.idle(at, 1)),
}


@pytest.mark.parametrize("call", WORD_CALLS)
def test_a_word_outside_of_the_file_is_euclean(domain: dmabuf.Domain, call: str) -> None:
    size, function = WORD_CALLS[call]
    for at in (end_of(domain.shm), MAPPED - size, MAPPED, MAPPED + size, 1 << 40, EDGE):
        with pytest.raises(DmaBufError) as caught:
            function(domain.shm, at)
        assert caught.value.errno == errno.EUCLEAN


@pytest.mark.parametrize("call", WORD_CALLS)
def test_an_unaligned_word_is_euclean(domain: dmabuf.Domain, call: str) -> None:
    size, function = WORD_CALLS[call]
    for off in range(1, size):
        with pytest.raises(DmaBufError) as caught:
            function(domain.shm, _native.OFF_LIVES + off)
        assert caught.value.errno == errno.EUCLEAN


@pytest.mark.parametrize(("at", "n"), [(0, MAPPED), (0, MAPPED + 1), (MAPPED, 1), (8, EDGE), (EDGE, 8), (EDGE, 1 << 63)])
def test_bytes_outside_of_the_file_are_euclean(domain: dmabuf.Domain, at: int, n: int) -> None:
    with pytest.raises(DmaBufError) as caught:
        domain.shm.read(at, n)
    assert caught.value.errno == errno.EUCLEAN


def test_the_last_word_of_the_file_can_be_read(domain: dmabuf.Domain) -> None:
    domain.shm.load64(end_of(domain.shm) - 8)


NUMBERS = (0, 1, 63, 255, 1 << 20, (1 << 22) - 1, 1 << 31, (1 << 32) - 1)
INDEX_CALLS: dict[str, Callable[[_native.Shm, int], object]] = {
    "rec_get": lambda s, i: s.rec_get(i, 1),
    "rec_put": lambda s, i: s.rec_put(i),
    "rec_free": lambda s, i: s.rec_free(i, 1),
    "rec_info": lambda s, i: s.rec_info(i),
    "rec_name": lambda s, i: s.rec_name(i, b"name"),
    "rec_set_absent": lambda s, i: s.rec_set_absent(i, 1, 1, 1),
    "rec_set_resv": lambda s, i: s.rec_set_resv(i, 1, 1),
    "rec_torn": lambda s, i: s.rec_torn(i),
    "rec_holders": lambda s, i: s.rec_holders(i),
    "rec_layout": lambda s, i: s.rec_layout(i, i),
    "rec_set_layout": lambda s, i: s.rec_set_layout(i, i, i, b"layout"),
    "chunks_of": lambda s, i: s.chunks_of(i),
    "locked": lambda s, i: s.locked(i),
    "life_current": lambda s, i: s.life_current(i),
    "ctx_open": lambda s, i: s.ctx_open(i, 1, False, 1),
    "ctx_close": lambda s, i: s.ctx_close(i),
    "ctx_waits": lambda s, i: s.ctx_waits(i, 1, 1),
    "ctx_info": lambda s, i: s.ctx_info(i),
    "timeline_open": lambda s, i: s.timeline_open(i, 1, b"", b""),
    "timeline_close": lambda s, i: s.timeline_close(i),
    "timeline_info": lambda s, i: s.timeline_info(i),
    "fence_signal": lambda s, i: s.fence_signal(i, 0, False),
    "fence_wait": lambda s, i: s.fence_wait(i, 0, False),
    "fence_pending": lambda s, i: s.fence_pending(i),
    "fence_info": lambda s, i: s.fence_info(i),
    "fence_share": lambda s, i: s.fence_share(i),
    "fence_watch": lambda s, i: s.fence_watch(i),
    "sync_make": lambda s, i: s.sync_make(i, (i,), b"", ((i, 1, 1, 0, 0, 0, b"", b""),)),
    "sync_make, of fences": lambda s, i: s.sync_make(
        s.chunk_claim(_native.CH_SYNC) * _native.SYNC_PER, (i,), b"", ((i,) * 6 + (b"",) * 2,)
    ),
    "sync_slots": lambda s, i: s.sync_slots(i),
    "sync_exists": lambda s, i: s.sync_exists(i, 1),
    "sync_info": lambda s, i: s.sync_info(i, 1),
    "sync_advance": lambda s, i: s.sync_advance(i, 1),
    "sync_wake": lambda s, i: s.sync_wake(i),
    "fence_set_error": lambda s, i: s.fence_set_error(i, -errno.EIO),
    "fence_set_deadline": lambda s, i: s.fence_set_deadline(i, 1),
    "fence_shared": lambda s, i: s.fence_shared(i),
    "fences_done": lambda s, i: s.fences_done([i]),
    "resv_lock": lambda s, i: s.resv_lock(i, 1, 0, False, True, 0),
    "resv_unlock": lambda s, i: s.resv_unlock(i, 1),
    "resv_pass": lambda s, i: s.resv_pass(i, 1, 1),
    "resv_borrow": lambda s, i: s.resv_borrow(i, 1, 1),
    "resv_return": lambda s, i: s.resv_return(i, 1),
    "resv_owner": lambda s, i: s.resv_owner(i),
    "resv_entries": lambda s, i: s.resv_entries(i, 3, False),
    "resv_pending": lambda s, i: s.resv_pending(i, 3, 0),
    "resv_busy": lambda s, i: s.resv_busy(i, 3),
    "resv_reserve": lambda s, i: s.resv_reserve(i, 1),
    "resv_add": lambda s, i: s.resv_add(i, 1, 1, 1),
    "resv_replace": lambda s, i: s.resv_replace(i, 1, 1, 1),
    "Fence": lambda s, i: _native.Fence(s, i).wait(0),
}


@pytest.mark.parametrize("call", INDEX_CALLS)
def test_any_number_is_answered_or_refused(domain: dmabuf.Domain, call: str) -> None:
    for number in NUMBERS:
        with suppress(DmaBufError, OverflowError):
            INDEX_CALLS[call](domain.shm, number)


# ---- random bytes in a living domain ----

NCHUNKS_GARBAGE = (0, 1, 2, 100, _native.MAX_CHUNKS - 1, _native.MAX_CHUNKS, _native.MAX_CHUNKS + 1, (1 << 32) - 1)


@contextmanager
def only_clear_errors() -> Iterator[None]:
    """Normal results or errors that say what is wrong; warnings of any kind are fine too."""
    with warnings.catch_warnings(), suppress(OSError, dmabuf.ContractError, BufferError):
        warnings.simplefilter("ignore")
        yield


class Inhabited:
    """A private domain with something of everything in it."""

    def __init__(self) -> None:
        self.domain = dmabuf.Domain.private()
        self.shm = self.domain.join()
        self.bufs = [dmabuf.allocate(shape=(i + 1,), dtype="uint8", name=f"buffer {i}", domain=self.domain) for i in range(3)]
        self.timeline = dmabuf.Timeline("pending", domain=self.domain)
        self.fences = [self.timeline.fence() for _ in range(3)]
        others = [dmabuf.Timeline(f"other {i}", domain=self.domain) for i in range(40)]
        self.many = [timeline.fence() for timeline in others]
        with self.bufs[0].resv.locked():
            self.bufs[0].resv.reserve(len(self.many))
            for fence in self.many:
                self.bufs[0].resv.add(fence, Usage.READ)
        for buf, fence in zip(self.bufs[1:], self.fences, strict=False):
            attach(buf.resv, fence, Usage.WRITE)

    def operations(self) -> list[Callable[[], Any]]:
        a, b, c = self.bufs
        domain = self.domain

        def locked() -> None:
            with b.resv.locked():
                b.resv.reserve(40)
                b.resv.add(self.fences[2], Usage.READ)
                list(b.resv.iterate(Usage.BOOKKEEP))
                b.resv.describe()

        def all_locked() -> None:
            with dmabuf.lock_all([a.resv, b.resv, c.resv]):
                pass

        def write() -> None:
            with c.write(timeout=0) as view:
                view[0] = 1

        def read() -> None:
            with c.read(timeout=0) as view:
                assert view[0] in (0, 1)

        def another() -> None:
            with dmabuf.allocate(4096, domain=domain) as buf:
                buf.name = "another"
                assert buf.name in ("another", None)
                buf.describe(dmabuf.TensorLayout("uint8", (7,)))
                assert buf.layout is not None

        def timeline() -> None:
            with dmabuf.Timeline("another", domain=domain) as made:
                fence = made.fence()
                fence.signal()
                assert fence.status != 0

        return [
            locked, all_locked, write, read, another, timeline, domain.sweep, domain.reap_dead, self.fences[0].signal,
            lambda: setattr(a, "name", "renamed"), lambda: a.name, lambda: a.resv.fences(Usage.BOOKKEEP), lambda: repr(self.many[0]),
            lambda: a.resv.wait(Usage.BOOKKEEP, timeout=0), lambda: b.poll(1), lambda: dmabuf.get(a.fileno(), domain=domain).close(),
            lambda: self.fences[1].wait(0), lambda: a.resv.statistics(), lambda: records.present(domain), self.many[3].signal,
            lambda: b.layout, lambda: c.describe(dmabuf.TensorLayout("uint8", (9,))),
            lambda: self.many[0].statistics(), lambda: self.domain.pid_of(self.shm.life), lambda: a.fdinfo(),
        ]  # fmt: skip

    def end(self) -> None:
        for buf in self.bufs:
            with only_clear_errors():
                buf.close()
        with only_clear_errors():
            self.timeline.close()
        with only_clear_errors():
            self.domain.leave()


def regions(shm: _native.Shm) -> dict[str, list[tuple[int, int]]]:
    """Where the bytes are that a test overwrites: offset and length by what they hold."""
    found: dict[str, list[tuple[int, int]]] = {
        "header": [(64, 64)],
        "lives": [(_native.OFF_LIVES, 256)],
        "chunk table": [(_native.OFF_CHUNKTAB, 8 * 16)],
        "buckets": [(_native.OFF_CHUNKTAB + 8 * _native.MAX_CHUNKS, 4 * _native.BUCKETS)],
    }
    names = {v: k for k, v in vars(_native).items() if k.startswith("CH_")}
    for chunk in range(shm.load32(_native.OFF_NCHUNKS)):
        kind = names[shm.load64(_native.OFF_CHUNKTAB + 8 * chunk) & 0xFF]
        found.setdefault(kind, []).append((_native.HEADER_BYTES + chunk * _native.CHUNK_BYTES, _native.CHUNK_BYTES))
    return found


REGIONS = ("header", "lives", "chunk table", "buckets", "CH_LIFE", "CH_FENCE", "CH_REC", "CH_BLOCK", "CH_TIMELINE", "CH_CTX", "CH_LAYOUT")


def spoil(shm: _native.Shm, places: list[tuple[int, int]], rng: random.Random) -> None:
    """Overwrite some or all words of a region, by bytes of several kinds."""
    start, length = rng.choice(places)
    used = min(length, rng.choice((64, 512, 4096, length)))
    kind = rng.randrange(5)
    for at in range(start, start + used, 8):
        if kind == 0 and rng.random() < 0.9:
            continue
        value = {
            0: rng.getrandbits(64),
            1: rng.getrandbits(64),
            2: (1 << 64) - 1,
            3: rng.randrange(300) | rng.randrange(300) << 32,  # like indices
            4: shm.load64(rng.randrange(start, start + length, 8)),  # values that mean something elsewhere
        }[kind]
        shm.store64(at, value)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("where", REGIONS)
def test_random_bytes_in_a_living_domain_give_clear_errors(where: str, seed: int) -> None:
    rng = random.Random(f"{where} {seed}")
    there = Inhabited()
    operations, found = there.operations(), regions(there.shm)
    places = found.get(where) or found["CH_LIFE"]  # contexts live in there too
    try:
        for _ in range(times(quick=2, full=9)):
            spoil(there.shm, places, rng)
            rng.shuffle(operations)
            for operation in operations:
                with only_clear_errors():
                    operation()
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            there.end()
            del operations, there
            gc.collect()


@pytest.mark.parametrize("value", NCHUNKS_GARBAGE)
def test_a_wrong_count_of_chunks_neither_grows_nor_reuses_memory(value: int) -> None:
    there = Inhabited()
    shm, size = there.shm, os.fstat(there.domain.fileno()).st_size
    right = shm.load32(_native.OFF_NCHUNKS)
    before = shm.read(_native.HEADER_BYTES, _native.CHUNK_BYTES)
    shm.store32(_native.OFF_NCHUNKS, value)
    for kind in (_native.CH_TIMELINE, _native.CH_CTX, _native.CH_FENCE):
        with pytest.raises(DmaBufError) as caught:
            shm.chunk_claim(kind)
        assert caught.value.errno in (errno.EUCLEAN, errno.ENOSPC)
    assert os.fstat(there.domain.fileno()).st_size == size
    shm.store32(_native.OFF_NCHUNKS, right)
    assert shm.read(_native.HEADER_BYTES, _native.CHUNK_BYTES) == before
    there.end()


def test_a_circle_in_a_list_of_blocks_ends_the_list() -> None:
    there = Inhabited()
    shm = there.shm
    ((start, _),) = regions(shm)["CH_BLOCK"]
    used = [at for at in range(start, start + _native.CHUNK_BYTES, 128) if shm.load32(at)]
    assert len(used) > 1
    first = shm.load32(used[0] + 4) and used[0]
    for at in used:
        if not shm.load32(at + 4):  # the last one goes on with the first
            previous = next((u for u in used if u != at), first)
            chunk = (previous - _native.HEADER_BYTES) // _native.CHUNK_BYTES
            shm.store32(at + 4, chunk * 256 + (previous - start) // 128 + 1)
            for word in range(8, 128, 8):
                if not shm.load64(at + word):
                    shm.store64(at + word, shm.load64(used[0] + 8))
    index = handle_of(there.bufs[0]).shared.index
    assert len(shm.resv_entries(index, Usage.BOOKKEEP, False)) < 100_000
    assert shm.resv_busy(index, Usage.KERNEL) == 0
    with there.bufs[0].resv.locked():
        with only_clear_errors():
            there.bufs[0].resv.reserve(1000)
    there.end()


def test_a_table_lock_that_names_ourselves_is_no_wait_for_ever(domain: dmabuf.Domain) -> None:
    domain.shm.store32(_native.OFF_TABLE_LOCK, domain.shm.life)
    with only_clear_errors():
        dmabuf.allocate(4096, domain=domain).close()
    domain.shm.store32(_native.OFF_TABLE_LOCK, 0)
    dmabuf.allocate(4096, domain=domain).close()


def test_a_pending_fence_of_nobody_is_no_wait_for_ever(domain: dmabuf.Domain) -> None:
    fence = dmabuf.Timeline("orphan", domain=domain).fence()
    chunk = (fence.handle & 0x3FFFFF) // _native.FENCES_PER
    entry = _native.OFF_CHUNKTAB + 8 * chunk
    owned = domain.shm.load64(entry)
    domain.shm.store64(entry, owned & 0xFFFFFFFF)
    other = dmabuf.domain.domain._shm_of(_native.owned(os.dup, domain.fileno()))
    with pytest.raises(DmaBufError) as caught:
        _native.Fence(other, fence.handle).wait()
    assert caught.value.errno == errno.EUCLEAN
    domain.shm.store64(entry, owned)
    fence.signal()


def test_an_identity_is_never_read_from_spoiled_memory(domain: dmabuf.Domain) -> None:
    buf = dmabuf.allocate(4096, domain=domain)
    for at in range(16, 48, 8):
        domain.shm.store64(at, 0x6161616161616161)
    again = dmabuf.get(buf.fileno(), domain=domain)
    assert again == buf
    again.close()
    buf.close()


# ---- a file of another layout ----


@pytest.mark.parametrize(
    ("at", "data"),
    [(0, b"NOTADMBF"), (8, struct.pack("<I", _native.VERSION + 1)), (12, struct.pack("<I", 4096)), (_native.OFF_GEOMETRY, b"\xff" * 4)],
    ids=["magic", "version", "header", "geometry"],
)
def test_mapping_a_file_of_another_layout_is_euclean(at: int, data: bytes) -> None:
    domain = dmabuf.Domain.private()
    os.pwrite(domain.fileno(), data, at)
    with pytest.raises(DmaBufError) as caught:
        _native.Shm(domain.fileno(), domain.shm.fail)
    assert caught.value.errno == errno.EUCLEAN


def test_mapping_a_file_that_is_too_short_is_euclean() -> None:
    fd = os.memfd_create("short")
    try:
        os.ftruncate(fd, _native.HEADER_BYTES - 1)
        with pytest.raises(OSError) as caught:
            _native.Shm(fd)
        assert caught.value.errno == errno.EUCLEAN
    finally:
        os.close(fd)


def test_slots_of_closed_timelines_are_used_in_the_order_of_closing(domain: dmabuf.Domain) -> None:
    """A process that looks late still finds the errors of past fences in them."""
    made = [domain.timeline_open(b"d", b"%d" % i) for i in range(3 * _native.TIMELINES_PER)]
    order = made[::3] + made[1::3]
    for slot in order:
        slot.close()
        slot.close()
    again = [domain.timeline_open(b"d", b"n") for _ in order]
    assert [slot.index for slot in again] == [slot.index for slot in order]
    assert [tuple(slot) for slot in again] == [(slot.index, slot.context) for slot in again]
