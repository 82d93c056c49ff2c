"""How streams are made and found."""

import errno
from typing import Any

import pytest

import dmabuf
from dmabuf import Stream
from tests.stream.conftest import SIZE, Make, content, put
from tests.support.children import Parent, Spawn
from tests.support.errnos import raises_errno
from tests.support.waiting import Background


def test_stream_is_opened_by_its_name(make: Make, name: str) -> None:
    stream = make(name, buffers=3, when_full="drop", size=None, shape=(4, 4), dtype="uint8", meta_bytes=20)
    assert stream.name == name
    with Stream.open(name) as other:
        assert (other.name, other.when_full, len(other.bufs), other.layout) == (name, "drop", 3, stream.layout)
        assert (other.size, other.info()["meta_bytes"]) == (stream.size, 20)
        assert not other.closed
        assert name in repr(other)


def test_open_of_nothing_says_what_there_is(make: Make, name: str) -> None:
    make(name)
    with raises_errno(errno.ENOENT, FileNotFoundError) as caught:
        Stream.open("no such stream")
    assert repr(name) in str(caught.value)
    assert isinstance(caught.value, dmabuf.errors.NotFoundError) if hasattr(dmabuf, "errors") else True


def test_open_waits_until_there_is_one(make: Make, name: str) -> None:
    with raises_errno(errno.ENOENT, FileNotFoundError):
        Stream.open(name, wait=0)
    with Background(lambda: Stream.open(name, wait=60)) as job:
        job.until_blocked()
        stream = make(name)
        with job.result() as other:
            put(stream, 4)
            assert content(other.next(timeout=0)) == 4


def test_open_that_waits_in_vain_ends(name: str) -> None:
    with raises_errno(errno.ENOENT, FileNotFoundError):
        Stream.open(name, wait=0.05)


@pytest.mark.parametrize("wait", [-1, float("nan")])
def test_open_with_a_wrong_wait_is_refused(name: str, wait: float) -> None:
    with raises_errno(errno.EINVAL):
        Stream.open(name, wait=wait)


@pytest.mark.parametrize("call", [Stream.create, Stream.open, Stream.open_or_create])
@pytest.mark.parametrize("name", ["x" * 32, "", "a\0b"], ids=["long", "empty", "nul"])
def test_bad_name_is_refused(call: Any, name: str) -> None:
    keywords = {} if call == Stream.open else {"size": SIZE}
    with raises_errno(errno.EINVAL):
        call(name, **keywords)


@pytest.mark.parametrize("call", [Stream.create, Stream.open_or_create])
@pytest.mark.parametrize(
    "keywords",
    [
        {"buffers": 1},
        {"buffers": 65},
        {"buffers": -1},
        {"when_full": "block"},
        {"meta_bytes": -1},
        {"meta_bytes": 4097},
        {"size": None},
        {"size": 0},
        {"size": -1},
    ],
    ids=str,
)
def test_create_with_bad_arguments_is_refused(call: Any, keywords: dict[str, Any], name: str) -> None:
    with raises_errno(errno.EINVAL):
        call(name, **{"size": SIZE, **keywords})
    with raises_errno(errno.ENOENT):
        Stream.open(name)


def test_second_stream_of_a_name_is_refused(make: Make, name: str) -> None:
    make(name)
    with raises_errno(errno.EEXIST, FileExistsError):
        make(name)
    with Stream.open_or_create(name, size=SIZE) as other:
        assert other.name == name


@pytest.mark.parametrize(
    ("keywords", "text"),
    [
        ({"size": 2 * SIZE}, "its size is 4096, and 8192"),
        ({"buffers": 5}, "its buffers is 4, and 5"),
        ({"when_full": "drop"}, "its when_full is wait, and drop"),
        ({"meta_bytes": 100}, "its meta_bytes is 256, and 100"),
        ({"size": None, "shape": (SIZE,), "dtype": "uint8"}, "its layout is None"),
    ],
    ids=str,
)
def test_open_or_create_of_another_kind_is_refused(make: Make, name: str, keywords: dict[str, Any], text: str) -> None:
    make(name)
    with raises_errno(errno.EEXIST, FileExistsError) as caught:
        Stream.open_or_create(name, **{"size": SIZE, **keywords})
    assert text in str(caught.value)


def test_open_or_create_takes_a_size_that_is_not_of_whole_pages(name: str) -> None:
    with Stream.open_or_create(name, size=1000) as first, Stream.open_or_create(name, size=1000) as second:
        put(first, 3)
        assert content(second.next(timeout=0)) == 3


def test_name_is_free_when_the_last_holder_is_gone(make: Make, name: str) -> None:
    stream = make(name)
    other = Stream.open(name)
    stream.close()
    with raises_errno(errno.EEXIST, FileExistsError):
        make(name)
    other.close()
    make(name)


def test_unlink_makes_the_name_free_and_holders_go_on(make: Make, name: str) -> None:
    stream = make(name)
    with Stream.open(name) as old:
        stream.unlink()
        with raises_errno(errno.ENOENT):
            Stream.open(name)
        put(stream, 1)
        assert content(old.next(timeout=0)) == 1
        new = make(name)
        put(new, 2)
        with Stream.open(name) as found:
            assert content(found.next(timeout=0)) == 2


def test_stream_without_a_name_is_not_found(stream: Stream) -> None:
    assert stream.name is None
    assert repr(stream) == "<dmabuf.Stream>"
    put(stream, 1)
    assert content(stream.next(timeout=0)) == 1


def test_many_streams_and_slots_are_used_again() -> None:
    for _ in range(3):
        made = [Stream.create(size=SIZE, buffers=2) for _ in range(9)]
        for number, stream in enumerate(made):
            put(stream, number)
        for number, stream in enumerate(made):
            assert content(stream.next(timeout=0)) == number
            stream.close()


def comer(parent: Parent, name: str) -> tuple[int, bool]:
    parent.send("ready")
    parent.recv()
    with Stream.open_or_create(name, size=SIZE) as stream:
        parent.send("here")
        parent.recv()
        return stream.ring.stream, stream.closed


def test_of_several_that_come_at_once_one_makes_the_stream(name: str, child: Spawn) -> None:
    comers = [child(comer, name) for _ in range(4)]
    for process in comers:
        assert process.recv() == "ready"
    for process in comers:
        process.send()
    for process in comers:
        assert process.recv() == "here"
    with Stream.open(name) as stream:
        number = stream.ring.stream
    for process in comers:
        process.send()
    assert [process.result() for process in comers] == [(number, False)] * 4
    with raises_errno(errno.ENOENT):
        Stream.open(name)
