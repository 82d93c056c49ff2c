"""dmabuf.open_or_allocate() and open(newest=True): names that processes share over their restarts."""

import errno
import os

import pytest

import dmabuf
from dmabuf import TensorLayout
from dmabuf.domain import place
from dmabuf.heap import memfd
from tests.sharing.conftest import SIZE, Pair
from tests.support.children import Parent, Spawn
from tests.support.errnos import raises_errno


def _holder(parent: Parent, name: str, size: int = SIZE) -> None:
    with dmabuf.open_or_allocate(name, size) as buf:
        parent.send(buf.ino)
        parent.recv()


def _at_once(parent: Parent, name: str) -> None:
    dmabuf.Domain.default().join()
    parent.send()
    parent.recv()
    with dmabuf.open_or_allocate(name, SIZE) as buf:
        parent.send(buf.ino)
        parent.recv()


def test_the_first_allocates_and_the_second_opens(child: Spawn) -> None:
    with dmabuf.open_or_allocate("frame", SIZE) as buf:
        assert (buf.name, buf.size) == ("frame", SIZE)
        other = child(_holder, "frame")
        assert other.recv() == buf.ino
    with dmabuf.open_or_allocate(b"frame", SIZE - 1) as again:  # as many pages
        assert again == buf
    other.send()
    other.result()


def test_processes_that_come_at_once_get_one_buffer(child: Spawn) -> None:
    others = [child(_at_once, "frame") for _ in range(6)]
    for other in others:
        other.recv()
    for other in others:
        other.send()
    assert len({other.recv() for other in others}) == 1
    for other in others:
        other.send()
        other.result()


def test_after_a_crash_of_the_first_a_new_one_is_allocated(child: Spawn) -> None:
    other = child(_holder, "frame")
    other.recv()
    other.kill()
    with dmabuf.open_or_allocate("frame", 2 * SIZE) as buf:  # of another size, too
        assert buf.size == 2 * SIZE


def test_after_a_crash_of_the_first_another_holder_keeps_it(child: Spawn) -> None:
    first, second = child(_holder, "frame"), child(_holder, "frame")
    ino = first.recv()
    assert second.recv() == ino
    first.kill()
    with dmabuf.open_or_allocate("frame", SIZE) as buf:
        assert buf.ino == ino
    second.send()
    second.result()


def _stuck(parent: Parent) -> None:
    """Stops in the middle of allocating."""

    def reserve(*_: object) -> None:
        parent.send()
        parent.recv()

    memfd.reserve_range = reserve  # type: ignore[assignment]
    with dmabuf.open_or_allocate("frame", SIZE) as buf:
        parent.send(buf.ino)
        parent.recv()


def test_who_comes_while_another_allocates_gets_its_buffer(child: Spawn) -> None:
    first = child(_stuck)
    first.recv()
    second = child(_at_once, "frame")
    second.recv()
    second.send()
    first.send()
    ino = first.recv()
    assert second.recv() == ino
    for other in (first, second):
        other.send()
        other.result()


def test_a_process_killed_while_it_allocates_keeps_nobody(child: Spawn) -> None:
    other = child(_stuck)
    other.recv()
    other.kill()
    dmabuf.open_or_allocate("frame", SIZE).close()


def test_a_process_stopped_while_it_allocates_is_named(child: Spawn, monkeypatch: pytest.MonkeyPatch) -> None:
    other = child(_stuck)
    other.recv()
    monkeypatch.setattr(place, "LIFECYCLE_S", 0.1)
    with raises_errno(errno.ETIMEDOUT) as caught:
        dmabuf.open_or_allocate("frame", SIZE)
    assert f"process {other.pid} has held its lock of a name" in str(caught.value)
    dmabuf.open_or_allocate("another", SIZE).close()
    other.kill()


def test_a_thread_of_this_process_that_allocates_for_long_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place, "LIFECYCLE_S", 0.1)
    with place.name_lock(dmabuf.Domain.default().fileno(), b"frame"), raises_errno(errno.ETIMEDOUT) as caught:
        dmabuf.open_or_allocate("frame", SIZE)
    assert "another thread of this process has held" in str(caught.value)


def test_another_size_is_refused_and_nothing_stays_open(buf: dmabuf.DmaBuf) -> None:
    with raises_errno(errno.EEXIST, FileExistsError) as caught:
        dmabuf.open_or_allocate("shared", 3 * SIZE)
    assert f"the buffer has {SIZE} bytes, and {3 * SIZE} were asked for" in str(caught.value)


def test_layouts_must_agree_if_one_is_asked_for() -> None:
    layout = TensorLayout("float32", (32, 32))
    with dmabuf.open_or_allocate("tensor", layout=layout) as buf:
        assert buf.layout == layout
        dmabuf.open_or_allocate("tensor", shape=(32, 32), dtype="float32").close()
        dmabuf.open_or_allocate("tensor", SIZE).close()
        with raises_errno(errno.EEXIST) as caught:
            dmabuf.open_or_allocate("tensor", shape=(1024,), dtype="float32")
        assert "another layout" in str(caught.value)


def test_two_buffers_of_the_name_are_refused(buf: dmabuf.DmaBuf) -> None:
    with dmabuf.allocate(SIZE, name="shared"), raises_errno(errno.ENOTUNIQ):
        dmabuf.open_or_allocate("shared", SIZE)


def test_a_buffer_in_flight_is_not_made_twice(seqpacket: Pair) -> None:
    with dmabuf.allocate(SIZE, name="flying") as buf:
        dmabuf.send(seqpacket[0], buf)
    with raises_errno(errno.ENODEV):
        dmabuf.open_or_allocate("flying", SIZE)
    dmabuf.recv(seqpacket[1])[0].close()


def test_in_a_private_domain_too() -> None:
    domain = dmabuf.Domain.private()
    with dmabuf.open_or_allocate("frame", SIZE, domain=domain) as buf, dmabuf.open_or_allocate("frame", SIZE, domain=domain) as again:
        assert buf == again
        assert buf.domain is domain


def test_a_heap_that_does_not_exist_is_refused_when_it_is_needed(buf: dmabuf.DmaBuf) -> None:
    dmabuf.open_or_allocate("shared", SIZE, heap="none").close()
    with raises_errno(errno.ENODEV):
        dmabuf.open_or_allocate("new", SIZE, heap="none")


@pytest.mark.parametrize("name", ["x" * 32, "a\0b"])
def test_a_name_that_no_buffer_can_have_is_refused(name: str) -> None:
    with raises_errno(errno.EINVAL):
        dmabuf.open_or_allocate(name, SIZE)


@pytest.mark.parametrize("size", [0, -1, 1 << 63])
def test_a_size_out_of_range_is_refused(size: int) -> None:
    with raises_errno(errno.EINVAL):
        dmabuf.open_or_allocate("frame", size)


@pytest.mark.parametrize(("name", "size"), [(1, SIZE), (None, SIZE), ("frame", None), ("frame", 1.5)])
def test_arguments_of_a_wrong_type(name: object, size: object) -> None:
    with pytest.raises(TypeError):
        dmabuf.open_or_allocate(name, size)  # type: ignore[arg-type]


# ---- newest ----


def test_the_newest_of_a_name_is_opened(child: Spawn, buf: dmabuf.DmaBuf) -> None:
    other = child(_maker, "shared")
    ino = other.recv()
    with dmabuf.open("shared", newest=True) as got:
        assert got.ino == ino
    other.kill()
    with dmabuf.open("shared", newest=True) as got:
        assert got == buf


def _maker(parent: Parent, name: str) -> None:
    with dmabuf.allocate(SIZE, name=name) as buf:
        parent.send(buf.ino)
        parent.recv()


def test_newest_of_one_and_of_none(buf: dmabuf.DmaBuf) -> None:
    with dmabuf.open("shared", newest=True) as got, dmabuf.open(buf.ino, newest=True) as same:
        assert got == same == buf
    with raises_errno(errno.ENOENT):
        dmabuf.open("nobody's", newest=True)


def test_the_remedy_of_several_names_newest(buf: dmabuf.DmaBuf) -> None:
    with dmabuf.allocate(SIZE, name="shared"), raises_errno(errno.ENOTUNIQ) as caught:
        dmabuf.open("shared")
    assert "newest=True" in str(caught.value)


# ---- labels ----


def _labeled(parent: Parent, label: str | bytes) -> None:
    with dmabuf.allocate(SIZE, name="labeled") as buf:
        dmabuf.label("first")
        dmabuf.label(label)
        with buf.write():
            parent.send(buf)
            parent.recv()
        pid = os.fork()
        if not pid:
            try:
                with buf.write():
                    parent.send(os.getpid())
                    parent.recv()
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        dmabuf.label("")
        parent.send()
        parent.recv()


@pytest.mark.parametrize("label", ["camera", b"camera", "fifteen bytes ö"[:14], "\udcff"])
def test_label_names_a_process_and_its_forks(child: Spawn, label: str | bytes) -> None:
    text = os.fsdecode(label)
    other = child(_labeled, label)
    with other.recv() as buf:
        (record,) = dmabuf.buffers()
        assert text in [holder.comm for holder in record.holders]
        assert record.blocking_readers[0].comm == text
        with raises_errno(errno.ETIMEDOUT) as caught, buf.read(timeout=0):
            pass
        assert f"blocked by write() in process {other.pid} ({text})" in str(caught.value)
        other.send()
        pid = other.recv()
        (record,) = dmabuf.buffers()
        assert (record.blocking_readers[0].pid, record.blocking_readers[0].comm) == (pid, text)
        other.send()
        other.recv()
        (record,) = dmabuf.buffers()
        assert text not in [holder.comm for holder in record.holders]
        other.send()
    other.result()


@pytest.mark.parametrize("label", ["x" * 16, "ö" * 8, b"a\0b"])
def test_label_that_is_too_long_or_has_a_nul_is_refused(label: str | bytes) -> None:
    with raises_errno(errno.EINVAL):
        dmabuf.label(label)


@pytest.mark.parametrize("label", [None, 1, ["camera"]])
def test_label_of_a_wrong_type(label: object) -> None:
    with pytest.raises(TypeError):
        dmabuf.label(label)  # type: ignore[arg-type]
