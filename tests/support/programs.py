"""Programs that the documentation shows, run as their reader would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run(code: str, where: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program in the directory ``where``, with warnings as errors, and wait for the processes that it started too."""
    script = where / "example.py"
    script.write_text(code, encoding="utf-8")
    program = subprocess.Popen(
        [sys.executable, str(script), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=where,
        env={**os.environ, "PYTHONWARNINGS": "error", **environment},
        process_group=0,
    )
    with program:
        out, err = program.communicate()
    # What multiprocessing keeps for a program ends a moment after it, as a child of ours, who adopt orphans (tests/conftest.py). From
    # Python 3.14 on that is a fork server too.
    while True:
        try:
            os.waitpid(-program.pid, 0)
        except ChildProcessError:
            break
    return subprocess.CompletedProcess(program.args, program.returncode, out, err)
