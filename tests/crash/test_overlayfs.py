"""A part of the tests again, with the domain on overlayfs, the root of every container."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.budget import times
from tests.support.mounts import mounted

ROOT = Path(__file__).resolve().parents[2]
TESTS = (
    "tests/conformance/test_ww_mutex_death.py",
    "tests/conformance/test_polling_after_death.py",
    "tests/conformance/test_access_processes.py",
    "tests/conformance/test_dma_fence_processes.py",
    "tests/crash/test_forks.py",
    "tests/sharing/test_passing.py",
)[: times(quick=2, full=6)]


# The servers of multiprocessing outlive the run that started them for a moment. They become children of this process, which waits for them.
RUN = """
import ctypes, os, subprocess, sys
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
code = subprocess.call(sys.argv[1:])
while True:
    try:
        os.wait()
    except ChildProcessError:
        sys.exit(code)
"""


@pytest.mark.crash
def test_tests_pass_with_the_domain_on_overlayfs(tmp_path: Path) -> None:
    with mounted("overlay", tmp_path / "merged", base=tmp_path) as path:
        env = {**os.environ, "DMABUF_TEST_BASE": str(path)}
        command = [sys.executable, "-c", RUN, sys.executable, "-m", "pytest", "-n0", "-q", "-p", "no:cacheprovider", *TESTS]
        done = subprocess.run(command, check=False, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
        assert int(re.findall(r"(\d+) passed", done.stdout)[-1]) > 12
