"""export and what it checks, the exporter's ops behind CPU access, mmap and vmap, and the one release (spec 2.1–2.6, 2.15–2.18)."""

import errno
import gc
import os
import queue
import socket
import threading
from typing import Any

import pytest

import dmabuf
from dmabuf import ContractError, ContractWarning, Device, Direction, DmaBuf, DmaResv, Domain, Exporter, IosysMap, Timeline, Usage
from dmabuf.core import backing
from dmabuf.core.exporter import Module
from tests.support.children import Parent, Spawn
from tests.support.drivers import PAGE, Bare, Dynamic, Mover, Static
from tests.support.errnos import raises_errno
from tests.support.fences import attach as add
from tests.support.waiting import Background, until

BIDIR, TO, FROM = Direction.BIDIRECTIONAL, Direction.TO_DEVICE, Direction.FROM_DEVICE
SIZE = 4 * PAGE


# -- what export refuses, and in which order


def lacking(*ops: str) -> type[Exporter]:
    """A class of exporters with all ops but these."""
    have = {op: getattr(Dynamic, op) for op in Dynamic.__mro__[-2].__dict__ if not op.startswith("_") and op not in ops}
    return type("Lacking", (Exporter,), have)


@pytest.mark.parametrize("op", ["map", "unmap", "release"])
def test_an_exporter_without_a_mandatory_op_warns_and_is_einval(op: str) -> None:
    with pytest.warns(ContractWarning), raises_errno(errno.EINVAL):
        dmabuf.export(lacking(op)(), PAGE)


@pytest.mark.parametrize("exporter", [None, object(), Static], ids=["None", "an object", "a class"])
def test_what_is_no_exporter_warns_and_is_einval(exporter: Any) -> None:
    with pytest.warns(ContractWarning), raises_errno(errno.EINVAL):
        dmabuf.export(exporter, PAGE)


@pytest.mark.parametrize("op", ["pin", "unpin"])
def test_one_of_pin_and_unpin_warns_and_is_einval(op: str) -> None:
    with pytest.warns(ContractWarning), raises_errno(errno.EINVAL):
        dmabuf.export(lacking(op)(), PAGE)


def test_caching_with_pin_warns_and_is_einval(dynamic: Dynamic) -> None:
    with pytest.warns(ContractWarning), raises_errno(errno.EINVAL):
        dmabuf.export(dynamic, PAGE, cache_sgt_mapping=True)


def test_the_ops_are_checked_before_the_owner_is_asked(dynamic: Dynamic) -> None:
    module = Module("vram")
    with pytest.warns(ContractWarning, match="cache"), raises_errno(errno.EINVAL):
        dmabuf.export(dynamic, PAGE, cache_sgt_mapping=True, owner=module)
    assert module.references == 0


@pytest.mark.parametrize("name", ["", "x" * 32, "a\0b"])
def test_a_bad_exporter_name_is_einval(static: Static, name: str) -> None:
    with raises_errno(errno.EINVAL):
        dmabuf.export(static, PAGE, exp_name=name)


@pytest.mark.parametrize("size", [-1, 1 << 63])
def test_a_size_that_is_none_is_einval(static: Static, size: int) -> None:
    with raises_errno(errno.EINVAL):
        dmabuf.export(static, size)


def test_a_write_only_buffer_is_einval(static: Static) -> None:
    with raises_errno(errno.EINVAL):
        dmabuf.export(static, PAGE, flags=os.O_WRONLY)


def test_a_reservation_object_of_another_domain_is_exdev(static: Static) -> None:
    with raises_errno(errno.EXDEV):
        dmabuf.export(static, PAGE, resv=DmaResv(domain=Domain.private()), domain=Domain.default())


def test_a_name_that_is_too_long_is_einval_and_the_owner_is_given_back(static: Static) -> None:
    module = Module("vram")
    with raises_errno(errno.EINVAL):
        dmabuf.export(static, PAGE, name="x" * 32, owner=module)
    assert module.references == 0


def test_out_of_descriptors_export_leaves_nothing(static: Static) -> None:
    import resource

    module = Module("vram")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 64, hard))
    try:
        while True:
            try:
                taken.append(os.dup(0))
            except OSError:
                break
        for spare in range(2):
            with raises_errno(errno.EMFILE):
                dmabuf.export(static, PAGE, owner=module)
            assert module.references == 0
            if not spare:
                os.close(taken.pop())
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert static.calls == []


# -- what a buffer of an exporter is


@pytest.mark.parametrize("size", [0, 1, 4097, SIZE])
def test_the_size_is_taken_as_it_is(static: Static, size: int) -> None:
    with dmabuf.export(static, size) as buf:
        assert (buf.size, buf.lseek(0, os.SEEK_END), os.fstat(buf.fileno()).st_size) == (size, size, size)
        assert buf.home == "live"


def test_the_tail_of_a_part_of_a_page_cannot_be_mapped(static: Static) -> None:
    with dmabuf.export(static, 4097) as buf:
        with buf.mmap() as mapping:
            assert len(mapping) == 4096
        for offset, length in [(0, 4097), (4096, 1)]:
            with raises_errno(errno.EINVAL):
                buf.mmap(offset, length)


def test_the_exporter_is_named_after_its_module(static: Static) -> None:
    with dmabuf.export(static, PAGE) as buf:
        assert buf.exp_name == "drivers"
        assert "exp_name:\tdrivers\n" in buf.fdinfo()


def test_a_descriptor_of_it_gives_the_same_buffer(static: Static) -> None:
    with dmabuf.export(static, PAGE) as buf, dmabuf.get(buf.fileno()) as other:
        assert other == buf
        assert other.resv is buf.resv
        with other.write() as view:
            view[0] = 7
        assert static.whole[0] == 7


def test_the_token_holds_no_memory_and_nobody_writes_to_it(static: Static) -> None:
    with dmabuf.export(static, 1 << 40) as buf:
        assert os.fstat(buf.fileno()).st_blocks == 0
        with raises_errno(errno.EPERM):
            os.write(buf.fileno(), b"x")


def test_a_read_only_buffer_has_a_read_only_descriptor(static: Static) -> None:
    import fcntl

    with dmabuf.export(static, PAGE, flags=os.O_RDONLY) as buf:
        assert fcntl.fcntl(buf.fileno(), fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
    assert static.calls == ["release"]


def test_frozen_exporters_work(static: Static, dev: Device) -> None:
    class Frozen(Exporter):
        __slots__ = ()

        def __setattr__(self, *_: object) -> None:
            raise AssertionError

        map, unmap, release = (lambda self, *a: static.map(*a)), (lambda self, *a: static.unmap(*a)), (lambda self, *a: None)

    with dmabuf.export(Frozen(), PAGE) as buf:
        att = buf.attach(dev)
        with att.mapped(TO):
            pass
        att.detach()


# -- CPU access


@pytest.mark.parametrize("direction", list(Direction), ids=lambda direction: direction.name)
def test_begin_and_end_reach_the_exporter(static: Static, direction: Direction) -> None:
    with dmabuf.export(static, SIZE) as buf:
        buf.begin_cpu_access(direction)
        buf.end_cpu_access(direction)
    assert static.calls == [("begin", direction), ("end", direction), "release"]


def test_sync_reaches_the_exporter(static: Static) -> None:
    with dmabuf.export(static, SIZE) as buf:
        for flags in (1, 5, 2, 6, 3, 7):
            buf.sync(flags)
    assert static.calls[:-1] == [("begin", FROM), ("end", FROM), ("begin", TO), ("end", TO), ("begin", BIDIR), ("end", BIDIR)]


def test_a_failing_begin_is_told_without_waiting(static: Static, tl: Timeline) -> None:
    with dmabuf.export(static, SIZE) as buf:
        fence = tl.fence()
        add(buf.resv, fence, Usage.WRITE)
        static.fails["begin"] = errno.ENOMEM
        with raises_errno(errno.ENOMEM):
            buf.begin_cpu_access(TO)
        assert not fence.is_signaled()
        fence.signal()


def test_a_failing_end_is_told(static: Static) -> None:
    with dmabuf.export(static, SIZE) as buf:
        static.fails["end"] = errno.EINTR
        with raises_errno(errno.EINTR):
            buf.end_cpu_access(TO)
        with raises_errno(errno.EINTR):
            buf.sync(6)


def test_without_the_ops_begin_and_end_only_wait(bare: Bare) -> None:
    with dmabuf.export(bare, SIZE) as buf:
        buf.begin_cpu_access(TO)
        buf.end_cpu_access(TO)
    assert bare.calls == ["release"]


def test_read_and_write_are_bracketed_by_the_exporter(static: Static) -> None:
    with dmabuf.export(static, SIZE) as buf:
        with buf.write() as view:
            view[:3] = b"abc"
            assert static.calls == [("begin", BIDIR), ("mmap", 0, SIZE)]
        with buf.read() as view:
            assert view[:3] == b"abc"
        assert static.calls == [("begin", BIDIR), ("mmap", 0, SIZE), ("end", BIDIR), ("begin", FROM), ("mmap", 0, SIZE), ("end", FROM)]


def test_several_buffers_are_bracketed_each(static: Static, bare: Bare) -> None:
    with dmabuf.export(static, SIZE) as a, dmabuf.allocate(PAGE) as b:
        with dmabuf.access(read=[b], write=[a]) as views:
            assert [len(view) for view in views] == [PAGE, SIZE]
        assert static.calls == [("begin", BIDIR), ("mmap", 0, SIZE), ("end", BIDIR)]


def test_the_bracket_comes_after_the_fences(static: Static, tl: Timeline) -> None:
    with dmabuf.export(static, SIZE) as buf:
        fence = tl.fence()
        add(buf.resv, fence, Usage.WRITE)

        def look() -> int:
            with buf.read() as view:
                return len(view)

        with Background(look) as job:
            job.until_blocked()
            assert static.calls == []
            fence.signal()
            assert job.result() == SIZE


@pytest.mark.parametrize("op", ["begin", "mmap"])
@pytest.mark.parametrize("write", [False, True], ids=["read", "write"])
def test_a_failing_bracket_enters_nothing_and_leaves_nothing(static: Static, op: str, write: bool) -> None:
    with dmabuf.export(static, SIZE) as buf:
        static.fails[op] = errno.ENOMEM
        with raises_errno(errno.ENOMEM), buf.write() if write else buf.read():
            raise AssertionError("entered")
        assert static.count("begin") - static.count("end") == (op == "begin")
        assert buf.resv.fences(Usage.BOOKKEEP) == []
        assert buf.statistics().accesses == 0
        static.fails.clear()
        with buf.read():
            pass


def test_a_failing_end_of_a_read_is_told_and_ends_it(static: Static) -> None:
    with dmabuf.export(static, SIZE) as buf:
        static.fails["end"] = errno.EIO
        with raises_errno(errno.EIO), buf.read():
            pass
        static.fails.clear()
        assert buf.resv.fences(Usage.BOOKKEEP) == []
        with buf.read():
            pass


def test_a_failing_end_of_a_write_leaves_the_content_torn(static: Static) -> None:
    with dmabuf.export(static, SIZE) as buf:
        static.fails["end"] = errno.EIO
        with raises_errno(errno.EIO), buf.write():
            pass
        static.fails.clear()
        with raises_errno(errno.ECANCELED), buf.read():
            pass
        with buf.write():
            pass
        with buf.read():
            pass


def test_the_end_of_a_read_that_an_array_outlives_comes_with_the_array(static: Static) -> None:
    with dmabuf.export(static, SIZE) as buf:
        with buf.read() as view:
            part = view[:4]
        assert static.count("end") == 0
        part.release()
        assert static.count("end") == 1
        assert buf.resv.fences(Usage.BOOKKEEP) == []


def test_memory_that_moved_is_seen_where_it_is_now(static: Static) -> None:
    with dmabuf.export(static, SIZE) as buf:
        with buf.write() as view:
            view[0] = 1
        other = Static()
        other.whole[0] = 2
        static.memory, other.memory = other.memory, static.memory
        with buf.read() as view:
            assert view[0] == 2
        static.memory, other.memory = other.memory, static.memory
        other.close()


# -- mmap


def test_mmap_is_the_exporters(static: Static) -> None:
    with dmabuf.export(static, SIZE) as buf:
        mapping = buf.mmap(PAGE, PAGE)
        redirected = buf.dma_mmap(PAGE, PAGE)
        mapping[0] = 9
        assert redirected[0] == static.whole[PAGE] == 9
        assert static.calls == [("mmap", PAGE, PAGE), ("mmap", PAGE, PAGE)]
        mapping.close()
        redirected.close()


@pytest.mark.parametrize(("offset", "length"), [(0, SIZE + 1), (SIZE, PAGE), (1, PAGE), (0, 0)])
def test_mmap_out_of_bounds_is_einval_before_the_exporter_is_asked(static: Static, offset: int, length: int) -> None:
    with dmabuf.export(static, SIZE) as buf:
        with raises_errno(errno.EINVAL):
            buf.mmap(offset, length)
        with raises_errno(errno.EINVAL):
            buf.dma_mmap(offset, length)
        assert static.calls == []


def test_dma_mmap_that_overflows_is_eoverflow(static: Static) -> None:
    with dmabuf.export(static, SIZE) as buf, raises_errno(errno.EOVERFLOW):
        buf.dma_mmap((1 << 64) - PAGE, 2 * PAGE)


@pytest.mark.parametrize("call", ["mmap", "read", "write"])
def test_without_the_op_there_is_no_mapping(bare: Bare, call: str) -> None:
    with dmabuf.export(bare, SIZE) as buf:
        with raises_errno(errno.EINVAL):
            buf.mmap() if call == "mmap" else getattr(buf, call)().__enter__()
        assert buf.resv.fences(Usage.BOOKKEEP) == []


def test_a_failing_mmap_is_told(static: Static) -> None:
    with dmabuf.export(static, SIZE) as buf:
        static.fails["mmap"] = errno.EAGAIN
        with raises_errno(errno.EAGAIN):
            buf.mmap()


def test_an_exporter_whose_mmap_returns_something_else_is_a_type_error(bare: Bare) -> None:
    class Odd(Static):
        def mmap(self, buf: DmaBuf, offset: int, length: int) -> Any:
            return bytearray(length)

    exporter = Odd()
    with dmabuf.export(exporter, SIZE) as buf, pytest.raises(TypeError):
        buf.mmap()
    exporter.close()


def test_read_only_memory_is_mapped_when_asked_so(static: Static) -> None:
    class ReadOnly(Static):
        def mmap(self, buf: DmaBuf, offset: int, length: int) -> Any:
            return self.memory.mmap(offset, length, writable=False)

    exporter = ReadOnly()
    with dmabuf.export(exporter, SIZE) as buf:
        with raises_errno(errno.EACCES):
            buf.mmap()
        buf.mmap(writable=False).close()
        with raises_errno(errno.EACCES), buf.write():
            pass
        with buf.read():
            pass
    exporter.close()


# -- vmap


def test_vmap_is_counted_and_the_exporter_sees_one_of_each(static: Static) -> None:
    with dmabuf.export(static, SIZE) as buf:
        with buf.resv.locked():
            one, two = buf.vmap(), buf.vmap()
            assert one == two
            buf.vunmap(one)
            assert static.calls == ["vmap"]
            buf.vunmap(two)
        assert static.calls == ["vmap", "vunmap"]
        buf.vunmap_unlocked(buf.vmap_unlocked())
        assert static.calls == ["vmap", "vunmap"] * 2


def test_a_failing_vmap_warns_and_clears_the_map(static: Static) -> None:
    with dmabuf.export(static, SIZE) as buf:
        stale = IosysMap.init_vaddr(bytearray(8))
        static.fails["vmap"] = errno.ENOMEM
        with pytest.warns(ContractWarning), raises_errno(errno.ENOMEM):
            buf.vmap_unlocked(stale)
        assert stale.is_null()
        assert buf.statistics().vmaps == 0
        assert not buf.resv.is_locked()
        static.fails.clear()
        assert buf.vmap_unlocked(stale) is stale
        assert stale.is_set()
        buf.vunmap_unlocked(stale)


@pytest.mark.parametrize("why", ["not locked", "locked", "closed"])
def test_every_failure_clears_the_map(static: Static, why: str) -> None:
    stale = IosysMap.init_vaddr(bytearray(8))
    buf = dmabuf.export(static, SIZE)
    if why == "not locked":
        with pytest.raises(ContractError):
            buf.vmap(stale)
    elif why == "locked":
        with buf.resv.locked(), pytest.warns(ContractWarning), raises_errno(errno.EDEADLK):
            buf.vmap_unlocked(stale)
    buf.close()
    if why == "closed":
        with raises_errno(errno.EBADF):
            buf.vmap(stale)
    assert stale.is_null()


def test_vmap_without_the_op_is_einval_without_a_warning(bare: Bare) -> None:
    with dmabuf.export(bare, SIZE) as buf, raises_errno(errno.EINVAL):
        buf.vmap_unlocked()


def test_a_vmap_of_null_is_enomem(static: Static) -> None:
    class Null(Static):
        def vmap(self, buf: DmaBuf) -> IosysMap:
            return IosysMap()

    exporter = Null()
    with dmabuf.export(exporter, SIZE) as buf, pytest.warns(ContractWarning), raises_errno(errno.ENOMEM):
        buf.vmap_unlocked()
    exporter.close()


@pytest.mark.parametrize("kind", ["foreign", "one too many"])
def test_a_wrong_vunmap_is_a_contract_error(either: Static, kind: str) -> None:
    with dmabuf.export(either, SIZE) as buf:
        map_ = buf.vmap_unlocked()
        if kind == "one too many":
            buf.vunmap_unlocked(map_)
        with pytest.raises(ContractError):
            buf.vunmap_unlocked(IosysMap.init_vaddr(bytearray(8)) if kind == "foreign" else map_)
        if kind == "foreign":
            buf.vunmap_unlocked(map_)
        assert either.calls == ["vmap", "vunmap"]


@pytest.mark.parametrize("returned", [None, b"bytes"])
def test_an_exporter_whose_vmap_returns_something_else_is_a_type_error_and_counts_nothing(static: Static, returned: object) -> None:
    exporter = type("Odd", (Static,), {"vmap": lambda self, buf: returned})()
    with dmabuf.export(exporter, SIZE) as buf:
        with pytest.raises(TypeError, match="not an IosysMap"):
            buf.vmap_unlocked()
        assert (buf.statistics().vmaps, buf.resv.is_locked()) == (0, False)
    exporter.close()


def test_a_plain_buffer_is_vmapped_too(buf: DmaBuf) -> None:
    with buf.write() as view:
        view[:2] = b"hi"
    map_, again = buf.vmap_unlocked(), buf.vmap_unlocked()
    assert map_ == again
    buf.begin_cpu_access(FROM)
    got = bytearray(2)
    map_.memcpy_from(got, 0)
    buf.end_cpu_access(FROM)
    assert got == b"hi"
    buf.vunmap_unlocked(map_)
    buf.vunmap_unlocked(again)


# -- the release


def test_it_is_released_once_when_the_last_handle_closes(static: Static) -> None:
    buf = dmabuf.export(static, SIZE)
    other, third = dmabuf.get(buf.fileno()), buf.get_dma_buf()
    for handle in (buf, other):
        handle.close()
        assert static.calls == []
    third.close()
    assert static.calls == ["release"]
    domain = Domain.default()
    domain.sweep()
    assert static.calls == ["release"]


def test_release_tells_who_it_was(static: Static) -> None:
    seen: list[object] = []
    buf = dmabuf.export(static, SIZE, name="cam")
    static.during["release"] = lambda last: seen.append((last.ino, last.name, last.size, last.exp_name))
    expected = (buf.ino, "cam", SIZE, "drivers")
    buf.close()
    assert seen == [expected]


@pytest.mark.parametrize("how", ["dup", "detach"])
def test_a_bare_descriptor_keeps_it(static: Static, how: str) -> None:
    buf = dmabuf.export(static, SIZE)
    fd = buf.dup() if how == "dup" else buf.detach()
    buf.close()
    assert static.calls == []
    with dmabuf.get(fd) as again:
        assert again.home == "live"
        assert again.begin_cpu_access(FROM) is None
    assert static.count("release") == 0
    os.close(fd)
    Domain.default().sweep()
    until(lambda: static.count("release"))


def test_a_mapping_keeps_it(static: Static) -> None:
    buf = dmabuf.export(static, SIZE)
    mapping = buf.mmap()
    buf.close()
    Domain.default().sweep()
    assert static.count("release") == 0
    mapping.close()
    Domain.default().sweep()
    until(lambda: static.count("release"))


def test_a_descriptor_in_flight_keeps_it(static: Static) -> None:
    one, two = socket.socketpair()
    with one, two:
        buf = dmabuf.export(static, SIZE)
        dmabuf.send(one, buf)
        buf.close()
        Domain.default().sweep()
        assert static.count("release") == 0
        (again,) = dmabuf.recv(two)
        with again.read() as view:
            assert len(view) == SIZE
        again.close()
    assert static.count("release") == 1


def hold(parent: Parent) -> None:
    (buf,) = dmabuf.recv(parent.sock)
    parent.send((buf.ino, buf.name, buf.exp_name, buf.home, buf.size))
    with buf.mmap() as mapping:
        mapping[0] = 7
    parent.send((len(buf.resv.fences(Usage.BOOKKEEP)), buf.poll(1)))
    parent.recv()
    buf.close()
    parent.send("closed")
    parent.recv()


@pytest.mark.parametrize("own", [True, False], ids=["its own reservation object", "a given one"])
def test_another_process_keeps_it_and_uses_its_exporter(static: Static, child: Spawn, tl: Timeline, own: bool) -> None:
    buf = dmabuf.export(static, SIZE, name="cam", resv=None if own else DmaResv())
    fence = tl.fence()
    add(buf.resv, fence, Usage.WRITE)
    other = child(hold)
    dmabuf.send(other.sock, buf)
    assert other.recv() == (buf.ino, "cam", "drivers", "live", SIZE)
    assert other.recv() == (1, 0)
    assert static.whole[0] == 7
    buf.close()
    Domain.default().sweep()
    assert static.count("release") == 0
    other.send("close")
    assert other.recv() == "closed"
    fence.signal()  # until then a busy poll holds it
    until(lambda: static.count("release"))
    other.send("end")


def killed_holder(parent: Parent) -> None:
    kept = dmabuf.recv(parent.sock)
    parent.send(len(kept))
    parent.recv()


def test_the_death_of_the_last_holder_releases_it(static: Static, child: Spawn) -> None:
    buf = dmabuf.export(static, SIZE)
    other = child(killed_holder)
    dmabuf.send(other.sock, buf)
    assert other.recv() == 1
    buf.close()
    assert static.count("release") == 0
    other.kill()
    until(lambda: static.count("release"))


def test_release_is_put_off_while_the_caller_holds_a_reservation_lock(static: Static) -> None:
    buf, resv = dmabuf.export(static, SIZE), DmaResv()
    where: queue.SimpleQueue[int] = queue.SimpleQueue()
    static.during["release"] = lambda last: where.put(threading.get_ident())
    with resv.locked():
        buf.close()
        assert where.get() != threading.get_ident()


def test_release_is_put_off_out_of_a_callback(static: Static, tl: Timeline) -> None:
    buf = dmabuf.export(static, SIZE)
    where: queue.SimpleQueue[int] = queue.SimpleQueue()
    static.during["release"] = lambda last: where.put(threading.get_ident())
    fence = tl.fence()
    fence.add_callback(lambda _: buf.close())
    fence.signal()
    assert buf.closed
    assert where.get() != threading.get_ident()


def test_release_never_runs_in_the_garbage_collector(static: Static) -> None:
    buf = dmabuf.export(static, SIZE)
    where: queue.SimpleQueue[int] = queue.SimpleQueue()
    static.during["release"] = lambda last: where.put(threading.get_ident())
    del buf
    gc.collect()
    assert where.get() != threading.get_ident()


def test_who_closes_the_last_handle_releases_and_not_the_thread_that_looks_just_then(
    static: Static, monkeypatch: pytest.MonkeyPatch
) -> None:
    free, looks = backing.outside, list[Background[None]]()

    def outside() -> bool:
        if not looks:  # called as the handle is closed, before the release
            looks.append(Background(backing.exports_of(Domain.default()).look))
            looks[0].__enter__()
            looks[0].until_blocked()
        return free()

    where: list[int] = []
    static.during["release"] = lambda last: where.append(threading.get_ident())
    buf = dmabuf.export(static, SIZE)
    monkeypatch.setattr(backing, "outside", outside)
    buf.close()
    assert where == [threading.get_ident()]
    looks[0].__exit__(None)


def test_a_release_that_raises_is_told_and_the_rest_is_done(static: Static, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []
    monkeypatch.setattr("sys.unraisablehook", lambda info: told.append(info.exc_type))
    module = Module("vram")
    static.fails["release"] = errno.EIO
    dmabuf.export(static, SIZE, owner=module).close()
    assert told == [OSError]
    assert module.references == 0


def test_release_with_a_live_vmap_is_a_contract_error(static: Static) -> None:
    module = Module("vram")
    buf = dmabuf.export(static, SIZE, owner=module)
    map_ = buf.vmap_unlocked()
    with pytest.raises(ContractError, match="vmap"):
        buf.close()
    assert buf.closed
    assert static.calls == ["vmap"]
    map_.clear()


def test_release_with_attachments_warns(static: Static, dev: Device) -> None:
    buf = dmabuf.export(static, SIZE)
    buf.attach(dev)
    with pytest.warns(ContractWarning, match="npu0"):
        buf.close()
    assert static.calls == ["attach", "release"]


# -- reservation objects, owners


def test_a_given_reservation_object_is_the_buffers_and_outlives_it(static: Static, tl: Timeline) -> None:
    resv = DmaResv()
    with dmabuf.export(static, SIZE, resv=resv) as buf, dmabuf.export(static, SIZE, resv=resv) as other:
        assert buf.resv is resv is other.resv
        fence = tl.fence()
        add(resv, fence, Usage.WRITE)
        assert not buf.poll(1)
        assert not other.poll(1)
        fence.signal()
        with dmabuf.access(read=[buf, other]) as views:
            assert len(views) == 2
    assert resv.test_signaled(Usage.BOOKKEEP)


def test_the_owner_cannot_go_while_a_buffer_or_a_mapping_lives(static: Static) -> None:
    module = Module("vram")
    buf = dmabuf.export(static, SIZE, owner=module)
    mapping = buf.mmap()
    for step in (buf.close, mapping.close):
        with raises_errno(errno.EBUSY):
            module.unload()
        step()
    Domain.default().sweep()
    until(lambda: not module.references)
    module.unload()
    with raises_errno(errno.ENOENT):
        dmabuf.export(static, SIZE, owner=module)


def forked(parent: Parent) -> None:
    exporter = Static()
    buf = dmabuf.export(exporter, SIZE)
    pid = os.fork()
    if not pid:
        try:
            buf.begin_cpu_access(FROM)
            buf.end_cpu_access(FROM)
        except OSError as e:
            os._exit(e.errno or 255)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    buf.close()
    until(lambda: exporter.count("release"))
    parent.send((os.waitstatus_to_exitcode(status), exporter.calls))
    exporter.close()


def test_a_forked_child_asks_its_parent_as_any_process_does(child: Spawn) -> None:
    assert child(forked).recv() == (0, [("begin", FROM), ("end", FROM), "release"])


def test_a_dynamic_exporter_is_known_by_pin(static: Static, dynamic: Dynamic) -> None:
    with dmabuf.export(static, SIZE) as one, dmabuf.export(dynamic, SIZE) as two:
        assert (one.is_dynamic, two.is_dynamic) == (False, True)


def test_bufinfo_lists_attached_devices_by_name(static: Static) -> None:
    with dmabuf.export(static, SIZE, exp_name="vram") as buf:
        atts = [buf.attach(Device("gpu0")), buf.attach(Device("npu0"), Mover())]
        text = dmabuf.bufinfo()
        assert "\tvram\t" in text
        assert "\tAttached Devices:\n\tnpu0\n\tgpu0\nTotal 2 devices attached\n\n" in text
        for att in atts:
            att.detach()
        assert "Total 0 devices attached" in dmabuf.bufinfo()
