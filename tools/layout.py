"""Makes docs/layout.md, the layout of the domain's file, from native/domain/layout.h and its parts.

    python -m tools.layout            writes docs/layout.md
    python -m tools.layout --check    1 when it is not up to date

What the headers must look like:

- A comment ``/* ---- Title ----`` begins a section, and the rest of that comment is the section's text.
- A constant with a comment behind it, on one line, becomes a row of the section's table. Other macros are code and stay out.
- An enumeration has one name a line, each with a comment.
- A structure has one field a line. A ``DB_AT`` gives the offset of each field and a ``DB_SIZE`` the size of the structure, which the
  compiler holds true. Fields leave no gap; a field without a meaning has no comment.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tools.pages import up_to_date

ROOT = Path(__file__).resolve().parents[1]
HEADERS = tuple(ROOT / "native" / "domain" / name for name in ("layout.h", "layout_sync.h", "layout_buffers.h", "layout_streams.h"))
PAGE = ROOT / "docs" / "layout.md"
BYTES = {"char": 1, "uint8_t": 1, "uint32_t": 4, "a32": 4, "ai32": 4, "a64": 8}

_SECTION = re.compile(r"/\* ---- (?P<title>.+?) ----(?P<text>.*?)\*/", re.S)
_PART = re.compile(
    r"^#define (?P<constant>\w+) +(?P<value>[^\n]+?) +/\* (?P<meaning>[^\n]+) \*/$"
    r"|^enum \{\n(?P<names>.*?)^\};$"
    r"|^typedef struct \{\n(?P<fields>.*?)^\} (?P<struct>\w+);$",
    re.M | re.S,
)
_NAME = re.compile(r"^ +(\w+), +/\* (.+) \*/$", re.M)
_FIELD = re.compile(r"^ +(?P<type>\w+) (?P<name>\w+)(?P<counts>(?:\[\w+\])*);(?: +/\* (?P<meaning>.+) \*/)?$")
_OFFSET = re.compile(r"^DB_AT\((\w+), (\w+), (\d+)\);$", re.M)
_SIZE = re.compile(r"^DB_SIZE\((\w+), (\d+)\);$", re.M)
_MACRO = re.compile(r"^#define (\w+) +([^/\n]+)", re.M)


class Field(NamedTuple):
    """One field of a structure; ``type`` as C writes it, with the counts of an array."""

    offset: int
    name: str
    type: str
    meaning: str


class Header(NamedTuple):
    """What the header says: the value of each constant, the size of each structure, the offset of each field."""

    text: str
    values: dict[str, int | str]
    sizes: dict[str, int]
    offsets: dict[tuple[str, str], int]


def text_of_headers() -> str:
    """Return the text of the headers, one behind the other."""
    return "".join(path.read_text(encoding="utf-8") for path in HEADERS)


def read(text: str) -> Header:
    """Read the header's text. Raises ValueError for an offset that is given twice."""
    offsets = {(struct, field): int(offset) for struct, field, offset in _OFFSET.findall(text)}
    if len(offsets) != len(_OFFSET.findall(text)):
        raise ValueError("a field has two offsets")
    values: dict[str, int | str] = {}
    for name, value in _MACRO.findall(text):
        if re.fullmatch(r"[\w\s+*()<]+", value):
            plain = re.sub(r"\b(0x[0-9a-f]+|\d+)[ul]*\b", r"\1", value.strip())
            values[name] = eval(plain, {"__builtins__": {}}, dict(values))
        elif value.startswith('"'):
            values[name] = value.strip().strip('"')
    return Header(text, values, {struct: int(size) for struct, size in _SIZE.findall(text)}, offsets)


def fields(header: Header, struct: str, body: str) -> Iterator[Field]:
    """Yield the fields of a structure. Raises ValueError for a line that is not a field, a gap, or a size that does not fit."""
    end = 0
    for line in body.splitlines():
        match = _FIELD.match(line)
        if match is None:
            raise ValueError(f"{struct}: not one field on one line: {line.strip()}")
        offset = header.offsets.get((struct, match["name"]))
        if offset != end:
            raise ValueError(f"{struct}.{match['name']}: DB_AT says {offset}, the field before it ends at {end}")
        counts = [header.values.get(count) or int(count) for count in re.findall(r"\[(\w+)\]", match["counts"])]
        size = BYTES.get(match["type"]) or header.sizes[match["type"]]
        for count in counts:
            size *= int(count)
        yield Field(offset, match["name"], match["type"] + "".join(f"[{count}]" for count in counts), match["meaning"] or "")
        end += size
    if end != header.sizes.get(struct):
        raise ValueError(f"{struct}: DB_SIZE says {header.sizes.get(struct)}, the fields have {end} bytes")


def page(text: str) -> str:
    """Return the text of docs/layout.md."""
    header = read(text)
    version = header.values["DB_VERSION"]
    lines = [
        "# Layout of the domain's file",
        "",
        f"Version {version}, in a file called `domain-{version}`. [design.md](design.md) gives the reasons. Of the types, `a32` and `a64`",
        "are atomic unsigned words of 32 and 64 bits, and `ai32` is an atomic signed one. The parts of a word are listed from its",
        "highest bit, each with its number of bits.",
    ]
    sections = list(_SECTION.finditer(text))
    for section, following in zip(sections, [*sections[1:], None], strict=True):
        prose = re.sub(r"^ \* ?", "", section["text"], flags=re.M).strip()
        lines += ["", f"## {section['title']}"] + (["", *prose.splitlines()] if prose else [])
        lines += _tables(header, text[section.end() : following.start() if following else len(text)])
    parts = "`native/domain/layout.h`, `layout_sync.h`, `layout_buffers.h` and `layout_streams.h`"
    return "\n".join([*lines, "", f"Made by `python -m tools.layout` from {parts}.", ""])


def _tables(header: Header, body: str) -> Iterator[str]:
    """Yield the lines of a section's tables: consecutive constants share one, an enumeration and a structure have their own."""
    constants = False
    for part in _PART.finditer(body):
        if part["constant"]:
            if not constants:
                yield from ("", "| constant | value | meaning |", "|---|---|---|")
            value = header.values[part["constant"]]
            shown = hex(value) if isinstance(value, int) and value >= 1 << 31 else value
            yield f"| `{part['constant']}` | {shown} | {_cell(part['meaning'])} |"
        elif part["struct"]:
            struct = part["struct"]
            yield from ("", f"`{struct}`, {header.sizes[struct]:,} bytes:", "", "| byte | field | type | meaning |", "|---|---|---|---|")
            for field in fields(header, struct, part["fields"]):
                yield f"| {field.offset} | `{field.name}` | `{field.type}` | {_cell(field.meaning) or '–'} |"
        else:
            names = _NAME.findall(part["names"])
            if len(names) != len(part["names"].splitlines()):
                raise ValueError(f"not one name and its meaning on each line: {part['names']}")
            yield from ("", "| name | value | meaning |", "|---|---|---|")
            yield from (f"| `{name}` | {value} | {_cell(meaning)} |" for value, (name, meaning) in enumerate(names))
        constants = bool(part["constant"])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main(arguments: list[str]) -> int:
    """Write the page, or check it."""
    return int(not up_to_date(PAGE, page(text_of_headers()), arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
