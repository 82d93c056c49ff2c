"""send() and recv(): what travels, on each kind of socket, in one process and across processes."""

import errno
import fcntl
import gc
import os
import socket
import struct
import threading
import warnings
from pathlib import Path

import pytest

import dmabuf
from dmabuf.core.buffer.handle import handle_of
from tests.sharing.conftest import SIZE, Pair
from tests.support.children import Parent, Spawn
from tests.support.errnos import raises_errno
from tests.support.waiting import Background

# ---- what travels ----


def test_a_buffer_arrives_as_a_handle_of_its_own(pair: Pair, buf: dmabuf.DmaBuf) -> None:
    dmabuf.send(pair[0], buf)
    (got,) = dmabuf.recv(pair[1])
    with got:
        assert got == buf
        assert got is not buf
        assert got.fileno() != buf.fileno()
        assert (got.size, got.ino, got.name, got.home) == (buf.size, buf.ino, "shared", "memfd")
        assert got.resv is buf.resv or handle_of(got).shared is handle_of(buf).shared
        with buf.write() as view:
            view[:3] = b"abc"
        with got.read() as view:
            assert bytes(view[:3]) == b"abc"
    assert not buf.closed


def test_a_received_descriptor_is_not_inherited_by_exec(pair: Pair, buf: dmabuf.DmaBuf) -> None:
    dmabuf.send(pair[0], buf)
    (got,) = dmabuf.recv(pair[1])
    with got:
        assert fcntl.fcntl(got.fileno(), fcntl.F_GETFD) & fcntl.FD_CLOEXEC


def test_messages_arrive_one_by_one_in_order(pair: Pair) -> None:
    bufs = [dmabuf.allocate(SIZE, name=str(i)) for i in range(6)]
    dmabuf.send(pair[0], bufs[0])
    dmabuf.send(pair[0], *bufs[1:3])
    dmabuf.send(pair[0], bufs[3])
    dmabuf.send(pair[0], *bufs[4:])
    got = [dmabuf.recv(pair[1]) for _ in range(4)]
    assert [[b.name for b in message] for message in got] == [["0"], ["1", "2"], ["3"], ["4", "5"]]
    for b in [*bufs, *(b for message in got for b in message)]:
        b.close()


def test_the_same_buffer_twice_in_a_message_gives_two_handles(pair: Pair, buf: dmabuf.DmaBuf) -> None:
    dmabuf.send(pair[0], buf, buf)
    one, other = dmabuf.recv(pair[1])
    one.close()
    assert other == buf
    assert not other.closed
    other.close()


def test_all_kinds_of_things_in_one_message_keep_their_order(pair: Pair, buf: dmabuf.DmaBuf, tl: dmabuf.Timeline) -> None:
    domain = dmabuf.Domain.private()
    secret = dmabuf.allocate(SIZE, domain=domain)
    fence = tl.fence()
    dmabuf.send(pair[0], secret, fence, buf, tl, domain)
    got = dmabuf.recv(pair[1])
    assert [type(thing) for thing in got] == [dmabuf.DmaBuf, dmabuf.DmaFence, dmabuf.DmaBuf, dmabuf.RemoteTimeline, dmabuf.Domain]
    assert (got[0], got[1], got[2]) == (secret, fence, buf)
    assert got[4] is domain
    fence.signal()
    for b in (secret, got[0], got[2]):
        b.close()


def test_a_message_of_253_buffers_arrives(pair: Pair, buf: dmabuf.DmaBuf) -> None:
    dmabuf.send(pair[0], *[buf] * 253)
    got = dmabuf.recv(pair[1])
    assert got == [buf] * 253
    for b in got:
        b.close()


def test_254_things_are_refused_before_anything_is_sent(pair: Pair, buf: dmabuf.DmaBuf) -> None:
    with raises_errno(errno.EINVAL) as caught:
        dmabuf.send(pair[0], *[buf] * 254)
    assert "253" in str(caught.value)
    pair[1].setblocking(False)
    with raises_errno(errno.EAGAIN, BlockingIOError):
        dmabuf.recv(pair[1])


def test_a_long_message_through_a_small_stream_buffer_is_put_together(stream: Pair, tl: dmabuf.Timeline) -> None:
    fences = [tl.fence() for _ in range(253)]
    stream[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 0)
    stream[0].setblocking(False)
    with Background(lambda: dmabuf.send(stream[0], *fences)):
        assert dmabuf.recv(stream[1]) == fences
    for fence in fences:
        fence.signal()


# ---- across processes ----


def _reader(parent: Parent) -> tuple[str | None, bytes]:
    (buf,) = dmabuf.recv(parent.sock)
    with buf, buf.read() as view:
        return buf.name, bytes(view[:5])


def test_another_process_reads_what_was_written(child: Spawn, buf: dmabuf.DmaBuf) -> None:
    other = child(_reader)
    with buf.write() as view:
        view[:5] = b"hello"
    dmabuf.send(other.sock, buf)
    assert other.result() == ("shared", b"hello")


def _maker(parent: Parent) -> None:
    buf = dmabuf.allocate(SIZE, name="from a child")
    with buf.write() as view:
        view[:4] = b"late"
    dmabuf.send(parent.sock, buf)
    buf.close()
    parent.send("sent and closed")
    parent.recv()


def _check_late(sock: socket.socket) -> None:
    (got,) = dmabuf.recv(sock)
    with got, got.read() as view:
        assert bytes(view[:4]) == b"late"
        assert got.name == "from a child"


def test_a_buffer_only_in_flight_survives_with_its_name(child: Spawn) -> None:
    other = child(_maker)
    assert other.recv() == "sent and closed"
    for _ in range(4):
        dmabuf.Domain.default().sweep()
    _check_late(other.sock)


def test_a_buffer_in_flight_survives_kill_9_of_its_sender_with_its_name(child: Spawn) -> None:
    other = child(_maker)
    assert other.recv() == "sent and closed"
    other.kill()
    dmabuf.Domain.default().sweep()
    _check_late(other.sock)


def test_recv_recreates_missing_record_with_its_name(seqpacket: Pair) -> None:
    buf = dmabuf.allocate(SIZE, name="again")
    index, gen, shm = handle_of(buf).shared.index, handle_of(buf).shared.gen, handle_of(buf).shared.shm
    dmabuf.send(seqpacket[0], buf)
    buf.close()
    del buf
    assert shm.rec_free(index, gen)
    (got,) = dmabuf.recv(seqpacket[1])
    with got:
        assert got.name == "again"


def test_a_message_prepared_before_a_rename_has_the_new_name(seqpacket: Pair, buf: dmabuf.DmaBuf) -> None:
    dmabuf.send(seqpacket[0], buf)
    buf.name = "renamed"
    dmabuf.send(seqpacket[0], buf)
    first, second = dmabuf.recv(seqpacket[1]), dmabuf.recv(seqpacket[1])
    assert b"renamed" in (handle_of(buf).shared.message or b"")
    assert {b.name for b in first + second} == {"renamed"}
    for b in first + second:
        b.close()


# ---- fences and timelines ----


def test_a_fence_of_this_process_comes_back_as_the_same_object(pair: Pair, tl: dmabuf.Timeline) -> None:
    fence = tl.fence()
    dmabuf.send(pair[0], fence)
    assert dmabuf.recv(pair[1])[0] is fence
    fence.signal()


def _waiter(parent: Parent) -> tuple[str, str, int, int, int, bool]:
    (fence,) = dmabuf.recv(parent.sock)
    parent.send((fence.pid, fence.context, fence.seqno, fence.status))
    fence.wait()
    return fence.driver_name, fence.timeline_name, fence.context, fence.seqno, fence.status, fence.owned


def test_a_fence_is_waited_for_in_another_process(child: Spawn, tl: dmabuf.Timeline) -> None:
    other = child(_waiter)
    fence = tl.fence()
    dmabuf.send(other.sock, fence)
    assert other.recv() == (os.getpid(), fence.context, fence.seqno, 0)
    fence.signal(-errno.EIO)
    assert other.result() == ("camera", "frames", fence.context, fence.seqno, -errno.EIO, False)


def _foreign_signaller(parent: Parent) -> int:
    (fence,) = dmabuf.recv(parent.sock)
    with raises_errno(errno.EPERM):
        fence.signal()
    return int(fence.status)


def test_a_received_fence_is_not_signalled_by_its_receiver(child: Spawn, tl: dmabuf.Timeline) -> None:
    other = child(_foreign_signaller)
    fence = tl.fence()
    dmabuf.send(other.sock, fence)
    assert other.result() == 0
    fence.signal()


def _fence_maker(parent: Parent) -> None:
    tl = dmabuf.Timeline("mortal")
    fence = tl.fence()
    dmabuf.send(parent.sock, fence)
    parent.recv()


def test_a_received_fence_ends_with_its_owner(child: Spawn) -> None:
    other = child(_fence_maker)
    (fence,) = dmabuf.recv(other.sock)
    other.kill()
    fence.wait()
    assert fence.status == -errno.EOWNERDEAD


def test_fence_signaled_before_recv_keeps_its_error_and_number(seqpacket: Pair, tl: dmabuf.Timeline) -> None:
    fence = tl.fence()
    number = fence.context, fence.seqno
    dmabuf.send(seqpacket[0], fence)
    fence.signal(-errno.EIO)
    del fence
    while True:  # until its slot was used again
        again = tl.fence()
        again.signal()
        if again.handle >> 24 > 2:
            break
    (got,) = dmabuf.recv(seqpacket[1])
    assert (got.context, got.seqno) == number
    assert got.is_signaled()
    assert got.status in (-errno.EIO, 1)  # 1: more than the ring of 64 has passed


def test_dropping_a_sent_fence_unsignalled_warns(seqpacket: Pair, tl: dmabuf.Timeline) -> None:
    fence = tl.fence()
    dmabuf.send(seqpacket[0], fence)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del fence
        gc.collect()
    assert [w.category for w in caught] == [ResourceWarning]
    (got,) = dmabuf.recv(seqpacket[1])
    assert got.is_signaled()


def test_a_fence_that_could_not_be_sent_is_dropped_without_a_warning(seqpacket: Pair, tl: dmabuf.Timeline) -> None:
    fence = tl.fence()
    seqpacket[1].close()
    with raises_errno(errno.EPIPE):
        dmabuf.send(seqpacket[0], fence)
    del fence
    gc.collect()


def _looker(parent: Parent) -> tuple[bool, int]:
    (tl,) = dmabuf.recv(parent.sock)
    parent.send((tl.driver, tl.name, tl.context, tl.pid, tl.closed))
    parent.recv()
    return tl.closed, tl.pid


def test_a_timeline_arrives_as_a_view_of_it(child: Spawn) -> None:
    other = child(_looker)
    with dmabuf.Timeline("frames", driver="camera") as tl:
        dmabuf.send(other.sock, tl)
        assert other.recv() == ("camera", "frames", tl.context, os.getpid(), False)
    other.send()
    assert other.result() == (True, os.getpid())


def _timeline_maker(parent: Parent) -> None:
    with dmabuf.Timeline("mortal") as tl:
        dmabuf.send(parent.sock, tl)
        parent.recv()


def test_a_view_of_a_timeline_says_that_its_process_is_gone(child: Spawn) -> None:
    other = child(_timeline_maker)
    (tl,) = dmabuf.recv(other.sock)
    assert (tl.name, tl.pid, tl.closed) == ("mortal", other.pid, False)
    other.kill()
    dmabuf.Domain.default().sweep()
    assert (tl.pid, tl.closed) == (0, True)


def test_a_view_of_a_timeline_travels_on_and_is_equal(seqpacket: Pair, tl: dmabuf.Timeline) -> None:
    dmabuf.send(seqpacket[0], tl)
    (first,) = dmabuf.recv(seqpacket[1])
    dmabuf.send(seqpacket[0], first)
    (second,) = dmabuf.recv(seqpacket[1])
    assert first == second
    assert hash(first) == hash(second)
    assert "frames" in repr(second)


# ---- domains ----


def _private_reader(parent: Parent) -> list[str | None]:
    names = []
    for _ in range(2):
        *_, buf = dmabuf.recv(parent.sock)
        with buf, buf.read():
            names.append(buf.name)
        parent.send(buf.domain.path is None)
        keep = buf.domain  # noqa: F841
    return names


def test_a_private_domain_is_received_once_and_used_again(child: Spawn) -> None:
    domain = dmabuf.Domain.private()
    with dmabuf.allocate(SIZE, name="one", domain=domain) as one, dmabuf.allocate(SIZE, name="two", domain=domain) as two:
        other = child(_private_reader)
        dmabuf.send(other.sock, domain, one)
        assert other.recv() is True
        dmabuf.send(other.sock, two)
        assert other.recv() is True
        assert other.result() == ["one", "two"]


def _exdev(parent: Parent) -> tuple[int | None, str, int]:
    before = len(os.listdir("/proc/self/fd"))
    dmabuf.Domain.default()
    before = len(os.listdir("/proc/self/fd"))
    try:
        dmabuf.recv(parent.sock)
    except OSError as error:
        return error.errno, str(error), len(os.listdir("/proc/self/fd")) - before
    raise AssertionError


def test_a_buffer_of_a_private_domain_alone_is_refused_with_the_remedy(child: Spawn) -> None:
    other = child(_exdev)
    domain = dmabuf.Domain.private()
    with dmabuf.allocate(SIZE, domain=domain) as buf, dmabuf.allocate(SIZE) as plain:
        dmabuf.send(other.sock, plain, buf, plain)
        number, text, lost = other.result()
    assert number == errno.EXDEV
    assert "send the domain along" in text
    assert lost == 0


def test_a_fence_of_a_private_domain_alone_is_refused_with_the_remedy(child: Spawn) -> None:
    other = child(_exdev)
    with dmabuf.Timeline("secret", domain=dmabuf.Domain.private()) as tl:
        fence = tl.fence()
        dmabuf.send(other.sock, fence)
        number, text, _ = other.result()
        fence.signal()
    assert number == errno.EXDEV
    assert "send the domain along" in text


def test_a_buffer_of_another_directory_is_refused_with_the_remedy(child: Spawn, tmp_path: Path) -> None:
    other = child(_exdev)
    domain = dmabuf.Domain.open(tmp_path / "other")
    with dmabuf.allocate(SIZE, domain=domain) as buf:
        dmabuf.send(other.sock, buf)
        number, text, _ = other.result()
    domain.leave()
    assert number == errno.EXDEV
    assert "DMABUF_DOMAIN" in text


def _directory_reader(parent: Parent) -> tuple[str, str | None]:
    domain, buf = dmabuf.recv(parent.sock)
    with buf:
        found = str(domain.path), buf.name
    domain.leave()
    return found


def test_the_domain_of_another_directory_travels_along(child: Spawn, tmp_path: Path) -> None:
    other = child(_directory_reader)
    domain = dmabuf.Domain.open(tmp_path / "other")
    with dmabuf.allocate(SIZE, name="elsewhere", domain=domain) as buf:
        dmabuf.send(other.sock, domain, buf)
        assert other.result() == (str(tmp_path / "other"), "elsewhere")
    domain.leave()


def test_a_private_domain_inherited_by_fork_needs_no_sending(seqpacket: Pair) -> None:
    domain = dmabuf.Domain.private()
    with dmabuf.allocate(SIZE, name="forked", domain=domain) as buf:
        pid = os.fork()
        if not pid:
            try:
                (got,) = dmabuf.recv(seqpacket[1])
                os._exit(0 if got.name == "forked" and got.domain is domain else 1)
            finally:
                os._exit(2)
        dmabuf.send(seqpacket[0], buf)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_what_claims_to_be_a_domain_and_is_not_is_refused(seqpacket: Pair) -> None:
    domain = dmabuf.Domain.private()
    dmabuf.send(seqpacket[0], domain)
    data, control, _, _ = seqpacket[1].recvmsg(4096, 64)
    os.close(struct.unpack("i", control[0][2])[0])
    fd = os.memfd_create("dmabuf-domain:0", os.MFD_CLOEXEC)
    socket.send_fds(seqpacket[0], [data], [fd])
    os.close(fd)
    with raises_errno(errno.EINVAL):
        dmabuf.recv(seqpacket[1])


# ---- waiting ----


def test_recv_on_non_blocking_socket_takes_nothing_before_a_message(pair: Pair, buf: dmabuf.DmaBuf) -> None:
    pair[1].setblocking(False)
    with raises_errno(errno.EAGAIN, BlockingIOError):
        dmabuf.recv(pair[1])
    dmabuf.send(pair[0], buf)
    (got,) = dmabuf.recv(pair[1])
    got.close()
    with raises_errno(errno.EAGAIN, BlockingIOError):
        dmabuf.recv(pair[1])


def test_send_on_a_full_non_blocking_socket_loses_nothing(pair: Pair, buf: dmabuf.DmaBuf) -> None:
    pair[0].setblocking(False)
    sent = 0
    with raises_errno(errno.EAGAIN, BlockingIOError):
        while True:
            dmabuf.send(pair[0], buf, buf)
            sent += 1
    assert sent
    pair[1].setblocking(False)
    for _ in range(sent):
        got = dmabuf.recv(pair[1])
        assert got == [buf, buf]
        for b in got:
            b.close()
    with raises_errno(errno.EAGAIN, BlockingIOError):
        dmabuf.recv(pair[1])


def test_the_timeout_of_the_socket_ends_recv(pair: Pair) -> None:
    pair[1].settimeout(0.01)
    with raises_errno(errno.ETIMEDOUT, TimeoutError):
        dmabuf.recv(pair[1])


def test_the_timeout_of_the_socket_ends_send(pair: Pair, buf: dmabuf.DmaBuf) -> None:
    pair[0].settimeout(0.01)
    with raises_errno(errno.ETIMEDOUT, TimeoutError):
        while True:
            dmabuf.send(pair[0], buf)


def test_recv_waits_for_a_sender(pair: Pair, buf: dmabuf.DmaBuf) -> None:
    with Background(lambda: dmabuf.recv(pair[1])) as job:
        job.until_blocked()
        dmabuf.send(pair[0], buf)
        (got,) = job.result()
    got.close()


def test_two_threads_receive_whole_messages_from_one_stream(stream: Pair, buf: dmabuf.DmaBuf) -> None:
    rounds, got = 200, []
    lock = threading.Lock()

    def take() -> None:
        for _ in range(rounds):
            (b,) = dmabuf.recv(stream[1])
            with lock:
                got.append(b.ino)
            b.close()

    with Background(take), Background(take):
        for _ in range(2 * rounds):
            dmabuf.send(stream[0], buf)
    assert got == [buf.ino] * 2 * rounds


# ---- the other end goes ----


@pytest.mark.parametrize("kind", [socket.SOCK_SEQPACKET, socket.SOCK_STREAM])
def test_recv_from_a_closed_end_is_end_of_file(kind: socket.SocketKind) -> None:
    here, there = socket.socketpair(socket.AF_UNIX, kind)
    with here:
        there.close()
        with pytest.raises(EOFError):
            dmabuf.recv(here)


@pytest.mark.parametrize("kind", [socket.SOCK_SEQPACKET, socket.SOCK_STREAM])
def test_what_was_sent_before_the_end_closed_is_received_first(kind: socket.SocketKind, buf: dmabuf.DmaBuf) -> None:
    here, there = socket.socketpair(socket.AF_UNIX, kind)
    with here:
        dmabuf.send(there, buf)
        there.close()
        dmabuf.recv(here)[0].close()
        with pytest.raises(EOFError):
            dmabuf.recv(here)


def test_an_end_that_closed_without_reading_ours_is_connection_reset(seqpacket: Pair, buf: dmabuf.DmaBuf) -> None:
    dmabuf.send(seqpacket[0], buf)
    seqpacket[1].close()
    with raises_errno(errno.ECONNRESET, ConnectionResetError):
        dmabuf.recv(seqpacket[0])


@pytest.mark.parametrize("kind", [socket.SOCK_SEQPACKET, socket.SOCK_STREAM])
def test_send_to_a_closed_end_is_a_broken_pipe(kind: socket.SocketKind, buf: dmabuf.DmaBuf) -> None:
    here, there = socket.socketpair(socket.AF_UNIX, kind)
    with here:
        there.close()
        with raises_errno(errno.EPIPE, BrokenPipeError):
            dmabuf.send(here, buf)
