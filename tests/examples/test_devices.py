"""What docs/devices.md shows works as shown."""

import os
import random
import re
import subprocess
import sys
import zlib
from pathlib import Path

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[2] / "docs" / "devices.md").read_text(encoding="utf-8"), re.DOTALL)


def run(code: str, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "example.py"
    script.write_text(code, encoding="utf-8")
    environment = {**os.environ, "PYTHONWARNINGS": "error"}
    return subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, env=environment, check=False)


def test_the_first_example_takes_a_file_through_two_devices_to_a_file(tmp_path: Path) -> None:
    data = random.Random(1).randbytes(100_000)
    (tmp_path / "in").write_bytes(data)
    done = run(BLOCKS[0], tmp_path, str(tmp_path / "in"), str(tmp_path / "out"))
    crc = zlib.crc32(data.ljust(1 << 20, b"\0"))
    assert (done.returncode, done.stdout, done.stderr) == (0, f"100000 {crc}\n", "")
    assert (tmp_path / "out").read_bytes() == data


def test_the_example_of_ranges_prints_that_they_are_equal(tmp_path: Path) -> None:
    done = run(BLOCKS[1], tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")
