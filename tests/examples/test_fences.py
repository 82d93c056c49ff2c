"""What docs/fences.md shows works as shown."""

from pathlib import Path

from tests.support.programs import blocks, run

BLOCKS = blocks("docs/fences.md")


def test_the_examples_of_fences_run_one_after_the_other(tmp_path: Path) -> None:
    done = run("\n".join([*BLOCKS, "camera.close()", "encoder.close()", "print(fence.status)"]), tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")
