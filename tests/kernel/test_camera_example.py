"""examples/camera.py: vivid's frames, imported by vgem and vkms, counted in a second process, ordered by the kernel's fences."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "camera.py"
# The drivers of virtual GPUs that this kernel has, by their devices: the example is not asked.
GPUS = [name for name in ("vgem", "vkms") if Path("/sys/devices/platform", name).exists()]


@pytest.mark.skipif(not any(Path("/sys/class/video4linux").glob("*")), reason="this kernel has no test camera; KERNEL=debian has")
def test_camera_frames_reach_another_process_after_the_gpu_uncopied() -> None:
    done = subprocess.run([sys.executable, str(EXAMPLE), "4"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    first, *frames = done.stdout.splitlines()
    assert first == f"vivid gives 320x180 GREY; imported by {', '.join(GPUS)}"
    assert "vgem" in GPUS
    assert len(frames) == 4
    for line in frames:
        assert re.fullmatch(r"frame \d+: the GPU was at work, then counted 57600 pixels, most of them \d+; the same memory", line), line
