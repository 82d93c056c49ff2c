"""What docs/devices.md shows works as shown."""

import random
import zlib
from pathlib import Path

from tests.support.programs import blocks, run

BLOCKS = blocks("docs/devices.md")


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
