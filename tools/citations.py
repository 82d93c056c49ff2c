"""Checks that every citation "semantics 2.13" names a section of docs/semantics.

python -m tools.citations          1 when a citation names no section, or a numbered heading has no anchor
python -m tools.citations 2.13     prints where the section is
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SEMANTICS = "docs/semantics"
SEARCHED = ("src", "native", "tests", "tools", "bench", "examples", "docs", "README.md", "FAQ.md", "CONTRIBUTING.md")
SUFFIXES = {".py", ".pyi", ".c", ".h", ".md", ".toml"}

_HEADING = re.compile(
    r"^(?:<a id=\"(?P<anchor>[\w.]+)\"></a>\n\n)?#{1,2} (?:Appendix )?(?P<number>\d+(?:\.\d+)?[a-z]?|[A-Z](?:\.\d+)?)\.? ", re.MULTILINE
)
_NUMBER = r"\d+(?:\.\d+)?[a-z]?"
_CITATION = re.compile(rf"\b[Ss]emantics\s+({_NUMBER}(?:(?:[-–]|,\s+(?:and\s+)?|\s+and\s+){_NUMBER})*)(?![\w.]*\d)")
_SPEC = re.compile(r"\b[Ss]pec\s+\d+\.\d")
_APPENDIX = re.compile(r"\bappendix ([A-Z](?:\.\d+)?)(?![\w])")


class Fault(NamedTuple):
    """One citation or heading that is wrong."""

    path: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.text}"


def sections(root: Path = ROOT) -> tuple[dict[str, str], list[Fault]]:
    """Return the page and anchor of each section by its number, and the headings that have no anchor of their own number."""
    found: dict[str, str] = {}
    faults = []
    for path in sorted((root / SEMANTICS).glob("*.md")):
        text = path.read_text(encoding="utf-8")
        for match in _HEADING.finditer(text):
            number = match["number"]
            if match["anchor"] != number:
                line = text.count("\n", 0, match.start("number")) + 1
                faults.append(Fault(path.relative_to(root).as_posix(), line, f'the heading needs <a id="{number}"></a> two lines above it'))
            found[number] = f"{path.relative_to(root).as_posix()}#{number}"
    return found, faults


def citations(text: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the number of each section that a text cites."""
    for pattern in (_CITATION, _APPENDIX):
        for match in pattern.finditer(text):
            for number in re.findall(rf"{_NUMBER}|[A-Z](?:\.\d+)?", match[1]):
                yield text.count("\n", 0, match.start()) + 1, number


def check(root: Path = ROOT) -> list[Fault]:
    """Return every fault of the files in ``root``."""
    known, faults = sections(root)
    for name in SEARCHED:
        for path in [root / name, *sorted((root / name).rglob("*"))]:
            if path.is_file() and path.suffix in SUFFIXES:
                where = path.relative_to(root).as_posix()
                text = path.read_text(encoding="utf-8")
                for line, number in citations(text):
                    if number not in known:
                        faults.append(Fault(where, line, f"semantics {number}: there is no such section in {SEMANTICS}"))
                for match in _SPEC.finditer(text):
                    faults.append(Fault(where, text.count("\n", 0, match.start()) + 1, f'{match[0]}: cite it as "semantics"'))
    return faults


def main(arguments: list[str]) -> int:
    """Print every fault, or where the given sections are; 1 if there is a fault."""
    if arguments:
        known, _ = sections()
        print("\n".join(known.get(number, f"{number}: no such section") for number in arguments))
        return int(any(number not in known for number in arguments))
    faults = check()
    for fault in faults:
        print(fault)
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
