"""A short soak as a test; `make soak` runs an hour of it. And that a soak finds what it is there to find."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.soak import content
from tests.soak.operations import OPERATIONS
from tests.support.budget import times

# The seed of a failure is in its text; with it the processes do the same again, if not at the same moments.
SEED = os.environ.get("DMABUF_SOAK_SEED") or secrets.token_hex(4)


def run(*arguments: str, code: str = "") -> subprocess.CompletedProcess[str]:
    """Run the soak in an interpreter of its own, after some code that breaks it."""
    program = f"{code}\nimport sys\nfrom tests.soak.__main__ import main\nsys.exit(main())"
    started = subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=Path(__file__).parents[2],
        env={name: value for name, value in os.environ.items() if name != "DMABUF_DOMAIN"},
    )
    try:
        text, _ = started.communicate()
    except BaseException:
        started.send_signal(signal.SIGINT)
        started.communicate()
        raise
    return subprocess.CompletedProcess(started.args, started.returncode, text)


@pytest.mark.timeout(300)
def test_soak_of_ordinary_use_finds_nothing() -> None:
    done = run("--seconds", str(times(quick=2, full=20)), "--seed", SEED)
    assert done.returncode == 0, done.stdout
    print(done.stdout)


# What is done to the soak -> what it must say.
TORN = """
import tests.soak.operations as operations
def one_place_only(view, linger=None):
    view[0] = (view[0] + 1) % 256
operations.count_up = one_place_only
"""
UNEXPECTED = """
import tests.soak.operations as operations
for each in operations.OPERATIONS:
    each.expected.pop(2, None)
"""
LEFT = """
import tests.soak.worker as worker
go = worker.Worker.go
def leave_a_file(self):
    (self.where / "domain" / "left").touch()
    go(self)
worker.Worker.go = leave_a_file
"""
ENDLESS = """
import threading
import tests.soak.supervisor as supervisor
import tests.soak.operations as operations
supervisor.HANG = 2.0
for each in operations.OPERATIONS:
    object.__setattr__(each, "run", lambda worker: threading.Event().wait())
"""
BREAKS = {
    "torn read": (TORN, "a torn read without an error"),
    "unexpected error": (UNEXPECTED, "NotFoundError"),
    "file left": (LEFT, "'left'"),
    "wait without an end": (ENDLESS, "threading.py"),
}


@pytest.mark.parametrize("broken", list(BREAKS))
def test_soak_tells(broken: str) -> None:
    code, text = BREAKS[broken]
    done = run("--seconds", "20", "--longest", "1", "--seed", "tells", code=code)
    assert done.returncode == 1
    assert text in done.stdout


def test_reader_of_half_a_write_is_told() -> None:
    view = memoryview(bytearray(4096))
    content.count_up(view)
    assert content.check(view, "it") == 1
    view[2048] += 1
    with pytest.raises(content.TornError, match="up to byte 2048, then 2"):
        content.check(view, "it")


def test_every_expected_error_has_its_reason() -> None:
    for each in OPERATIONS:
        assert all(len(why) > 20 for why in each.expected.values()), each.name
