"""A test that hangs in a worker of xdist is named, and so is where it hangs."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

HANGS = """
import pytest, threading
@pytest.mark.timeout(1, func_only=True)
def test_that_hangs():
    print("what it printed")
    threading.Event().wait()
"""


def test_hanging_test_is_named_with_its_stacks_under_xdist(tmp_path: Path) -> None:
    (tmp_path / "test_hangs.py").write_text(HANGS)
    options = ["-n", "1", "--max-worker-restart", "0", "-p", "tests.conftest", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml")]
    command = [sys.executable, "-m", "pytest", *options, "--rootdir", str(tmp_path), str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0) as run:
        out, err = run.communicate()
    with contextlib.suppress(ChildProcessError):
        while True:  # what the watchdog's sudden end of the worker leaves behind ends by itself, as a child of this process
            os.waitpid(-run.pid, 0)
    assert run.returncode == 1
    assert "test_hangs.py::test_that_hangs" in out
    assert "what it printed" in err
    assert "line 6, in test_that_hangs" in err
