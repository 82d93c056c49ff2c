"""What docs/spill.md shows works as shown."""

from pathlib import Path

from tests.support.programs import blocks, run

BLOCKS = blocks("docs/spill.md")


def test_the_example_holds_ten_times_its_budget(tmp_path: Path) -> None:
    done = run(BLOCKS[0] + "\nprint(seen.moves_out >= 36, heap.closed)\n", tmp_path, DMABUF_SPILL_DIRECTORY=str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (0, "True True\n", "")
