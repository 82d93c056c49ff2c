"""`dmabuf info BUFFER`: everything about one buffer."""

import os
import re

import pytest

import dmabuf
from dmabuf import Timeline, Usage
from tests.cli.conftest import Run
from tests.cli.test_ls import BUFFER, FENCE, LS, fits
from tests.support.children import Parent, Spawn
from tests.support.fences import attach
from tests.support.partners import fences, has, is_inside, locks, started

INFO = {"domain": LS["domain"], "monotonic_ns": int, "buffer": BUFFER | {"fences": [FENCE]}, "stream": (dict, type(None))}


def field(out: str, name: str) -> list[str]:
    """The lines of a field."""
    (found,) = re.findall(rf"^{name} .*(?:\n .*)*", out, re.MULTILINE)
    return [line[11:] if name == "" else line[len("inode     ") :] for line in found.splitlines()]


@pytest.mark.parametrize("by", ["ino", "name", "pid:fd"])
def test_a_buffer_is_found(run: Run, by: str) -> None:
    with dmabuf.allocate(4096, name="frame") as buf, dmabuf.allocate(4096, name="other"):
        argument = {"ino": str(buf.ino), "name": "frame", "pid:fd": f"{os.getpid()}:{buf.fileno()}"}[by]
        ran = run("info", argument)
        assert (ran.status, ran.err) == (0, "")
        assert field(ran.out, "inode") == [str(buf.ino)]


def test_by_a_descriptor_of_another_process(run: Run, child: Spawn) -> None:
    with dmabuf.allocate(4096) as buf:
        other = started(child, buf, has, 0, 0)
        target = os.readlink(f"/proc/self/fd/{buf.fileno()}")
        (fd,) = (fd for fd in os.listdir(f"/proc/{other.pid}/fd") if os.readlink(f"/proc/{other.pid}/fd/{fd}") == target)
        assert field(run("info", f"{other.pid}:{fd}").out, "inode") == [str(buf.ino)]


def test_a_name_that_looks_like_a_number_is_found(run: Run) -> None:
    with dmabuf.allocate(4096, name="99999999999") as buf:
        assert field(run("info", "99999999999").out, "inode") == [str(buf.ino)]


def test_an_inode_goes_before_a_name(run: Run) -> None:
    with dmabuf.allocate(4096) as buf, dmabuf.allocate(4096, name=str(buf.ino)):
        assert field(run("info", str(buf.ino)).out, "inode") == [str(buf.ino)]


def test_info_says_what_the_bytes_are(run: Run) -> None:
    with dmabuf.allocate(shape=(3, 4), dtype="float32") as buf, dmabuf.allocate(4096) as bare:
        assert field(run("info", str(buf.ino)).out, "layout") == ["float32 (3, 4)"]
        assert field(run("info", str(bare.ino)).out, "layout") == ["none"]
        assert run("info", "--json", str(buf.ino)).json["buffer"]["layout"] == "float32 (3, 4)"


def test_an_empty_name_is_a_name(run: Run) -> None:
    with dmabuf.allocate(4096), dmabuf.allocate(4096, name="") as buf:
        assert field(run("info", "").out, "inode") == [str(buf.ino)]


def test_a_name_of_any_bytes_is_found_and_shown_safely(run: Run) -> None:
    with dmabuf.allocate(4096, name=b"[red]\n\xff\x1b"):
        ran = run("info", os.fsdecode(b"[red]\n\xff\x1b"))
        assert field(ran.out, "name") == ["[red]\\n\\xff\\x1b"]


def test_everything_is_shown(run: Run, child: Spawn) -> None:
    with dmabuf.allocate(5 << 20, name="frame") as buf, Timeline("own") as line:
        other = started(child, buf, has, 1, 1)
        writer = started(child, buf, is_inside, True)
        fence = line.fence()
        attach(buf.resv, fence, Usage.BOOKKEEP)
        out = run("info", "frame").out
        assert field(out, "size") == ["5.0 MiB (5242880 bytes)"]
        assert field(out, "home") == ["memfd, exported by memfd"]
        assert re.fullmatch(rf"\d{{4}}-\d\d-\d\d \S+ by process {os.getpid()}, .* ago", *field(out, "created"))
        assert field(out, "domain") == [os.environ["DMABUF_DOMAIN"]]
        held = field(out, "held by")
        assert len(held) == 3
        assert any(line.endswith(f" {other.pid}: 2 descriptors, 1 mapping") for line in held)
        assert field(out, "content") == ["whole"]
        assert field(out, "accesses") == ["1 entered or waiting"]
        assert field(out, "locked") == ["no"]
        assert len(field(out, "fences")) == 2
        assert re.search(
            rf"write: dmabuf \S+-{writer.pid} 1, of \S+ {writer.pid}, made .* a write\(\) that is entered, blocks readers and", out
        )
        assert re.search(rf"bookkeep: dmabuf own 1, of \S+ {os.getpid()}, made [^,]*ago$", out, re.MULTILINE)
        fence.signal()


def test_a_lock_and_a_torn_content_are_shown(run: Run, child: Spawn) -> None:
    with dmabuf.allocate(4096, name="frame") as buf:
        with pytest.raises(ZeroDivisionError), buf.write():
            raise ZeroDivisionError
        other = started(child, buf, locks)
        out = run("info", "frame").out
        assert field(out, "locked") == [f"by process {other.pid}"]
        assert field(out, "content")[0].startswith(f"torn: process {os.getpid()} raised an exception while writing (ECANCELED)")


def test_a_signalled_fence_is_shown_as_such(run: Run) -> None:
    with dmabuf.allocate(4096, name="frame") as buf, Timeline("line") as line:
        fence = line.fence()
        attach(buf.resv, fence, Usage.READ)
        fence.signal()
        assert field(run("info", "frame").out, "fences")[0].endswith(", signaled")


def test_json_has_exactly_the_documented_fields(run: Run, child: Spawn) -> None:
    with dmabuf.allocate(4096, name="frame") as buf:
        started(child, buf, fences, "v4l2", "capture", Usage.BOOKKEEP)
        found = run("info", "frame", "--json").json
        assert fits(found, INFO)
        assert [fence["usage"] for fence in found["buffer"]["fences"]] == ["bookkeep"]
        assert found["buffer"]["blocking_writers"] == []


@pytest.mark.parametrize("columns", [40, 80, 140])
def test_lines_fit_the_terminal(run: Run, child: Spawn, columns: int) -> None:
    with dmabuf.allocate(4096, name="frame") as buf:
        started(child, buf, is_inside, True)
        assert max(map(len, run("info", "frame", columns=columns).lines)) <= columns


# ---- what can't be done ----


@pytest.mark.parametrize("wanted", ["no such name", "4294967296", "\x1b[31m", "²"])
def test_a_buffer_that_is_not_there_is_an_error(run: Run, wanted: str) -> None:
    ran = run("info", wanted)
    assert (ran.status, ran.out) == (1, "")
    assert re.fullmatch(r"dmabuf: info: '.*': no buffer of this inode or name \(ENOENT\); run `dmabuf ls` for a list\n", ran.err)


def test_a_name_of_several_is_an_error_that_lists_them(run: Run) -> None:
    with dmabuf.allocate(4096, name="twin") as one, dmabuf.allocate(4096, name="twin") as two:
        ran = run("info", "twin")
        assert (ran.status, ran.out) == (1, "")
        assert f"inodes {two.ino}, {one.ino} (ENOTUNIQ)" in ran.err


def test_a_descriptor_that_is_not_open_is_an_error(run: Run) -> None:
    ran = run("info", f"{os.getpid()}:99999")
    assert ran.status == 1
    assert "the process has no such descriptor (ENOENT)" in ran.err


def test_a_process_that_is_not_there_is_an_error(run: Run) -> None:
    ran = run("info", f"{2**22 + 1}:0")
    assert ran.status == 1
    assert "there is no such process (ENOENT)" in ran.err


def test_a_descriptor_of_something_else_is_an_error(run: Run) -> None:
    with open("/dev/null") as null:
        ran = run("info", f"{os.getpid()}:{null.fileno()}")
        assert ran.status == 1
        assert "not a buffer of this domain but /dev/null (EINVAL)" in ran.err


def in_a_private_domain(parent: Parent) -> None:
    domain = dmabuf.Domain.private()
    with dmabuf.allocate(4096, domain=domain) as buf:
        parent.send((buf.fileno(), domain.id))
        parent.recv()


def test_a_buffer_of_another_domain_is_an_error_that_names_it(run: Run, child: Spawn) -> None:
    other = child(in_a_private_domain)
    fd, identity = other.recv()
    ran = run("info", f"{other.pid}:{fd}")
    assert ran.status == 1
    assert f"the buffer belongs to domain {identity} (EXDEV)" in ran.err


def test_no_buffer_named_is_a_usage_error(run: Run) -> None:
    assert run("info").status == 2


def test_two_buffers_named_are_a_usage_error(run: Run) -> None:
    assert run("info", "a", "b").status == 2
