"""Make docs/kernel-names.md: the Python name of each public name of the kernel's headers, or the reason why it has none.

    python -m tools.kernel_names            writes docs/kernel-names.md
    python -m tools.kernel_names --check    1 when it is not up to date, or a name has neither place nor reason; prints which

The names and the reasons are listed in ``tools/kernel_names.toml``. The places come from the docstrings of ``src/dmabuf``, from a sentence
of its own at the end:

    Kernel: dma_buf_attach, dma_buf_dynamic_attach.

gives the object's own names in the kernel. Members of a structure are in parentheses. ``as`` gives the attribute of a class, or the
parameter of a function or of the call that makes the class, if the name is not the object's own (without it a member has its own name):

    Kernel: dma_buf_attachment (dev, dmabuf, importer_ops as importer), dma_buf_attachment_is_dynamic as is_dynamic.
"""

import ast
import re
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tools.pages import up_to_date

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "src"
LIST = ROOT / "tools" / "kernel_names.toml"
PAGE = ROOT / "docs" / "kernel-names.md"
KINDS = ("function", "macro", "type", "op", "field", "constant", "variable")
NOT_YET = "not yet: "

_MAKERS = ("__init__", "__new__")
_SENTENCE = re.compile(r"\bKernel: (.+?)\.(?=\s|$)", re.S)
_ITEM = re.compile(r"\s*(\w+(?:\.\w+)?)\s*(?:\(([^)]*)\))?\s*(?:as\s+(\w+))?\s*(?:,|$)")


class Place(NamedTuple):
    """Where a kernel's name lives: ``where`` as a reader writes it, ``exists``: whether what it names is there."""

    where: str
    exists: bool


class Names(NamedTuple):
    """The list. ``kinds``: by header, by name; ``reasons``: by name."""

    kinds: dict[str, dict[str, str]]
    reasons: dict[str, str]


def read_list(path: Path = LIST) -> Names:
    """The names and the reasons. A name that is listed twice, or a reason without a name, is a ValueError."""
    data = tomllib.loads(path.read_text(encoding="utf-8"))
    reasons: dict[str, str] = {}
    for entry in data.pop("none", []):
        for name in entry["names"]:
            if reasons.setdefault(name, entry["why"]) != entry["why"]:
                raise ValueError(f"{name} has two reasons")
    kinds: dict[str, dict[str, str]] = {}
    for header, by_kind in data.items():
        pairs = [(name, kind) for kind in KINDS for name in by_kind.get(kind, ())]
        kinds[header] = dict(pairs)
        if len(kinds[header]) != len(pairs) or by_kind.keys() - set(KINDS):
            raise ValueError(f"{header}: a name twice, or an unknown kind")
    if unknown := reasons.keys() - {name for header in kinds.values() for name in header}:
        raise ValueError(f"reasons for what is not listed: {', '.join(sorted(unknown))}")
    return Names(kinds, reasons)


# ---- the docstrings


def read_places(sources: Path = SOURCES) -> dict[str, list[Place]]:
    """Every kernel's name that a docstring claims, with where. A sentence that can't be read is a ValueError."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8"), str(path)) for path in sorted((sources / "dmabuf").rglob("*.py*"))
             if path.suffix in (".py", ".pyi")}  # fmt: skip
    classes = {node.name: node for tree in trees.values() for node in tree.body if isinstance(node, ast.ClassDef)}
    public = _public(sources)
    modules = {node.name: ".".join(path.relative_to(sources).with_suffix("").parts) for path, tree in trees.items() for node in tree.body
               if isinstance(node, ast.ClassDef)}  # fmt: skip
    for (_, name), shown in list(public.items()):
        for base in _bases(name, classes):
            public.setdefault((modules[base], base), shown)
    found: dict[str, list[Place]] = defaultdict(list)
    for path, tree in trees.items():
        module = ".".join(path.relative_to(sources).with_suffix("").parts).removesuffix(".__init__")
        for node, owner in _documented(tree):
            for sentence in _SENTENCE.findall(ast.get_docstring(node) or ""):
                for name, attribute in _items(sentence, f"{path}: {getattr(node, 'name', module)}"):
                    found[name].append(_place(node, owner, attribute, module, public, classes))
    return found


def _public(sources: Path) -> dict[tuple[str, str], str]:
    """(module, name) of what ``dmabuf`` itself offers, and its name there."""
    tree = ast.parse((sources / "dmabuf" / "__init__.py").read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {(node.module or "", alias.name): alias.asname or alias.name for node in imports for alias in node.names}


def _bases(name: str, classes: dict[str, ast.ClassDef]) -> Iterator[str]:
    """The base classes of this package, at any depth: a reader finds their members in the public class."""
    for base in classes[name].bases if name in classes else ():
        found = ast.unparse(base.value if isinstance(base, ast.Subscript) else base).rpartition(".")[2]
        if found in classes and found != name:
            yield found
            yield from _bases(found, classes)


def _documented(tree: ast.Module) -> Iterator[tuple[Any, ast.ClassDef | None]]:
    """Module, classes, functions and methods; with the class that a method is of."""
    yield tree, None
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node, None
        if isinstance(node, ast.ClassDef):
            yield from ((inner, node) for inner in node.body if isinstance(inner, (ast.FunctionDef, ast.AsyncFunctionDef)))


def _items(sentence: str, where: str) -> Iterator[tuple[str, str]]:
    """(kernel's name, attribute or "") of a sentence."""
    at = 0
    while at < len(sentence):
        match = _ITEM.match(sentence, at)
        if match is None:
            raise ValueError(f"{where}: can't read “Kernel: {sentence}”")
        name, members, attribute = match.groups()
        yield name, attribute or ""
        for member in (members or "").split(","):
            words = member.split()
            if len(words) not in (0, 1, 3) or (len(words) == 3 and words[1] != "as"):
                raise ValueError(f"{where}: can't read “{member.strip()}” in “Kernel: {sentence}”")
            if words:
                yield f"{name}.{words[0]}", words[-1]
        at = match.end()


def _place(
    node: Any, owner: ast.ClassDef | None, attribute: str, module: str, public: dict[tuple[str, str], str], classes: dict[str, ast.ClassDef]
) -> Place:
    if isinstance(node, ast.Module):
        return Place(f"`{module}.{attribute}`" if attribute else f"`{module}`", not attribute or attribute in _globals(node))
    top = owner or node
    name = public.get((module, top.name))
    said = (f"dmabuf.{name}" if owner is None and not isinstance(node, ast.ClassDef) else name) if name else f"{module}.{top.name}"
    if isinstance(node, ast.ClassDef):
        if not attribute:
            return Place(f"`{said}`", True)
        known = _attributes(node, classes)
        if attribute not in known and attribute in _parameters(*(inner for inner in node.body if getattr(inner, "name", "") in _MAKERS)):
            return Place(f"`{said}({attribute}=…)`", True)
        return Place(f"`{said}.{attribute}{'()' if known.get(attribute) else ''}`", attribute in known)
    if owner is not None:
        said = f"{said}.{node.name}"
    if attribute:
        return Place(f"`{said}({attribute}=…)`", attribute in _parameters(node))
    return Place(f"`{said}{'' if _is_property(node) else '()'}`", True)


def _parameters(*nodes: Any) -> set[str]:
    return {argument.arg for node in nodes for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)}


def _is_property(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("property" in ast.unparse(decorator) or "setter" in ast.unparse(decorator) for decorator in node.decorator_list)


def _globals(tree: ast.Module) -> set[str]:
    return {name.id for node in ast.walk(tree) if isinstance(node, (ast.Assign, ast.AnnAssign))
            for name in ast.walk(node) if isinstance(name, ast.Name)}  # fmt: skip


def _attributes(node: ast.ClassDef, classes: dict[str, ast.ClassDef]) -> dict[str, bool]:
    """What a class and its bases of this package have; True for methods."""
    found: dict[str, bool] = {}
    for base in node.bases:
        name = ast.unparse(base).rpartition(".")[2]
        if name in classes and classes[name] is not node:
            found |= _attributes(classes[name], classes)
    for inner in ast.walk(node):
        if isinstance(inner, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found[inner.name] = not _is_property(inner)
        elif isinstance(inner, (ast.Assign, ast.AnnAssign)):
            for target in inner.targets if isinstance(inner, ast.Assign) else [inner.target]:
                for part in ast.walk(target):
                    if isinstance(part, ast.Attribute) and ast.unparse(part.value) == "self":
                        found.setdefault(part.attr, False)
                    elif isinstance(part, ast.Name):
                        found.setdefault(part.id, False)
    return found


# ---- what is wrong, and the page


def problems(names: Names, places: dict[str, list[Place]]) -> list[str]:
    """What has to be mended before the page tells the truth; a line each."""
    listed = {name for header in names.kinds.values() for name in header}
    homeless = listed - places.keys() - names.reasons.keys()
    lines = [f"{name}: neither a docstring nor a reason in tools/kernel_names.toml" for name in sorted(homeless)]
    lines += [f"{name}: a docstring claims it, and no header has it" for name in sorted(places.keys() - listed)]
    for name in sorted(places.keys() & names.reasons.keys()):
        if not names.reasons[name].startswith(NOT_YET):
            lines.append(f"{name}: has a place ({places[name][0].where}) and a reason for having none")
    lines += [f"{name}: {place.where} is not there" for name, found in sorted(places.items()) for place in found if not place.exists]
    return lines


def page(names: Names, places: dict[str, list[Place]]) -> str:
    """The text of docs/kernel-names.md."""
    all_names = [name for header in names.kinds.values() for name in header]
    here = sum(name in places for name in all_names)
    later = sum(name not in places and names.reasons.get(name, "").startswith(NOT_YET) for name in all_names)
    lines = [
        "# The kernel's names",
        "",
        "The Python name of every public function, op, field and constant of the kernel's headers for DMA-BUF (Linux 6.8,",
        f"`include/linux`), or why there is none. Of {len(all_names)} names {here} have a Python name, {later} are not built yet, and",
        f"{len(all_names) - here - later} have no counterpart in user space or in Python. A member of a structure is written",
        "`structure.member`. Names that begin with two underscores are internal to the kernel and left out.",
        "",
        "`python -m tools.kernel_names` makes this page from the docstrings, where they say “Kernel: …”, and from the reasons in",
        "`tools/kernel_names.toml`. [Semantics](semantics/index.md) says what the functions do.",
    ]
    for header, kinds in names.kinds.items():
        lines += ["", f"## {header}", "", "| in the kernel | kind | in Python |", "|---|---|---|"]
        for name, kind in kinds.items():
            where = ", ".join(dict.fromkeys(place.where for place in places.get(name, ()))) or f"– {names.reasons.get(name, '')}"
            lines.append(f"| `{name}` | {kind} | {where} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    """Write the page, or check it."""
    names, places = read_list(), read_places()
    found = problems(names, places)
    text = page(names, places)
    if not up_to_date(PAGE, text, arguments):
        found.append("docs/kernel-names.md is not up to date: python -m tools.kernel_names")
    print("\n".join(found), end="\n" if found else "")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
