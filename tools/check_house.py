"""Checks what the import contracts in pyproject.toml can't say: private names, names of modules in strings, and how long a file is.

    python -m tools.check_house [REPOSITORY]

*Private names.* A module may use ``x._name`` only if it defines ``_name`` itself, or through ``self`` and ``cls``, where a base class may
have it. Every other use is a use of another module's private name. ``ALLOWED`` lists those that stay, each with its reason.

*Strings.* The contracts don't see a module that a string names, for ``import_module``. Outside the public face, a string may name a module
of another package only where ``NAMED`` says why.

*Length.* One file holds one thing, in about 500 lines.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGE = "dmabuf"
FACE = "__init__.py"
LINES = 550
MOST_PRIVATE = 10
# Documented names of the standard library that begin with an underscore, and the receivers that mean the object itself.
_FOREIGN = ("_asdict", "_current_frames", "_exit", "_fields", "_get_running_loop", "_getframe", "_replace")
_SELF = ("self", "cls")

# (file below src/dmabuf, private name): why the module uses it.
ALLOWED: dict[tuple[str, str], str] = {
    ("domain/forks.py", "_is_owned"): "threading.RLock tells in no other way whether the running thread holds it",
}

# (file below src/dmabuf, module): why a string names it.
NAMED: dict[tuple[str, str], str] = {
    ("core/buffer/backing.py", "dmabuf.sharing.serving"): "the registry of servers imports a server when a buffer first needs one",
    ("core/buffer/backing.py", "dmabuf.sharing.duplicate"): "the same",
    ("core/buffer/shared.py", "dmabuf.sharing.remote_backing"): "the registry of backings imports a backing when a buffer first has it",
    ("sharing/items.py", "dmabuf.stream.stream"): "the registry of composed objects imports streams when one is received",
    ("core/export/exported.py", "dmabuf.sharing.remote_backing"): "a forked child has its parent's buffers by the same backing",
}


class Fault(NamedTuple):
    """One line that should not be there."""

    path: Path
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.text}"


def private_uses(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """The line and name of each private name of another module that this one uses."""
    own = set(_defined(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr) and node.attr not in (*own, *_FOREIGN):
            if not (isinstance(node.value, ast.Name) and node.value.id in _SELF):
                yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == PACKAGE):
            yield from ((node.lineno, alias.name) for alias in node.names if _is_private(alias.name) and alias.name != "_native")


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _defined(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name)
            and node.value.id in _SELF
        ):
            yield node.attr
        elif isinstance(node, ast.Assign) and any(isinstance(target, ast.Name) and target.id == "__slots__" for target in node.targets):
            yield from (part.value for part in ast.walk(node.value) if isinstance(part, ast.Constant) and isinstance(part.value, str))


def named_modules(tree: ast.Module, package: Path, own: str) -> Iterator[tuple[int, str]]:
    """The line and name of each module that a string names and that is in another package than ``own``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith(f"{PACKAGE}."):
            first, *rest = node.value.split(".")[1:]
            below = package.joinpath(first, *rest)
            if first != own and (below.with_suffix(".py").is_file() or (below / "__init__.py").is_file()):
                yield node.lineno, node.value


def check_package(package: Path) -> list[Fault]:
    """Every fault of the Python package in this directory."""
    faults, used, named = [], set(), set()
    for path in sorted(package.rglob("*.py")):
        where = path.relative_to(package).as_posix()
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        for line, name in private_uses(tree):
            used.add((where, name))
            if (where, name) not in ALLOWED:
                faults.append(Fault(path, line, f"{name} is private to another module: give it a name without the underscore there"))
        for line, name in named_modules(tree, package, where.split("/")[0]) if where != FACE else ():
            named.add((where, name))
            if (where, name) not in NAMED:
                faults.append(Fault(path, line, f"a string names {name}: import it, or say in tools/check_house.py why not"))
    own = Path(__file__)
    faults += [Fault(own, 1, f"ALLOWED names {entry}, which is not used") for entry in sorted(ALLOWED.keys() - used)]
    faults += [Fault(own, 1, f"NAMED names {entry}, which is not used") for entry in sorted(NAMED.keys() - named)]
    if len(ALLOWED) > MOST_PRIVATE:
        faults.append(Fault(own, 1, f"ALLOWED has {len(ALLOWED)} private names of other modules; at most {MOST_PRIVATE}"))
    return faults


def check_lengths(repository: Path) -> list[Fault]:
    """Every source file that git tracks and that is too long."""
    listed = subprocess.run(["git", "ls-files", "*.py", "*.pyi", "*.c", "*.h"], cwd=repository, capture_output=True, text=True, check=True)
    faults = []
    for path in (repository / name for name in listed.stdout.splitlines()):
        lines = path.read_text(encoding="utf-8").count("\n") if path.exists() else 0
        if lines > LINES:
            faults.append(Fault(path, lines, f"{lines} lines; a file holds one thing, in about 500"))
    return faults


def main(arguments: list[str]) -> int:
    """Print every fault; 1 if there is one."""
    repository = Path(arguments[0]) if arguments else Path(__file__).resolve().parents[1]
    faults = check_package(repository / "src" / PACKAGE) + check_lengths(repository)
    for fault in faults:
        print(fault)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
