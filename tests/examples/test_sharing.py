"""What docs/sharing.md shows works as shown."""

from pathlib import Path

import pytest

from tests.support.programs import blocks, run

BLOCKS = blocks("docs/sharing.md")


@pytest.mark.parametrize(
    ("code", "said"), list(zip(BLOCKS, ["b'hello'\n", "4096 other\n"], strict=True)), ids=["socket", "multiprocessing"]
)
def test_each_example_runs_by_itself(code: str, said: str, tmp_path: Path) -> None:
    done = run(code, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, said, "")
