"""export and what it checks, and the exporter's ops behind CPU access (semantics 2.1–2.6, 2.15, 2.16)."""

import errno
import os
from typing import Any

import pytest

import dmabuf
from dmabuf import ContractWarning, Device, Direction, DmaResv, Domain, Exporter, Timeline, Usage
from dmabuf.core.export.module import Module
from tests.support.drivers import BIDIR, FROM, PAGE, TO, Bare, Dynamic, Static
from tests.support.errnos import raises_errno
from tests.support.fences import attach as add
from tests.support.waiting import Background

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
        assert buf.home == "exported"


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
            part = memoryview(view)[:4]
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
