"""What docs/exporters.md shows works as shown."""

import os
import re
import subprocess
import sys
from pathlib import Path

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[2] / "docs" / "exporters.md").read_text(encoding="utf-8"), re.DOTALL)


def test_the_example_exports_and_a_device_reads_it(tmp_path: Path) -> None:
    script = tmp_path / "example.py"
    script.write_text(BLOCKS[0] + "\n" + BLOCKS[1] + "\nprint(data[:5], buf.closed)\n", encoding="utf-8")
    environment = {**os.environ, "PYTHONWARNINGS": "error"}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "b'hello' True\n", "")
