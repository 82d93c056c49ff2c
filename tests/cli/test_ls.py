"""`dmabuf ls`: what people and programs see of the buffers."""

import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dmabuf
from dmabuf import Timeline, Usage
from dmabuf.domain import place
from tests.cli.conftest import Run
from tests.support.budget import times
from tests.support.children import Spawn
from tests.support.fences import attach
from tests.support.partners import fences, has, holds, is_inside, locks, started

# Every field of the JSON and its type; docs/cli.md says what each means.
FENCE = {
    "driver": str,
    "timeline": str,
    "seqno": int,
    "pid": int,
    "since": int,
    "context": int,
    "comm": str,
    "usage": str,
    "access": (str, type(None)),
    "granted": bool,
    "signaled": bool,
}
HOLDER = {"pid": int, "comm": str, "fds": int, "maps": int}
TORN = {"errno": int, "pid": int}
BUFFER = {
    "ino": int,
    "name": (str, type(None)),
    "size": int,
    "exp_name": str,
    "home": str,
    "created": int,
    "holders": [HOLDER],
    "accesses": int,
    "blocking_readers": [FENCE],
    "blocking_writers": [FENCE],
    "torn": (dict, type(None)),
    "layout": (str, type(None)),
    "stream": (dict, type(None)),
    "dev": int,
    "pid": int,
    "locked_by": int,
}
PROCESS = {"pid": int, "comm": str, "state": str}
STREAM = {
    "ino": int,
    "name": (str, type(None)),
    "created": int,
    "policy": str,
    "size": int,
    "layout": (str, type(None)),
    "meta_bytes": int,
    "producer": (dict, type(None)),
    "state": str,
    "published": int,
    "lag": int,
    "kept": int,
    "readers": int,
    "slots": int,
}
LS = {"domain": {"id": (str, type(None)), "path": str}, "monotonic_ns": int, "streams": [STREAM], "buffers": [BUFFER]}


def fits(value: Any, schema: Any) -> bool:
    """Has the value exactly the fields and types of the schema?"""
    if isinstance(schema, dict):
        return isinstance(value, dict) and value.keys() == schema.keys() and all(fits(value[key], schema[key]) for key in schema)
    if isinstance(schema, list):
        return isinstance(value, list) and all(fits(one, schema[0]) for one in value)
    return isinstance(value, schema) and (schema is not int or not isinstance(value, bool))


def test_an_empty_domain(run: Run) -> None:
    ran = run("ls")
    assert (ran.status, ran.err) == (0, "")
    assert ran.out == f"No buffers in {os.environ['DMABUF_DOMAIN']}.\n"


def _link(path: Path) -> None:
    path.symlink_to("/nowhere")


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir, _link, None])
def test_where_allocate_fails_ls_fails_too(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], object] | None
) -> None:
    where = tmp_path / "none" / "domain"
    if make is not None:
        where.parent.mkdir()
        make(where)
        if where.is_dir():
            where.chmod(0o755)
    monkeypatch.setenv("DMABUF_DOMAIN", str(where))
    for command in ("ls", "info 1"):
        ran = run(*command.split())
        assert ran.status == 1
        assert ran.err.startswith(f"dmabuf: open domain: {where}: ")
    with pytest.raises(dmabuf.DmaBufError):
        dmabuf.Domain.open(where)


def test_where_a_domain_can_be_made_there_are_no_buffers(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for where in (tmp_path / "new", tmp_path / "empty"):
        monkeypatch.setenv("DMABUF_DOMAIN", str(where))
        (tmp_path / "empty").mkdir(mode=0o700, exist_ok=True)
        assert run("ls").out == f"No buffers in {where}.\n"
    assert not (tmp_path / "new").exists()


def test_json_of_an_empty_domain(run: Run) -> None:
    found = run("ls", "--json").json
    assert fits(found, LS)
    assert found["buffers"] == []
    assert found["domain"] == {"id": dmabuf.Domain.default().id, "path": os.environ["DMABUF_DOMAIN"]}


def test_json_has_exactly_the_documented_fields(run: Run, child: Spawn) -> None:
    with dmabuf.allocate(5000, name="frame") as buf, dmabuf.allocate(4096) as torn:
        with pytest.raises(ZeroDivisionError), torn.write():
            raise ZeroDivisionError
        started(child, buf, fences, "v4l2", "capture", Usage.READ)
        started(child, buf, is_inside, False)
        found = run("ls", "--json").json
        assert fits(found, LS)
        second, first = found["buffers"]
        assert fits(second["torn"], TORN)
        assert len(first["blocking_writers"]) == 2
        assert first["torn"] is None


def test_every_field_of_the_json_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
    for schema in (FENCE, HOLDER, TORN, BUFFER, LS):
        for field in schema:
            assert f"`{field}`" in text, field


def test_a_buffer_is_a_line_with_its_holders(run: Run, child: Spawn) -> None:
    with dmabuf.allocate(3 << 20, name="frame-7") as buf:
        other = started(child, buf, has, 1, 2)
        (line,) = (line for line in run("ls").lines if "frame-7" in line)
        assert re.match(rf" *{buf.ino}  frame-7 +3\.0 MiB  memfd +[0-9.]+ m?s  ", line)
        assert f" {os.getpid()} (1 fd)" in line
        assert f" {other.pid} (2 fds, 2 maps)" in line


def test_a_summary_comes_first(run: Run) -> None:
    with dmabuf.allocate(4096), dmabuf.allocate(8192):
        assert run("ls").lines[0] == f"2 buffers, 12.0 KiB, in {os.environ['DMABUF_DOMAIN']}"


@pytest.mark.parametrize(
    ("usage", "who"), [(Usage.KERNEL, "readers and writers"), (Usage.WRITE, "readers and writers"), (Usage.READ, "writers")]
)
def test_a_fence_of_another_process_is_shown_with_its_owner(run: Run, child: Spawn, usage: Usage, who: str) -> None:
    with dmabuf.allocate(4096) as buf:
        other = started(child, buf, fences, "v4l2", "capture", usage)
        note = run("ls").lines[-1]
        assert re.fullmatch(rf"    {who} wait for fence v4l2 capture 1 of \S+ {other.pid}, for [0-9.]+ m?s", note)


def test_an_access_of_another_process_is_shown_with_its_owner(run: Run, child: Spawn) -> None:
    with dmabuf.allocate(4096) as buf:
        other = started(child, buf, is_inside, True)
        assert re.fullmatch(rf"    readers and writers wait for write\(\) of \S+ {other.pid}, for [0-9.]+ m?s", run("ls").lines[-1])


def test_what_blocks_nobody_is_not_shown(run: Run, child: Spawn) -> None:
    with dmabuf.allocate(4096) as buf:
        started(child, buf, fences, "v4l2", "capture", Usage.BOOKKEEP)
        assert "wait" not in run("ls").out


def test_of_many_fences_the_oldest_are_shown_and_the_rest_counted(run: Run) -> None:
    with dmabuf.allocate(4096) as buf:
        lines = [Timeline(f"line-{i}") for i in range(10)]
        made = [line.fence() for line in lines]
        for fence in made:
            attach(buf.resv, fence, Usage.READ)
        ran = run("ls")
        assert [f"line-{i} " in ran.out for i in range(10)] == [True] * 4 + [False] * 6
        assert ran.lines[-1] == f"    and for 6 more: dmabuf info {buf.ino}"
        for fence in made:
            fence.signal()


def test_a_torn_buffer_says_who_left_it_so(run: Run, child: Spawn) -> None:
    with dmabuf.allocate(4096) as buf:
        other = started(child, buf, is_inside, True)
        other.kill()
        ran = run("ls")
        assert (
            f"    torn: process {other.pid} died or left the domain while writing (EOWNERDEAD), until the next complete write()"
            in ran.lines
        )
        assert "wait" not in ran.out


def test_of_a_killed_process_nothing_is_left(run: Run, child: Spawn) -> None:
    other = child(holds, ["one", "two"])
    other.recv()
    assert "one" in run("ls").out
    other.kill()
    assert run("ls").out.startswith("No buffers")


def test_a_held_reservation_lock_is_shown_and_not_waited_for(run: Run, child: Spawn) -> None:
    with dmabuf.allocate(4096) as buf:
        other = started(child, buf, locks)
        other.stop()
        assert f"    its reservation lock is held by {other.pid}" in run("ls").lines
        assert run("ls", "--json").json["buffers"][0]["locked_by"] == other.pid
        other.resume()


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a\nb", "a\\nb"),
        (b"\xff\x00".rstrip(b"\0"), "\\xff"),
        ("[red]x[/]", "[red]x[/]"),
        ("\x1b[2J", "\\x1b[2J"),
        (":smile:", ":smile:"),
        ("", '""'),
    ],
    ids=["line feed", "no UTF-8", "markup", "escape", "emoji code", "empty"],
)
@pytest.mark.parametrize("columns", [None, 80])
def test_a_name_of_any_bytes_is_shown_safely(run: Run, name: str | bytes, shown: str, columns: int | None) -> None:
    with dmabuf.allocate(4096, name=name) as buf:
        ran = run("ls", columns=columns)
        assert re.search(rf"^ *{buf.ino}  {re.escape(shown)} ", ran.out, re.MULTILINE)
        assert "\x1b" not in ran.out
        assert os.fsencode(run("ls", "--json").json["buffers"][0]["name"]) == os.fsencode(name)


def test_a_timeline_of_any_bytes_is_shown_safely(run: Run) -> None:
    with dmabuf.allocate(4096) as buf, Timeline(b"[red]\xff\n", driver="\x1b[31m") as line:
        fence = line.fence()
        attach(buf.resv, fence, Usage.READ)
        assert "fence \\x1b[31m [red]\\xff\\n 1 of" in run("ls").lines[-1]
        fence.signal()


@pytest.mark.parametrize("columns", [40, 80, 140])
def test_lines_fit_the_terminal(run: Run, child: Spawn, columns: int) -> None:
    names: list[str | bytes | None] = ["short", "a name of thirty-one characters", None, b"\xff" * 31]
    child(holds, names).recv()
    with dmabuf.allocate(4096) as buf:
        started(child, buf, is_inside, True)
        ran = run("ls", columns=columns)
        assert max(map(len, ran.lines[1:])) <= columns
        assert ("HOME" in ran.out) == (columns == 140)


def test_number_and_unit_of_an_age_stay_on_one_line(run: Run) -> None:
    with dmabuf.allocate(4096) as buf:
        fence = Timeline("capture").fence()
        attach(buf.resv, fence, Usage.WRITE)
        for columns in random.sample(range(60, 100), times(quick=12, full=40)):
            notes = [line for line in run("ls", columns=columns).lines if line.startswith("    ")]
            assert re.search(r"(^| )[0-9.]+ (m?s|min|h)$", notes[-1]), (columns, notes)
        fence.signal()


def test_into_a_pipe_every_buffer_is_one_line_with_its_whole_name(run: Run, child: Spawn) -> None:
    child(holds, [b"\xff" * 31]).recv()
    assert sum("\\xff" * 31 in line and "(1 fd)" in line for line in run("ls").lines) == 1


def test_a_thousand_buffers(run: Run, child: Spawn) -> None:
    others = [child(holds, [f"{i}-{k}" for k in range(250)]) for i in range(4)]
    inodes = {ino for other in others for ino in other.recv()}
    assert {buffer["ino"] for buffer in run("ls", "--json").json["buffers"]} == inodes
    assert run("ls", columns=80).lines[0].startswith("1000 buffers, 3.9 MiB, in ")


def test_the_script_sees_the_buffers_of_others(script: Run, child: Spawn) -> None:
    other = child(holds, ["from the child"])
    other.recv()
    ran = script("ls")
    assert (ran.status, ran.err) == (0, "")
    assert re.search(rf"from the child .* {other.pid} \(1 fd\)$", ran.out, re.MULTILINE)
    other.send()
    other.result()
    assert script("ls").out.startswith("No buffers")


def test_a_directory_without_a_domain_is_an_error_and_stays_without(run: Run, tmp_path: Path) -> None:
    ran = run("ls", "--domain", str(tmp_path / "none"))
    assert (ran.status, ran.out) == (1, "")
    assert ran.err.startswith(f"dmabuf: open domain: {tmp_path / 'none'}: no domain there (ENOENT); ")
    assert not (tmp_path / "none").exists()


def test_a_domain_that_nobody_has_made_yet_is_empty_and_not_made(script: Run, tmp_path: Path) -> None:
    ran = script("ls", env={"DMABUF_DOMAIN": str(tmp_path / "new")})
    assert (ran.status, ran.out, ran.err) == (0, f"No buffers in {tmp_path / 'new'}.\n", "")
    assert script("ls", "--json", env={"DMABUF_DOMAIN": str(tmp_path / "new")}).json["domain"]["id"] is None
    assert not (tmp_path / "new").exists()


def test_a_domain_open_to_others_is_an_error(run: Run, tmp_path: Path) -> None:
    (tmp_path / place.FILE).touch()
    tmp_path.chmod(0o755)
    ran = run("ls", "--domain", str(tmp_path))
    assert ran.status == 1
    assert "mode 0755 (EACCES)" in ran.err


def test_a_corrupt_domain_is_set_aside_in_one_line(script: Run, tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    (tmp_path / place.FILE).write_bytes(b"nonsense" * 1000)
    ran = script("ls", "--domain", tmp_path)
    assert (ran.status, ran.out) == (0, f"No buffers in {tmp_path}.\n")
    assert re.fullmatch(rf"dmabuf: the domain {tmp_path}/.* was corrupt .*; renamed to .*\n", ran.err)


def test_another_domain_can_be_named(script: Run, child: Spawn) -> None:
    child(holds, ["here"]).recv()
    assert "here" in script("ls", "--domain", os.environ["DMABUF_DOMAIN"], env={"DMABUF_DOMAIN": "/nonexistent"}).out
