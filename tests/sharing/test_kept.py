"""Descriptors that wait for their receivers, and peers that are not to be believed."""

from __future__ import annotations

import array
import errno
import os
import pickle
import socket
import subprocess
import threading
from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest

import dmabuf
from dmabuf.sharing import keeping, kept
from dmabuf.sharing.fetching import fetch
from tests.support.errnos import raises_errno
from tests.support.waiting import until

pytestmark = pytest.mark.usefixtures("keepers_are_reaped")


class Got:
    """What is made of a descriptor that was received."""

    def __init__(self, fd: Any) -> None:
        self.close = fd.close


@pytest.fixture
def place(buf: dmabuf.DmaBuf) -> Iterator[Any]:
    """Where a descriptor of a buffer is kept."""
    yield keeping.TABLE.add(buf._handle.dup_owned)
    keeping.TABLE.drop()


def _count() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_messages_that_make_no_sense_are_ignored(place: Any) -> None:
    name, key, _, _ = place
    before = _count()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("")
        for data in (b"", b"x", bytes(kept.MESSAGE.size), kept.MESSAGE.pack(kept.MAGIC, 99, key), kept.MESSAGE.pack(b"other", 1, key)):
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", (sock.fileno(), 0)))]
            sock.sendmsg([data], rights, 0, name)
            sock.sendto(data, name)
        sock.sendto(kept.MESSAGE.pack(kept.MAGIC, kept.FETCH, bytes(16)), name)
        assert kept.MESSAGE.unpack(sock.recv(100))[1] == kept.GONE
        assert _count() == before + 1
    made = fetch(place, "it", Got)
    made.close()
    until(lambda: len(keeping.TABLE) == 0)


def test_question_without_an_address_is_ignored(place: Any) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.sendto(kept.MESSAGE.pack(kept.MAGIC, kept.FETCH, place[1]), place[0])
    fetch(place, "it", Got).close()
    until(lambda: len(keeping.TABLE) == 0)


def test_descriptor_is_received_once(place: Any, buf: dmabuf.DmaBuf) -> None:
    other = keeping.TABLE.add(buf._handle.dup_owned)  # so that the socket stays
    fetch(place, "it", Got).close()
    with raises_errno(errno.ENOENT) as caught:
        fetch(place, "it", Got)
    assert "it was received already" in str(caught.value)
    fetch(other, "it", Got).close()
    until(lambda: len(keeping.TABLE) == 0)


@pytest.mark.parametrize(
    "place",
    [(), None, (b"\0dmabuf-kept-x", b"short", 1, "x"), (b"/tmp/x", bytes(16), 1, "x"), ("\0dmabuf-kept-x", bytes(16), 1, "x"),
     (b"\0dmabuf-kept-" + b"x" * 200, bytes(16), 1, "x"), (b"\0dmabuf-kept-x", bytes(16), None, "x")],
)  # fmt: skip
def test_token_that_makes_no_sense_is_a_bad_message(place: Any) -> None:
    with raises_errno(errno.EBADMSG):
        fetch(place, "it", Got)


def test_descriptor_of_something_else_is_refused(place: Any, buf: dmabuf.DmaBuf) -> None:
    """A sender of this user that says one thing and sends another."""
    pickled = bytes(ForkingPickler.dumps(buf))  # not its view, whose cycle with the traceback some Pythons collect wrongly
    entries = keeping.TABLE._entries
    (key,) = entries.keys() - {place[1]}
    entries[key].close()
    entries[key] = keeping.owned(os.open, "/dev/null", os.O_RDONLY)
    with raises_errno(errno.EINVAL):
        pickle.loads(pickled)
    keeping.TABLE.drop()


def test_forked_child_has_nothing_of_the_table(place: Any) -> None:
    pid = os.fork()
    if not pid:
        os._exit(len(keeping.TABLE) + sum("dmabuf-kept" in line for line in os.listdir("/proc/self/fd")))
    assert not os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    fetch(place, "it", Got).close()
    until(lambda: len(keeping.TABLE) == 0)


def test_keeper_ends_when_the_parent_has_ended_and_the_time_is_over() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("")
        child = subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE)
        table = {bytes(16): os.open("/dev/null", os.O_RDONLY)}
        parent = os.pidfd_open(child.pid)
        thread = threading.Thread(target=kept.keep, args=(sock, table, parent, 0.0))
        thread.start()
        child.communicate()
        thread.join()
        os.close(parent)
        os.close(table.pop(bytes(16)))
