"""The C programs that every ratio is divided by: built from limits.c into a temporary directory, run in the same minute."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path


@cache
def _program() -> str:
    where = Path(tempfile.mkdtemp(prefix="dmabuf-bench-")) / "limits"
    source = Path(__file__).with_name("limits.c")
    subprocess.run([os.environ.get("CC", "gcc"), "-O2", "-o", str(where), str(source), "-lpthread"], check=True)
    return str(where)


def run(test: str, *arguments: str) -> float:
    """Median round trip of one test of limits.c, in µs."""
    done = subprocess.run([_program(), test, *arguments], check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout)["rtt"]["p50"])


def clean() -> None:
    """Remove what was built."""
    if _program.cache_info().currsize:
        program = Path(_program())
        program.unlink()
        program.parent.rmdir()
