"""What docs/spill.md shows works as shown."""

import os
import re
import subprocess
import sys
from pathlib import Path

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[2] / "docs" / "spill.md").read_text(encoding="utf-8"), re.DOTALL)


def test_the_example_holds_ten_times_its_budget(tmp_path: Path) -> None:
    script = tmp_path / "example.py"
    script.write_text(BLOCKS[0] + "\nprint(seen.moves_out >= 36, heap.closed)\n", encoding="utf-8")
    environment = {**os.environ, "PYTHONWARNINGS": "error", "DMABUF_SPILL_DIRECTORY": str(tmp_path)}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True True\n", "")
