"""Tokens: buf.ref(), which any pickle carries, and dmabuf.open() of one."""

import copy
import dataclasses
import errno
import os
import pickle
import subprocess
import sys
from typing import Any

import pytest

import dmabuf
from tests.sharing.conftest import SIZE, Pair
from tests.support.children import Parent, Spawn
from tests.support.errnos import raises_errno


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_ref_survives_any_pickle(buf: dmabuf.DmaBuf, protocol: int) -> None:
    ref = buf.ref()
    pickled = pickle.dumps(ref, protocol)
    assert len(pickled) < 600
    same = pickle.loads(pickled)
    assert (same, hash(same), bytes(same)) == (ref, hash(ref), bytes(ref))
    assert copy.deepcopy(ref) == ref == dmabuf.BufferRef.from_bytes(bytes(ref))
    with dmabuf.open(same) as got:
        assert got == buf


def test_ref_is_pickled_by_the_name_of_a_function(buf: dmabuf.DmaBuf) -> None:
    """A pickler that takes functions by value if need be, as cloudpickle does, needn't."""
    function, arguments = buf.ref().__reduce__()
    assert getattr(sys.modules[function.__module__], function.__qualname__) is function
    assert arguments == (bytes(buf.ref()),)


def test_ref_says_which_buffer_it_is(buf: dmabuf.DmaBuf) -> None:
    ref = buf.ref()
    assert (ref.domain, ref.ino, ref.size, ref.name) == (buf.domain.id, buf.ino, SIZE, "shared")
    assert str(ref) == f"buffer 'shared' (inode {buf.ino} of domain {buf.domain.id})"
    with dmabuf.allocate(SIZE) as other:
        assert other.ref() != ref
        assert other.ref().name is None


def test_ref_of_a_closed_buffer_is_refused() -> None:
    buf = dmabuf.allocate(SIZE)
    buf.close()
    with raises_errno(errno.EBADF):
        buf.ref()


_OPENER = """
import pickle, sys
ref = pickle.load(sys.stdin.buffer)
import dmabuf
with dmabuf.open(ref) as buf, buf.write() as view:
    view[:2] = b"ok"
"""


def test_ref_is_opened_by_a_program_that_has_nothing_else(buf: dmabuf.DmaBuf) -> None:
    subprocess.run([sys.executable, "-c", _OPENER], input=pickle.dumps(buf.ref()), check=True)
    with buf.read() as view:
        assert bytes(view[:2]) == b"ok"


def _holder(parent: Parent) -> None:
    with dmabuf.allocate(SIZE, name="held") as buf:
        parent.send(pickle.dumps(buf.ref()))
        parent.recv()


def test_ref_of_another_process_is_opened_until_that_is_killed(child: Spawn) -> None:
    other = child(_holder)
    ref = pickle.loads(other.recv())
    with dmabuf.open(ref) as got:
        assert (got.name, got.ref()) == ("held", ref)
    other.kill()
    with raises_errno(errno.ENOENT, FileNotFoundError) as caught:
        dmabuf.open(ref)
    assert "the buffer of this token is gone: no process has it open any more" in str(caught.value)
    assert "'held'" in str(caught.value)


def test_ref_is_opened_from_a_program_without_dmabuf() -> None:
    buf = dmabuf.allocate(SIZE, name="kept")
    ref = buf.ref()
    read, write = os.pipe()
    with subprocess.Popen(["/bin/cat"], stdin=read, pass_fds=(buf.fileno(),)) as holder:
        os.close(read)
        buf.close()
        with dmabuf.open(ref) as got:
            assert got.ino == ref.ino
        os.close(write)
        holder.wait()


def test_ref_of_a_buffer_in_flight_is_no_device(seqpacket: Pair) -> None:
    buf = dmabuf.allocate(SIZE)
    ref = buf.ref()
    dmabuf.send(seqpacket[0], buf)
    buf.close()
    with raises_errno(errno.ENODEV):
        dmabuf.open(ref)
    dmabuf.recv(seqpacket[1])[0].close()


def test_ref_with_another_nonce_is_stale(buf: dmabuf.DmaBuf) -> None:
    later = dataclasses.replace(buf.ref(), nonce=os.urandom(16))
    with raises_errno(errno.ESTALE) as caught:
        dmabuf.open(later)
    assert "its inode is another buffer's now" in str(caught.value)


def test_ref_of_another_domain_is_refused_unless_it_is_known(buf: dmabuf.DmaBuf) -> None:
    elsewhere = dataclasses.replace(buf.ref(), domain="0123456789abcdef")
    with raises_errno(errno.EXDEV) as caught:
        dmabuf.open(elsewhere)
    assert "make a new token" in str(caught.value)
    private = dmabuf.Domain.private()
    with dmabuf.allocate(SIZE, domain=private) as secret:
        ref = pickle.loads(pickle.dumps(secret.ref()))
        with dmabuf.open(ref) as got, dmabuf.open(ref, domain=private) as again:
            assert got == again == secret
        with raises_errno(errno.EXDEV):
            dmabuf.open(buf.ref(), domain=private)


def test_ref_of_another_inode_is_not_found(buf: dmabuf.DmaBuf) -> None:
    ref = buf.ref()
    for changed in (dataclasses.replace(ref, ino=1), dataclasses.replace(ref, dev=ref.dev + 1)):
        with raises_errno(errno.ENOENT):
            dmabuf.open(changed)


@pytest.mark.parametrize(
    "data",
    [b"", b"dmabufR\1", b"x" * 88, b"dmabufR\2" + b"\1" * 80, b"dmabufR\1" + bytes(80), b"dmabufR\1" + b"\xff" * 80],
)
def test_bytes_that_are_no_ref_are_invalid(data: bytes) -> None:
    with raises_errno(errno.EINVAL) as caught:
        dmabuf.BufferRef.from_bytes(data)
    assert "not a token of this version of dmabuf" in str(caught.value)


@pytest.mark.parametrize("data", [None, 5, "text", bytearray(88)])
def test_ref_from_no_bytes_is_a_type_error(data: Any) -> None:
    with pytest.raises(TypeError, match="the bytes of a token are bytes, not"):
        dmabuf.BufferRef.from_bytes(data)


@pytest.mark.parametrize("what", [None, 1.5, b"dmabufR\1" + b"\1" * 80])
def test_open_of_the_bytes_of_a_ref_is_no_ref(what: Any) -> None:
    with pytest.raises((TypeError, OSError)):
        dmabuf.open(what)
