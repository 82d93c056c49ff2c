"""asend() and arecv() in tasks of asyncio and trio."""

import errno
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

import dmabuf
from dmabuf.sharing import items
from tests.sharing.conftest import SIZE, Pair
from tests.support.children import Parent, Spawn
from tests.support.errnos import raises_errno

anyio = pytest.importorskip("anyio")
pytest.importorskip("trio")


@pytest.fixture(params=["asyncio", "trio"])
def run(request: pytest.FixtureRequest) -> Callable[[Callable[[], Awaitable[Any]]], Any]:
    return lambda main: anyio.run(main, backend=request.param)


Run = Callable[[Callable[[], Awaitable[Any]]], Any]


def non_blocking(pair: Pair) -> Pair:
    for sock in pair:
        sock.setblocking(False)
    return pair


def test_what_is_there_is_received_at_once(pair: Pair, buf: dmabuf.DmaBuf, run: Run) -> None:
    a, b = non_blocking(pair)

    async def main() -> Any:
        await dmabuf.asend(a, buf, buf, meta={"seq": 1})
        return await dmabuf.arecv(b)

    got = run(main)
    assert (got, got.meta) == ([buf, buf], {"seq": 1})
    for one in got:
        one.close()


def test_other_tasks_run_while_one_waits(pair: Pair, buf: dmabuf.DmaBuf, run: Run) -> None:
    a, b = non_blocking(pair)
    order: list[str] = []

    async def receiver() -> None:
        (got,) = await dmabuf.arecv(b)
        order.append("received")
        got.close()

    async def main() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(receiver)
            await anyio.wait_all_tasks_blocked()
            order.append("sent")
            await dmabuf.asend(a, buf)

    run(main)
    assert order == ["sent", "received"]


def test_a_sender_waits_for_room(pair: Pair, buf: dmabuf.DmaBuf, run: Run) -> None:
    a, b = non_blocking(pair)
    a.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    sent: list[int] = []

    async def sender() -> None:
        for i in range(100):
            await dmabuf.asend(a, buf, meta=[i, "x" * 900])  # on a stream several are cut in the middle
            sent.append(i)

    async def main() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(sender)
            await anyio.wait_all_tasks_blocked()
            assert len(sent) < 100
            for i in range(100):
                got = await dmabuf.arecv(b)
                assert got.meta[0] == i
                got[0].close()

    run(main)
    assert sent == list(range(100))


def test_a_message_that_comes_in_pieces(stream: Pair, buf: dmabuf.DmaBuf, run: Run) -> None:
    a, b = non_blocking(stream)
    data, fds, _, _ = items.pack_objects((buf,), "x" * 500)
    seen: list[int] = []

    async def main() -> Any:
        async with anyio.create_task_group() as tasks:

            async def pieces() -> None:
                socket.send_fds(a, [data[:10]], fds)
                for at in range(10, len(data)):
                    await anyio.lowlevel.checkpoint()
                    seen.append(a.send(data[at : at + 1]))

            tasks.start_soon(pieces)
            got = await dmabuf.arecv(b)
        return got

    got = run(main)
    assert (got, got.meta) == ([buf], "x" * 500)
    assert len(seen) == len(data) - 10
    got[0].close()


def test_canceled_before_a_message_nothing_is_lost(pair: Pair, buf: dmabuf.DmaBuf, run: Run) -> None:
    a, b = non_blocking(pair)

    async def main() -> Any:
        with anyio.move_on_after(0.01) as scope:
            await dmabuf.arecv(b)
        assert scope.cancelled_caught
        await dmabuf.asend(a, buf)
        with anyio.move_on_after(0) as scope:  # canceled with a message there
            await dmabuf.arecv(b)
        assert scope.cancelled_caught
        return await dmabuf.arecv(b)

    (got,) = run(main)
    assert got == buf
    got.close()


def test_canceled_in_the_middle_closes_what_came(stream: Pair, buf: dmabuf.DmaBuf, run: Run) -> None:
    a, b = non_blocking(stream)
    data, fds, _, _ = items.pack_objects((buf, buf))
    socket.send_fds(a, [data[:100]], fds)

    async def main() -> None:
        before = len(os.listdir("/proc/self/fd"))
        with anyio.move_on_after(0.01) as scope:
            await dmabuf.arecv(b)
        assert scope.cancelled_caught
        assert len(os.listdir("/proc/self/fd")) == before

    run(main)


def test_canceled_sender_has_sent_nothing(seqpacket: Pair, buf: dmabuf.DmaBuf, run: Run) -> None:
    a, b = non_blocking(seqpacket)

    async def main() -> None:
        with anyio.move_on_after(0) as scope:
            await dmabuf.asend(a, buf)
        assert scope.cancelled_caught
        with raises_errno(errno.EAGAIN):
            dmabuf.recv(b)

    run(main)


def _peer(parent: Parent) -> None:
    parent.sock.setblocking(True)
    for _ in range(20):
        got = dmabuf.recv(parent.sock)
        dmabuf.send(parent.sock, *got, meta=got.meta)
        for one in got:
            one.close()
    parent.recv()


def test_with_another_process_that_is_then_killed(child: Spawn, buf: dmabuf.DmaBuf, run: Run) -> None:
    other = child(_peer)
    other.sock.setblocking(False)

    async def main() -> None:
        for i in range(20):
            await dmabuf.asend(other.sock, buf, meta=i)
            got = await dmabuf.arecv(other.sock)
            assert (got, got.meta) == ([buf], i)
            got[0].close()
        async with anyio.create_task_group() as tasks:

            async def receiver() -> None:
                with pytest.raises(EOFError):
                    await dmabuf.arecv(other.sock)

            tasks.start_soon(receiver)
            await anyio.wait_all_tasks_blocked()
            other.kill()
        with raises_errno(errno.EPIPE):
            await dmabuf.asend(other.sock, buf)

    run(main)


def test_the_other_end_is_closed_in_the_middle_of_a_message(stream: Pair, run: Run) -> None:
    a, b = non_blocking(stream)
    a.send(items.MAGIC)
    a.close()

    async def main() -> None:
        with raises_errno(errno.ECONNRESET):
            await dmabuf.arecv(b)

    run(main)


def test_a_wait_leaves_the_programs_own_wait_for_the_socket(seqpacket: Pair, buf: dmabuf.DmaBuf, run: Run) -> None:
    a, b = non_blocking(seqpacket)

    async def main() -> None:
        woken: list[str] = []

        async def other() -> None:
            await anyio.wait_readable(b)
            woken.append("other")

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(other)
            await anyio.wait_all_tasks_blocked()

            async def sender() -> None:
                await dmabuf.asend(a, buf)
                await dmabuf.asend(a, buf)

            tasks.start_soon(sender)
            (await dmabuf.arecv(b))[0].close()
        assert woken == ["other"]
        (await dmabuf.arecv(b))[0].close()

    run(main)


# ---- bad arguments ----


@pytest.mark.parametrize("timeout", [None, 1.0])
@pytest.mark.parametrize("call", [dmabuf.asend, dmabuf.arecv])
def test_a_blocking_socket_is_refused(seqpacket: Pair, run: Run, call: Any, timeout: float | None) -> None:
    seqpacket[0].settimeout(timeout)

    async def main() -> None:
        with raises_errno(errno.EINVAL) as caught:
            await call(seqpacket[0])
        assert "setblocking(False)" in str(caught.value)

    run(main)


@pytest.mark.parametrize("call", [dmabuf.asend, dmabuf.arecv])
def test_what_is_not_a_socket_of_the_library_is_a_type_error(run: Run, call: Any) -> None:
    async def main() -> None:
        with pytest.raises(TypeError):
            await call(3)

    run(main)


@pytest.mark.parametrize(("thing", "meta", "error"), [((), None, OSError), ((3,), None, TypeError), ((), {1}, TypeError)])
def test_what_cannot_be_sent(seqpacket: Pair, run: Run, thing: Any, meta: Any, error: type[Exception]) -> None:
    a, _ = non_blocking(seqpacket)

    async def main() -> None:
        with pytest.raises(error):
            await dmabuf.asend(a, *thing, meta=meta)

    run(main)


def test_outside_of_a_framework_nothing_is_sent(seqpacket: Pair) -> None:
    a, b = non_blocking(seqpacket)
    with dmabuf.allocate(SIZE) as buf:
        for call in (dmabuf.asend(a, buf), dmabuf.arecv(b)):
            with pytest.raises(RuntimeError, match="no event loop"):
                call.send(None)
    with raises_errno(errno.EAGAIN):
        dmabuf.recv(b)
