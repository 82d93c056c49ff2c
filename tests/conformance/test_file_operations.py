"""What the fd of a dma-buf does, through our API: lseek, mmap and the name, by the kernel's answers (semantics 5.2, 5.4, 2.17)."""

import errno
import os
import re
from typing import Any

import pytest

import dmabuf
from dmabuf import DmaBuf, Usage
from tests.support.children import Parent, Spawn
from tests.support.errnos import raises_errno
from tests.support.facts import FACTS, Fact, fact_id, facts

PAGE = 4096
SIZE = FACTS["file/heap:system-size"].ret


# -- lseek

WHENCE = {"SET": os.SEEK_SET, "CUR": os.SEEK_CUR, "END": os.SEEK_END, "DATA": os.SEEK_DATA, "HOLE": os.SEEK_HOLE, "5": 5, "-1": -1}


@pytest.mark.parametrize("fact", facts("file/lseek-"), ids=fact_id)
def test_lseek_answers_as_the_kernel(buf: DmaBuf, fact: Fact) -> None:
    found = re.fullmatch(r"file/lseek-(-?\w+)-(-?\d+)", fact.id)
    assert found
    whence, offset = WHENCE[found[1]], int(found[2])
    if fact.errno is None:
        assert buf.lseek(offset, whence) == fact.ret
    else:
        with raises_errno(fact.errno):
            buf.lseek(offset, whence)


def test_lseek_of_a_closed_buffer_is_ebadf() -> None:
    buf = dmabuf.allocate(PAGE)
    buf.close()
    with raises_errno(errno.EBADF):
        buf.lseek(0, os.SEEK_END)


# -- mmap

# (offset, length) of each question
MAPPED: dict[str, tuple[int, int]] = {
    "full": (0, SIZE),
    "len+1": (0, SIZE + 1),
    "len+page": (0, SIZE + PAGE),
    "len-100": (0, 100),
    "len-0": (0, 0),
    "off-page": (PAGE, SIZE - PAGE),
    "off-over": (PAGE, SIZE),
    "off-end": (SIZE, PAGE),
    "off-past": (SIZE + PAGE, PAGE),
    "off-unaligned": (1, PAGE),
    "off-huge": (2**62, PAGE),
    "off-neg": (-PAGE, PAGE),
}


@pytest.mark.parametrize("name", list(MAPPED))
def test_mmap_answers_as_the_kernel(buf: DmaBuf, name: str) -> None:
    fact = FACTS[f"mmap/heap:system-{name}"]
    offset, length = MAPPED[name]
    if fact.errno is not None:
        with raises_errno(fact.errno):
            buf.mmap(offset, length)
        return
    mapping = buf.mmap(offset, length)
    with memoryview(mapping) as view:
        assert len(view) == length
    mapping.close()


def test_mmap_with_a_negative_length_is_einval(buf: DmaBuf) -> None:
    with raises_errno(errno.EINVAL):
        buf.mmap(0, -1)


def test_mmap_of_a_closed_buffer_is_ebadf() -> None:
    buf = dmabuf.allocate(PAGE)
    buf.close()
    with raises_errno(errno.EBADF):
        buf.mmap()


def test_mmap_without_arguments_is_the_whole_buffer_writable(buf: DmaBuf) -> None:
    mapping = buf.mmap()
    with memoryview(mapping) as view:
        assert (len(view), view.readonly) == (SIZE, False)
    mapping.close()


def test_what_is_written_through_one_mapping_is_read_through_another(buf: DmaBuf) -> None:
    written = FACTS["mmap/heap:system-rw"].ret.encode()
    one, two = buf.mmap(), buf.mmap(SIZE - PAGE, PAGE, writable=False)
    with memoryview(one) as view:
        view[-len(written) :] = written
    with memoryview(two) as view:
        assert view[-len(written) :] == written
        assert view.readonly
    one.close()
    two.close()


def test_a_mapping_outlives_the_buffers_handle() -> None:
    kept = FACTS["mmap/after-close"].ret.encode()
    buf = dmabuf.allocate(PAGE)
    mapping = buf.mmap()
    buf.close()
    with memoryview(mapping) as view:
        view[: len(kept)] = kept
        assert bytes(view[: len(kept)]) == kept
    mapping.close()


def test_closing_a_mapping_in_use_is_a_buffer_error(buf: DmaBuf) -> None:
    mapping = buf.mmap()
    with memoryview(mapping) as view:
        with pytest.raises(BufferError):
            mapping.close()
        view[0] = 1
    mapping.close()


# -- the name


def name_in(fact: Fact) -> bytes:
    """The bytes of `SET_NAME_B b'…' (n bytes + NUL)`; a long one is shown cut."""
    found = re.fullmatch(r"SET_NAME_B b'(.*)'(?:\.\.\.)? \((\d+) bytes \+ NUL\)", fact.call)
    assert found
    shown = found[1].encode().decode("unicode_escape").encode("latin-1")
    count = int(found[2])
    return shown if len(shown) == count else shown[:1] * count


# Those that give a name; the others give bad pointers.
NAMES = [fact for fact in facts("name/set-") if "bytes + NUL" in fact.call]


@pytest.mark.parametrize("fact", NAMES, ids=fact_id)
@pytest.mark.parametrize("kind", ["bytes", "str"])
def test_the_name_is_set_or_refused_as_in_the_kernel(buf: DmaBuf, fact: Fact, kind: str) -> None:
    name: Any = name_in(fact) if kind == "bytes" else os.fsdecode(name_in(fact))
    buf.name = "before"
    if fact.errno is None:
        buf.name = name
        assert buf.name == os.fsdecode(name)
    else:
        with raises_errno(fact.errno):
            buf.name = name
        assert buf.name == "before"


def test_a_buffer_without_a_name_has_none(buf: DmaBuf) -> None:
    assert buf.name is None


def test_the_empty_name_is_a_name(buf: DmaBuf) -> None:
    buf.name = ""
    assert buf.name == ""


def test_the_limit_is_in_bytes_not_characters(buf: DmaBuf) -> None:
    buf.name = "é" * 15
    assert buf.name == "é" * 15
    with raises_errno(errno.EINVAL):
        buf.name = "é" * 16
    assert buf.name == "é" * 15


@pytest.mark.parametrize("name", ["a\0b", "\0", b"a\0", "x" * 31 + "\0"])
def test_a_nul_in_the_name_is_einval(buf: DmaBuf, name: str | bytes) -> None:
    buf.name = "before"
    with raises_errno(errno.EINVAL):
        buf.name = name
    assert buf.name == "before"


@pytest.mark.parametrize("name", [5, 1.5, ["a"]])
def test_a_name_is_text_or_bytes(buf: DmaBuf, name: Any) -> None:
    with pytest.raises(TypeError):
        buf.name = name
    assert buf.name is None


@pytest.mark.parametrize("name", ["x" * 32, "a\0b"])
def test_allocate_refuses_the_same_names(name: str) -> None:
    with raises_errno(errno.EINVAL):
        dmabuf.allocate(PAGE, name=name)


def test_allocate_gives_a_name() -> None:
    with dmabuf.allocate(PAGE, name="frame 0") as buf:
        assert buf.name == "frame 0"


def test_the_name_is_the_buffers_not_the_handles(buf: DmaBuf) -> None:
    with dmabuf.get(buf.fileno()) as again:
        again.name = FACTS["name/dup-shares"].ret.removeprefix("/dmabuf:")
        assert buf.name == "dupname"


def test_renaming_is_fine_inside_an_access_and_with_the_lock_held(buf: DmaBuf) -> None:
    with buf.write():
        buf.name = "writing"
    with buf.resv.locked():
        buf.name = "locked"
    assert buf.name == "locked"


def renames(parent: Parent, name: str | bytes) -> Any:
    (buf,) = dmabuf.recv(parent.sock)
    seen = buf.name
    buf.name = name
    return seen


@pytest.mark.parametrize("name", ["after", b"\xff\xfe", "a\nb", ""])
def test_the_name_is_the_same_in_every_process(child: Spawn, buf: DmaBuf, name: str | bytes) -> None:
    buf.name = "before"
    other = child(renames, name)
    dmabuf.send(other.sock, buf)
    assert other.result() == "before"
    assert buf.name == os.fsdecode(name)


def test_naming_a_closed_buffer_is_ebadf() -> None:
    buf = dmabuf.allocate(PAGE)
    buf.close()
    with raises_errno(errno.EBADF):
        buf.name = "late"


def test_a_name_adds_no_fence(buf: DmaBuf) -> None:
    buf.name = "quiet"
    assert buf.resv.fences(Usage.BOOKKEEP) == []


# -- fdinfo


@pytest.mark.parametrize("inherited", [False, True])
def test_fdinfo_shows_the_flags_of_an_open_dma_buf_and_no_others(inherited: bool) -> None:
    # O_LARGEFILE, which the kernel sets on our memfd and not on its dma-bufs, is another bit on arm64 than on x86-64.
    with dmabuf.allocate(PAGE) as buf:
        os.set_inheritable(buf.fileno(), inherited)
        flags = re.search(r"^flags:\t0([0-7]+)$", buf.fdinfo(), re.MULTILINE)
        assert flags
        assert int(flags[1], 8) == os.O_RDWR | (0 if inherited else os.O_CLOEXEC)
