"""The Python examples of the documentation, as programs.

Sybil reads a page. Its Python blocks, joined, are one program, with these comments, which a reader of the page doesn't see:

    <!-- invisible-code-block: python          code for the test alone: what the example needs, and what it must have done
    ...
    -->
    <!-- prints: b'HELLO' -->                  one line of the output that the program must have
    <!-- clear-namespace -->                   the next block begins another program
    <!-- skip: next "needs a camera" -->       the next block can't be run by `make test`, and why
    <!-- skip: next if("udmabuf" not in usable, reason="needs /dev/udmabuf") -->      the same, where a heap can't be used
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from unittest import SkipTest

from sybil import Document, Example, Region, Sybil
from sybil.evaluators.python import pad
from sybil.parsers.markdown import CodeBlockParser, SkipParser
from sybil.parsers.markdown.lexers import DirectiveInHTMLCommentLexer

import dmabuf

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md")
    for path in ROOT.glob(pattern)
    if "```python" in path.read_text(encoding="utf-8")
)


@dataclass
class Program:
    """Blocks of a page that run in one interpreter. Lines of ``code`` have the numbers that they have on the page."""

    code: str = ""
    output: str = ""
    skipped: list[str] = field(default_factory=list)


def programs(page: str) -> list[Program]:
    """Return the programs of a page, which is named by its path in the repository."""
    found = [Program()]

    def add_block(example: Example) -> None:
        line = example.line + example.parsed.line_offset
        found[-1].code += pad(str(example.parsed), line - found[-1].code.count("\n"))

    def begin_program(example: Example) -> None:
        found.append(Program())

    def expect_line(example: Example) -> None:
        found[-1].output += example.parsed + "\n"

    def directives(document: Document) -> list[Region]:
        regions = []
        for name, evaluate in (("clear-namespace", begin_program), ("prints", expect_line)):
            for region in DirectiveInHTMLCommentLexer(name)(document):
                region.parsed, region.evaluator = region.lexemes["arguments"], evaluate
                regions.append(region)
        return regions

    document = Sybil([CodeBlockParser("python", add_block), SkipParser(), directives]).parse(ROOT / page)
    document.namespace["usable"] = {heap.name for heap in dmabuf.heaps() if heap.unavailable is None}
    for example in document.examples():
        try:
            example.evaluate()
        except SkipTest as reason:
            found[-1].skipped.append(str(reason))
    return [program for program in found if program.code]
