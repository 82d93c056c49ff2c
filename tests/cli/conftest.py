"""Running the commands: inside the test's process, or as the installed script."""

import json
import os
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from dmabuf.cli.app import app
from tests.cli import stages
from tests.support.budget import budget
from tests.support.children import ENTRY, Nursery, Spawn
from tests.support.zygote import Zygote

SCRIPT = Path(sysconfig.get_path("scripts")) / "dmabuf"


@dataclass(frozen=True)
class Ran:
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Ran]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run("ls", "--json")`; `columns=80` as on a terminal of that width, else as into a pipe."""

    def invoke(*arguments: str, columns: int | None = None) -> Ran:
        monkeypatch.delenv("COLUMNS", raising=False)
        if columns is not None:
            monkeypatch.setenv("COLUMNS", str(columns))
        result = CliRunner().invoke(app, list(arguments))
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Ran(result.exit_code, result.stdout, result.stderr)

    return invoke


@pytest.fixture
def script() -> Run:
    """The installed script in a process of its own; `env=` adds to the environment."""

    def invoke(*arguments: str | Path, env: dict[str, str] | None = None) -> Ran:
        clean = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
        done = subprocess.run([SCRIPT, *arguments], stdin=subprocess.DEVNULL, capture_output=True, env=clean | (env or {}), check=False)
        return Ran(done.returncode, done.stdout.decode(), done.stderr.decode())

    return invoke


@pytest.fixture(scope="session")
def stage_zygote(zygote: Zygote | None) -> Iterator[Zygote | None]:
    """A zygote for stages alone: that of the run stays without FFmpeg."""
    made = Zygote(ENTRY, f"{stages.__name__}:prepare") if zygote else None
    yield made
    if made:
        made.close()


@pytest.fixture
def stage_child(stage_zygote: Zygote | None) -> Iterator[Spawn]:
    """The `child` fixture, of that zygote."""
    with Nursery(stage_zygote) as nursery:
        yield nursery


@pytest.fixture
def interpreters() -> None:
    """Start the stages as a user's pipeline does."""


@pytest.fixture
def forked_stages(request: pytest.FixtureRequest, stage_child: Spawn, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork the stages, which are there in a tenth of the time, except with the full budget and where a test is about interpreters."""
    monkeypatch.setattr("dmabuf.pipe.run.GRACE_S", 30.0)  # a machine that is busy with other tests stands still for a while
    if budget() == "quick" and "interpreters" not in request.fixturenames:
        monkeypatch.setattr("dmabuf.pipe.process.spawned", lambda sock, stdout: stages.ForkedStage(stage_child, sock, stdout))
