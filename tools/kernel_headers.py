"""Reads the public names out of kernel headers, to check that the list of ``tools/kernel_names.toml`` is whole.

    python -m tools.kernel_headers DIR      DIR is a kernel's include/linux: prints what differs; 1 if anything does

Not part of any build: it is for developers who have the headers of Linux 6.8, or of a later kernel and want to know what came. Only names
are taken. A member is ``type.member``; names that begin with two underscores are the kernel's own and left out.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

HEADERS = (
    "dma-buf.h", "dma-fence.h", "dma-fence-array.h", "dma-fence-chain.h", "dma-fence-unwrap.h", "dma-resv.h", "iosys-map.h", "sync_file.h",
)  # fmt: skip

_POINTER = re.compile(r"\(\s*\*\s*(\w+)\s*\)\s*\(")


class Name(NamedTuple):
    """A name of a header. ``kind``: function, macro, constant, variable, type, op or field."""

    name: str
    kind: str


def names(text: str) -> list[Name]:
    """Every public name of a header's text, in its order."""
    text = re.sub(r"/\*.*?\*/|//[^\n]*", " ", text, flags=re.S).replace("\\\n", " ")
    found: dict[str, Name] = {}
    for name, kind in [*_declared(re.sub(r"^[ \t]*#.*$", "", text, flags=re.M)), *_defined(text)]:
        if not name.rpartition(".")[2].startswith("__"):
            found.setdefault(name, Name(name, kind))
    return list(found.values())


def _defined(text: str) -> Iterator[tuple[str, str]]:
    """Macros and constants; a guard has no value."""
    for name, arguments, value in re.findall(r"^[ \t]*#[ \t]*define[ \t]+(\w+)(\(?)[ \t]*(.*)$", text, flags=re.M):
        if arguments or value:
            yield name, "macro" if arguments else "constant"


def _declared(text: str) -> Iterator[tuple[str, str]]:
    """What stands outside of every brace: functions, variables, types and their members."""
    for head, body, _ in _statements(text):
        kind, _, rest = head.partition(" ")
        if body is not None and kind in ("struct", "union", "enum") and re.fullmatch(r"\w+", rest):
            yield rest, "type"
            yield from _members(rest, kind, body)
        elif kind == "typedef":
            pointer = _POINTER.search(head)  # to a function
            yield pointer[1] if pointer else head.split()[-1], "type"
        elif match := re.search(r"(\w+)\s*\(", head):
            yield match[1], "function"
        elif kind == "extern":
            yield re.findall(r"\w+", head)[-1], "variable"


def _members(owner: str, kind: str, body: str) -> Iterator[tuple[str, str]]:
    if kind == "enum":
        yield from ((part.split("=")[0].strip(), "constant") for part in body.split(",") if part.strip())
        return
    for head, inner, tail in _statements(body):
        declared = head
        if inner is not None:
            word, _, nested = head.partition(" ")
            if nested:
                yield nested, "type"
            yield from _members(nested or owner, word, inner)
            declared = tail
        if match := _POINTER.search(declared):
            yield f"{owner}.{match[1]}", "op"
            continue
        declared = re.sub(r"__\w+\s*\([^)]*\)", "", declared)
        for part in declared.split(",") if declared.strip() else ():
            name = re.findall(r"\w+", re.sub(r"\[.*\]", "", part))[-1]
            yield f"{owner}.{name}", "field"


def _statements(text: str) -> Iterator[tuple[str, str | None, str]]:
    """(before a brace, inside of it or None, after it) of each declaration; the last is empty for a function's body."""
    at = 0
    while match := re.search(r"[;{]", text[at:]):
        head, at = " ".join(text[at : at + match.start()].split()), at + match.end()
        if match[0] == ";":
            if head:
                yield head, None, ""
            continue
        depth, begin = 1, at
        while depth:
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            at += 1
        body, tail = text[begin : at - 1], ""
        if "(" not in head:  # a type: declarators may follow
            end = text.index(";", at)
            tail, at = " ".join(text[at:end].split()), end + 1
        yield head, body, tail


def main(arguments: list[str]) -> int:
    """Compare the list with a directory of headers."""
    from tools.kernel_names import read_list

    (directory,) = arguments
    differs = False
    listed = read_list().kinds
    for header in HEADERS:
        there = {name.name: name.kind for name in names((Path(directory) / header).read_text(encoding="utf-8"))}
        here = listed.get(header, {})
        for name in sorted(there.keys() ^ here.keys()):
            print(f"{header}: {name}: {'not in the list' if name in there else 'not in the header'}")
        for name in sorted(name for name in there.keys() & here.keys() if there[name] != here[name]):
            print(f"{header}: {name}: {there[name]}, listed as {here[name]}")
        differs = differs or there != here
    return int(differs)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
