"""What README shows works as shown."""

import ast
from pathlib import Path

import pytest

from tests.support.programs import blocks, run

BLOCKS = blocks("README.md")


def test_the_first_example_shares_a_frame_between_two_processes(tmp_path: Path) -> None:
    done = run(BLOCKS[0], tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "b'HELLO'\n", "")


def test_the_array_example_gives_the_frame_back_at_once(tmp_path: Path) -> None:
    pytest.importorskip("numpy")
    before = "import dmabuf, numpy as np\nbuf = dmabuf.allocate(4096)\nwith buf.write() as view:\n    view[0] = 5\n"
    after = "assert total == 5\nassert buf.resv.test_signaled(dmabuf.Usage.BOOKKEEP)\nprint('given back')\n"
    done = run(before + BLOCKS[1] + after, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "given back\n", "")


def test_the_example_of_several_things_runs_inside_a_coroutine(tmp_path: Path) -> None:
    before = "import asyncio, dmabuf\na, b, c, buf = (dmabuf.allocate(4096) for _ in range(4))\nasync def main():\n"
    body = "".join(f"    {line}\n" for line in BLOCKS[2].splitlines())
    done = run(before + body + "    assert fence.status == 1\nasyncio.run(main())\nprint('done')\n", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


@pytest.mark.parametrize("code", BLOCKS, ids=range(len(BLOCKS)))
def test_every_example_is_python(code: str) -> None:
    compile(code, "README.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


def test_the_example_of_devices_runs_inside_a_coroutine(tmp_path: Path) -> None:
    (tmp_path / "frame.raw").write_bytes(b"frame")
    before = f"import asyncio, os, dmabuf\nos.chdir({str(tmp_path)!r})\n"
    before += "buf, other = (dmabuf.allocate(4096) for _ in range(2))\nasync def main():\n"
    body = "".join(f"    {line}\n" for line in BLOCKS[3].splitlines())
    after = "    with other.read() as view:\n        print(bytes(view[:6]))\nasyncio.run(main())\n"
    done = run(before + body + after, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "b'frame\\x00'\n", "")
