"""What docs/exporters.md shows works as shown."""

from pathlib import Path

from tests.support.programs import blocks, run

BLOCKS = blocks("docs/exporters.md")


def test_the_example_exports_and_a_device_reads_it(tmp_path: Path) -> None:
    done = run(BLOCKS[0] + "\n" + BLOCKS[1] + "\nprint(data[:5], buf.closed)\n", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "b'hello' True\n", "")
