"""dmabuf.open() where /proc doesn't lead to the holder: the holder's process is asked, or the error says who has the buffer."""

import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest

import dmabuf
from dmabuf._native import OwnedFd
from dmabuf.domain import peers
from dmabuf.domain.domain import Domain
from dmabuf.sharing import duplicate, server
from tests.sharing.conftest import SIZE, Pair
from tests.support.children import Parent, Spawn
from tests.support.errnos import raises_errno
from tests.support.namespaces import program

_PR_SET_DUMPABLE = 4
_HOLD = """
import dmabuf
dmabuf.label("camera")
with dmabuf.allocate(4096, name="frame") as buf:
    with buf.write() as view:
        view[:5] = b"there"
    print(buf.ino, flush=True)
    input()
"""
_LOOK = """
import dmabuf
try:
    with dmabuf.open("frame") as buf, buf.read() as view:
        print(bytes(view[:5]))
except OSError as e:
    print(e)
"""
_LIST = """
from dmabuf import buffers
from dmabuf.cli.ls import held_by
(record,) = buffers()
print(held_by(record).plain.replace(chr(0xe000), " "))
"""
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


def test_holder_in_a_container_is_asked_from_the_host() -> None:
    with program(_HOLD) as holder:
        ino = int(holder.line())
        with dmabuf.open("frame") as buf, buf.read() as view:
            assert buf.ino == ino
            assert bytes(view[:5]) == b"there"


def test_holder_in_a_container_is_asked_from_another_container() -> None:
    with program(_HOLD) as holder:
        holder.line()
        with program(_LOOK) as opener:
            assert opener.line() == "b'there'"


def test_ls_shows_the_holder_in_a_container_by_its_label() -> None:
    with program(_HOLD) as holder:
        holder.line()
        (record,) = dmabuf.buffers()
        assert [(h.comm, h.fds, h.maps) for h in record.holders] == [("camera", 1, 1)]


def test_ls_in_a_container_shows_the_holder_in_another_one_by_its_label() -> None:
    with program(_HOLD) as holder:
        holder.line()
        with program(_LIST) as lister:
            assert lister.line() == "camera 1 (in another PID namespace)"


def _holder(parent: Parent, serve: bool) -> None:
    dmabuf.label("recorder")
    if serve:
        dmabuf.serve()
        dmabuf.serve()  # has no further effect
    domain = Domain.default()
    with dmabuf.allocate(SIZE, name="frame") as buf:
        with buf.write() as view:
            view[:5] = b"there"
        parent.send(server.SERVER.peek(domain) is not None)
        parent.recv()


@pytest.mark.parametrize("serve", [False, True])
def test_holder_of_the_host_is_asked_if_it_serves_and_else_is_named(child: Spawn, serve: bool) -> None:
    holder = child(_holder, serve)
    assert holder.recv() is serve  # no thread if the program asks for none
    with program(_LOOK) as opener:
        text = opener.line()
    if serve:
        assert text == "b'there'"
    else:
        for part in (f"process {holder.pid} (recorder, in another PID namespace)", "(ENODEV)", "dmabuf.serve()"):
            assert part in text
    holder.send()
    holder.result()


def test_holder_that_was_killed_is_not_waited_for() -> None:
    with program(_HOLD) as holder:
        holder.line()
    with raises_errno(errno.ENOENT):
        dmabuf.open("frame")


def test_holder_that_is_stopped_is_waited_for_a_while(child: Spawn, hidden: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicate, "ANSWER_S", 0.1)
    other = child(_serving, "asleep")
    other.recv()
    other.stop()
    with raises_errno(errno.ENODEV):
        dmabuf.open("asleep")
    other.resume()
    dmabuf.open("asleep").close()
    other.send()
    other.result()


def _serving(parent: Parent, name: str) -> None:
    dmabuf.serve()
    with dmabuf.allocate(SIZE, name=name):
        parent.send()
        parent.recv()


@pytest.fixture
def hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have /proc lead to no process's descriptors, as in another PID namespace."""
    monkeypatch.setattr("dmabuf.sharing.opening._from_process", lambda *_: None)


def _lying(parent: Parent, name: str) -> None:
    """Answers with descriptors of something else."""
    dmabuf.serve()
    other = dmabuf.allocate(SIZE)

    def lie(*_: object) -> server.Answer:
        return server.Answer(fds=[OwnedFd(os.open(os.devnull, os.O_RDONLY)), OwnedFd(other.dup())])

    server._handlers["duplicate"] = lie
    with dmabuf.allocate(SIZE, name=name):
        parent.send()
        parent.recv()
    other.close()


@pytest.mark.usefixtures("hidden")
def test_what_is_another_buffer_is_not_taken(child: Spawn) -> None:
    other = child(_lying, "mine")
    other.recv()
    with raises_errno(errno.ENODEV):
        dmabuf.open("mine")
    other.send()
    other.result()


@pytest.mark.usefixtures("hidden")
def test_holder_that_closed_it_says_so(child: Spawn, seqpacket: Pair) -> None:
    other = child(_serving, "here")
    other.recv()
    with dmabuf.allocate(SIZE, name="flying") as buf:
        dmabuf.send(seqpacket[0], buf)
    with raises_errno(errno.ENODEV):
        dmabuf.open("flying")
    dmabuf.recv(seqpacket[1])[0].close()
    other.send()
    other.result()


# ---- processes that changed their user ----


@pytest.fixture
def nobodys() -> Iterator[str]:
    """A domain of uid 65534."""
    path = tempfile.mkdtemp(dir="/dev/shm")
    os.chown(path, 65534, 65534)
    os.chmod(path, 0o700)
    yield path
    shutil.rmtree(path)


def _worker(parent: Parent, path: str, leave: bool) -> None:
    os.setresuid(65534, 65534, 65534)  # /proc/PID belongs to root from here on
    if not leave:
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 1)
    domain = Domain.open(path)
    with dmabuf.allocate(SIZE, name="worker's", domain=domain) as buf:
        parent.send((buf.ino, peers.barred(domain), server.SERVER.peek(domain) is not None))
        parent.recv()
    domain.leave()


def _openers(parent: Parent, path: str, number: int) -> int:
    os.setresuid(65534, 65534, 65534)
    domain = Domain.open(path)
    with dmabuf.open("worker's", domain=domain) as buf:
        parent.send(buf.ino)
    domain.leave()
    return number


@as_root
@pytest.mark.parametrize("undumpable", [True, False])
def test_setuid_worker_sends_its_buffer(child: Spawn, nobodys: str, undumpable: bool) -> None:
    holder = child(_worker, nobodys, undumpable)
    ino, barred, serves = holder.recv()
    assert (barred, serves) == (undumpable, undumpable)  # no thread where none is needed
    opener = child(_openers, nobodys, 7)
    assert opener.recv() == ino
    assert opener.result() == 7
    holder.send()
    holder.result()


_FORK = """
import os
import dmabuf
buf = dmabuf.allocate(4096, name="forked")
child = os.fork()
if child:
    os.write(1, b"%d\\n" % buf.ino)
    os.waitpid(child, 0)
else:
    with buf.write():
        os.write(1, b"joined\\n")
    input()
    os.write(1, b"closed\\n")
    buf.close()
"""


def test_forked_child_in_a_container_is_asked_too() -> None:
    with program(_FORK) as holder:
        assert sorted((holder.line(), holder.line()))[1] == "joined"
        with program(_SERVERS) as lister:
            assert lister.line() == "2 2"


_SERVERS = """
import os
from pathlib import Path
import dmabuf
from dmabuf.domain import lives, place
domain = dmabuf.Domain.default()
domain.sweep()
(record,) = (i for i in domain.shm.rec_list() if domain.shm.rec_info(i)["name"] == b"forked")
holders = domain.shm.rec_holders(record)
names = [place.socket_name(lives.life_at(domain.shm, i)) for i in holders]
print(len(holders), sum((domain.path / name).exists() for name in names))
"""


def test_serve_of_something_else_is_a_type_error() -> None:
    with pytest.raises(TypeError):
        dmabuf.serve(domain="/tmp")  # type: ignore[arg-type]
