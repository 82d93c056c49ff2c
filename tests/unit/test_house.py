"""The checks of the house find each kind of fault, and nothing else: circles, arrows up, the face, private names, strings, long files."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools import check_house

REPOSITORY = Path(__file__).resolve().parents[2]


def faults(tmp_path: Path, source: str) -> list[str]:
    """What the check says about a package with this one module."""
    package = tmp_path / "dmabuf"
    for name in ("module.py", "cli/app.py", "cli/__init__.py", "core/__init__.py"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text("")
    (package / "module.py").write_text(source)
    return [fault.text for fault in check_house.check_package(package) if fault.path != Path(check_house.__file__)]


@pytest.mark.parametrize(
    "source",
    [
        "class A:\n    def f(self):\n        return self._of_a_base_class",
        "class A:\n    def __init__(self):\n        self._x = 1\n    def __eq__(self, other):\n        return self._x == other._x",
        "class A:\n    __slots__ = ('_x',)\ndef f(a):\n    return a._x",
        "def _f(): pass\ng = _f",
        "from dmabuf import _native",
        "import os\nos._exit(0)",
        "x.__class__",
        "TEXT = 'dmabuf.read: not a module'",
        "from importlib import import_module\nimport_module('json')",
    ],
)
def test_check_package_accepts_what_a_module_may_use(tmp_path: Path, source: str) -> None:
    assert faults(tmp_path, source) == []


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("def f(buf):\n    return buf._record", "_record is private"),
        ("def f(buf):\n    buf._record = 1", "_record is private"),
        ("from dmabuf.core.resv.resv import _Hold", "_Hold is private"),
        ("from .resv import _Hold", "_Hold is private"),
        ("import importlib\nimportlib.import_module('dmabuf.cli')", "a string names dmabuf.cli"),
        ("MODULES = {'remote': 'dmabuf.cli.app'}", "a string names dmabuf.cli.app"),
    ],
)
def test_check_package_names_each_fault(tmp_path: Path, source: str, says: str) -> None:
    (text,) = faults(tmp_path, source)
    assert text.startswith(says)


def test_check_package_names_an_entry_that_is_no_longer_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_house, "ALLOWED", {("module.py", "_gone"): "reason"})
    monkeypatch.setattr(check_house, "NAMED", {})
    (tmp_path / "module.py").write_text("")
    (fault,) = check_house.check_package(tmp_path)
    assert "_gone" in fault.text


def test_check_package_refuses_more_private_uses_than_ten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"_x{i}" for i in range(11)]
    monkeypatch.setattr(check_house, "ALLOWED", {("module.py", name): "reason" for name in names})
    monkeypatch.setattr(check_house, "NAMED", {})
    (tmp_path / "module.py").write_text("\n".join(f"a.{name}" for name in names))
    (fault,) = check_house.check_package(tmp_path)
    assert "11 private names" in fault.text


@pytest.mark.parametrize(("lines", "count"), [(check_house.LINES, 0), (check_house.LINES + 1, 1)])
def test_check_lengths_names_a_file_that_is_too_long(tmp_path: Path, lines: int, count: int) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "long.py").write_text("\n" * lines)
    subprocess.run(["git", "add", "long.py"], cwd=tmp_path, check=True)
    assert len(check_house.check_lengths(tmp_path)) == count


def test_this_house_is_in_order() -> None:
    assert check_house.main([]) == 0


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("domain/lives.py", "from dmabuf.core.base import usage as planted", "layers"),
        ("core/base/usage.py", "def planted():\n    from dmabuf.core.resv import ww_mutex", "rooms"),
        ("domain/lives.py", "TYPE_CHECKING = False\nif TYPE_CHECKING:\n    from dmabuf.domain import domain as planted", "circles"),
        ("core/base/usage.py", "from dmabuf import DmaBuf", "face"),
    ],
)
def test_import_contracts_break_when_a_fault_is_planted(tmp_path: Path, module: str, line: str, contract: str) -> None:
    shutil.copytree(REPOSITORY / "src" / "dmabuf", tmp_path / "dmabuf", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    path = tmp_path / "dmabuf" / module
    path.write_text(f"{path.read_text(encoding='utf-8')}\n{line}\n", encoding="utf-8")
    ast.parse(path.read_text(encoding="utf-8"))
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()"]
    options = ["--no-cache", "--config", str(REPOSITORY / "pyproject.toml"), "--contract", contract]
    ran = subprocess.run(
        [*command, *options], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path), "LC_ALL": "C.UTF-8"}, capture_output=True, text=True
    )
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert "1 broken" in ran.stdout
