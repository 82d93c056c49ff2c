"""Access in one process: read(), write() and access() (design: access is a fence) and the views they give."""

import errno
import threading
import warnings
from typing import Any

import pytest

import dmabuf
from dmabuf import ContractWarning, DmaBuf, Timeline, Usage
from tests.support.errnos import raises_errno
from tests.support.fences import attach, keys
from tests.support.waiting import Background, until

LONG = 3600.0


class Mishap(Exception):
    """What goes wrong inside a block."""


def tear(buf: DmaBuf) -> None:
    """Leave the content half written."""

    def block() -> None:
        with buf.write() as view:
            view[0] = 1
            raise Mishap

    with pytest.raises(Mishap):
        block()


class Inside(Background[None]):
    """Another thread inside an access, until `leave()`."""

    def __init__(self, buf: DmaBuf, mode: str) -> None:
        self._entered, self._leave = threading.Event(), threading.Event()

        def block() -> None:
            with getattr(buf, mode)():
                self._entered.set()
                self._leave.wait()

        super().__init__(block)

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.leave()
        super().__exit__(kind, *rest)

    def entered(self) -> None:
        self._entered.wait()

    def leave(self) -> None:
        self._leave.set()


def use(buf: DmaBuf, mode: str, timeout: float | None = None) -> str:
    with getattr(buf, mode)(timeout=timeout):
        return "in"


MODES = pytest.mark.parametrize("mode", ["read", "write"])


# -- the views


def test_what_was_written_is_read(buf: DmaBuf) -> None:
    with buf.write() as view:
        assert (view.nbytes, view.readonly, view.format) == (buf.size, False, "B")
        view[:5] = b"hello"
    with buf.read() as view:
        assert (view.nbytes, view.readonly) == (buf.size, True)
        assert bytes(view[:5]) == b"hello"
        assert bytes(view[5:]) == bytes(buf.size - 5)


def test_a_read_view_is_read_only(buf: DmaBuf) -> None:
    view: Any
    with buf.read() as view, pytest.raises(TypeError):
        view[0] = 1


@MODES
def test_a_view_is_released_after_the_block(buf: DmaBuf, mode: str) -> None:
    with getattr(buf, mode)() as view:
        pass
    with pytest.raises(ValueError, match="released"):
        view[0]
    with pytest.raises(ValueError, match="released"):
        bytes(view)


def test_a_view_is_released_after_a_block_that_raised(buf: DmaBuf) -> None:
    views = []

    def block() -> None:
        with buf.write() as view:
            views.append(view)
            raise Mishap

    with pytest.raises(Mishap):
        block()
    with pytest.raises(ValueError, match="released"):
        views[0][0]


# -- an access is a fence


@pytest.mark.parametrize(("mode", "usage"), [("write", Usage.WRITE), ("read", Usage.READ)])
def test_an_access_is_one_fence_of_its_usage(buf: DmaBuf, mode: str, usage: Usage) -> None:
    with getattr(buf, mode)():
        with buf.resv.locked():
            assert [used for _, used in buf.resv.iterate(Usage.BOOKKEEP)] == [usage]
        (fence,) = buf.resv.fences(usage)
        assert fence.status == 0
    assert fence.status == 1
    assert buf.resv.fences(Usage.BOOKKEEP) == []


def test_each_access_has_a_context_of_its_own(buf: DmaBuf) -> None:
    contexts = set()
    for _ in range(3):
        with buf.read():
            contexts.add(buf.resv.fences(Usage.READ)[0].context)
    assert len(contexts) == 3


@pytest.mark.parametrize(("mode", "usages"), [("read", [Usage.KERNEL, Usage.WRITE]), ("write", [Usage.KERNEL, Usage.WRITE, Usage.READ])])
def test_an_access_waits_for_the_fences_in_its_way(buf: DmaBuf, mode: str, usages: list[Usage]) -> None:
    lines = [Timeline(usage.name) for usage in usages]
    fences = [line.fence() for line in lines]
    for fence, usage in zip(fences, usages, strict=True):
        attach(buf.resv, fence, usage)
    with Background(lambda: use(buf, mode)) as job:
        for fence in fences:
            job.until_blocked()
            assert not job.done
            fence.signal()
        assert job.result() == "in"
    for line in lines:
        line.close()


@pytest.mark.parametrize(("mode", "usage"), [("read", Usage.READ), ("read", Usage.BOOKKEEP), ("write", Usage.BOOKKEEP)])
def test_an_access_does_not_wait_for_others(buf: DmaBuf, tl: Timeline, mode: str, usage: Usage) -> None:
    fence = tl.fence()
    attach(buf.resv, fence, usage)
    assert use(buf, mode) == "in"
    assert fence.status == 0
    fence.signal()


@MODES
def test_a_failed_fence_that_is_no_access_is_no_error(buf: DmaBuf, tl: Timeline, mode: str) -> None:
    fence = tl.fence()
    attach(buf.resv, fence, Usage.WRITE)
    with Background(lambda: use(buf, mode)) as job:
        job.until_blocked()
        fence.signal(error=-errno.EIO)
        assert job.result() == "in"


# -- between threads


@pytest.mark.parametrize(("first", "second"), [("write", "read"), ("write", "write"), ("read", "write")])
def test_a_writer_and_anybody_else_exclude_each_other(buf: DmaBuf, first: str, second: str) -> None:
    with Inside(buf, first) as holder:
        holder.entered()
        with Background(lambda: use(buf, second)) as job:
            job.until_blocked()
            assert not job.done
            holder.leave()
            assert job.result() == "in"


def test_readers_overlap(buf: DmaBuf) -> None:
    with Inside(buf, "read") as one, Inside(buf, "read") as two, buf.read():
        one.entered()
        two.entered()
        assert len(buf.resv.fences(Usage.READ)) == 3


def test_accesses_are_granted_in_the_order_of_arrival(buf: DmaBuf) -> None:
    """A reader that comes after a waiting writer comes after it, though another reader is inside."""
    with Inside(buf, "read") as first:
        first.entered()
        with Inside(buf, "write") as writer:
            until(lambda: len(buf.resv.fences(Usage.READ)) == 2)
            with Background(lambda: use(buf, "read")) as late:
                until(lambda: len(buf.resv.fences(Usage.READ)) == 3)
                late.until_blocked()
                assert not late.done
                first.leave()
                writer.entered()
                late.until_blocked()
                assert not late.done
                writer.leave()
                assert late.result() == "in"


# -- torn content


def test_a_writer_that_raises_leaves_the_content_torn(buf: DmaBuf) -> None:
    tear(buf)
    for _ in range(2):
        with raises_errno(errno.ECANCELED), buf.read():
            pass
    assert buf.resv.fences(Usage.BOOKKEEP) == []


def test_the_fence_of_a_writer_that_raises_ends_with_ecanceled(buf: DmaBuf) -> None:
    found = []

    def block() -> None:
        with buf.write():
            found.extend(buf.resv.fences(Usage.WRITE))
            raise Mishap

    with pytest.raises(Mishap):
        block()
    assert [fence.status for fence in found] == [-errno.ECANCELED]


def test_a_complete_write_heals(buf: DmaBuf) -> None:
    tear(buf)
    with buf.write() as view:
        view[0] = 2
    with buf.read() as view:
        assert view[0] == 2


def test_a_write_that_raises_again_does_not_heal(buf: DmaBuf) -> None:
    tear(buf)
    tear(buf)
    with raises_errno(errno.ECANCELED), buf.read():
        pass


def test_a_reader_that_raises_tears_nothing(buf: DmaBuf) -> None:
    def block() -> None:
        with buf.read():
            raise Mishap

    with pytest.raises(Mishap):
        block()
    assert use(buf, "read") == "in"


def test_begin_cpu_access_goes_on_with_torn_content(buf: DmaBuf) -> None:
    tear(buf)
    buf.begin_cpu_access(dmabuf.Direction.FROM_DEVICE)
    buf.end_cpu_access(dmabuf.Direction.FROM_DEVICE)


def test_a_waiting_reader_is_told_that_the_writer_raised(buf: DmaBuf) -> None:
    entered, go = threading.Event(), threading.Event()

    def block() -> None:
        with buf.write():
            entered.set()
            go.wait()
            raise Mishap

    with Background(block) as writer:
        entered.wait()
        with Background(lambda: use(buf, "read")) as reader:
            reader.until_blocked()
            assert not reader.done
            go.set()
            with raises_errno(errno.ECANCELED):
                reader.result()
        with pytest.raises(Mishap):
            writer.result()


# -- timeouts


@MODES
@pytest.mark.parametrize("timeout", [0, 0.002])
def test_a_timeout_raises_and_has_added_nothing(buf: DmaBuf, tl: Timeline, mode: str, timeout: float) -> None:
    fence = tl.fence()
    attach(buf.resv, fence, Usage.WRITE)
    before = keys(buf.resv)
    with raises_errno(errno.ETIMEDOUT, TimeoutError), getattr(buf, mode)(timeout=timeout):
        pass
    assert keys(buf.resv) == before
    fence.signal()
    assert use(buf, "read") == "in"


@MODES
@pytest.mark.parametrize("timeout", [0, LONG])
def test_a_timeout_does_not_matter_when_nothing_is_in_the_way(buf: DmaBuf, mode: str, timeout: float) -> None:
    assert use(buf, mode, timeout) == "in"


@MODES
@pytest.mark.parametrize("timeout", [-1, -0.001])
def test_a_negative_timeout_is_einval(buf: DmaBuf, mode: str, timeout: float) -> None:
    with raises_errno(errno.EINVAL), getattr(buf, mode)(timeout=timeout):
        pass
    assert keys(buf.resv) == []


@pytest.mark.parametrize("timeout", [0, 0.002])
def test_a_writer_that_gave_up_tears_nothing_and_holds_nobody_up(buf: DmaBuf, timeout: float) -> None:
    with Inside(buf, "read") as reader:
        reader.entered()
        with raises_errno(errno.ETIMEDOUT, TimeoutError), buf.write(timeout=timeout):
            pass
        assert use(buf, "read", 0) == "in"


# -- one's own access


@pytest.mark.parametrize(("outer", "inner"), [("write", "write"), ("write", "read"), ("read", "write")])
@pytest.mark.parametrize("handle", ["same", "another"])
def test_waiting_for_oneself_is_edeadlk_at_once(buf: DmaBuf, outer: str, inner: str, handle: str) -> None:
    with dmabuf.get(buf.fileno()) as again:
        other = buf if handle == "same" else again
        with getattr(buf, outer)():
            before = keys(buf.resv)
            with raises_errno(errno.EDEADLK), getattr(other, inner)():
                pass
            assert keys(buf.resv) == before
    # Nothing is torn, nothing is left.
    assert use(buf, "read", 0) == "in"
    assert use(buf, "write", 0) == "in"


def test_a_read_inside_a_read_overlaps(buf: DmaBuf) -> None:
    with buf.read() as outer, buf.read() as inner:
        assert outer[0] == inner[0]


def test_with_the_reservation_locked_it_is_edeadlk(buf: DmaBuf) -> None:
    with buf.resv.locked(), warnings.catch_warnings(), raises_errno(errno.EDEADLK):
        warnings.simplefilter("ignore", ContractWarning)
        buf.write().__enter__()


@pytest.mark.parametrize("mode", ["read", "write"])
def test_a_handle_that_is_closed_while_its_access_waits_is_ebadf(buf: DmaBuf, tl: Timeline, mode: str) -> None:
    fence = tl.fence()
    attach(buf.resv, fence, Usage.WRITE)
    handle = buf.get_dma_buf()

    def enter() -> None:
        with raises_errno(errno.EBADF, dmabuf.DmaBufError), getattr(handle, mode)():
            pass

    with Background(enter):
        until(lambda: len(keys(buf.resv)) == 2)
        handle.close()
        fence.signal()
    assert buf.resv.test_signaled(Usage.BOOKKEEP)
    with buf.read(), buf.read():
        pass


@pytest.mark.parametrize("call", ["close", "detach"])
@MODES
def test_closing_inside_an_access_is_ebusy(buf: DmaBuf, call: str, mode: str) -> None:
    with getattr(buf, mode)() as view:
        with raises_errno(errno.EBUSY):
            getattr(buf, call)()
        assert not buf.closed
        assert view[0] == 0
    assert use(buf, "read") == "in"


@MODES
def test_another_handle_may_be_closed_inside_an_access(buf: DmaBuf, mode: str) -> None:
    again = dmabuf.get(buf.fileno())
    with getattr(buf, mode)() as view:
        again.close()
        assert view[0] == 0


@MODES
def test_a_closed_buffer_is_ebadf(mode: str) -> None:
    buf = dmabuf.allocate(4096)
    buf.close()
    with raises_errno(errno.EBADF), getattr(buf, mode)():
        pass


# -- several at once


def test_access_gives_read_views_first_in_the_order_given(buf: DmaBuf, other_buf: DmaBuf) -> None:
    with dmabuf.allocate(4096) as third:
        with dmabuf.access(read=[third, buf], write=[other_buf]) as views:
            assert [view.readonly for view in views] == [True, True, False]
            assert [view.nbytes for view in views] == [third.size, buf.size, other_buf.size]
            views[2][0] = 5
        with dmabuf.access(read=[other_buf]) as (view,):
            assert view[0] == 5


def test_access_times_out_as_a_whole_having_added_nothing(buf: DmaBuf, other_buf: DmaBuf) -> None:
    with Inside(buf, "write") as writer:
        writer.entered()
        before = keys(buf.resv)
        with raises_errno(errno.ETIMEDOUT, TimeoutError), dmabuf.access(read=[other_buf], write=[buf], timeout=0):
            pass
        assert keys(buf.resv) == before
        assert keys(other_buf.resv) == []


def test_access_to_torn_content_raises_and_holds_nothing(buf: DmaBuf, other_buf: DmaBuf) -> None:
    tear(buf)
    with raises_errno(errno.ECANCELED), dmabuf.access(read=[buf], write=[other_buf]):
        pass
    assert keys(buf.resv) == keys(other_buf.resv) == []
    # The writer of the other one was never let in.
    assert use(other_buf, "read") == "in"


def test_access_that_raises_tears_what_it_writes_only(buf: DmaBuf, other_buf: DmaBuf) -> None:
    def block() -> None:
        with dmabuf.access(read=[buf], write=[other_buf]):
            raise Mishap

    with pytest.raises(Mishap):
        block()
    assert use(buf, "read") == "in"
    with raises_errno(errno.ECANCELED), other_buf.read():
        pass


@pytest.mark.parametrize(("read", "write"), [(2, 0), (1, 1), (0, 2)])
def test_access_to_one_buffer_twice_is_einval(buf: DmaBuf, read: int, write: int) -> None:
    with raises_errno(errno.EINVAL), dmabuf.access(read=[buf] * read, write=[buf] * write):
        pass
    assert keys(buf.resv) == []


@pytest.mark.parametrize("which", ["read", "write"])
def test_access_to_one_buffer_without_a_list_is_a_typeerror(buf: DmaBuf, which: str) -> None:
    with pytest.raises(TypeError, match=rf"access: {which} is a list of buffers, as {which}=\[a, b\], not one DmaBuf"):
        dmabuf.access(**{which: buf})  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [5, None])
def test_access_to_what_is_no_buffer_is_a_typeerror(given: Any) -> None:
    with pytest.raises(TypeError, match=r"access: read is a list of buffers, .* not of (int|NoneType)"):
        dmabuf.access(read=[given])


def test_access_to_ranges_shows_their_parts(buf: DmaBuf, other_buf: DmaBuf) -> None:
    with buf.write() as view:
        view[:10] = bytes(range(10))
    part, other = buf.export_range(2, 5), other_buf.export_range(1, 3)
    with dmabuf.access(read=[part], write=[other]) as (seen, written):
        assert bytes(seen) == bytes(range(2, 7))
        written[:] = b"abc"
        with raises_errno(errno.EDEADLK):  # the whole buffer is in the block
            use(buf, "write")
    with other_buf.read() as view:
        assert bytes(view[:5]) == b"\0abc\0"
    assert keys(buf.resv) == keys(other_buf.resv) == []


def test_access_to_two_ranges_of_one_buffer_is_einval(buf: DmaBuf) -> None:
    with raises_errno(errno.EINVAL), dmabuf.access(read=[buf.export_range(0, 1)], write=[buf.export_range(1, 1)]):
        pass
    with raises_errno(errno.EINVAL), dmabuf.access(read=[buf, buf.export_range(1, 1)]):
        pass
    assert keys(buf.resv) == []


def test_access_to_one_range_without_a_list_is_a_typeerror(buf: DmaBuf) -> None:
    with pytest.raises(TypeError, match="not one BufferRange"):
        dmabuf.access(read=buf.export_range(0, 1))  # type: ignore[arg-type]


def test_access_while_inside_one_of_them_is_edeadlk(buf: DmaBuf, other_buf: DmaBuf) -> None:
    with buf.write(), raises_errno(errno.EDEADLK), dmabuf.access(read=[buf], write=[other_buf]):
        pass
    assert keys(buf.resv) == keys(other_buf.resv) == []
    assert use(buf, "read") == "in"
