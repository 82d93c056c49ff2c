"""Checks that links between pages of the documentation lead somewhere, and that the files and modules that pages name exist.

    python -m tools.links              1 when one does not

A link with a fragment needs a heading, or an ``<a id>``, of that name. A file in backticks (`tests/unit/test_names.py`, `test_names.py`,
`core/fence/fence.py`) must be in this repository, under that path or one that ends with it; ``*`` stands for any text. A module in
backticks (`dmabuf.core.resv.resv`) must be there.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from tools.citations import ROOT, Fault

HISTORY = ("CHANGELOG.md", "bench/RESULTS.md")  # name files as they were at the time
KERNEL = ("include/", "drivers/")  # paths in the kernel's sources
PAGES = ("*.md", "docs/**/*.md", "bench/*.md", "examples/*.md", "tests/model/*.md")

_CODE = re.compile(r"^```.*?^```$|<!--.*?-->", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]+)\)")
_SPAN = re.compile(r"`[^`\n]+`")
_FILE = re.compile(r"`((?:[\w*.-]+/)*[\w*-]+\.(?:py|c|h|md|toml))`")
_MODULE = re.compile(r"(?:`|pydoc )(dmabuf(?:\.[a-z_]\w*)+)\b")
_ANCHOR = re.compile(r"<a id=\"([^\"]+)\"></a>")
_HEADING = re.compile(r"^#{1,6} (.*)$", re.MULTILINE)


def pages(root: Path = ROOT) -> list[Path]:
    """Return the pages that are checked."""
    return sorted({path for pattern in PAGES for path in root.glob(pattern)})


def anchors(text: str) -> set[str]:
    """Return the fragments that a page has: explicit ones, and those that GitHub makes of headings."""
    found = set(_ANCHOR.findall(text))
    for heading in _HEADING.findall(_CODE.sub("", text)):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        count = 0
        while (name := f"{slug}-{count}" if count else slug) in found:
            count += 1
        found.add(name)
    return found


def _blank(match: re.Match[str]) -> str:
    return re.sub(r"[^\n]", " ", match[0])


def _links(text: str) -> Iterator[tuple[int, str]]:
    text = _SPAN.sub(_blank, _CODE.sub(_blank, text))
    for match in _LINK.finditer(text):
        yield text.count("\n", 0, match.start()) + 1, match[1]


def _named(text: str, pattern: re.Pattern[str]) -> Iterator[tuple[int, str]]:
    text = _CODE.sub(_blank, text)
    for match in pattern.finditer(text):
        yield text.count("\n", 0, match.start()) + 1, match[1]


def _exists(root: Path, name: str) -> bool:
    """Whether a file of the repository has this name, or a path that ends with it."""
    if any(root.glob(name)):
        return True
    return any(any((root / top).rglob(name)) for top in ("src", "native", "tests", "tools", "bench", "docs", "examples"))


def _module_exists(root: Path, name: str) -> bool:
    """Whether the name is a module of the package, or something that the ``__init__`` of its package mentions."""
    parts = name.split(".")[1:]
    place = root / "src" / "dmabuf"
    while parts and (place / parts[0]).is_dir():
        place /= parts.pop(0)
    return not parts or (place / f"{parts[0]}.py").is_file() or parts[0] in (place / "__init__.py").read_text(encoding="utf-8")


def check(root: Path = ROOT) -> list[Fault]:
    """Return every fault of the pages in ``root``."""
    faults = []
    for path in pages(root):
        text = path.read_text(encoding="utf-8")
        where = path.relative_to(root).as_posix()
        for line, link in _links(text):
            if re.match(r"\w+:", link):
                continue
            name, _, fragment = link.partition("#")
            target = (path.parent / name).resolve() if name else path
            if not target.exists():
                faults.append(Fault(where, line, f"{link}: there is no such file"))
            elif fragment and fragment not in anchors(target.read_text(encoding="utf-8")):
                faults.append(Fault(where, line, f"{link}: the page has no such heading or anchor"))
        if where not in HISTORY and not where.startswith("docs/semantics/"):  # those name files of the kernel
            for line, name in _named(text, _FILE):
                if not name.startswith(KERNEL) and not _exists(root, name):
                    faults.append(Fault(where, line, f"{name}: there is no such file"))
            for line, name in _named(text, _MODULE):
                if not _module_exists(root, name):
                    faults.append(Fault(where, line, f"{name}: there is no such module"))
    return faults


def main() -> int:
    """Print every fault; 1 if there is one."""
    faults = check()
    for fault in faults:
        print(fault)
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
