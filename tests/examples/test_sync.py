"""What docs/sync.md shows works as shown."""

from pathlib import Path

from tests.support.programs import blocks, run

BLOCKS = blocks("docs/sync.md")


def test_the_examples_run_one_after_the_other(tmp_path: Path) -> None:
    assert len(BLOCKS) >= 4
    done = run("\n".join(BLOCKS) + "print('done')\n", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
