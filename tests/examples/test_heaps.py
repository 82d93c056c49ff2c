"""What docs/heaps.md shows works as shown; on the default heap, where no kernel has the others."""

import re
from pathlib import Path

import dmabuf
from dmabuf.heaps import recommended

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[2] / "docs" / "heaps.md").read_text(encoding="utf-8"), re.DOTALL)


def test_the_examples_run() -> None:
    usable = {heap.name for heap in recommended.heaps() if heap.unavailable is None}
    code = "".join(BLOCKS)
    if "udmabuf" not in usable:
        code = code.replace('heap="udmabuf"', 'heap="memfd"')
    names = {"dmabuf": dmabuf}
    exec(compile(code, "heaps.md", "exec"), names)
    buf, chroma = names["buf"], names["chroma"]
    with buf.read() as view:
        assert bytes(view[:5]) == b"abcel"
    assert (chroma.offset, chroma.length) == (640 * 480, 640 * 240)
    buf.close()
