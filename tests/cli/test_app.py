"""The group of commands and the installed script."""

import os
import subprocess
import sys

import pytest

from dmabuf.cli import app as group
from tests.cli.conftest import SCRIPT, Run


@pytest.fixture
def sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(group.COMMANDS, "sample", "tests.cli.sample")


def test_help_lists_the_commands(run: Run) -> None:
    ran = run("--help")
    assert ran.status == 0
    for name in ("ls", "info", "doctor", "heaps", "pipe"):
        assert f"\n  {name} " in ran.out


@pytest.mark.parametrize("command", ["ls", "info", "doctor", "heaps", "pipe"])
def test_every_command_has_help_and_json(run: Run, command: str) -> None:
    ran = run(command, "-h")
    assert ran.status == 0
    assert "--json" in ran.out


def test_a_new_command_is_one_line_in_the_table(run: Run, sample: None) -> None:
    assert "A sample." in run("--help").out
    assert run("sample", "hello").out == "hello\n"


def test_a_command_whose_module_is_not_there_is_not_listed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(group.COMMANDS, "later", "dmabuf.cli.no_such_module")
    assert "later" not in run("--help").out
    ran = run("later")
    assert (ran.status, ran.out) == (2, "")
    assert "No such command 'later'" in ran.err


def test_an_unknown_command_is_a_usage_error(run: Run) -> None:
    assert run("nonsense").status == 2


def test_an_unknown_option_is_a_usage_error(run: Run) -> None:
    assert run("ls", "--nonsense").status == 2


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("fail", "dmabuf: sample: a device\\n\\x1b[31m: No such device (ENODEV); plug it in\n"),
        (
            "extra",
            "dmabuf: import av: it is not installed; install it with: pip install 'dmabuf[demo]' (in a clone: pip install '.[demo]')\n",
        ),
        ("builtin", "dmabuf: [Errno 13] Permission denied: '/dev/sample'\n"),
    ],
)
def test_what_can_not_be_done_is_one_line_and_status_1(run: Run, sample: None, what: str, text: str) -> None:
    ran = run("sample", what)
    assert (ran.status, ran.out, ran.err) == (1, "", text)


def test_the_script_says_its_version(script: Run) -> None:
    ran = script("--version")
    assert (ran.status, ran.err) == (0, "")
    assert ran.out.startswith("dmabuf, version ")


def test_the_module_can_be_run(script: Run) -> None:
    done = subprocess.run([sys.executable, "-m", "dmabuf", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == script("--version").out


@pytest.mark.parametrize("module", ["click", "rich"])
def test_without_the_extra_it_is_one_line_and_status_1(module: str) -> None:
    program = f"import sys; sys.modules[{module!r}] = None; from dmabuf.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    expected = (
        f"dmabuf: import {module}: it is not installed; install it with: pip install 'dmabuf[cli]' (in a clone: pip install '.[cli]')\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (1, "", expected)


def test_importing_the_package_imports_no_extra() -> None:
    program = "import sys, dmabuf, dmabuf.cli; sys.exit(bool({'click', 'rich'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_reader_that_has_seen_enough_gets_no_traceback() -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run([SCRIPT, "heaps"], stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(write)
    assert "Traceback" not in done.stderr


def test_a_terminal_of_another_encoding_is_no_error(script: Run) -> None:
    ran = script("heaps", "--help", env={"PYTHONIOENCODING": "ascii:strict"})
    assert (ran.status, ran.err) == (0, "")
