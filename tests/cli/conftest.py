"""Running the commands: inside the test's process, or as the installed script."""

import json
import os
import subprocess
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from dmabuf.cli.app import app

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
