"""The examples that need drivers run as they are."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not Path("/dev/video0").exists(), reason="this kernel has no camera (vivid): KERNEL=debian or full")
def test_frames_of_a_camera_go_through_a_driver_to_another_process_without_a_copy() -> None:
    ran = subprocess.run(
        [sys.executable, str(ROOT / "examples/camera/frames.py"), "/dev/video0", "4"], capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    made = re.findall(r"^frame-\d: inode (\d+), home imported", ran.stdout, re.MULTILINE)
    assert len(made) == 4
    seen = re.findall(r"inode (\d+): seen as inode (\d+), waited True, done True; (\d+) values in (\d+) bytes", ran.stdout)
    size = int(re.search(r", (\d+) bytes$", ran.stdout, re.MULTILINE)[1])  # type: ignore[index]
    assert len(seen) == 4
    for here, there, values, total in seen:
        assert here == there  # the same buffer, one of the camera's: no copy in between
        assert here in made
        assert int(values) > 1
        assert int(total) >= size
