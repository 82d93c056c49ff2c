"""send() and recv(): limits, bad arguments, and bytes that are no message."""

import errno
import os
import resource
import select
import socket
import struct

import pytest

import dmabuf
from dmabuf.sharing import passing
from tests.sharing.conftest import SIZE, Pair
from tests.support.children import Parent, Spawn
from tests.support.errnos import raises_errno
from tests.support.waiting import Background

# ---- limits ----


def _with_few_descriptors(parent: Parent, free: int) -> tuple[int | None, str, int, list[str | None]]:
    dmabuf.Domain.default()
    recv = dmabuf.recv  # its module is loaded now, as that takes descriptors too
    highest = max(map(int, os.listdir("/proc/self/fd")))
    fillers = [os.open("/dev/null", os.O_RDONLY)]
    while fillers[-1] <= highest + free:  # no number below is left: the limit is one of numbers, not of how many there are
        fillers.append(os.open("/dev/null", os.O_RDONLY))
    for fd in fillers[-free:] if free else []:
        os.close(fd)
    before = len(os.listdir("/proc/self/fd"))
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (fillers[-1] + 1, hard))
    try:
        recv(parent.sock)
    except OSError as error:
        found = error.errno, str(error)
    else:
        raise AssertionError
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    lost = len(os.listdir("/proc/self/fd")) - before
    (again,) = dmabuf.recv(parent.sock)
    with again:
        return *found, lost, [again.name]


@pytest.mark.parametrize(("free", "sent"), [(0, 1), (0, 5), (3, 5)])
def test_lost_descriptors_are_an_error_that_names_the_limit(child: Spawn, buf: dmabuf.DmaBuf, free: int, sent: int) -> None:
    other = child(_with_few_descriptors, free)
    dmabuf.send(other.sock, *[buf] * sent)
    dmabuf.send(other.sock, buf)
    number, text, left, names = other.result()
    assert number == errno.EMFILE
    assert "RLIMIT_NOFILE" in text
    assert f"of {sent} descriptors were lost" in text
    assert left == 0
    assert names == ["shared"]


# ---- bad arguments ----


def test_send_of_nothing_is_refused(pair: Pair) -> None:
    with raises_errno(errno.EINVAL):
        dmabuf.send(pair[0])


@pytest.mark.parametrize("thing", [3, b"bytes", None, "name"])
def test_send_of_something_else_is_a_type_error(pair: Pair, thing: object) -> None:
    with pytest.raises(TypeError, match=type(thing).__name__):
        dmabuf.send(pair[0], thing)  # type: ignore[arg-type]


def test_nothing_is_sent_when_one_of_the_things_is_bad(pair: Pair, buf: dmabuf.DmaBuf) -> None:
    with pytest.raises(TypeError):
        dmabuf.send(pair[0], buf, "no")  # type: ignore[arg-type]
    assert not select.select([pair[1]], [], [], 0)[0]


def test_send_of_a_closed_buffer_is_refused(pair: Pair) -> None:
    buf = dmabuf.allocate(SIZE)
    buf.close()
    with raises_errno(errno.EBADF):
        dmabuf.send(pair[0], buf)


def test_send_of_a_closed_timeline_is_refused(pair: Pair) -> None:
    tl = dmabuf.Timeline()
    tl.close()
    with raises_errno(errno.EBADF):
        dmabuf.send(pair[0], tl)


def test_send_of_a_timeline_inherited_by_fork_is_refused(seqpacket: Pair, tl: dmabuf.Timeline) -> None:
    pid = os.fork()
    if not pid:
        try:
            dmabuf.send(seqpacket[0], tl)
        except PermissionError:
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_fence_inherited_by_fork_is_sent_on_as_its_parents(seqpacket: Pair, tl: dmabuf.Timeline) -> None:
    fence = tl.fence()
    pid = os.fork()
    if not pid:
        try:
            dmabuf.send(seqpacket[0], fence)
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert dmabuf.recv(seqpacket[1])[0] is fence
    fence.signal()


@pytest.mark.parametrize("operation", ["send", "recv"])
def test_a_socket_that_is_not_unix_is_refused(operation: str, buf: dmabuf.DmaBuf) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock, raises_errno(errno.EINVAL) as caught:
        getattr(dmabuf, operation)(*([sock, buf] if operation == "send" else [sock]))
    assert "AF_UNIX" in str(caught.value)


@pytest.mark.parametrize("operation", ["send", "recv"])
@pytest.mark.parametrize("sock", [3, None, "path"])
def test_what_is_no_socket_is_a_type_error(operation: str, sock: object, buf: dmabuf.DmaBuf) -> None:
    with pytest.raises(TypeError, match="socket"):
        getattr(dmabuf, operation)(*([sock, buf] if operation == "send" else [sock]))


@pytest.mark.parametrize("operation", ["send", "recv"])
def test_a_closed_socket_is_refused(operation: str, pair: Pair, buf: dmabuf.DmaBuf) -> None:
    for used in (False, True):
        if used:
            dmabuf.send(pair[0], buf)
            dmabuf.recv(pair[1])[0].close()
        for sock in pair:
            other = sock.dup()
            if used:
                dmabuf.send(other, buf)
            other.close()
            with raises_errno(errno.EBADF):
                getattr(dmabuf, operation)(*([other, buf] if operation == "send" else [other]))
    for sock in pair:
        dmabuf.recv(sock)[0].close()


@pytest.mark.parametrize("kind", [socket.SOCK_SEQPACKET, socket.SOCK_STREAM])
def test_a_socket_that_is_not_connected_is_refused(kind: socket.SocketKind, buf: dmabuf.DmaBuf) -> None:
    with socket.socket(socket.AF_UNIX, kind) as sock:
        with raises_errno(errno.ENOTCONN):
            dmabuf.send(sock, buf)
        with raises_errno(errno.ENOTCONN):
            dmabuf.recv(sock)


# ---- foreign bytes ----


def _message(pair: Pair, buf: dmabuf.DmaBuf) -> bytes:
    dmabuf.send(pair[0], buf)
    data, control, _, _ = pair[1].recvmsg(4096, 64)
    os.close(struct.unpack("i", control[0][2])[0])
    return data


def test_foreign_bytes_are_refused(pair: Pair) -> None:
    pair[0].send(b"GET / HTTP/1.1\r\n" * 8)
    with raises_errno(errno.EBADMSG):
        dmabuf.recv(pair[1])


def test_foreign_bytes_with_a_descriptor_leave_no_descriptor(pair: Pair) -> None:
    with open("/dev/null") as f:
        socket.send_fds(pair[0], [b"take this"], [f.fileno()])
    with raises_errno(errno.EBADMSG):
        dmabuf.recv(pair[1])


def test_a_descriptor_that_is_no_buffer_is_refused(pair: Pair, buf: dmabuf.DmaBuf) -> None:
    data = _message(pair, buf)
    with open("/dev/null") as f:
        socket.send_fds(pair[0], [data], [f.fileno()])
    with raises_errno(errno.EINVAL):
        dmabuf.recv(pair[1])


def test_a_message_without_its_descriptor_is_refused(pair: Pair, buf: dmabuf.DmaBuf) -> None:
    pair[0].send(_message(pair, buf))
    with raises_errno(errno.EBADMSG):
        dmabuf.recv(pair[1])


def test_a_message_with_a_descriptor_too_many_is_refused(pair: Pair, buf: dmabuf.DmaBuf) -> None:
    socket.send_fds(pair[0], [_message(pair, buf)], [buf.fileno()] * 2)
    with raises_errno(errno.EBADMSG):
        dmabuf.recv(pair[1])


@pytest.mark.parametrize("cut", [1, 15, 95])
def test_a_truncated_datagram_is_refused(seqpacket: Pair, buf: dmabuf.DmaBuf, cut: int) -> None:
    socket.send_fds(seqpacket[0], [_message(seqpacket, buf)[:cut]], [buf.fileno()])
    with raises_errno(errno.EBADMSG):
        dmabuf.recv(seqpacket[1])


def test_a_datagram_longer_than_a_message_is_refused(seqpacket: Pair, buf: dmabuf.DmaBuf) -> None:
    socket.send_fds(seqpacket[0], [_message(seqpacket, buf) + bytes(20000)], [buf.fileno()])
    with raises_errno(errno.EBADMSG):
        dmabuf.recv(seqpacket[1])


@pytest.mark.parametrize("cut", [1, 15, 95])
def test_a_stream_that_ends_inside_a_message_is_connection_reset(stream: Pair, buf: dmabuf.DmaBuf, cut: int) -> None:
    socket.send_fds(stream[0], [_message(stream, buf)[:cut]], [buf.fileno()])
    stream[0].close()
    with raises_errno(errno.ECONNRESET):
        dmabuf.recv(stream[1])


def test_a_message_in_pieces_is_put_together(stream: Pair, buf: dmabuf.DmaBuf) -> None:
    data = _message(stream, buf)
    socket.send_fds(stream[0], [data[:10]], [buf.fileno()])
    stream[1].setblocking(False)
    with Background(lambda: dmabuf.recv(stream[1])) as job:
        job.until_blocked()
        stream[0].send(data[10:])
        (got,) = job.result()
    assert got == buf
    got.close()


def test_a_timeout_inside_a_message_says_so(stream: Pair, buf: dmabuf.DmaBuf) -> None:
    socket.send_fds(stream[0], [_message(stream, buf)[:10]], [buf.fileno()])
    stream[1].settimeout(0.01)
    with raises_errno(errno.ETIMEDOUT, TimeoutError) as caught:
        dmabuf.recv(stream[1])
    assert "middle" in str(caught.value)


def test_any_byte_of_a_message_changed_gives_a_clear_error_or_the_buffer(seqpacket: Pair, buf: dmabuf.DmaBuf) -> None:
    message = _message(seqpacket, buf)
    for at in range(len(message)):
        for flip in (0x01, 0x80, 0xFF):
            data = bytearray(message)
            data[at] ^= flip
            socket.send_fds(seqpacket[0], [data], [buf.fileno()])
            try:
                got = dmabuf.recv(seqpacket[1])
            except dmabuf.DmaBufError:
                continue
            assert got == [buf]
            got[0].close()


# ---- a peer that doesn't go on ----


@pytest.mark.parametrize("timeout", [0.05, 0.0], ids=["timeout", "non-blocking"])
def test_recv_of_half_a_message_times_out(timeout: float, buf: dmabuf.DmaBuf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passing, "_REST_S", 0.05)
    a, b = socket.socketpair()
    with a, b:
        dmabuf.send(a, buf, buf)
        data, control, _, _ = b.recvmsg(4096, 64)
        for _, _, raw in control:
            for fd in struct.unpack("=2i", raw):
                os.close(fd)
        a.send(data[:100])  # of 176
        b.settimeout(timeout)
        with raises_errno(errno.ETIMEDOUT, dmabuf.DmaBufError):
            dmabuf.recv(b)


def test_recv_of_single_bytes_times_out_as_a_whole(stream: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte comes within the timeout."""
    clock = iter(range(1000))
    monkeypatch.setattr(passing.time, "monotonic", lambda: float(next(clock)))
    stream[1].settimeout(5)

    def byte_by_byte(sock: socket.socket, event: int, end: float | None) -> bool:
        stream[0].send(b"x")
        return end is None or passing.time.monotonic() < end

    monkeypatch.setattr(passing, "_ready", byte_by_byte)
    with raises_errno(errno.ETIMEDOUT, dmabuf.DmaBufError):
        passing._receive_rest(stream[1], 4096)
