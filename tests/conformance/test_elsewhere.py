"""CPU access and mappings of a buffer whose exporter is this process, from here and from another process, with the same results."""

import errno
import sys
import threading
from typing import Any

import pytest

import dmabuf
from dmabuf import Direction, DmaBuf, Usage
from dmabuf.core.export.exported import EXPORTS
from tests.support import elsewhere as do
from tests.support.children import Parent, Spawn
from tests.support.drivers import BIDIR, FROM, PAGE, TO, Bare, Static
from tests.support.elsewhere import Away, Place, obeys
from tests.support.errnos import raises_errno
from tests.support.waiting import until

SIZE = 4 * PAGE


@pytest.mark.parametrize("direction", list(Direction), ids=lambda direction: direction.name)
def test_begin_and_end_reach_the_exporter_with_their_direction(place: Place, static: Static, direction: Direction) -> None:
    with dmabuf.export(static, SIZE) as buf, place.of(buf) as there:
        there.do(do.begin, direction)
        assert static.calls == [("begin", direction)]
        there.do(do.end, direction)
        assert static.calls == [("begin", direction), ("end", direction)]
        assert static.locked == {"begin": False, "end": False}


@pytest.mark.parametrize(("op", "call", "arguments"), [("begin", do.begin, (TO,)), ("end", do.end, (TO,)), ("mmap", do.map_bytes, ())])
@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EINTR, errno.EIO, errno.EAGAIN])
def test_a_failing_op_gives_its_errno_and_leaves_nothing(
    place: Place, static: Static, op: str, call: Any, arguments: Any, number: int
) -> None:
    with dmabuf.export(static, SIZE) as buf, place.of(buf) as there:
        there.do(do.begin, FROM)
        there.do(do.end, FROM)  # connected from now on
        before = there.do(do.memories), do.memories()
        static.fails[op] = number
        with raises_errno(number):
            there.do(call, *arguments)
        assert (there.do(do.memories), do.memories()) == before
        assert buf.statistics().attachments == buf.statistics().vmaps == 0
        assert not buf.resv.is_locked()
        static.fails.clear()
        there.do(call, *arguments)
        if op == "mmap":
            there.do(do.unmap_bytes)
    until(lambda: static.count("release"))
    assert static.calls[-1] == "release"


def test_the_error_says_the_same(child: Spawn, static: Static) -> None:
    error = dmabuf.errors.fail(errno.EBUSY, "begin", "the memory", "wait", what="it moves just now")
    static.fails["begin"] = error
    seen = []
    for here in (True, False):
        with dmabuf.export(static, SIZE) as buf, Place(child, here).of(buf) as there, pytest.raises(dmabuf.DmaBufError) as caught:
            there.do(do.begin, TO)
        seen.append((type(caught.value), caught.value.errno, str(caught.value), caught.value.operation, caught.value.remedy))
    assert seen[0] == seen[1]


@pytest.mark.parametrize("kind", [KeyError, SystemExit])
def test_exception_of_remote_op_is_a_contract_error_unless_oserror(
    child: Spawn, static: Static, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    told: list[object] = []
    monkeypatch.setattr("sys.unraisablehook", lambda info: told.append(info.exc_type))
    static.fails["begin"] = kind("bug")  # one of this test alone: its traceback holds the buffer
    with dmabuf.export(static, SIZE) as buf, Place(child, False).of(buf) as there:
        with pytest.raises(dmabuf.ContractError, match=kind.__name__):
            there.do(do.begin, TO)
        assert told == [kind]
        static.fails.clear()
        there.do(do.begin, TO)
        there.do(do.end, TO)


class Odd(Exception):
    """An exception that can't say what it is."""

    def __str__(self) -> str:
        raise ValueError("no text")


class OddError(OSError):
    """The same with an errno."""

    def __str__(self) -> str:
        raise ValueError("no text")


class Silent:
    """An argument of an exception, with no text either."""

    def __str__(self) -> str:
        raise SystemExit("no text")


def _ours(**fields: object) -> dmabuf.DmaBufError:
    made = dmabuf.DmaBufError(errno.EBUSY, "busy")
    vars(made).update(fields)
    return made


@pytest.mark.parametrize(
    ("raised", "came", "says"),
    [
        (Odd(), dmabuf.ContractError, "the exporter raised Odd: \\(its str\\(\\) raised ValueError\\)"),
        (dmabuf.ContractError(Silent()), dmabuf.ContractError, "raised SystemExit"),
        (OddError(), OSError, "raised ValueError"),
        (OddError(errno.EBUSY, ""), OSError, "raised ValueError"),
        (OSError(errno.EBUSY, Silent()), OSError, "raised SystemExit"),
        (OSError(errno.EBUSY, 7), OSError, "7"),
        (OSError("no number"), OSError, "no number"),
        (_ours(operation=Silent(), remedy=b"wait"), dmabuf.DmaBufError, "^busy$"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_exception_of_remote_op_without_text_reaches_the_caller(
    child: Spawn, static: Static, monkeypatch: pytest.MonkeyPatch, raised: Exception, came: type[Exception], says: str
) -> None:
    monkeypatch.setattr("sys.unraisablehook", lambda info: None)
    static.fails["begin"] = raised
    with dmabuf.export(static, SIZE) as buf, Place(child, False).of(buf) as there:
        with pytest.raises(came, match=says):
            there.do(do.begin, TO)
        static.fails.clear()
        there.do(do.begin, TO)
        there.do(do.end, TO)


def test_an_error_with_a_long_text_has_its_errno_elsewhere_too(place: Place, static: Static) -> None:
    static.fails["begin"] = OSError(errno.EBUSY, "why " * 50_000)
    with dmabuf.export(static, SIZE) as buf, place.of(buf) as there, raises_errno(errno.EBUSY) as caught:
        there.do(do.begin, TO)
    assert "why why" in str(caught.value)


def test_without_the_ops_begin_and_end_only_wait_and_there_is_no_mapping(place: Place, bare: Bare) -> None:
    with dmabuf.export(bare, SIZE) as buf, place.of(buf) as there:
        there.do(do.begin, TO)
        there.do(do.end, TO)
        for call, *more in ((do.map_bytes,), (do.read, 1), (do.write, b"x")):
            with raises_errno(errno.EINVAL):
                there.do(call, *more)  # type: ignore[arg-type]
        assert bare.calls == []
        assert buf.resv.fences(Usage.BOOKKEEP) == []


def test_a_mapping_shows_the_exporters_memory(place: Place, static: Static) -> None:
    with dmabuf.export(static, SIZE) as buf, place.of(buf) as there:
        static.whole[PAGE : PAGE + 5] = b"hello"
        there.do(do.map_bytes, PAGE, PAGE)
        assert static.calls == [("mmap", PAGE, PAGE)]
        assert there.do(do.peek, 0, 5) == b"hello"
        there.do(do.poke, 5, b" you")
        assert static.whole[PAGE : PAGE + 9] == b"hello you"
        there.do(do.unmap_bytes)


@pytest.mark.parametrize(("offset", "length"), [(0, SIZE + 1), (SIZE, PAGE), (1, PAGE), (0, 0)])
def test_a_mapping_out_of_bounds_is_einval_before_the_exporter_is_asked(place: Place, static: Static, offset: int, length: int) -> None:
    with dmabuf.export(static, SIZE) as buf, place.of(buf) as there:
        with raises_errno(errno.EINVAL):
            there.do(do.map_bytes, offset, length)
        assert static.calls == []


def test_read_only_memory_is_mapped_when_asked_so(place: Place) -> None:
    exporter = ReadOnly()
    with dmabuf.export(exporter, SIZE) as buf, place.of(buf) as there:
        with raises_errno(errno.EACCES):
            there.do(do.map_bytes)
        there.do(do.map_bytes, writable=False)
        there.do(do.unmap_bytes)
        with raises_errno(errno.EACCES):
            there.do(do.write, b"x")
        assert there.do(do.read, 2) == b"\0\0"
    exporter.close()


class ReadOnly(Static):
    def mmap(self, buf: DmaBuf, offset: int, length: int) -> Any:
        return self.memory.mmap(offset, length, writable=False)


class Anonymous(Static):
    """Its memory's only descriptor is closed."""

    def mmap(self, buf: DmaBuf, offset: int, length: int) -> Any:
        with dmabuf.allocate(SIZE) as memory:
            return memory.mmap(offset, length)


def test_memory_without_a_descriptor_cannot_be_shown_elsewhere(child: Spawn) -> None:
    exporter = Anonymous()
    with dmabuf.export(exporter, SIZE) as buf, Place(child, False).of(buf) as there:
        with raises_errno(errno.EOPNOTSUPP) as caught:
            there.do(do.map_bytes)
        assert "closed every descriptor" in str(caught.value)
    exporter.close()


def test_read_and_write_are_bracketed_by_the_exporter(place: Place, static: Static) -> None:
    with dmabuf.export(static, SIZE) as buf, place.of(buf) as there:
        there.do(do.write, b"abc")
        assert static.whole[0:3] == b"abc"
        assert there.do(do.read, 3) == b"abc"
        assert static.calls == [("begin", BIDIR), ("mmap", 0, SIZE), ("end", BIDIR), ("begin", FROM), ("mmap", 0, SIZE), ("end", FROM)]


@pytest.mark.parametrize("op", ["begin", "mmap"])
@pytest.mark.parametrize("call", [do.read, do.write])
def test_a_failing_bracket_enters_nothing_and_leaves_nothing(place: Place, static: Static, op: str, call: Any) -> None:
    with dmabuf.export(static, SIZE) as buf, place.of(buf) as there:
        static.fails[op] = errno.ENOMEM
        with raises_errno(errno.ENOMEM):
            there.do(call, b"" if call is do.write else 0)
        assert static.count("begin") - static.count("end") == (op == "begin")
        assert buf.resv.fences(Usage.BOOKKEEP) == []
        static.fails.clear()
        there.do(do.read, 1)


def test_a_failing_end_of_a_write_leaves_the_content_torn(place: Place, static: Static) -> None:
    with dmabuf.export(static, SIZE) as buf, place.of(buf) as there:
        static.fails["end"] = errno.EIO
        with raises_errno(errno.EIO):
            there.do(do.write, b"x")
        static.fails.clear()
        with raises_errno(errno.ECANCELED):
            there.do(do.read, 1)
        there.do(do.write, b"y")
        assert there.do(do.read, 1) == b"y"


# -- who holds what


def live_mappings(exporter: Static) -> int:
    (exported,) = (e for e in EXPORTS.of(dmabuf.Domain.default()).buffers.values() if e.exporter is exporter)
    return sum(not mapping.closed for mapping in exported._mappings.values())


def test_the_exporters_mapping_lives_as_long_as_the_one_elsewhere(child: Spawn, static: Static) -> None:
    buf = dmabuf.export(static, SIZE)
    with Place(child, False).of(buf) as there:
        there.do(do.map_bytes)
        buf.close()
        there.do(do.close)
        dmabuf.Domain.default().sweep()
        assert live_mappings(static) == 1
        assert static.count("release") == 0
        there.do(do.poke, 0, b"still")
        assert static.whole[0:5] == b"still"
        there.do(do.unmap_bytes)
        until(lambda: static.count("release"))


def many(state: Any, count: int) -> None:
    mappings = [state.buf.mmap() for _ in range(count)]
    for mapping in mappings:
        mapping.close()


def test_many_mappings_closed_at_once_are_all_given_back(child: Spawn, static: Static) -> None:
    with dmabuf.export(static, SIZE) as buf, Place(child, False).of(buf) as there:
        there.do(many, 200)
        until(lambda: live_mappings(static) == 0)


def dies_holding(parent: Parent) -> None:
    (buf,) = dmabuf.recv(parent.sock)
    buf.begin_cpu_access(TO)
    buf.begin_cpu_access(FROM)
    mapping = buf.mmap()
    parent.send(mapping.size)
    parent.recv()


def test_a_dead_process_gives_back_its_brackets_and_mappings(child: Spawn, static: Static) -> None:
    buf = dmabuf.export(static, SIZE)
    other = child(dies_holding)
    dmabuf.send(other.sock, buf)
    assert other.recv() == SIZE
    buf.close()
    other.kill()
    until(lambda: static.count("release"))
    assert static.calls == [("begin", TO), ("begin", FROM), ("mmap", 0, SIZE), ("end", FROM), ("end", TO), "release"]


def exports(parent: Parent) -> None:
    exporter = Static()
    buf = dmabuf.export(exporter, SIZE)
    dmabuf.send(parent.sock, buf)
    while (order := parent.recv()) is not None:
        parent.send(order)
    buf.close()
    exporter.close()


def test_a_dead_exporter_is_enodev(child: Spawn) -> None:
    other = child(exports)
    (buf,) = dmabuf.recv(other.sock)
    mapping = buf.mmap()
    buf.begin_cpu_access(TO)
    mapping[0:2] = b"ok"
    other.kill()
    for call in (lambda: buf.begin_cpu_access(TO), lambda: buf.end_cpu_access(TO), lambda: buf.mmap(), lambda: buf.read().__enter__()):
        with raises_errno(errno.ENODEV):
            call()
    assert mapping[0:2] == b"ok"  # its memory is still there
    mapping.close()
    buf.close()


def stuck(parent: Parent, op: str) -> None:
    exporter = Static()
    exporter.during[op] = lambda _: parent.recv()
    buf = dmabuf.export(exporter, SIZE)
    dmabuf.send(parent.sock, buf)
    exporter.during["never"] = lambda _: None
    import threading

    threading.Event().wait()


@pytest.mark.parametrize(("op", "call"), [("begin", do.begin), ("end", do.end), ("mmap", do.map_bytes)])
def test_a_caller_is_told_when_the_exporter_dies_in_the_middle(child: Spawn, op: str, call: Any) -> None:
    other = child(stuck, op)
    caller = child(obeys)
    (buf,) = dmabuf.recv(other.sock)
    away = Away(caller, buf)
    away.start(call, *(() if op == "mmap" else (int(TO),)))
    from tests.support.waiting import until_asleep

    until_asleep(caller.pid)
    other.kill()
    with raises_errno(errno.ENODEV):
        away.finish()
    caller.send(None)
    caller.result()
    buf.close()


def leaves_within_a_bracket(parent: Parent) -> tuple[int, list[str]]:
    """Exports, leaves the domain on command, and tells what its exporter was asked and what no one could catch."""
    told: list[str] = []
    sys.unraisablehook = lambda unraisable: told.append(str(unraisable.exc_value))
    exporter, left = Static(), threading.Event()
    exporter.during["detach"] = lambda _: left.wait()  # which comes before the ends
    buf = dmabuf.export(exporter, SIZE)
    dmabuf.send(parent.sock, buf)
    parent.recv()
    dmabuf.Domain.default().leave()
    left.set()
    until(lambda: told or exporter.count("end"))
    return exporter.count("end"), told


def test_exporter_that_leaves_ends_the_brackets_of_others(child: Spawn) -> None:
    other = child(leaves_within_a_bracket)
    (buf,) = dmabuf.recv(other.sock)
    attachment = buf.attach(dmabuf.Device("npu0"))
    buf.begin_cpu_access(FROM)
    other.send("leave")
    assert other.result() == (1, [])
    attachment.detach()
    with raises_errno(errno.ENODEV):
        buf.end_cpu_access(FROM)
    buf.close()
