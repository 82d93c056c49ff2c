"""Checks that imports inside `dmabuf` go down only.

    cli → stream, interop, drivers, observe, sim → heap, devices → sharing → core → domain → uapi → _native

`dmabuf.errors` may be imported from everywhere and imports nothing of ours. `dmabuf/__init__.py` is the public face: it stands above
all layers but `cli`, and nothing below may import it. Layers on one line don't import each other.

Every import counts: at the top, inside a function, under `TYPE_CHECKING`, or by `importlib.import_module("…")`. A module that needs
something from above asks for a callable (or states a Protocol) instead. `fcntl.ioctl` is called in `uapi` only.

    python tools/check_layers.py [PACKAGE_DIRECTORY]
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGE = "dmabuf"
LAYERS: tuple[tuple[str, ...], ...] = (
    ("__main__",),
    ("cli",),
    ("stream", "interop", "drivers", "observe", "sim"),
    ("heap", "devices"),
    ("sharing",),
    ("core",),
    ("domain",),
    ("uapi",),
    ("_native",),
)
RANK = {name: rank for rank, row in enumerate(LAYERS) for name in row}
FREE = "errors"
FACE = ""


class Fault(NamedTuple):
    """One import that should not be there."""

    path: Path
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.text}"


def check(package: Path) -> list[Fault]:
    """Every fault of the package in this directory, in the order of the files."""
    faults: list[Fault] = []
    for path in sorted(package.rglob("*.py")):
        module = path.relative_to(package).with_suffix("").parts
        is_package = module[-1] == "__init__"
        module = module[:-1] if is_package else module
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        if module and module[0] not in RANK and module[0] != FREE:
            faults.append(Fault(path, 1, f"{PACKAGE}.{module[0]} is in no layer; give it one in tools/check_layers.py"))
            continue
        for line, target in _imports(tree, package, module, is_package):
            text = _judge(module, target)
            if text:
                faults.append(Fault(path, line, text))
        if module[:1] != ("uapi",):
            faults.extend(Fault(path, line, "ioctl outside of uapi: add the call there") for line in _ioctls(tree))
    return faults


def _ioctls(tree: ast.AST) -> Iterator[int]:
    """Lines that name fcntl's ioctl."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "fcntl" and any(alias.name == "ioctl" for alias in node.names):
            yield node.lineno
        elif isinstance(node, ast.Attribute) and node.attr == "ioctl" and isinstance(node.value, ast.Name):
            yield node.lineno


def _judge(module: tuple[str, ...], target: str) -> str | None:
    """Why `module` must not import `target` (a layer, `errors`, or the face); None if it may."""
    source = module[0] if module else FACE
    if target == source:
        return None
    here = ".".join((PACKAGE, *module))
    if source == FREE:
        return f"{here} imports {PACKAGE}.{target}".rstrip(".") + ": errors imports nothing of ours"
    if target == FACE:
        return f"{here} imports the public face: name the module that defines it"
    if target == FREE:
        return None
    if target not in RANK:
        return f"{here} imports {PACKAGE}.{target}, which is in no layer"
    if source == FACE:
        return f"the public face imports {PACKAGE}.{target}, which needs an extra" if RANK[target] <= RANK["cli"] else None
    if RANK[target] < RANK[source]:
        return f"{here} imports {PACKAGE}.{target}: an upward arrow"
    if RANK[target] == RANK[source]:
        return f"{here} imports {PACKAGE}.{target}: layers side by side don't know each other"
    return None


def _imports(tree: ast.AST, package: Path, module: tuple[str, ...], is_package: bool) -> Iterator[tuple[int, str]]:
    """Each import of ours as (line, layer); the face is the empty string."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                parts = tuple(alias.name.split("."))
                if parts[0] == PACKAGE:
                    # `import dmabuf.core` without `as` binds the face's name, whatever it loads.
                    yield node.lineno, parts[1] if len(parts) > 1 and alias.asname else FACE
        elif isinstance(node, ast.ImportFrom):
            base = _base(node, module, is_package)
            if base is None:
                continue
            if base:
                yield node.lineno, base[0]
                continue
            for alias in node.names:
                yield node.lineno, alias.name if _is_module(package, alias.name) else FACE
        elif isinstance(node, ast.Call) and node.args and _names_import(node.func):
            first = node.args[0]
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                parts = tuple(first.value.split("."))
                if parts[0] == PACKAGE:
                    yield node.lineno, parts[1] if len(parts) > 1 else FACE


def _base(node: ast.ImportFrom, module: tuple[str, ...], is_package: bool) -> tuple[str, ...] | None:
    """The module that a `from` names, relative to the package; None if it is somebody else's."""
    named = tuple(node.module.split(".")) if node.module else ()
    if node.level == 0:
        return named[1:] if named[:1] == (PACKAGE,) else None
    up = node.level - 1 if is_package else node.level
    return (*module[: len(module) - up], *named)


def _is_module(package: Path, name: str) -> bool:
    return name in RANK or name == FREE or (package / name).is_dir() or (package / f"{name}.py").is_file()


def _names_import(function: ast.expr) -> bool:
    if isinstance(function, ast.Attribute):
        return function.attr == "import_module"
    return isinstance(function, ast.Name) and function.id in {"import_module", "__import__"}


def main(arguments: list[str]) -> int:
    """Print every fault; 1 if there is one."""
    package = Path(arguments[0]) if arguments else Path(__file__).resolve().parents[1] / "src" / PACKAGE
    faults = check(package)
    for fault in faults:
        print(fault)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
