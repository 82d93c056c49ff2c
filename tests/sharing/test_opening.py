"""dmabuf.open(): a buffer by name or inode number."""

import errno
import os
import resource
import signal
from pathlib import Path

import pytest

import dmabuf
from tests.sharing.conftest import SIZE, Pair
from tests.support.children import Parent, Spawn
from tests.support.errnos import raises_errno
from tests.support.leaks import rest


@pytest.mark.parametrize("how", ["name", "bytes", "ino"])
def test_a_buffer_of_this_process_is_opened(buf: dmabuf.DmaBuf, how: str) -> None:
    with dmabuf.open({"name": "shared", "bytes": b"shared", "ino": buf.ino}[how]) as got:
        assert got == buf
        assert got.fileno() != buf.fileno()
        assert got.size == SIZE


def _opener(parent: Parent, what: str | int) -> tuple[str | None, int, bytes]:
    with dmabuf.open(what) as buf, buf.write() as view:
        found = bytes(view[:3])
        view[:3] = b"new"
        return buf.name, buf.ino, found


@pytest.mark.parametrize("by_name", [True, False])
def test_another_process_opens_it(child: Spawn, buf: dmabuf.DmaBuf, by_name: bool) -> None:
    with buf.write() as view:
        view[:3] = b"old"
    assert child(_opener, "shared" if by_name else buf.ino).result() == ("shared", buf.ino, b"old")
    with buf.read() as view:
        assert bytes(view[:3]) == b"new"


def _holder(parent: Parent, name: str) -> None:
    with dmabuf.allocate(SIZE, name=name) as buf:
        parent.send(buf.ino)
        parent.recv()


def test_what_was_opened_lives_on_when_its_maker_is_killed(child: Spawn) -> None:
    other = child(_holder, "orphan")
    ino = other.recv()
    with dmabuf.open("orphan") as buf:
        other.kill()
        dmabuf.Domain.default().sweep()
        assert (buf.name, buf.ino) == ("orphan", ino)
        with dmabuf.open(ino) as again:
            assert again == buf


def test_after_the_last_holder_was_killed_it_is_not_found(child: Spawn) -> None:
    other = child(_holder, "gone")
    ino = other.recv()
    other.kill()
    for what in ("gone", ino):
        with raises_errno(errno.ENOENT, FileNotFoundError):
            dmabuf.open(what)


def test_a_new_name_is_found_and_the_old_one_is_not(buf: dmabuf.DmaBuf) -> None:
    buf.name = "renamed"
    dmabuf.open("renamed").close()
    with raises_errno(errno.ENOENT):
        dmabuf.open("shared")


def test_the_empty_name_is_a_name(buf: dmabuf.DmaBuf) -> None:
    buf.name = ""
    with dmabuf.allocate(SIZE), dmabuf.open("") as got:
        assert got == buf


def test_no_such_name_lists_the_names_there_are(buf: dmabuf.DmaBuf) -> None:
    with dmabuf.allocate(SIZE, name="alpha"), raises_errno(errno.ENOENT, FileNotFoundError) as caught:
        dmabuf.open("beta")
    for word in ("'beta'", "'alpha'", "'shared'"):
        assert word in str(caught.value)


def test_no_such_name_lists_a_few_names_only() -> None:
    bufs = [dmabuf.allocate(SIZE, name=f"frame {i}") for i in range(9)]
    with raises_errno(errno.ENOENT) as caught:
        dmabuf.open("frame")
    assert str(caught.value).count("'frame ") == 5
    for buf in bufs:
        buf.close()


def test_no_such_inode() -> None:
    with raises_errno(errno.ENOENT):
        dmabuf.open(1)


def test_two_of_one_name_are_refused_with_their_inodes(child: Spawn, buf: dmabuf.DmaBuf) -> None:
    other = child(_holder, "shared")
    ino = other.recv()
    with raises_errno(errno.ENOTUNIQ) as caught:
        dmabuf.open("shared")
    assert str(ino) in str(caught.value)
    assert str(buf.ino) in str(caught.value)
    dmabuf.open(ino).close()
    other.kill()
    with dmabuf.open("shared") as got:
        assert got == buf


def test_held_only_in_flight_is_no_device_and_says_why(seqpacket: Pair) -> None:
    buf = dmabuf.allocate(SIZE, name="flying")
    dmabuf.send(seqpacket[0], buf)
    buf.close()
    del buf
    with raises_errno(errno.ENODEV) as caught:
        dmabuf.open("flying")
    assert "in flight" in str(caught.value)
    dmabuf.recv(seqpacket[1])[0].close()


def test_held_only_by_a_mapping_is_no_device_and_says_why() -> None:
    buf = dmabuf.allocate(SIZE, name="mapped")
    mapping = buf.mmap()
    buf.close()
    with raises_errno(errno.ENODEV) as caught:
        dmabuf.open("mapped")
    assert "only mapped" in str(caught.value)
    mapping.close()


def _bare_holder(parent: Parent) -> None:
    (buf,) = dmabuf.recv(parent.sock)
    fd = buf.detach()
    del buf
    dmabuf.Domain.default().leave()
    parent.send()
    parent.recv()
    os.close(fd)


def test_a_holder_that_left_the_domain_is_found_by_its_descriptor(child: Spawn) -> None:
    other = child(_bare_holder)
    buf = dmabuf.allocate(SIZE, name="bare")
    dmabuf.send(other.sock, buf)
    buf.close()
    del buf
    other.recv()
    with dmabuf.open("bare") as got:
        assert got.name == "bare"
    other.send()
    other.result()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_holder_whose_descriptors_are_not_readable_is_a_permission_error(child: Spawn, buf: dmabuf.DmaBuf) -> None:
    other = child(_opener_without_rights, buf.ino, os.getpid())
    number, text = other.result()
    assert number == errno.EACCES
    assert str(os.getpid()) in text


def _opener_without_rights(parent: Parent, ino: int, pid: int) -> tuple[int | None, str]:
    dmabuf.Domain.default().join()
    os.setresuid(65534, 65534, 65534)
    try:
        dmabuf.open(ino)
    except PermissionError as error:
        return error.errno, str(error)
    raise AssertionError


def test_another_domain_is_searched_when_named(buf: dmabuf.DmaBuf) -> None:
    domain = dmabuf.Domain.private()
    with dmabuf.allocate(SIZE, name="shared", domain=domain) as secret, dmabuf.open("shared", domain=domain) as got:
        assert got == secret
        assert got.domain is domain
    with dmabuf.open("shared") as got:
        assert got == buf


def test_reservation_objects_are_not_found() -> None:
    domain = dmabuf.Domain.private()
    resv = dmabuf.DmaResv(domain=domain)
    with raises_errno(errno.ENOENT) as caught:
        dmabuf.open("", domain=domain)
    assert "of its 0 buffers" in str(caught.value)
    del resv


def test_without_a_free_descriptor_the_limit_is_named(buf: dmabuf.DmaBuf) -> None:
    dmabuf.open(buf.ino).close()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    rest()  # no number is another thread's for a moment
    lowest = os.dup(buf.fileno())
    os.close(lowest)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
        with raises_errno(errno.EMFILE):
            dmabuf.open(buf.ino)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("name", ["x" * 32, b"x" * 32, "a\0b"])
def test_a_name_that_no_buffer_can_have_is_refused(name: str | bytes) -> None:
    with raises_errno(errno.EINVAL):
        dmabuf.open(name)


@pytest.mark.parametrize("ino", [-1, 0, 1 << 64])
def test_a_number_that_no_inode_can_have_is_refused(ino: int) -> None:
    with raises_errno(errno.EINVAL):
        dmabuf.open(ino)


@pytest.mark.parametrize("what", [None, 1.5, True, Path("shared")])
def test_neither_name_nor_number_is_a_type_error(what: object) -> None:
    with pytest.raises(TypeError):
        dmabuf.open(what)  # type: ignore[arg-type]


def test_a_stopped_holder_is_no_obstacle(child: Spawn) -> None:
    other = child(_holder, "asleep")
    other.recv()
    other.stop()
    dmabuf.open("asleep").close()
    other.send_signal(signal.SIGKILL)
