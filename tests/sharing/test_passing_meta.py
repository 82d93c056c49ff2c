"""send(meta=) and what recv() returns: values that are sent along with objects."""

import errno
import json
import os
import socket
from collections.abc import Callable
from typing import Any

import pytest

import dmabuf
from dmabuf.sharing import items
from dmabuf.sharing.items import HEADER, INLINE_META, ITEM, MAGIC, MAX_META
from tests.sharing.conftest import Pair
from tests.support.children import Parent, Spawn
from tests.support.errnos import raises_errno

VALUES: list[Any] = [
    {"seq": 7, "roi": [0, 0, 640.5, 480], "name": "ö", "key": None, "last": True},
    [],
    {},
    "",
    "text",
    0,
    False,
    1.5,
    b"",
    b"\0\xff" * 31,
    b"x" * INLINE_META,
    b"x" * (INLINE_META + 1),
    "y" * 5000,
    {"nested": [[[{"deep": [1] * 300}]]]},
]


@pytest.mark.parametrize("meta", VALUES, ids=lambda value: repr(value)[:24])
@pytest.mark.parametrize("objects", [0, 1, 3])
def test_meta_arrives_with_its_objects(pair: Pair, buf: dmabuf.DmaBuf, meta: Any, objects: int) -> None:
    dmabuf.send(pair[0], *[buf] * objects, meta=meta)
    got = dmabuf.recv(pair[1])
    assert got == [buf] * objects
    assert got.meta == meta
    assert type(got.meta) is type(meta)
    for one in got:
        one.close()


@pytest.mark.parametrize("timeout", [None, 0, 5])
def test_without_meta_it_is_none(pair: Pair, buf: dmabuf.DmaBuf, timeout: float | None) -> None:
    for sock in pair:
        sock.settimeout(timeout)
    for objects in ([buf], [buf, buf]):
        dmabuf.send(pair[0], *objects)
        got = dmabuf.recv(pair[1])
        assert got.meta is None
        assert isinstance(got, list)
        assert got == objects
        for one in got:
            one.close()


def test_meta_of_one_message_stays_with_it(pair: Pair, buf: dmabuf.DmaBuf, tl: dmabuf.Timeline) -> None:
    dmabuf.send(pair[0], buf, meta=1)
    dmabuf.send(pair[0], tl)
    dmabuf.send(pair[0], tl, buf, meta=[3])
    found = [dmabuf.recv(pair[1]) for _ in range(3)]
    assert [one.meta for one in found] == [1, None, [3]]
    for one in (found[0][0], found[2][1]):
        one.close()


@pytest.mark.parametrize(
    ("meta", "came"), [((1, (2,)), [1, [2]]), ({1: "a"}, {"1": "a"}), (bytearray(b"x"), b"x"), (memoryview(b"x"), b"x")]
)
def test_what_meta_becomes(seqpacket: Pair, meta: Any, came: Any) -> None:
    dmabuf.send(seqpacket[0], meta=meta)
    got = dmabuf.recv(seqpacket[1]).meta
    assert got == came
    assert type(got) is type(came)


@pytest.mark.parametrize("size", [MAX_META, 100_000])
def test_long_meta_travels_in_memory_and_leaves_none(pair: Pair, size: int) -> None:
    dmabuf.send(pair[0], meta=b"x" * size)
    assert len(dmabuf.recv(pair[1]).meta) == size


def test_meta_with_as_many_objects_as_a_message_has(seqpacket: Pair, tl: dmabuf.Timeline) -> None:
    dmabuf.send(seqpacket[0], *[tl] * 252, meta=b"x" * 100)  # no room for its bytes in items
    got = dmabuf.recv(seqpacket[1])
    assert (len(got), got.meta) == (252, b"x" * 100)
    with raises_errno(errno.EMSGSIZE):
        dmabuf.send(seqpacket[0], *[tl] * 253, meta=1)


def _echo(parent: Parent) -> None:
    while (got := dmabuf.recv(parent.sock)).meta != "end":
        dmabuf.send(parent.sock, *got, meta=[got.meta, os.getpid()])
        for one in got:
            one.close()


def test_meta_reaches_another_process_and_comes_back(child: Spawn, buf: dmabuf.DmaBuf) -> None:
    other = child(_echo)
    dmabuf.send(other.sock, buf, meta={"seq": 1})
    got = dmabuf.recv(other.sock)
    assert got.meta == [{"seq": 1}, other.pid]
    got[0].close()
    dmabuf.send(other.sock, meta="end")
    other.result()


# ---- bad arguments ----


def _circle() -> list[Any]:
    made: list[Any] = []
    made.append(made)
    return made


def _deep() -> list[Any]:
    made: list[Any] = []
    for _ in range(100_000):
        made = [made]
    return made


@pytest.mark.parametrize(
    "make", [object, lambda: {"a": {1}}, lambda: [b"x"], lambda: {(1, 2): 3}, _circle, _deep, lambda: 10**5000], ids=range(7)
)
def test_meta_that_json_does_not_have_is_a_type_error(seqpacket: Pair, buf: dmabuf.DmaBuf, make: Callable[[], Any]) -> None:
    with pytest.raises(TypeError, match="meta is bytes, or what JSON has"):
        dmabuf.send(seqpacket[0], buf, meta=make())
    seqpacket[1].setblocking(False)
    with raises_errno(errno.EAGAIN):
        dmabuf.recv(seqpacket[1])


@pytest.mark.parametrize("meta", [b"x" * (MAX_META + 1), "x" * MAX_META])
def test_meta_that_is_too_long_is_refused(seqpacket: Pair, meta: Any) -> None:
    with raises_errno(errno.EMSGSIZE) as caught:
        dmabuf.send(seqpacket[0], meta=meta)
    assert f"send at most {MAX_META}" in str(caught.value)


def test_nothing_at_all_is_refused(seqpacket: Pair) -> None:
    with raises_errno(errno.EINVAL):
        dmabuf.send(seqpacket[0], meta=None)


# ---- a peer that sends something else ----


def _meta(length: int, as_json: int, pieces: int, kind: int = items._META) -> bytes:
    return ITEM.pack(kind, 0, 0, pieces, bytes(8), items._META_BODY.pack(length, as_json))


def _piece(data: bytes) -> bytes:
    return ITEM.pack(items._MORE, 0, 0, 0, bytes(8), data)


@pytest.mark.parametrize(
    "parts",
    [
        [_meta(1, 1, 1), _piece(b"1"), _meta(1, 1, 1), _piece(b"2")],
        [_meta(3, 1, 1), _piece(b"nan")],
        [_meta(0, 1, 0)],
        [_meta(1, 1, 0)],
        [_meta(65, 0, 1), _piece(b"x" * 64)],
        [_meta(64, 0, 2), _piece(b"x" * 64), _piece(b"")],
        [_meta(1 << 31, 0, 1), _piece(b"")],
        [_meta(64, 0, 1), _meta(1, 1, 1)],
        [_meta(2, 1, 1), _piece(b"\xff\xff")],
        [_meta(64 * 64, 1, 64), *[_piece(b"[" * 64)] * 64],
    ],
    ids=range(10),
)
def test_meta_that_makes_no_sense_is_refused(pair: Pair, parts: list[bytes]) -> None:
    pair[0].send(HEADER.pack(MAGIC, len(parts), 0, 0) + b"".join(parts))
    with raises_errno(errno.EBADMSG):
        dmabuf.recv(pair[1])


def _pipe() -> int:
    there, here = os.pipe()
    os.close(here)
    return there


def _unsealed() -> int:
    fd = os.memfd_create("x")
    os.write(fd, b"x" * 8)
    return fd


@pytest.mark.parametrize("make", [_pipe, _unsealed, lambda: os.open(os.devnull, os.O_RDONLY), lambda: items.sealed("x", b"x" * 9).take()])
def test_memory_of_meta_that_is_something_else_is_refused(seqpacket: Pair, make: Callable[[], int]) -> None:
    fd = make()
    socket.send_fds(seqpacket[0], [HEADER.pack(MAGIC, 1, 1, 0) + _meta(8, 0, 0, items._META_FD)], [fd])
    os.close(fd)
    with raises_errno(errno.EBADMSG):
        dmabuf.recv(seqpacket[1])


def test_a_buffer_beside_bad_meta_is_closed(seqpacket: Pair, buf: dmabuf.DmaBuf) -> None:
    data, fds, _, _ = items.pack_objects((buf,), json.loads("1"))
    socket.send_fds(seqpacket[0], [data.replace(b"1" + bytes(63), b"?" + bytes(63))], fds)
    with raises_errno(errno.EBADMSG):
        dmabuf.recv(seqpacket[1])
