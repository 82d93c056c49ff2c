"""Checks that links between pages of the documentation lead somewhere.

    python -m tools.links              1 when one does not

A link with a fragment needs a heading, or an ``<a id>``, of that name.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from tools.citations import ROOT, Fault

PAGES = ("*.md", "docs/**/*.md", "bench/*.md", "examples/*.md")

_CODE = re.compile(r"^```.*?^```$|<!--.*?-->", re.M | re.S)
_LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]+)\)")
_SPAN = re.compile(r"`[^`\n]+`")
_ANCHOR = re.compile(r"<a id=\"([^\"]+)\"></a>")
_HEADING = re.compile(r"^#{1,6} (.*)$", re.M)


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
    return faults


def main() -> int:
    """Print every fault; 1 if there is one."""
    faults = check()
    for fault in faults:
        print(fault)
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
