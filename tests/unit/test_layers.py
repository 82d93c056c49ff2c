"""The layer check finds every kind of upward import, and nothing else."""

from pathlib import Path

import pytest

from tools.check_layers import check

REPOSITORY = Path(__file__).resolve().parents[2]


def faults(tmp_path: Path, module: str, source: str) -> list[str]:
    """What the check says about a package with this one module beside an empty module for each layer."""
    package = tmp_path / "dmabuf"
    for name in ("core", "domain", "heap", "cli", "stream", "observe", "uapi"):
        (package / name).mkdir(parents=True)
        (package / name / "__init__.py").write_text("")
    (package / "__init__.py").write_text("")
    (package / module).write_text(source)
    return [fault.text for fault in check(package)]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("core/dma_buf.py", "from dmabuf.domain.lives import Life"),
        ("core/dma_buf.py", "from ..domain import lives"),
        ("core/dma_buf.py", "from .resv import DmaResv"),
        ("core/dma_buf.py", "from dmabuf import _native, errors"),
        ("core/__init__.py", "from .buffer import DmaBuf"),
        ("core/dma_buf.py", "import dmabuf.domain.lives as lives"),
        ("core/dma_buf.py", "import dmabuf_tools"),
        ("__init__.py", "from dmabuf.heap import heaps"),
        ("cli/ls.py", "def main():\n    from dmabuf.observe import bufinfo"),
        ("uapi/call.py", "import fcntl\nsystem = fcntl.ioctl"),
    ],
)
def test_an_import_that_goes_down_or_stays_is_allowed(tmp_path: Path, module: str, source: str) -> None:
    assert faults(tmp_path, module, source) == []


@pytest.mark.parametrize(
    ("module", "source", "says"),
    [
        ("domain/lives.py", "from dmabuf.core.dma_buf import DmaBuf", "upward"),
        ("domain/lives.py", "from ..core import buffer", "upward"),
        ("domain/lives.py", "from .. import core", "upward"),
        ("domain/__init__.py", "from ..core import buffer", "upward"),
        ("domain/lives.py", "import dmabuf.core.dma_buf as b", "upward"),
        ("domain/lives.py", "def f():\n    from dmabuf.heap import memfd", "upward"),
        ("domain/lives.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from dmabuf.core import buffer", "upward"),
        ("domain/lives.py", "import importlib\nimportlib.import_module('dmabuf.cli')", "upward"),
        ("stream/ring.py", "from dmabuf.observe import trace", "side by side"),
        ("cli/ls.py", "import dmabuf", "public face"),
        ("cli/ls.py", "from dmabuf import DmaBuf", "public face"),
        ("cli/ls.py", "import dmabuf.observe", "public face"),
        ("errors.py", "from dmabuf.uapi import errno", "errors imports nothing"),
        ("errors.py", "from dmabuf import DmaBuf", "errors imports nothing"),
        ("__init__.py", "from dmabuf.cli import main", "needs an extra"),
        ("helpers.py", "", "in no layer"),
        ("core/dma_buf.py", "from dmabuf.helpers import f", "in no layer"),
        ("core/dma_buf.py", "import fcntl\nfcntl.ioctl(3, 4)", "ioctl outside of uapi"),
        ("core/dma_buf.py", "from fcntl import ioctl", "ioctl outside of uapi"),
        ("uapi/call.py", "from dmabuf.core import buffer", "upward"),
    ],
)
def test_any_other_import_is_a_fault(tmp_path: Path, module: str, source: str, says: str) -> None:
    (fault,) = faults(tmp_path, module, source)
    assert says in fault


def test_this_package_has_no_fault() -> None:
    assert check(REPOSITORY / "src" / "dmabuf") == []
